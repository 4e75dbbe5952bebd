from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.backend import KernelRecord
from edgekit.graph.operators import Layer
from edgekit.proof import compare, int8_share, lost_slices, run_batches

Array = NDArray[Any]
RNG = np.random.default_rng(0)
FLOAT = RNG.normal(0, 1, (60, 5)).astype(np.float32)
SIMULATED = FLOAT + RNG.normal(0, 0.01, FLOAT.shape).astype(np.float32)


def batches(array: Array, name: str = "y") -> list[dict[str, Array]]:
    return [{name: array[:42]}, {name: array[42:]}]


def noisy(array: Array, db: float, seed: int = 1) -> Array:
    """The array plus noise that is `db` below it."""
    noise = np.random.default_rng(seed).normal(0, 1, array.shape)
    noise *= np.linalg.norm(array) / np.linalg.norm(noise) / 10 ** (db / 20)
    return (array + noise).astype(np.float32)


def test_the_simulation_itself_agrees() -> None:
    proof = compare(batches(SIMULATED), batches(SIMULATED), batches(FLOAT))
    output = proof.outputs[0]
    assert proof.agrees is True
    assert proof.reason == ""
    assert (proof.samples, proof.batch_sizes) == (60, (18, 42))
    assert (output.simulation_sqnr_db, output.simulation_cosine) == (200.0, pytest.approx(1.0, abs=1e-12))
    assert output.float_sqnr_db == pytest.approx(40, abs=1)


@pytest.mark.parametrize("db", [10.0, 25.0, 40.0])
def test_the_ratio_is_in_decibels(db: float) -> None:
    output = compare(batches(noisy(SIMULATED, db)), batches(SIMULATED), batches(FLOAT)).outputs[0]
    assert output.simulation_sqnr_db == pytest.approx(db, abs=0.01)


@given(db=st.floats(31, 90), seed=st.integers(0, 2**31))
def test_rounding_differences_agree(db: float, seed: int) -> None:
    proof = compare(batches(noisy(SIMULATED, db, seed)), batches(SIMULATED), batches(FLOAT))
    assume(
        proof.simulation_top1 is not None and proof.simulation_top1 > 58.5 / 60
    )  # close decisions may flip in either
    assert proof.agrees is True


@given(db=st.floats(-10, 25), seed=st.integers(0, 2**31))
def test_wrong_numbers_do_not_agree(db: float, seed: int) -> None:
    proof = compare(batches(noisy(SIMULATED, db, seed)), batches(SIMULATED), batches(FLOAT))
    assert proof.agrees is False
    assert "output 'y' is" in proof.reason
    assert "from the simulation" in proof.reason


def test_a_runtime_that_stays_closer_to_float_agrees() -> None:
    simulated = noisy(FLOAT, 12)
    assert compare(batches(FLOAT), batches(simulated), batches(FLOAT)).agrees is True
    assert compare(batches(noisy(FLOAT, 11.5, seed=2)), batches(simulated), batches(FLOAT)).agrees is True
    assert compare(batches(noisy(FLOAT, 9, seed=2)), batches(simulated), batches(FLOAT)).agrees is False


def test_rounding_adds_little_to_what_quantization_does() -> None:
    """Flips of codes add up in a deep network, to the side of the quantization error too."""
    simulated = noisy(FLOAT, 21)
    away = simulated - FLOAT
    assert compare(batches(simulated + away / 2.2), batches(simulated), batches(FLOAT)).agrees is True
    assert compare(batches(simulated + away / 1.8), batches(simulated), batches(FLOAT)).agrees is False


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_do_not_agree(bad: float) -> None:
    ran = SIMULATED.copy()
    ran[3, 2] = bad
    proof = compare(batches(ran), batches(SIMULATED), batches(FLOAT))
    assert proof.agrees is False
    assert proof.outputs[0].simulation_sqnr_db == -200.0


