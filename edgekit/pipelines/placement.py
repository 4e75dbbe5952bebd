"""Which layers of an export run in float because this machine's runtime is faster so."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.backend import Backend
from edgekit.pipelines.stored import Stored, samples_of_size
from edgekit.progress import Progress
from edgekit.records import TunedPlacement
from edgekit.target import Target
from edgekit.tuning import placement_key, read_placement, tune_placement, write_placement


def fastest(
    stored: Stored, target: Target, backend: Backend, seconds: float, on_progress: Progress
) -> TunedPlacement | None:
    """As measured before for the same model, target and runtime or, given time, now; else None."""
    feeds = samples_of_size(stored, 1)
    known = read_placement(stored.folder, placement_key(stored.model, target, backend, feeds))
    if known is not None and (known.finished or not seconds):
        return known
    if not seconds:
        return None
    tuned = tune_placement(stored.model, target, backend, feeds, time_budget_s=seconds, on_progress=on_progress)
    write_placement(stored.folder, tuned)
    return tuned


def placement_notes(placement: TunedPlacement | None) -> Iterator[str]:
    """What to tell of a placement that pays."""
    if placement is not None and placement.ratio is not None:
        names = placement.keep_float
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        yield (
            f"in float because that is faster here ({placement.ratio:.2f}x, {placement.ci_low:.2f} to {placement.ci_high:.2f}): "
            f"{', '.join(names[:5])}{more}"
        )
