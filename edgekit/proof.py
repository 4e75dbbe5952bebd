"""Proof: an artifact on its own runtime, against the simulation of the annotated model and against float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.backend import KernelRecord
from edgekit.graph.operators import Layer
from edgekit.records import OutputProof, Proof

Array = NDArray[np.generic]
Arrays = Mapping[str, Array]
Runner = Callable[[Arrays], Arrays]

ROUNDING_DB = 30.0
"""A runtime this close to the simulation differs from it by codes that flip at ties, and their cascade."""
UNDER_DB = 6.0
"""... or by so much less than quantization itself is from float: in a deep network with coarse grids one code of a squeeze-excite gate
moves a whole channel, and flips add up to half of that distance.
"""
SLACK_DB = 1.5
"""... or it is as close to float as the simulation is, give or take this much: it kept something in float that it need not."""
RESEMBLES_DB = 6.0
"""... which takes that it resembles float at all."""
KEPT_SLICE_DB, LOST_SLICE_DB = 10.0, 3.0
"""A class, a box coordinate, a channel that the simulation keeps at least so well may not come out this far from it: one of many weighs
little in the whole output.
"""
NOTHING = 1e-20
"""The energy of what some runtimes make of exact zeros."""
FLOAT_NOISE = 1e-6
"""Of an output's largest number: what a runtime's own float functions are off by, such as a Sigmoid far from 0."""
LARGEST_AXIS = 4096
LOST_ELEMENTS = 0.1
"""Share of whole numbers, such as indices among equals, that may part from the simulation's."""
LOST_DECISIONS = 0.02
"""Share of samples whose arg max may part from the simulation's by rounding (at least one sample)."""


def run_batches(run: Runner, batches: Sequence[Arrays]) -> list[Arrays]:
    """The outputs of each batch."""
    return [run(batch) for batch in batches]


def compare(ran: Sequence[Arrays] | None, simulated: Sequence[Arrays], floats: Sequence[Arrays]) -> Proof:
    """Hold what a runtime made of some batches against the simulation and the float model.

    Without `ran` (the device is not here) the simulation speaks for it, and `agrees` is None.
    """
    measured = simulated if ran is None else ran
    missing = [name for name in simulated[0] if name not in measured[0]]
    if missing:
        return Proof(agrees=False, reason=f"output {missing[0]!r} is missing (found: {', '.join(measured[0])})")
    outputs = tuple(
        OutputProof(
            name=name,
            simulation_sqnr_db=None if ran is None else _sqnr_db(name, measured, simulated),
            float_sqnr_db=_sqnr_db(name, measured, floats),
            simulation_cosine=None if ran is None else _cosine(name, measured, simulated),
            float_cosine=_cosine(name, measured, floats),
            simulation_equal=None if ran is None else _equal_share(name, measured, simulated),
            float_equal=_equal_share(name, measured, floats),
        )
        for name in simulated[0]
    )
    scores = next(iter(simulated[0]))
    changed = [name for name, array in simulated[0].items() if not _same_kind(measured[0][name], array)]
    if changed:
        there, here = measured[0][changed[0]], simulated[0][changed[0]]
        return Proof(
            agrees=False,
            reason=f"output {changed[0]!r} is {there.dtype} of {there.ndim} axes, where the model has {here.dtype} of {here.ndim}",
        )
    proof = Proof(
        samples=sum(_length(batch[scores]) for batch in simulated),
        batch_sizes=tuple(sorted({_length(batch[scores]) for batch in simulated})),
        outputs=outputs,
        float_top1=_top1(scores, measured, floats),
        simulation_top1=None if ran is None else _top1(scores, ran, simulated),
    )
    if ran is None:
        return proof
    reason = _disagreement(proof, ran, simulated, floats)
    return proof.model_copy(update={"agrees": not reason, "reason": reason})