def test_an_infinity_of_the_model_itself_is_no_difference() -> None:
    masked, simulated = FLOAT.copy(), SIMULATED.copy()
    masked[:, 0] = simulated[:, 0] = -np.inf
    proof = compare(batches(simulated), batches(simulated), batches(masked))
    assert proof.agrees is True
    assert proof.outputs[0].float_sqnr_db == pytest.approx(40, abs=1)


def test_another_shape_does_not_agree() -> None:
    assert compare(batches(SIMULATED[:, :4]), batches(SIMULATED), batches(FLOAT)).agrees is False


def test_an_output_that_is_missing_does_not_agree() -> None:
    proof = compare(batches(SIMULATED, "z"), batches(SIMULATED), batches(FLOAT))
    assert proof.agrees is False
    assert proof.reason == "output 'y' is missing (found: z)"


def test_each_output_counts() -> None:
    simulated = [{"good": SIMULATED, "bad": SIMULATED}]
    proof = compare([{"good": SIMULATED, "bad": -SIMULATED}], simulated, [{"good": FLOAT, "bad": FLOAT}])
    assert proof.agrees is False
    assert "output 'bad'" in proof.reason


def test_decisions_that_part_do_not_agree_however_small_the_numbers() -> None:
    scores = np.full((60, 5), 100.0, np.float32)
    scores[np.arange(60), np.arange(60) % 5] += 0.1
    ran = np.roll(scores, 1, axis=1)
    proof = compare(batches(ran), batches(scores), batches(scores))
    assert proof.outputs[0].simulation_sqnr_db is not None
    assert proof.outputs[0].simulation_sqnr_db > 50
    assert proof.agrees is False
    assert proof.reason == "60 of 60 samples have another arg max than in the simulation"


@pytest.mark.parametrize(("flipped", "agrees"), [(0, True), (4, True), (8, False)])
@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_whole_numbers_are_compared_one_by_one(flipped: int, agrees: bool, dtype: type) -> None:
    classes = (np.arange(60) % 2).astype(dtype)
    ran = classes.copy()
    ran[:flipped] = ~ran[:flipped] if dtype is np.bool_ else 1 - ran[:flipped]
    proof = compare(batches(ran), batches(classes), batches(classes))
    assert proof.agrees is agrees
    assert proof.outputs[0].simulation_equal == 1 - flipped / 60
    assert proof.outputs[0].float_sqnr_db is None
    assert agrees or proof.reason == "output 'y' has 86.7 % of its elements in common with the simulation"


def test_outputs_without_rows_are_equal() -> None:
    nothing = np.zeros((0, 4), np.float32)
    proof = compare([{"boxes": nothing}], [{"boxes": nothing}], [{"boxes": nothing}])
    assert proof.agrees is True
    assert proof.float_top1 is None


def test_without_a_device_the_simulation_speaks() -> None:
    proof = compare(None, batches(SIMULATED), batches(FLOAT))
    assert proof.agrees is None
    assert proof.simulation_top1 is None
    assert proof.outputs[0].simulation_sqnr_db is None
    assert proof.outputs[0].float_sqnr_db == pytest.approx(40, abs=1)


def test_the_cosine_of_zeros_and_numbers_is_zero() -> None:
    ran = SIMULATED.copy()
    ran[:30] = 0
    output = compare(batches(ran), batches(SIMULATED), batches(FLOAT)).outputs[0]
    assert output.simulation_cosine == pytest.approx(0.5, abs=1e-9)


def test_top1_counts_equal_decisions() -> None:
    ran = SIMULATED.copy()
    ran[:6] = -ran[:6]
    proof = compare(batches(ran), batches(ran), batches(SIMULATED))
    assert proof.float_top1 == pytest.approx(0.9, abs=1e-12)


def test_run_batches_keeps_the_order() -> None:
    found = run_batches(lambda feeds: {"y": feeds["x"] + 1}, [{"x": np.array([i])} for i in range(3)])
    assert [int(outputs["y"][0]) for outputs in found] == [1, 2, 3]


