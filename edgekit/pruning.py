"""Pruning as users ask for it, and the record of what it came to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from edgekit.channels import LayerCost
from edgekit.toml_file import Table

CRITERIA = ("l1", "l2", "bn", "taylor", "hessian", "random", "fpgm")
"""What says how much a channel is worth."""

GOALS = ("ratio", "macs", "speedup", "latency", "blocks", "sparsity")
"""The fields of `Prune` that say how much goes; one of them is given."""

ONE_SHOT, ITERATIVE, DURING, SCRATCH = "one-shot", "iterative", "during-training", "from-scratch"
_SCHEDULE = re.compile(rf"{ONE_SHOT}|{ITERATIVE}:[1-9]\d*|{DURING}|{SCRATCH}")
_SPEEDUP = re.compile(r"(?P<value>\d+(\.\d+)?)x?@(?P<target>.+)")
_LATENCY = re.compile(r"(?P<value>\d+(\.\d+)?) ?(?P<unit>ms|us|s)@(?P<target>.+)")
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def _listed(value: object) -> object:
    """`"a, b"` as `["a", "b"]`."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Prune(Table):
    """What is cut from a model before it is quantized. One of `GOALS` says how much.

    Attributes:
        ratio: share of the channels that go, 0 to 1.
        macs: share of the multiply-accumulates that stay, 0 to 1.
        speedup: how many times faster on a runtime, `2.0@x86-openvino`: float against float, one sample at a time.
        latency: of one sample on a runtime, in float, `3ms@x86-openvino`.
        blocks: whole blocks are left out instead of channels, so many: residual blocks or transformer layers of a stack, each time the
            one without which the outputs move least.
        sparsity: single weights become zero instead of channels: their share, 0 to 1, or "2:4" of each four in a row.
        criterion: one of `CRITERIA`; "l1" is the sum of a filter's magnitudes (Li 2017), or a function `importance(group)` that gives
            each unit of an `edgekit.training.prune.TensorGroup` a score, higher is kept.
        scope: "global" compares channels of all layers, for `macs` by what they are worth for their cost (but not of an ONNX
            file, which cannot be trained); "layer" takes the same share of each.
        round_to: numbers of channels are multiples of this; "auto" asks the target, 0 leaves them as they are.
        schedule: "one-shot"; "iterative:N", a part, recovery, the next; "during-training", gradually over the first half of training;
            "from-scratch", cut and trained from new weights.
        recover: train what is left, as `[finetune]` says or by the defaults; an ONNX file's weights are fitted to the calibration
            data instead (`edgekit.calibration.refit`). False leaves it as it was cut.
        ignore: patterns of layers that keep their channels.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    macs: Annotated[float, Field(gt=0, lt=1)] | None = None
    speedup: str | None = None
    latency: str | None = None
    blocks: Annotated[int, Field(gt=0)] | None = None
    sparsity: Annotated[float, Field(gt=0, lt=1)] | Literal["2:4"] | None = None
    criterion: Any = "l1"
    scope: Literal["global", "layer"] = "global"
    round_to: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    schedule: str = ONE_SHOT
    recover: bool = True
    ignore: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(f"one of {', '.join(GOALS)} says how much to prune; found {found}")
        if self.speedup is not None and not _SPEEDUP.fullmatch(self.speedup):
            raise ValueError(f"speedup is {self.speedup!r}; expected TIMES@TARGET, such as 2.0@x86-openvino")
        if self.latency is not None and not _LATENCY.fullmatch(self.latency):
            raise ValueError(f"latency is {self.latency!r}; expected TIME@TARGET, such as 3ms@x86-openvino")
        if self.timed is not None and "scope" in self.model_fields_set:
            raise ValueError(
                "scope is for ratio, macs and sparsity; a goal in time compares channels of all layers: leave it out"
            )
        if self.timed is not None and self.timed[1] <= (1 if self.speedup is not None else 0):
            asked = self.speedup or self.latency
            raise ValueError(f"{asked!r} asks for no cut; expected a speed-up above 1, or a time above 0")
        known = self.criterion in CRITERIA if isinstance(self.criterion, str) else callable(self.criterion)
        if not known:
            raise ValueError(f"criterion is {self.criterion!r}; known: {', '.join(CRITERIA)}, or a function")
        if not _SCHEDULE.fullmatch(self.schedule):
            raise ValueError(
                f"schedule is {self.schedule!r}; expected {ONE_SHOT}, {ITERATIVE}:N, {DURING} or {SCRATCH}"
            )
        if self.sparsity is not None and self.schedule not in (ONE_SHOT, DURING):
            raise ValueError(f"sparsity is for the schedules {ONE_SHOT} and {DURING}; found {self.schedule!r}")
        if self.sparsity is not None:
            self._refuse_choices({"criterion", "round_to"}, "with sparsity single weights go by magnitude")
        if self.blocks is not None:
            self._refuse_choices({"criterion", "round_to", "scope"}, "blocks go by what the outputs are without them")
        if not self.recover and self.schedule in (DURING, SCRATCH):
            raise ValueError(
                f"schedule is {self.schedule!r}, which is training, and recover is false: drop one of them"
            )
        return self

    def _refuse_choices(self, names: set[str], why: str) -> None:
        """What is asked for and would be ignored is refused."""
        for name in sorted(names & self.model_fields_set):
            raise ValueError(f"{name} is for channels; {why}: leave it out")

    @property
    def rounds(self) -> int:
        """How often a part is cut and recovered from."""
        return int(self.schedule.partition(":")[2]) if self.schedule.startswith(ITERATIVE) else 1

    @property
    def timed(self) -> tuple[str, float, str] | None:
        """For a goal in time: "speedup" or "latency", its value (times, or ms), and the target; None for other goals."""
        if self.speedup is not None:
            found = _SPEEDUP.fullmatch(self.speedup)
            assert found, "validated"
            return "speedup", float(found["value"]), found["target"]
        if self.latency is not None:
            found = _LATENCY.fullmatch(self.latency)
            assert found, "validated"
            return "latency", float(found["value"]) * _MS[found["unit"]], found["target"]
        return None

    @property
    def summary(self) -> str:
        """The main choices in a few words."""
        [goal] = [name for name in GOALS if getattr(self, name) is not None]
        criterion = self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "custom")
        if self.blocks is not None:
            return f"{goal} {self.blocks}, {self.schedule}"
        return f"{goal} {getattr(self, goal)}, by {criterion}, {self.scope}, {self.schedule}"


class PrunedLayer(Table):
    """A layer that lost channels: its input and output channels, and its MACs, before and after."""

    name: str
    before: tuple[int, int]
    after: tuple[int, int]
    macs: tuple[int, int]


class Pruned(Table):
    """What pruning came to.

    Attributes:
        summary: what was asked for, in words.
        layers: that lost channels.
        macs, parameters: of all layers, before and after.
        blocks: that were left out, in that order.
        sparsity: share of the weights that are zero, where single ones go instead of channels.
        speedup, latency_ms: measured on `target`, after recovery, where the goal was a time; `speedup_low` to `speedup_high` is the 95 %
            interval.
        before, cut, after: what `--evaluate` gave for the model as it came, for what was cut, and after recovery.
        recovered: the last recovery in words; empty where there was none.
        remarks: what the user should know.
    """

    summary: str
    layers: tuple[PrunedLayer, ...] = ()
    macs: tuple[int, int] = (0, 0)
    parameters: tuple[int, int] = (0, 0)
    blocks: tuple[str, ...] = ()
    sparsity: float | None = None
    target: str = ""
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    latency_ms: float | None = None
    before: float | None = None
    cut: float | None = None
    after: float | None = None
    recovered: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """What it did, in one sentence."""
        if self.sparsity is not None:
            text = f"{self.summary}: {self.sparsity:.1%} of the weights are zero"
        else:
            lost = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)} lost channels"
            lost = f"without {', '.join(self.blocks)}" if self.blocks else lost
            text = f"{self.summary}: {lost}, MACs {_fewer(self.macs)}, parameters {_fewer(self.parameters)}"
        if self.speedup is not None:
            text += f"; {self.speedup:.2f}x as fast on {self.target} ({self.speedup_low:.2f} to {self.speedup_high:.2f}), in float"
        if self.before is not None and self.cut is not None:
            text += f"; metric {self.before:.4f} as it came, {self.cut:.4f} cut"
        text = text if self.after is None else f"{text}, {self.after:.4f} after recovery"
        return f"{text}; recovered by {self.recovered}" if self.recovered else text


def _fewer(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} to {pair[1]:,} ({pair[1] / max(1, pair[0]):.0%})"


def pruned_layers(
    first: Sequence[LayerCost], last: Sequence[LayerCost], left: Mapping[str, float]
) -> Iterator[PrunedLayer]:
    """The layers that lost channels: as they were at `first`, and of what they `last` were what is `left` of each group."""
    before = {cost.name: cost for cost in first}
    for cost in last:
        old, (inputs, outputs) = before.get(cost.name, cost), cost.shares(left)
        after = round(cost.channels[0] * inputs), round(cost.channels[1] * outputs)
        if after != old.channels:
            macs = old.macs, round(cost.macs * inputs * outputs)
            yield PrunedLayer(name=cost.name, before=old.channels, after=after, macs=macs)
