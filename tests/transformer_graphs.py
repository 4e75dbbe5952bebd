"""Small transformers with random weights: BERT-like with masks, ViT-like without, and their data and quant attributes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from edgekit.calibration.calibrate import calibrate
from edgekit.data import Batch
from edgekit.method import Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.pack_matmuls import pack_matmuls
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.target import load_target
from graphs import Array
from networks import Net

WIDTH, HEADS, SIZE, FEED_FORWARD = 32, 4, 8, 48
LOWEST = float(np.finfo(np.float32).min)


class Transformer(Net):
    """Layers of a transformer over tokens of shape `(n, s, WIDTH)`."""

    def linear(self, x: str, name: str, features: int, outputs: int) -> str:
        bias = self.rng.normal(0, 0.3, outputs).astype(np.float32)
        product = self.matmul(x, name, features, outputs)
        return str(self.op("Add", [product, self.constant(f"{name}.bias", bias)], f"{name}.add"))

    def layer_norm(self, x: str, name: str) -> str:
        gain = self.rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        shift = self.rng.normal(0, 0.1, WIDTH).astype(np.float32)
        parameters = [self.constant(f"{name}.gain", gain), self.constant(f"{name}.shift", shift)]
        return str(self.op("LayerNormalization", [x, *parameters], name, axis=-1))

    def reshape(self, x: str, name: str, *shape: int) -> str:
        return str(self.op("Reshape", [x, self.constant(f"{name}.shape", np.array(shape, np.int64))], name))

    def heads(self, x: str, name: str, *perm: int) -> str:
        return str(self.op("Transpose", [self.reshape(x, f"{name}.split", 0, 0, HEADS, SIZE)], f"{name}.t", perm=perm))

    def attend(self, query: str, key: str, value: str, mask: str | None, name: str, *, divide: bool = True) -> str:
        """From heads, the keys turned, to `(n, s, WIDTH)`."""
        scores = self.op("MatMul", [query, key], f"{name}.scores")
        number = self.constant(f"{name}.scale", np.float32(np.sqrt(SIZE) if divide else 0.3))
        scores = self.op("Div" if divide else "Mul", [scores, number], f"{name}.scaled")
        if mask is not None:
            scores = self.op("Add", [scores, mask], f"{name}.masked")
        weights = self.op("Softmax", [scores], f"{name}.softmax", axis=-1)
        context = self.op("MatMul", [weights, value], f"{name}.context")
        return self.reshape(
            self.op("Transpose", [context], f"{name}.back", perm=[0, 2, 1, 3]), f"{name}.merge", 0, 0, WIDTH
        )

    def rest(self, x: str, attended: str, name: str) -> str:
        """The residual sums, LayerNormalization and feed-forward network behind an attention."""
        x = self.layer_norm(
            self.op("Add", [self.linear(attended, f"{name}.out", WIDTH, WIDTH), x], f"{name}.residual"), f"{name}.norm"
        )
        wide = self.op("Gelu", [self.linear(x, f"{name}.up", WIDTH, FEED_FORWARD)], f"{name}.gelu")
        back = self.op("Add", [self.linear(wide, f"{name}.down", FEED_FORWARD, WIDTH), x], f"{name}.residual2")
        return self.layer_norm(back, f"{name}.norm2")

    def padding(self, mask: str, kind: str) -> str | None:
        """What is added to scores: from an integer mask in the ways that exporters write it, or a float mask as it comes."""
        if kind in ("none", "float", "keys"):
            return mask or None
        if kind == "picked":
            return self._picked(mask)
        axes = self.constant("mask.axes", np.array([1, 2]))
        mask = self.op("Unsqueeze", [mask, axes], "mask.wide")
        zero, lowest = self.constant("mask.zero", np.float32(0)), self.constant("mask.lowest", np.float32(LOWEST))
        if kind == "where":
            shown = self.op("Cast", [mask], "mask.shown", to=TensorProto.BOOL)
            return str(self.op("Where", [shown, zero, lowest], "mask.added"))
        number = self.op("Cast", [mask], "mask.cast", to=TensorProto.FLOAT)
        if kind == "hidden":  # 1 is what is hidden
            return str(self.op("Mul", [number, self.constant("mask.most", np.float32(-1e4))], "mask.added"))
        less = self.op("Sub", [self.constant("mask.one", np.float32(1)), number], "mask.less")
        strength = {"padding": -1e4, "lowest": LOWEST, "weak": -2.0}[kind]
        return str(self.op("Mul", [less, self.constant("mask.strength", np.float32(strength))], "mask.added"))

    def _picked(self, mask: str) -> str:
        """Through a last axis of one, as a mask comes that weighs a mean over tokens too."""
        number = self.op("Cast", [mask], "mask.cast", to=TensorProto.FLOAT)
        weights = self.op("Unsqueeze", [number, self.constant("mask.last", np.array([2]))], "mask.weights")
        less = self.op("Sub", [self.constant("mask.one", np.float32(1)), weights], "mask.less")
        wide = self.op("Unsqueeze", [less, self.constant("mask.axes", np.array([1, 2]))], "mask.wide")
        picked = self.op("Gather", [wide, self.constant("mask.index", np.array(0))], "mask.picked", axis=4)
        return str(self.op("Mul", [picked, self.constant("mask.strength", np.float32(LOWEST))], "mask.added"))


def bert(
    mask: str = "padding",
    *,
    layers: int = 2,
    length: int | str = "s",
    names: tuple[str, ...] = ("query", "key", "value"),
) -> ir.Model:
    """Encoder layers whose projections come in the order `names`; `mask` is how it is made (see `Transformer.padding`)."""
    net = Transformer(seed=7)
    tokens = net.input("x", ["n", length, WIDTH])
    given = "" if mask == "none" else _mask_input(net, mask, length)
    added = net.padding(given, mask)
    x = net.layer_norm(tokens, "embedding")
    for index in range(layers):
        name = f"layer{index}"
        made = {one: net.linear(x, f"{name}.{one}", WIDTH, WIDTH) for one in names}
        query = net.heads(made["query"], f"{name}.query", 0, 2, 1, 3)
        key = net.heads(made["key"], f"{name}.key", 0, 2, 3, 1)
        value = net.heads(made["value"], f"{name}.value", 0, 2, 1, 3)
        x = net.rest(x, net.attend(query, key, value, added, name, divide=index == 0), name)
    return net.model(net.matmul(x, "head", WIDTH, 4))


def vit() -> ir.Model:
    """A pre-norm block with one projection for queries, keys and values, taken apart along a fifth axis."""
    net = Transformer(seed=8)
    x = net.input("x", ["n", 10, WIDTH])
    packed = net.linear(net.layer_norm(x, "norm0"), "qkv", WIDTH, 3 * WIDTH)
    five = net.op("Transpose", [net.reshape(packed, "five", 0, 0, 3, HEADS, SIZE)], "five.t", perm=[2, 0, 3, 1, 4])
    query, key, value = (
        net.op("Gather", [five, net.constant(f"{name}.index", np.array(index))], name, axis=0)
        for index, name in enumerate(("q", "k", "v"))
    )
    query = net.op("Mul", [query, net.constant("q.scale", np.float32(SIZE**-0.25))], "q.scaled")
    key = net.op("Transpose", [key], "k.t", perm=[0, 1, 3, 2])
    return net.model(net.matmul(net.rest(x, net.attend(query, key, value, None, "block"), "block"), "head", WIDTH, 4))


def feeds(model: ir.Model, count: int, length: int, seed: int = 0) -> dict[str, Array]:
    """Tokens, and masks with a part of each sample hidden; of sample 1, all of it."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {"x": rng.normal(0, 1, (count, length, WIDTH)).astype(np.float32)}
    shown = np.arange(length) < rng.integers(1, length + 1, (count, 1))
    shown[1:2] = False
    for value in model.graph.inputs:
        if value.name == "attention_mask":
            arrays[value.name] = shown.astype(np.int64)
        if value.name == "hidden_mask":
            arrays[value.name] = ~shown
        if value.name == "bias":
            wide = value.shape is not None and value.shape[2] == 1
            arrays[value.name] = rng.normal(0, 2, (count, 1, 1 if wide else length, length)).astype(np.float32)
    return arrays


def annotated(model: ir.Model, *, packed: bool = True, length: int = 10) -> ir.Model:
    """The model with quant attributes, its projections packed into one layer or not."""
    target = load_target("portable")
    model = simplify(model)
    wished = assign_specs(pack_matmuls(model) if packed else model, target)
    batches = [Batch(feeds(model, 16, length))]
    return unify_params(calibrate(wished, target, batches, method=Method(calibrator="minmax"), threads=1), target)


def _mask_input(net: Transformer, kind: str, length: int | str) -> str:
    if kind in ("float", "keys"):
        return net.input("bias", ["n", 1, length if kind == "float" else 1, length])
    if kind == "hidden":
        return net.input("hidden_mask", ["n", length], TensorProto.BOOL)
    return net.input("attention_mask", ["n", length], TensorProto.INT64)
