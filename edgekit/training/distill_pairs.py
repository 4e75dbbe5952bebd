"""Which outputs and layers of two models are compared with each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edgekit.distillation import Distillation
from edgekit.errors import SourceError
from edgekit.training.distill_losses import scores_in
from edgekit.training.taps import FEATURE as KEY
from edgekit.training.taps import Outputs, channel_axis
from edgekit.words import hint, some


def output_pairs(own: Outputs, others: Outputs) -> list[tuple[str, str]]:
    """Names of outputs that are compared: all the student's floats, by name, or in order when names differ.

    Raises:
        SourceError: neither names nor numbers agree, or shapes do not.
    """
    ours, theirs = (_floats(without_features(outputs)) for outputs in (own, others))
    if not ours or not theirs:
        raise SourceError(
            f"the {'teacher' if ours else 'student'} has no output of floats to be compared; choose other kinds than 'response'"
        )
    if ours.keys() <= theirs.keys():
        names = [(name, name) for name in ours]
    elif len(ours) == len(theirs):
        names = list(zip(ours, theirs, strict=True))
    else:
        raise SourceError(
            f"the student's outputs ({some(list(ours))}) are not the teacher's ({some(list(theirs))}), by name or by number; "
            "let both return the same, or choose other kinds than 'response'"
        )
    for mine, yours in names:
        if ours[mine].shape != theirs[yours].shape:
            raise SourceError(
                f"the student's output {mine!r} has the shape {tuple(ours[mine].shape)}, the teacher's {yours!r} "
                f"{tuple(theirs[yours].shape)}; give a teacher of the same classes and resolution, or choose other kinds than 'response'"
            )
    return names


def feature_pairs(distillation: Distillation, own: Outputs, others: Outputs) -> list[tuple[str, str]]:
    """Keys of features that are compared: of the pairs that the user names, or all in order.

    Raises:
        SourceError: there are none, or not as many of both.
    """
    if not distillation.reads_features:
        return []
    ours, theirs = ([key for key in outputs if key.startswith(KEY)] for outputs in (own, others))
    if not distillation.pairs:
        if not ours or len(ours) != len(theirs):
            raise SourceError(
                f"{len(ours)} features of the student and {len(theirs)} of the teacher are no pairs; read as many of both, or name 'pairs'"
            )
        return list(zip(ours, theirs, strict=True))
    keys = [(KEY + mine, KEY + yours) for mine, yours in distillation.pairs]
    for mine, yours in keys:
        _check_known(mine, ours, "student")
        _check_known(yours, theirs, "teacher")
    return keys


def channel_axes(
    own: Outputs, others: Outputs, pairs: Sequence[tuple[str, str]], pair: tuple[str, str]
) -> tuple[int, int]:
    """Which axes count channels in a pair of features: judged with all other pairs that have as many axes."""
    ranks = own[pair[0]].dim(), others[pair[1]].dim()
    alike = [(own[a].shape, others[b].shape) for a, b in pairs if (own[a].dim(), others[b].dim()) == ranks]
    ours, theirs = ([tuple(shapes[side]) for shapes in alike] for side in (0, 1))
    if ranks[0] == ranks[1]:
        axis = channel_axis(ours, theirs)
        return axis, axis
    return channel_axis(ours), channel_axis(theirs)


def score_names(distillation: Distillation, outputs: Outputs, who: str) -> tuple[str, ...]:
    """Names of outputs that hold class scores: those that the user names, or what seems to.

    Args:
        distillation: what is wanted.
        outputs: without features.
        who: the model that they are of, for messages.

    Raises:
        SourceError: one that the user names does not exist, or cannot hold scores.
    """
    if distillation.scores is None:
        return scores_in(outputs)
    for name in distillation.scores:
        if name not in outputs:
            raise SourceError(f"no output of the {who} is called {name!r}, as 'scores' says; {hint(name, outputs)}")
        if not outputs[name].is_floating_point() or outputs[name].dim() < 2:
            raise SourceError(
                f"output {name!r} of the {who} has the shape {tuple(outputs[name].shape)} and type {outputs[name].dtype}; 'scores' are "
                "floats (N, C) or more: leave it out"
            )
    return distillation.scores


def without_features(outputs: Outputs) -> dict[str, Tensor]:
    """The model's own outputs."""
    return {name: value for name, value in outputs.items() if not name.startswith(KEY)}


def listed(outputs: Outputs) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{name!r} {tuple(value.shape)}" for name, value in outputs.items()) or "none"


def _check_known(key: str, known: Sequence[str], who: str) -> None:
    if key not in known:
        names = [one.removeprefix(KEY) for one in known]
        layer = key.removeprefix(KEY)
        raise SourceError(f"no feature of the {who}'s layer {layer!r} was read; {hint(layer, names)}")


def _floats(outputs: Outputs) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if value.is_floating_point()}
