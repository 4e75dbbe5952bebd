"""Single weights are zero, exactly as many as were asked for, and stay so through training, rounding and export."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import SourceError
from edgekit.graph.sparsity import graph_sparsity, is_two_four
from edgekit.lowering.qdq import lower_qdq
from edgekit.schedule import Schedule
from edgekit.target import load_target
from edgekit.training.capture import capture
from edgekit.training.export_onnx import export_onnx
from edgekit.training.loop import train
from edgekit.training.prune.sparsity import Masks, cubic, layer_sparsity, plan_masks, sparsify
from edgekit.training.qat import prepare_qat
from edgekit.training.stored import load_module, save_module


def linear(rows: Any) -> nn.Linear:
    weight = torch.tensor(rows, dtype=torch.float32)
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data.copy_(weight)
    return made


def two_layers() -> nn.Sequential:
    return nn.Sequential(linear([[1.0, -2.0], [3.0, -4.0]]), linear([[-0.5, 6.0], [0.25, 7.0], [8.0, 9.0]]))


class Net(nn.Module):
    """A dense first layer (3 channels), one that is folded, a depthwise, a transposed and a plain one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.bn2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=2)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.body(F.relu(self.bn(self.stem(x))))))
        return self.head(self.drop(self.up(F.relu(self.deep(y))).mean((2, 3))))


SPARSE = ("body", "up", "head")
"""Its layers that 2:4 fits."""


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (count, 3, 6, 6)).astype(np.float32)


def samples(count: int = 32) -> dict[str, Any]:
    return {"x": images(count), "labels": np.random.default_rng(1).integers(0, 3, count)}


def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(student["output"], batch["labels"])


def learn(module: nn.Module, masks: Masks, folder: Path, on_step: Any = (), **choices: Any) -> Any:
    schedule = Schedule.model_validate(
        {"batch_size": 8, "epochs": 3, "learning_rate": 0.05, "track": "none", **choices}
    )
    with masks.holding(module):
        return train(module, samples(), loss, schedule=schedule, folder=folder, extra=(masks,), on_step=on_step)


# ---- which weights go


def test_the_smallest_of_all_layers_go() -> None:
    module = two_layers()
    masks = sparsify(module, 0.4)  # 4 of 10: 0.25, -0.5, 1, -2
    assert module[0].weight.tolist() == [[0.0, 0.0], [3.0, -4.0]]
    assert module[1].weight.tolist() == [[0.0, 6.0], [0.0, 7.0], [8.0, 9.0]]
    assert masks.kept["1.weight"].tolist() == [[False, True], [False, True], [True, True]]
    assert masks.zeros == pytest.approx(0.4, abs=1e-12)
    assert not torch.signbit(module[0].weight[0, 1])  # no minus zero


def test_each_layer_loses_the_same_share() -> None:
    module = two_layers()
    sparsify(module, 0.5, scope="layer")
    assert module[0].weight.tolist() == [[0.0, 0.0], [3.0, -4.0]]
    assert module[1].weight.tolist() == [[0.0, 0.0], [0.0, 7.0], [8.0, 9.0]]


def test_of_equal_weights_the_first_go_and_the_count_is_exact() -> None:
    module = linear([[1.0, -1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.5, 1.0, 2.0]])
    sparsify(module, 0.4)  # 0.5, and three ones
    assert module.weight.tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0, 2.0]]
    for share in (0.1, 0.37, 0.5, 0.8):
        network = net()
        sparsify(network, share)
        parts = [one for one in network.modules() if isinstance(one, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
        count = sum(one.weight.numel() for one in parts)
        assert sum(int((one.weight == 0).sum()) for one in parts) == round(share * count)


def test_two_of_four_stay_along_the_input_channels() -> None:
    module = linear([[1.0, -5.0, 2.0, -3.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0, -9.0, 8.0, -7.0, 6.0]])
    masks = sparsify(module, "2:4")
    assert module.weight.tolist() == [[0, -5, 0, -3, 1, 1, 0, 0], [0, 0, 0, 4, -9, 8, 0, 0]]
    assert masks.zeros == 0.5
    conv = nn.Conv2d(4, 1, (1, 2), bias=False)
    conv.weight.data = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]]).reshape(1, 4, 1, 2)
    sparsify(conv, "2:4")
    assert conv.weight[0, :, 0].tolist() == [[0, 8], [0, 7], [3, 0], [4, 0]]


