"""What a search for a `Method` writes down."""

from __future__ import annotations

from edgekit.method import Method
from edgekit.toml_file import Table


class SearchTrial(Table):
    """A method that was tried.

    Attributes:
        changed: what differs from the best before it; empty for the method to begin with.
        value: what it is worth; higher is better.
        seconds: that the trial took.
        kept: it was better than all before it.
    """

    changed: str
    method: Method
    value: float
    seconds: float
    kept: bool


class Searched(Table):
    """A search for a method.

    Attributes:
        key: stands for the model, the target, the samples, the method to begin with and what is measured.
        judged_by: the name of that.
        judged_on: the data that it was measured on.
        needed: what would have been good enough; None where nothing is.
        trials: in order, the method to begin with first.
        finished: the search came to its end, or to what is good enough; else its time was up, or it was interrupted.
    """

    key: str
    judged_by: str
    judged_on: str
    needed: float | None = None
    trials: tuple[SearchTrial, ...] = ()
    finished: bool = False

    @property
    def best(self) -> SearchTrial:
        """The winner."""
        return [trial for trial in self.trials if trial.kept][-1]


def difference(before: Method, after: Method) -> str:
    """What is other in `after`, such as "calibrator kld, smooth off"."""
    changed = [name for name in Method.model_fields if getattr(before, name) != getattr(after, name)]
    return ", ".join(f"{name.replace('_', ' ')} {_said(getattr(after, name))}" for name in changed)


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class LiftTrial(Table):
    """What a model is worth with some of its quantized nodes in float, sorted by name; higher is better."""

    lifted: tuple[str, ...]
    value: float


class LiftState(Table):
    """What a search has tried so far; `key` stands for the model, the target, the samples and what is measured."""

    key: str
    trials: tuple[LiftTrial, ...] = ()


class Lifted(Table):
    """What it took to meet an accuracy floor.

    Attributes:
        floor: as the user gave it.
        met: the simulated model meets it.
        float_value, needed, before, after: the number that decides: of the float model, at the floor, with nothing lifted, and with
            `lifted` in float.
        lifted: the layers to keep in float, in the order of the ranking.
        finished: the search came to its end, and no smaller set was found; else its time was up.
        state: gives the search what it knows when it goes on.
    """

    floor: str
    met: bool
    float_value: float | None
    needed: float
    before: float
    after: float
    lifted: tuple[str, ...]
    finished: bool
    state: LiftState
