"""Which layers of an export run in float because this machine's runtime is faster so."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.backend import Backend
from edgekit.graph.rules import quantized_nodes
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
        return _marked(known, stored, target)
    if not seconds:
        return None
    tuned = tune_placement(stored.model, target, backend, feeds, time_budget_s=seconds, on_progress=on_progress)
    write_placement(stored.folder, tuned)
    return _marked(tuned, stored, target)


def _marked(placement: TunedPlacement, stored: Stored, target: Target) -> TunedPlacement:
    """The same, saying whether anything is left in int8."""
    kept = frozenset(placement.keep_float)
    all_float = bool(kept) and not quantized_nodes(stored.model, target, keep_float=kept)
    return placement.model_copy(update={"all_float": all_float})


def placement_notes(placement: TunedPlacement | None) -> Iterator[str]:
    """What to tell of a placement that pays."""
    if placement is None or placement.ratio is None:
        return
    faster = f"{placement.ratio:.2f}x, {placement.ci_low:.2f} to {placement.ci_high:.2f}"
    if placement.all_float:
        yield (
            f"no layer is left in int8 on {placement.target}: float is faster here ({faster}), so this artifact is the float model "
            "(--no-tune-placement exports int8 all the same)"
        )
        return
    names = placement.keep_float
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    yield f"in float because that is faster here ({faster}): {', '.join(names[:5])}{more}"