def test_the_int8_share_is_of_macs() -> None:
    layers = [Layer(name, "Conv", None, None, macs, 0) for name, macs in (("a", 60), ("b", 30), ("c", 10))]
    kernels = [
        KernelRecord(("a",), "conv_int8", "int8"),
        KernelRecord(("a", "relu"), "reorder", "f32"),
        KernelRecord(("b",), "conv", "f32"),
        KernelRecord((), "reorder", "int8"),
    ]
    assert int8_share(layers, kernels) == (0.6, ("b", "c"))


def test_a_runtime_that_does_not_tell_has_no_share() -> None:
    assert int8_share([Layer("a", "Conv", None, None, 60, 0)], []) == (None, ())
    assert int8_share([], [KernelRecord(("a",), "relu", "f32")]) == (None, ())


def heads(scores: float, noise: float = 0.0) -> NDArray[np.float32]:
    """A detector's output `(20, 100, 5)`: boxes of a few hundred, and one small score."""
    rng = np.random.default_rng(0)
    boxes, score = rng.uniform(0, 640, (20, 100, 4)), rng.uniform(0, 1, (20, 100, 1))
    exact = np.concatenate([boxes, scores * score], axis=2)
    return (exact * (1 + noise * rng.standard_normal(exact.shape))).astype(np.float32)


def test_scores_that_the_runtime_loses_beside_large_boxes_do_not_agree() -> None:
    proof = compare(batches(heads(0.0)), batches(heads(1.0)), batches(heads(1.0, noise=0.01)))
    assert proof.outputs[0].simulation_sqnr_db is not None
    assert proof.outputs[0].simulation_sqnr_db > 50
    assert proof.agrees is False
    assert "is lost at index 4 of axis 2" in proof.reason


def test_zeros_do_not_agree_with_a_poor_simulation() -> None:
    simulated = FLOAT + 0.85 * np.random.default_rng(1).standard_normal(FLOAT.shape).astype(np.float32) * np.std(FLOAT)
    assert compare(batches(np.zeros_like(FLOAT)), batches(simulated), batches(FLOAT)).agrees is False


def test_what_quantization_itself_loses_is_told() -> None:
    [told] = lost_slices(batches(heads(0.0)), batches(heads(1.0)))
    assert "nothing is left of 1 of its 5 slices along axis 2 (index 4)" in told
    assert lost_slices(batches(heads(1.0)), batches(heads(1.0, noise=0.01))) == []


def test_what_float_arithmetic_is_off_by_loses_no_slice() -> None:
    """A channel that is all but empty, which a runtime's Sigmoid gets as wrong as any float; and one that is really lost."""
    rng = np.random.default_rng(0)
    floats = rng.uniform(0, 1, (4, 5, 8, 8)).astype(np.float32)
    floats[:, 3] = 1e-9
    ran = floats.copy()
    ran[:, 3] = 1e-8
    proof = compare([{"map": ran}], [{"map": floats}], [{"map": floats}])
    assert proof.agrees is True
    floats[:, 3] = ran[:, 3] = 1e-3
    ran[:, 3] *= -1
    proof = compare([{"map": ran}], [{"map": floats}], [{"map": floats}])
    assert proof.agrees is False
    assert "is lost at index 3 of axis 1" in proof.reason


def test_a_row_of_a_map_is_no_kind_of_its_own() -> None:
    """Where all numbers of a row are small it may be off by more than it holds; a map of channels last has them there."""
    rng = np.random.default_rng(0)
    floats = rng.uniform(0, 1, (4, 2, 8, 8)).astype(np.float32)
    floats[:, :, 3] = 1e-3
    ran = floats.copy()
    ran[:, :, 3] *= -1
    assert compare([{"map": ran}], [{"map": floats}], [{"map": floats}]).agrees is True
    last = [{"map": array.transpose(0, 2, 3, 1).copy()} for array in (ran, floats)]
    assert compare([last[0]], [last[1]], [last[1]]).agrees is True
    last[0]["map"][..., 1] *= -1
    assert "at index 1 of axis 3" in compare([last[0]], [last[1]], [last[1]]).reason
