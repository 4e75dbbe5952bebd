"""Write a tiny convolutional ONNX model and samples for it: `python tiny_onnx.py MODEL.onnx SAMPLES.npz`.

Needs nothing but numpy and onnx, so that it also serves to try an installed wheel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def tiny_model(seed: int = 0) -> onnx.ModelProto:
    """Conv, Relu, residual Conv + Add, GlobalAveragePool, Gemm: `image (N, 3, 8, 8)` to `scores (N, 4)`, opset 13."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan_in = int(np.prod(shape[1:])) or 1
        return numpy_helper.from_array((rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["scores"], "head", transB=1),
    ]
    weights = [
        weight("w1", 8, 3, 3, 3),
        weight("b1", 8),
        weight("w2", 8, 8, 3, 3),
        weight("b2", 8),
        weight("w3", 4, 8),
        weight("b3", 4),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def tiny_samples(count: int = 64, seed: int = 1) -> dict[str, np.ndarray]:
    """Images with negative and positive values, and labels."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(count, 3, 8, 8)).astype(np.float32),
        "labels": rng.integers(0, 4, count),
    }


def main() -> None:
    """Write both files."""
    model, samples = (Path(argument) for argument in sys.argv[1:3])
    onnx.save(tiny_model(), model)
    np.savez(samples, **tiny_samples())


if __name__ == "__main__":
    main()