def _same_kind(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.ndim == b.ndim


def moved_by(simulated: Array, expected: Array, ran: Array) -> Array:
    """`simulated`, moved as far as `ran` is from `expected`: what a runtime adds to another simulation than the one in question."""
    if expected.shape != ran.shape or simulated.shape != ran.shape or ran.dtype.kind not in "f":
        return ran
    real, there, here = (array.astype(np.float64) for array in (simulated, expected, ran))
    with np.errstate(invalid="ignore"):  # infinities that are equal
        return np.where(here == there, real, real + (here - there)).astype(ran.dtype)


def int8_share(layers: Sequence[Layer], kernels: Sequence[KernelRecord]) -> tuple[float | None, tuple[str, ...]]:
    """The share of the layers' MACs in int8 kernels, and the names of the layers that are not.

    A layer counts as int8 when one of the kernels that bear its name computes in int8 (a fused kernel may have a float epilogue).
    """
    integer = {name for kernel in kernels if kernel.precision == "int8" for name in kernel.layers}
    total = sum(layer.macs for layer in layers)
    if not kernels or not total:
        return None, ()
    return (
        sum(layer.macs for layer in layers if layer.name in integer) / total,
        tuple(layer.name for layer in layers if layer.name not in integer),
    )


def _disagreement(proof: Proof, ran: Sequence[Arrays], simulated: Sequence[Arrays], floats: Sequence[Arrays]) -> str:
    """Why the runtime does not compute what the simulation does; empty when it does, up to rounding."""
    for output in proof.outputs:
        reason = _other_numbers(output, ran, simulated, floats) or _other_codes(output, simulated, floats)
        if reason:
            return f"output {output.name!r} {reason}"
    expected = _top1(next(iter(simulated[0])), simulated, floats)
    if _lost(proof.simulation_top1, proof.float_top1, expected, proof.samples):
        lost = (1 - (proof.simulation_top1 or 0)) * proof.samples
        return f"{lost:.0f} of {proof.samples} samples have another arg max than in the simulation"
    return ""


def _other_numbers(
    output: OutputProof, ran: Sequence[Arrays], simulated: Sequence[Arrays], floats: Sequence[Arrays]
) -> str:
    """What is wrong with an output of floats."""
    near, own = output.simulation_sqnr_db, output.float_sqnr_db
    expected = _sqnr_db(output.name, simulated, floats)
    if near is None or own is None or expected is None:
        return ""
    lost = _lost_slice(output.name, ran, simulated, floats)
    if lost:
        return lost
    rounding = min(ROUNDING_DB, max(expected, RESEMBLES_DB) + UNDER_DB)
    if near >= rounding or own >= max(expected - SLACK_DB, RESEMBLES_DB):
        return ""
    return f"is {near:.1f} dB from the simulation and {own:.1f} dB from float, where the simulation is {expected:.1f} dB from float"


def _lost_slice(name: str, ran: Sequence[Arrays], simulated: Sequence[Arrays], floats: Sequence[Arrays]) -> str:
    """The first slice along an axis that the simulation keeps and the runtime does not."""
    for axis in _kinds_along(simulated[0][name]):
        kept, near = _slices_db(name, simulated, floats, axis), _slices_db(name, ran, simulated, axis)
        if kept is None or near is None:
            continue
        lost = np.flatnonzero((kept >= KEPT_SLICE_DB) & (near < LOST_SLICE_DB))
        if lost.size:
            index = int(lost[0])
            return (
                f"is lost at index {index} of axis {axis}: {near[index]:.1f} dB from the simulation, which is {kept[index]:.1f} dB "
                "from float"
            )
    return ""


def _kinds_along(array: Array) -> tuple[int, ...]:
    """The axes along which the slices of an output may be of different kinds: channels, not the rows and columns of a map."""
    last = array.ndim - 1
    if array.ndim < 4:
        return tuple(range(1, array.ndim))
    return (1,) if array.shape[1] <= array.shape[last] else (last,)


def lost_slices(simulated: Sequence[Arrays], floats: Sequence[Arrays]) -> list[str]:
    """Where quantization itself leaves nothing of a part of an output that as a whole looks well, a sentence for each output."""
    found = []
    for name, array in simulated[0].items():
        for axis in _kinds_along(array):
            ratios, whole = _slices_db(name, simulated, floats, axis), _sqnr_db(name, simulated, floats)
            if ratios is None or whole is None or whole < KEPT_SLICE_DB:
                continue
            lost = np.flatnonzero(ratios <= LOST_SLICE_DB)
            if lost.size:
                found.append(
                    f"output {name!r} is {whole:.1f} dB from float as a whole, but nothing is left of {lost.size} of its {ratios.size} "
                    f"slices along axis {axis} (index {int(lost[0])}): keep what makes it in float, or evaluate it"
                )
                break
    return found


def _slices_db(name: str, a: Sequence[Arrays], reference: Sequence[Arrays], axis: int) -> NDArray[np.float64] | None:
    """The SQNR (dB) of each slice along an axis; 200 for slices of zeros, and for noise that no float arithmetic is without.

    None for what has no such slices or too many.
    """
    sizes = {array[name].shape[axis] if array[name].ndim > axis else 0 for array in (*a, *reference)}
    if len(sizes) != 1 or not 2 <= min(sizes) <= LARGEST_AXIS:
        return None
    signal = noise = count = np.zeros(min(sizes))
    peak = 0.0
    for ours, theirs in zip(a, reference, strict=True):
        x, y = ours[name], theirs[name]
        if x.shape != y.shape or not np.issubdtype(y.dtype, np.floating):
            return None
        others = tuple(i for i in range(y.ndim) if i != axis)
        left, right = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(left) & np.isfinite(right)
        noise = noise + np.sum((np.where(finite, left, 0) - np.where(finite, right, 0)) ** 2, axis=others)
        signal = signal + np.sum(np.where(finite, right, 0) ** 2, axis=others)
        count = count + x.size / len(noise)
        peak = max(peak, float(np.abs(right, where=finite, out=np.zeros_like(right)).max(initial=0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = 10 * np.log10(signal / noise)
    told = (noise > count * (FLOAT_NOISE * peak) ** 2) & (signal > 0)
    return np.where(told, np.clip(ratios, -200.0, 200.0), 200.0)


def _other_codes(output: OutputProof, simulated: Sequence[Arrays], floats: Sequence[Arrays]) -> str:
    """What is wrong with an output of whole numbers or truth values: classes, indices, masks."""
    expected = _equal_share(output.name, simulated, floats)
    size = sum(batch[output.name].size for batch in simulated)
    if not _lost(output.simulation_equal, output.float_equal, expected, size, LOST_ELEMENTS):
        return ""
    return f"has {100 * (output.simulation_equal or 0):.1f} % of its elements in common with the simulation"


def _lost(
    near: float | None, own: float | None, expected: float | None, count: int, share: float = LOST_DECISIONS
) -> bool:
    """Whether more of `count` decisions part from the simulation's than rounding explains, and to the worse."""
    if near is None or own is None or expected is None:
        return False
    return (1 - near) * count > max(1.0, share * count) and own < expected - share


def _sqnr_db(name: str, a: Sequence[Arrays], reference: Sequence[Arrays]) -> float | None:
    """Signal-to-quantization-noise ratio (dB, -200 to 200); None for outputs that are not floats."""
    signal = noise = 0.0
    for ours, theirs in zip(a, reference, strict=True):
        x, y = ours[name], theirs[name]
        if not np.issubdtype(y.dtype, np.floating):
            return None
        if x.shape != y.shape:
            return -200.0
        with np.errstate(over="ignore", invalid="ignore"):
            left, right = x.astype(np.float64), y.astype(np.float64)
            same, finite = (left == right) | (np.isnan(left) & np.isnan(right)), np.isfinite(right)
            noise += float(np.sum(np.where(same, 0.0, left - right) ** 2, where=finite | ~same))
            signal += float(np.sum(right**2, where=finite))
    if not np.isfinite(noise):
        return -200.0
    if noise == 0.0 or (signal == 0.0 and noise < NOTHING):
        return 200.0
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -200.0, 200.0))


def _cosine(name: str, a: Sequence[Arrays], reference: Sequence[Arrays]) -> float | None:
    """The mean over samples of the cosine between outputs; None for outputs that are not floats."""
    cosines = []
    for ours, theirs in zip(a, reference, strict=True):
        x, y = ours[name], theirs[name]
        if not np.issubdtype(y.dtype, np.floating) or not y.ndim or x.shape != y.shape:
            return None
        if not y.size:
            continue
        masked = (x == y) & ~np.isfinite(y)  # such as the -inf of a mask
        left, right = (np.where(masked, 0.0, v.astype(np.float64)).reshape(len(v), -1) for v in (x, y))
        with np.errstate(invalid="ignore"):
            scale = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            cosine = (left * right).sum(1) / np.where(scale > 0, scale, 1)
        cosines.append(np.where((left == right).all(1), 1.0, np.nan_to_num(cosine, nan=0.0)))
    return float(np.concatenate(cosines).mean()) if cosines else None


def _equal_share(name: str, a: Sequence[Arrays], reference: Sequence[Arrays]) -> float | None:
    """The share of equal elements; None for outputs of floats."""
    equal = size = 0
    for ours, theirs in zip(a, reference, strict=True):
        x, y = ours[name], theirs[name]
        if np.issubdtype(y.dtype, np.floating):
            return None
        equal += int(np.sum(x == y)) if x.shape == y.shape else 0
        size += y.size
    return equal / size if size else 1.0


def _top1(name: str, a: Sequence[Arrays], reference: Sequence[Arrays]) -> float | None:
    """The share of samples with the same arg max, where the output is scores of shape `(N, classes)`."""
    same = []
    for ours, theirs in zip(a, reference, strict=True):
        x, y = ours[name], theirs[name]
        if y.ndim != 2 or y.shape[1] < 2 or not np.issubdtype(y.dtype, np.floating) or x.shape != y.shape:
            return None
        same.append(np.argmax(x, axis=1) == np.argmax(y, axis=1))
    return float(np.concatenate(same).mean()) if sum(map(len, same)) else None


def _length(array: NDArray[np.generic]) -> int:
    return len(array) if array.ndim else 1
