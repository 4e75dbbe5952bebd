"""Search for a better `Method`: one choice after the other, within a time budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from edgekit.method import Method
from edgekit.progress import Progress, silent
from edgekit.trials import Searched, SearchTrial, difference

Option = Mapping[str, object]
"""Fields of a `Method` and their values."""
Choice = Sequence[Option]
"""Options of which one is to be taken."""


def search(
    base: Method,
    choices: Sequence[Choice],
    value_of: Callable[[Method, int], float],
    *,
    last: Sequence[Option] = (),
    time_budget_s: float = math.inf,
    blank: Searched,
    known: Sequence[SearchTrial] = (),
    on_trial: Callable[[Searched], None] | None = None,
    on_progress: Progress = silent,
) -> Searched:
    """Coordinate descent from `base`.

    1. The base itself; then each option of each choice, with the rest as in the best so far. Only a higher value replaces the best.
    2. That is repeated until a whole round gains nothing; a method that was tried is not tried again.
    3. The options in `last`, which are dear, one time.

    It ends at once when a trial reaches `blank.needed`, and with the best so far when the next trial would not fit into the time budget:
    one that takes as long as the longest so far, and then the same again to make the winner for good. The base is always tried.

    Args:
        base: where the search begins.
        choices: what to vary, the cheap before the dear.
        value_of: what a method is worth, higher is better; told the number of the trial, from 1 on.
        last: options to try when the rest is settled.
        time_budget_s: seconds.
        blank: the record to fill with trials.
        known: trials of an earlier search for the same; they are not made again.
        on_trial: given the record so far after each new trial, to be stored.
        on_progress: told of each new trial.
    """
    descent = _Descent(base, choices, last, time_budget_s)
    earlier = {trial.method: trial for trial in known}
    for method in descent.untried():
        if method in earlier:
            descent.add(method, earlier[method].value, earlier[method].seconds)
        else:
            if not descent.fits(method):
                return _filled(blank, descent, finished=False)
            begin = time.monotonic()
            value = value_of(method, len(descent.trials) + 1)
            descent.add(method, value, time.monotonic() - begin)
            if on_trial is not None:
                on_trial(_filled(blank, descent, finished=False))
            _tell(descent, on_progress)
        if blank.needed is not None and descent.best.value >= blank.needed:
            break
    return _filled(blank, descent, finished=True)


@dataclass(slots=True)
class _Descent:
    """The trials so far, and what comes next."""

    base: Method
    choices: Sequence[Choice]
    last: Sequence[Option]
    time_budget_s: float
    trials: list[SearchTrial] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def best(self) -> SearchTrial:
        """Of the highest value; of equal ones the earliest."""
        return max(self.trials, key=lambda trial: trial.value)

    def untried(self) -> Iterator[Method]:
        """Methods, each of which is tried before the next one is asked for."""
        tried = {self.base}
        yield self.base
        for option in self._options():
            method = self.best.method.model_copy(update=dict(option))
            if method not in tried:
                tried.add(method)
                yield method

    def _options(self) -> Iterator[Option]:
        before = -math.inf
        while self.best.value > before:
            before = self.best.value
            for choice in self.choices:
                yield from choice
        yield from self.last

    def fits(self, method: Method) -> bool:
        """Whether there is time for a trial, and for making the winner after it."""
        if not self.trials:
            return True
        longest = max(trial.seconds for trial in self.trials)
        rounding = method.rounding_budget if method.rounding == "adaround" != self.base.rounding else 0.0
        return time.monotonic() - self.start + 2 * (longest + rounding) <= self.time_budget_s

    def add(self, method: Method, value: float, seconds: float) -> None:
        """Count a trial, made now or before."""
        first = not self.trials
        changed = "" if first else difference(self.best.method, method)
        kept = first or value > self.best.value
        self.trials.append(SearchTrial(changed=changed, method=method, value=value, seconds=seconds, kept=kept))

    @property
    def expected(self) -> int:
        """About how many trials there will be: one round's."""
        return max(len(self.trials), 1 + sum(len(choice) - 1 for choice in self.choices) + len(self.last))


def _tell(descent: _Descent, on_progress: Progress) -> None:
    trial = descent.trials[-1]
    what = trial.changed or "the method to begin with"
    on_progress(
        f"search: {trial.value:.5g} with {what}, {descent.best.value:.5g} is best",
        len(descent.trials),
        descent.expected,
    )


def _filled(blank: Searched, descent: _Descent, *, finished: bool) -> Searched:
    return blank.model_copy(update={"trials": tuple(descent.trials), "finished": finished})
