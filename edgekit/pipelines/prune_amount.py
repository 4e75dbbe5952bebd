"""`--prune`, `--macs`: channels are cut until a share of them, or of the multiply-accumulates, is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgekit.channel_choice import Chosen, by_macs, by_ratio
from edgekit.channels import Group, LayerCost, kept_shares, total_macs
from edgekit.errors import GoalError
from edgekit.frontier import by_price
from edgekit.pipelines.prune_timing import multiples_for
from edgekit.pruning import ONE_SHOT, SCRATCH, Prune
from edgekit.target import Pruning

NEAR = 0.02
"""Of all channels or multiply-accumulates: what is missed by less is not told."""


@dataclass(slots=True)
class Amount:
    """Chooses a share of the channels, or of the multiply-accumulates, of what there was in the first round.

    Attributes:
        plan: what is asked for.
        liked: the numbers of channels that the target likes.
        trainable: what is cut can be trained, as an ONNX graph cannot.
        whole: what there was; unknown before the first round.
    """

    plan: Prune
    liked: Pruning
    trainable: bool
    whole: float = math.nan

    def choose(self, groups: tuple[Group, ...], costs: tuple[LayerCost, ...], share: float) -> Chosen:
        """What to keep so that a share of all that goes is gone."""
        multiples, scope = multiples_for(self.plan, groups, self.liked), self.plan.scope
        now = total_macs(costs, {}) if self.plan.macs is not None else _channels(groups, {})
        self.whole = now if math.isnan(self.whole) else self.whole
        wanted = 1 - (1 - self._left) * share
        if wanted * self.whole >= now:
            return Chosen({})
        if self.plan.macs is not None:
            left = wanted * self.whole / now
            if scope == "global" and self.trainable:
                chosen = by_price(groups, costs, left, multiples=multiples)
            else:
                chosen = by_macs(groups, costs, left, scope=scope, multiples=multiples)
            reached = total_macs(costs, kept_shares(groups, chosen.choice)) / self.whole
        else:
            try:
                chosen = by_ratio(groups, 1 - wanted * self.whole / now, scope=scope, multiples=multiples)
            except GoalError:
                if self.plan.schedule in (ONE_SHOT, SCRATCH):
                    raise
                return Chosen({})  # rounding leaves nothing to go in this round
            reached = _channels(groups, kept_shares(groups, chosen.choice)) / self.whole
        if share < 1 or abs(reached - self._left) <= NEAR:
            return chosen
        what = "multiply-accumulates" if self.plan.macs is not None else "channels"
        why = "widths are rounded (--round-to)" if multiples else "units go whole"
        missed = f"{reached:.1%} of the {what} stay instead of {self._left:.1%}: nearer is not possible, as {why}"
        return Chosen(chosen.choice, (*chosen.remarks, missed))

    @property
    def _left(self) -> float:
        """What is to stay in the end."""
        if self.plan.macs is not None:
            return self.plan.macs
        assert self.plan.ratio is not None, "one goal is given"
        return 1 - self.plan.ratio


def _channels(groups: tuple[Group, ...], kept: Mapping[str, float]) -> float:
    return sum(group.units * group.width * kept.get(group.name, 1.0) for group in groups)