def test_a_grouped_transposed_layer_sums_over_the_first_axis() -> None:
    up = nn.ConvTranspose2d(8, 2, 1, groups=2, bias=False)
    up.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]).reshape(8, 1, 1, 1)
    sparsify(up, "2:4")
    assert up.weight.flatten().tolist() == [0, 0, 3, 4, 8, 7, 0, 0]
    with pytest.raises(SourceError, match="'': it sums over 2 input channels, no multiple of 4"):
        sparsify(nn.ConvTranspose2d(8, 4, 1, groups=4), "2:4")


def test_layers_that_do_not_fit_stay_dense_and_are_named() -> None:
    module = net()
    masks = sparsify(module, "2:4", ignore=["he*"])
    assert masks.dense == {
        "stem": "it sums over 3 input channels, no multiple of 4",
        "deep": "it sums over 1 input channels, no multiple of 4",
        "head": "it is to be ignored",
    }
    found = {one.name: (one.zeros, one.two_four) for one in layer_sparsity(module)}
    assert found == {"stem": (0, False), "body": (0.5, True), "deep": (0, False), "up": (0.5, True), "head": (0, False)}


def test_a_shared_weight_is_one_and_a_computed_one_stays_dense() -> None:
    module = nn.Sequential(linear(np.arange(1, 17).reshape(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    nn.utils.parametrizations.weight_norm(module[2])
    masks = sparsify(module, 0.5)
    assert list(masks.kept) == ["0.weight"] and masks.dense == {"2": "its weight is computed from other tensors"}
    assert int((module[1].weight == 0).sum()) == 8
    graph = capture(module, (np.zeros((2, 4), np.float32),))  # which has it under one of its names
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(1.0)
    masks.enforce(graph)
    weight = graph.get_parameter("0.weight" if "0.weight" in dict(graph.named_parameters()) else "1.weight")
    assert int((weight == 0).sum()) == 8
    with pytest.raises(SourceError, match="has no layer that can be sparse"):
        sparsify(module, 0.5, ignore=["1", "2"])  # the first is the second


@pytest.mark.parametrize(
    ("module", "wanted", "options", "message"),
    [
        (two_layers(), 1.0, {}, "sparsity is 1.0; expected a share between 0 and 1, or '2:4'"),
        (two_layers(), "1:2", {}, "sparsity is '1:2'"),
        (two_layers(), 0.5, {"ignore": ["00"]}, "no layer of the model is called '00', which is to stay dense; did you mean '0'"),
        (two_layers(), 0.6, {}, "sparsity 0.6 leaves none of the 4 weights of layer '0'; give a smaller share, scope 'layer'"),
        (nn.ReLU(), 0.5, {}, "ReLU has no layer that can be sparse"),
        (linear([[float("nan"), 1.0]]), 0.5, {}, "the weight of layer '' is not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_explained(module: nn.Module, wanted: Any, options: Any, message: str) -> None:
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(SourceError) as caught:
        sparsify(module, wanted, **options)
    assert message in str(caught.value)
    for name, value in module.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


def test_masks_of_another_module_are_refused() -> None:
    masks = sparsify(two_layers(), 0.5, scope="layer")
    with pytest.raises(SourceError, match=r"Net has no parameter '0.weight'"):
        masks.enforce(net())
    with pytest.raises(
        SourceError, match=r"'0.weight' has the shape \(2, 3\), and its mask \(2, 2\); make masks after"
    ):
        masks.enforce(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)))


# ---- while it is trained


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_zero_while_others_learn(optimizer: str, tmp_path: Path) -> None:
    module = net()
    masks = sparsify(module, "2:4")
    before, kept = copy.deepcopy(module.state_dict()), {name: mask.clone() for name, mask in masks.kept.items()}
    seen: list[bool] = []

    def watch(one: nn.Module) -> float:
        seen.append(all(bool((one.get_parameter(name)[~mask] == 0).all()) for name, mask in kept.items()))
        return 0.0

    schedule = Schedule.model_validate({"batch_size": 8, "epochs": 2, "optimizer": optimizer, "track": "none"})
    with masks.holding(module):
        train(module, samples(), loss, schedule=schedule, folder=tmp_path, extra=(masks,), evaluate=watch)
    assert seen == [True, True]
    for name, mask in kept.items():
        weight = module.get_parameter(name)
        assert torch.equal(masks.kept[name], mask) and bool((weight[~mask] == 0).all())
        assert (weight[mask] != before[name][mask]).float().mean() > 0.9
    assert {one.name for one in layer_sparsity(module) if one.two_four} == set(SPARSE)
    optimizer_ = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    module(torch.from_numpy(images())).sum().backward()
    optimizer_.step()
    assert not all(bool((module.get_parameter(name)[~mask] == 0).all()) for name, mask in kept.items())  # held no more


def test_the_cubic_schedule_by_hand() -> None:
    shares = [cubic(step, final=0.8, begin=2, end=6, initial=0.1) for step in range(9)]
    expected = [0.1, 0.1, 0.1, 0.8 - 0.7 * 27 / 64, 0.8 - 0.7 / 8, 0.8 - 0.7 / 64, 0.8, 0.8, 0.8]
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-12)
    assert cubic(3, final=0.5, begin=3, end=3) == 0.5


@pytest.mark.parametrize("wanted", [0.75, "2:4"])
def test_zeros_become_more_while_it_is_trained(wanted: Any, tmp_path: Path) -> None:
    module = net()
    masks = plan_masks(module, wanted)
    assert masks.zeros == 0
    prune, shares = masks.gradually(module), []

    def watch(step: int, steps: int) -> None:
        prune(step, steps)
        shares.append(masks.zeros)
        assert all(bool((module.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.kept.items())

    learn(module, masks, tmp_path, on_step=(watch,))  # 12 steps, the first 6 of them prune
    final = masks.final
    count = sum(mask.numel() for mask in masks.kept.values())
    grain = 1 / count if wanted != "2:4" else 2 / count
    expected = [final * (1 - (1 - min(step, 6) / 6) ** 3) for step in range(12)]
    np.testing.assert_allclose(shares, expected, rtol=0, atol=grain)
    if wanted == "2:4":
        assert {one.name for one in layer_sparsity(module) if one.two_four} == set(SPARSE)
    else:
        zeros = sum(round(one.zeros * one.weights) for one in layer_sparsity(module))
        assert zeros == round(0.75 * count)


def test_once_zero_a_weight_stays_zero_until_the_end(tmp_path: Path) -> None:
    module = net()
    masks = plan_masks(module, 0.5, scope="layer")
    prune, before = masks.gradually(module, begin=0.25, end=1.0), [copy.deepcopy(masks.kept)]

    def watch(step: int, steps: int) -> None:
        prune(step, steps)
        assert all(not bool((mask & ~before[0][name]).any()) for name, mask in masks.kept.items())
        before[0] = {name: mask.clone() for name, mask in masks.kept.items()}
        assert step >= 4 or masks.zeros == 0  # a quarter of 12, and a step that takes nothing

    learn(module, masks, tmp_path, on_step=(watch,))
    assert all(one.zeros == 0.5 for one in layer_sparsity(module))


@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_that_goes_on_computes_what_the_whole_one_does(stop: int, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Masks]:
        module = net()
        nn.init.zeros_(module.head.weight)  # zeros that no mask asks for
        return module, plan_masks(module, 0.5, ignore=["stem"])

    whole, masks = made()
    learn(whole, masks, tmp_path / "whole", on_step=(masks.gradually(whole),))

    class Stop(Exception):
        pass

    def halt(step: int, steps: int) -> None:
        if step == stop:
            raise Stop

    broken, masks_ = made()
    with pytest.raises(Stop):
        learn(broken, masks_, tmp_path / "parts", on_step=(halt, masks_.gradually(broken)), save_every=1)
    again, masks_ = made()
    done = learn(again, masks_, tmp_path / "parts", on_step=(masks_.gradually(again),), save_every=1)
    assert done.resumed_from == stop
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert all(torch.equal(mask, masks_.kept[name]) for name, mask in masks.kept.items())
    assert masks_.zeros == pytest.approx(0.5, abs=1e-3)


# ---- through graphs and rounding to the export


def trained(module: nn.Module, masks: Masks, tmp_path: Path) -> nn.Module:
    student = prepare_qat(module.eval(), (images(),), load_target("portable"))
    learn(student, masks, tmp_path, epochs=1)
    return student


def test_two_of_four_holds_through_training_with_quantizers_to_the_exported_codes(tmp_path: Path) -> None:
    module = net()
    masks = sparsify(module, "2:4")
    student = trained(module, masks, tmp_path)
    assert {one.name for one in layer_sparsity(student) if one.two_four} == set(SPARSE)
    model = export_onnx(student, (images(2),))
    assert {one.name for one in graph_sparsity(model) if one.two_four} == set(SPARSE)
    lowered = graph_sparsity(lower_qdq(model, load_target("portable")))
    assert {one.name for one in lowered if one.two_four} == set(SPARSE)
    assert all(one.zeros >= 0.5 for one in lowered if one.name in SPARSE)
    assert any(
        value.dtype == ir.DataType.INT8
        for value in lower_qdq(model, load_target("portable")).graph.initializers.values()
    )


def test_a_stored_module_is_made_sparse_as_its_source_is(tmp_path: Path) -> None:
    module = net().eval()
    save_module(module, tmp_path, (images(2),), structure={})
    loaded = load_module(tmp_path)
    ours, theirs = sparsify(loaded, 0.6, ignore=["up"]), sparsify(module, 0.6, ignore=["up"])
    assert ours.kept.keys() == theirs.kept.keys()
    assert all(torch.equal(mask, ours.kept[name]) for name, mask in theirs.kept.items())
    assert layer_sparsity(loaded) == layer_sparsity(module)
    save_module(loaded, tmp_path, (images(2),), structure={})
    assert layer_sparsity(load_module(tmp_path)) == layer_sparsity(module)


# ---- in an ONNX graph


def onnx(text: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\ngraph {text}')
    for name, array in weights.items():
        value = next(one for node in model.graph for one in node.inputs if one is not None and one.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


def test_zeros_of_a_graph_are_counted_along_what_its_layers_sum_over() -> None:
    rows = np.array([[1, 0, 0, 2], [0, 0, 3, 0]], np.float32)
    text = """(float[N,4] x) => (float[N,2] y) {
        a = MatMul(x, tall)  b = Gemm<transB=1>(x, wide)  c = Gemm(x, tall)
        z = Transpose<perm=[1,0]>(x)  d = MatMul(left, z)  e = Transpose<perm=[1,0]>(d)
        ab = Add(a, b)  ce = Add(c, e)  y = Add(ab, ce)
    }"""
    model = onnx(text, tall=rows.T, wide=rows, left=rows)
    assert [(one.weights, one.zeros, one.two_four) for one in graph_sparsity(model)] == [(8, 5 / 8, True)] * 4
    model = onnx(text, tall=np.ones((4, 2), np.float32), wide=rows * 0 + 1, left=rows + 1)
    assert [(one.zeros, one.two_four) for one in graph_sparsity(model)] == [(0, False)] * 4


def test_zeros_of_codes_are_where_the_zero_point_is() -> None:
    codes = np.array([[5, 7, 5, 7], [3, 2, 2, 3]], np.uint8)
    text = """(float[N,4] x) => (float[N,2] y) {
        w = DequantizeLinear<axis=0>(codes, scale, point)
        y = Gemm<transB=1>(x, w)
    }"""
    scale = np.ones(2, np.float32)
    [found] = graph_sparsity(onnx(text, codes=codes, scale=scale, point=np.array([5, 2], np.uint8)))
    assert (found.weights, found.zeros, found.two_four) == (8, 0.5, True)
    [found] = graph_sparsity(onnx(text, codes=codes, scale=scale, point=np.array([2, 5], np.uint8)))
    assert found.zeros == 0 and not found.two_four
    blocked = text.replace("axis=0", "axis=1, block_size=2")
    points = np.array([[5, 7], [3, 3]], np.uint8)
    [found] = graph_sparsity(onnx(blocked, codes=codes, scale=np.ones((2, 2), np.float32), point=points))
    assert found.zeros == 4 / 8


def test_zeros_of_integer_operators() -> None:
    text = """(uint8[N,4] x, uint8[N,4,2,2] image) => (int32[N,2] y, int32[N,2,2,2] z) {
        y = MatMulInteger(x, tall, p, points)
        z = ConvInteger(image, filters)
    }"""
    tall = np.array([[5, 7], [5, 7], [1, 7], [2, 1]], np.uint8)
    filters = np.array([[0, 1, 0, 2], [0, 0, 0, 1]], np.int8).reshape(2, 4, 1, 1)
    model = onnx(text, tall=tall, points=np.array([5, 7], np.uint8), filters=filters, p=np.zeros((), np.uint8))
    assert [(one.zeros, one.two_four) for one in graph_sparsity(model)] == [(5 / 8, True), (5 / 8, True)]
    model = onnx(text, tall=tall, points=np.array([7, 5], np.uint8), filters=filters + 1, p=np.zeros((), np.uint8))
    assert [(one.zeros, one.two_four) for one in graph_sparsity(model)] == [(0, False)] * 2


def test_the_pattern_by_hand() -> None:
    good = np.array([[1, 0, 1, 0, 0, 1, 1, 1]], bool)
    assert is_two_four(good, axis=1) and not is_two_four(~good, axis=1)
    assert not is_two_four(np.ones((1, 6), bool), axis=1)  # fours do not fit
    assert is_two_four(good.T.copy(), axis=0, groups=2) and not is_two_four(good.T.copy(), axis=0, groups=4)
