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
    return [_status(load_target(name)) for name in target_names()]


def _status(target: Target) -> TargetStatus:
    try:
        return TargetStatus(target, get_backend(target.backend).available(target))
    except BackendError as error:
        return TargetStatus(target, Availability(False, False, False, "", str(error), "install the backend's package"))
