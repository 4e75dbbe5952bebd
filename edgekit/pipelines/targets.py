"""`edgekit targets`: every target, and what this machine can do for it."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.backend import Availability, get_backend
from edgekit.errors import BackendError
from edgekit.target import Target, load_target, target_names


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """A target and its runtime here."""

    target: Target
    availability: Availability


def list_targets() -> list[TargetStatus]:
    """The shipped targets in order of their names."""
    return [TargetStatus(target, availability(target)) for target in map(load_target, target_names())]


def availability(target: Target) -> Availability:
    """What this machine can do for a target; nothing when its backend is not installed."""
    try:
        return get_backend(target.backend).available(target)
    except BackendError as error:
        return Availability(False, False, False, reason=str(error))


def missing(available: Availability) -> str:
    """What keeps a target from running here, and what would change that; empty when nothing does."""
    return "; ".join(filter(None, (available.reason, available.remedy)))
