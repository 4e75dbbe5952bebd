"""`rounded_steps`: float16 that is rounded as a runtime which computes it rounds it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from edgekit.graph.float16 import rounded_steps
from edgekit.graph.run import Session

X = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
SWALLOWED = """<ir_version: 10, opset_import: ["" : 21]>
net (float[4] x) => (float[4] y)
<float thousand = {1000}, float less = {-1000}> {
    far = Cast <to = 10> (thousand)
    back = Cast <to = 10> (less)
    half = Cast <to = 10> (x)
    there = Add (half, far)
    again = Add (there, back)
    y = Cast <to = 1> (again)
}"""
BRANCHES = """<ir_version: 10, opset_import: ["" : 21]>
net (float[4] x, bool up) => (float[4] y)
<float thousand = {1000}, float less = {-1000}> {
    far = Cast <to = 10> (thousand)
    back = Cast <to = 10> (less)
    half = Cast <to = 10> (x)
    there = Add (half, far)
    again = If (up) <
        then_branch = up_graph () => (float16[4] one) { moved = Add (there, back) one = Identity (moved) },
        else_branch = down_graph () => (float16[4] other) { doubled = Add (there, there) other = Add (doubled, back) }
    >
    y = Cast <to = 1> (again)
}"""


def typed(text: str) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def test_sums_that_float16_swallows_are_swallowed() -> None:
    model = typed(SWALLOWED)
    [kept] = Session(model, optimize=False).run({"x": X}).values()
    np.testing.assert_allclose(kept, X, rtol=1e-3)  # without: ONNX Runtime's own doing
    [got] = Session(rounded_steps(model), optimize=False).run({"x": X}).values()
    [wanted] = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": X})
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(got, np.float32([0, 0, 0.5, 0.5]))


@pytest.mark.parametrize("up", [True, False])
def test_steps_inside_branches_are_rounded_too(up: bool) -> None:
    model, feeds = typed(BRANCHES), {"x": X, "up": np.array(up)}
    [got] = Session(rounded_steps(model), optimize=False).run(feeds).values()
    [wanted] = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    np.testing.assert_array_equal(got, wanted)


def test_the_model_that_is_given_stays_as_it_is() -> None:
    model = typed(SWALLOWED)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert len(list(rounded_steps(model).graph)) == 6 + 2 * 5
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
