"""Groups of channels in networks where they are known, and cuts that compute what the masked network does."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prune_nets as nets
from edgekit.channels import kept_shares, total_macs
from edgekit.errors import BackendError, DataError, SourceError
from edgekit.training.prune import find_groups
from edgekit.training.prune.attention import HeadAttention
from edgekit.training.prune.couplings import Coupling
from edgekit.training.prune.cut import Cut, prove
from edgekit.training.prune.slots import Member, Slot

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(12).reshape(2, 6) % 11

Readers = Mapping[str, tuple[tuple[str, Callable[[int], object]], ...]]
"""By group: where its unit is read, as a weight and what of it is zero without the unit."""


def column(parameter: str, size: int = 1, *, offset: int = 0) -> tuple[str, Callable[[int], object]]:
    """`size` input channels in a row for each unit."""
    return parameter, lambda unit: (slice(None), slice(offset + unit * size, offset + (unit + 1) * size))


def row(parameter: str, *, times: int = 1, step: int = 1) -> tuple[str, Callable[[int], object]]:
    """Rows for each unit: `times` of them, `step` apart."""
    return parameter, lambda unit: [unit + step * index for index in range(times)]


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, tuple[int, int]], Readers]] = {
    "chain": (
        nets.Chain, IMAGES, {"conv1": (8, 1), "conv2": (12, 1), "fc1": (10, 1)},
        {"conv1": (column("conv2.weight"),), "conv2": (column("fc1.weight", 16),), "fc1": (column("fc2.weight"),)},
    ),
    "f(0) is not 0": (
        lambda: nets.Chain(nn.Softplus), IMAGES, {"conv1": (8, 1), "conv2": (12, 1), "fc1": (10, 1)},
        {"conv1": (column("conv2.weight"),), "conv2": (column("fc1.weight", 16),), "fc1": (column("fc2.weight"),)},
    ),
    "residual": (
        nets.Residual, IMAGES, {"stem": (8, 1), "a": (6, 1), "c": (10, 1)},
        {
            "stem": (column("a.weight"), column("c.weight"), column("short.weight")),
            "a": (column("b.weight"),),
            "c": (column("head.weight"),),
        },
    ),
    "concat": (
        nets.Dense, IMAGES, {"a": (6, 1), "b": (8, 1)},
        {"a": (column("b.weight", offset=3), column("c.weight", offset=11)), "b": (column("c.weight"),)},
    ),
    "split": (
        nets.Gated, IMAGES, {"conv": (6, 2), "mix": (8, 1), "wide": (10, 2)},
        {"conv": (column("mix.weight"),), "mix": (column("wide.weight"),), "wide": (column("narrow.weight"),)},
    ),
    "grouped and depthwise": (
        nets.Grouped, IMAGES, {"stem": (4, 4), "grouped": (6, 4), "point": (10, 1)},
        {
            "stem": (column("grouped.weight"),),
            "grouped": (("point.weight", lambda unit: (slice(None), slice(unit, None, 6))),),
            "point": (column("head.weight", 2),),
        },
    ),
    "transposed": (
        nets.Upward, torch.randn(2, 2, 9), {"a": (8, 1), "up": (6, 2), "grouped": (3, 2), "volume": (5, 1)},
        {
            "a": (row("up.weight"),),
            "up": (row("grouped.weight", times=2, step=6),),
            "grouped": (("volume.weight", lambda unit: (slice(None), slice(unit, None, 3))),),
            "volume": (column("last.weight"),),
        },
    ),
    "shared weight": (
        nets.Shared, IMAGES, {"stem": (8, 1)}, {"stem": (column("twice.weight"), column("head.weight"))},
    ),
    "squeeze-excite": (
        nets.Squeeze, IMAGES, {"stem": (8, 1), "reduce": (4, 1)},
        {
            "stem": (column("reduce.weight"), column("mask.weight"), column("head.weight")),
            "reduce": (column("expand.weight"),),
        },
    ),
    "group norm": (
        nets.Norms, IMAGES, {"a": (4, 4), "b": (6, 1), "c": (6, 1)},
        {"a": (column("b.weight", 4),), "c": (column("d.weight"),)},
    ),
    "channel shuffle": (nets.Shuffle, IMAGES, {"a": (2, 4), "b": (4, 2)}, {}),
    "option A, a layer": (
        lambda: nets.OptionA(inside=False), IMAGES, {"stem": (8, 1), "conv1": (10, 1), "conv2": (16, 1)},
        {"stem": (column("conv1.weight"), column("short.weight")), "conv2": (column("head.weight"),)},
    ),
    "option A, in forward": (
        lambda: nets.OptionA(inside=True), IMAGES, {"stem": (8, 1), "conv1": (10, 1), "conv2": (16, 1)},
        {"stem": (column("conv1.weight"), column("padded_channels.weight")), "conv2": (column("head.weight"),)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_cut_network_computes_what_it_does_with_these_channels_masked(case: str) -> None:
    """The mask is set by hand here: zeros where a unit is read."""
    build, inputs, expected, readers = CASES[case]
    prunable = find_groups(randomized(build()), [inputs])
    assert {group.name: (group.units, group.width) for group in prunable.groups} == expected
    assert prunable.remarks == ()

    masked = copy.deepcopy(prunable.module)
    kept = {name: half(units) for name, (units, _) in expected.items() if name in readers or not readers}
    for name, places in readers.items():
        for parameter, place in places:
            for unit in set(range(expected[name][0])) - set(kept[name].tolist()):
                masked.get_parameter(parameter).data[place(unit)] = 0
    names = list(prunable.module.state_dict())
    pruned = prunable.cut(kept)
    assert list(pruned.state_dict()) == names
    if readers:
        more = torch.cat([inputs, 2 * inputs, inputs - 1])
        torch.testing.assert_close(evaluated(pruned, more), evaluated(masked, more), rtol=0, atol=1e-12)
    assert pruned.train()(torch.cat([inputs] * 3)).shape[0] == 6


@pytest.mark.parametrize("case", CASES)
def test_costs_foretell_what_a_second_analysis_counts(case: str) -> None:
    build, inputs, expected, _ = CASES[case]
    prunable = find_groups(build(), [inputs])
    kept = {name: half(units) for name, (units, _) in expected.items()}
    foretold = total_macs(prunable.costs, kept_shares(prunable.groups, kept))
    again = find_groups(prunable.cut(kept), [inputs])
    assert foretold == pytest.approx(total_macs(again.costs, {}), rel=1e-12)
    assert foretold < total_macs(prunable.costs, {})


def test_macs_and_parameters_as_counted_by_hand() -> None:
    """(N, 3, 8, 8) -> 8 channels at 8x8 -> 12 at 4x4 -> 192 -> 10 -> 5."""
    prunable = find_groups(nets.Chain(), [IMAGES])
    assert {cost.name: cost.macs for cost in prunable.costs} == {
        "conv1": 3 * 8 * 9 * 64,
        "conv2": 8 * 12 * 9 * 16,
        "fc1": 192 * 10,
        "fc2": 10 * 5,
    }
    kept = {"conv1": np.arange(6), "conv2": np.arange(3), "fc1": np.arange(5)}
    shares = kept_shares(prunable.groups, kept)
    assert total_macs(prunable.costs, shares) == 3 * 6 * 9 * 64 + 6 * 3 * 9 * 16 + 48 * 5 + 5 * 5

    assert prunable.costs[2].reads == (("conv2", 1.0),) and prunable.costs[3].makes == ()


def test_costs_of_layers_with_several_groups_and_with_none() -> None:
    costs = {cost.name: cost for cost in find_groups(nets.Dense(), [IMAGES]).costs}
    assert costs["c"].reads == (("a", 6 / 17), ("b", 8 / 17)) and costs["c"].makes == ()
    costs = {cost.name: cost for cost in find_groups(nets.Grouped(), [IMAGES]).costs}
    assert costs["grouped"].macs == 24 * 4 * 9 * 64
    assert (costs["grouped"].reads, costs["grouped"].makes) == ((("stem", 1.0),), (("grouped", 1.0),))
    assert (costs["depthwise"].macs, costs["depthwise"].reads) == (10 * 9 * 64, ())
    shared = {cost.name: cost for cost in find_groups(nets.Shared(), [IMAGES]).costs}["twice"]
    assert shared.macs == 2 * 8 * 8 * 9 * 64


def test_outputs_and_inputs_of_the_network_keep_their_channels() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            middle = self.b(F.relu(self.a(x)))
            return {"features": middle.permute(0, 2, 3, 1), "image": x + self.c(F.relu(middle))}

    prunable = find_groups(TwoOutputs(), [IMAGES])
    assert [group.name for group in prunable.groups] == ["a"]
    assert prunable.cut({"a": np.array([2, 5])})(IMAGES)["features"].shape == (2, 8, 8, 6)


def test_padding_that_cannot_be_rewritten_keeps_residual_widths() -> None:
    prunable = find_groups(nets.Untraceable(), [IMAGES])
    assert [group.name for group in prunable.groups] == ["conv1"] and prunable.replaced == ()
    assert "conv2" in prunable.remarks[0] and "stem" in prunable.remarks[0]


def test_shortcuts_are_replaced_exactly() -> None:
    for inside, path in ((False, "short"), (True, "padded_channels")):
        net = randomized(nets.OptionA(inside=inside))
        prunable = find_groups(net, [IMAGES])
        assert prunable.replaced == (path,)
        assert torch.equal(prunable.module(IMAGES), net(IMAGES))
        conv = prunable.module.get_submodule(path)
        assert not conv.weight.requires_grad and conv.stride == (2, 2)
        parts = [part for group in prunable.groups for part in prunable.tensors(group.name).parts]
        assert path not in {part.layer for part in parts}


ATTENTIONS: dict[str, tuple[Callable[[int, int], nn.Module], str, int]] = {
    "separate": (nets.SelfAttention, "q", 4),
    "packed": (lambda width, heads: nets.SelfAttention(width, heads, packed=True), "qkv", 12),
    "width from input": (nets.WidthFromInput, "qkv", 12),
    "torch": (nets.TorchAttention, "inner", 12),
    "BERT": (nets.BertAttention, "self.query", 4),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_heads_mlp_and_embedding_of_a_transformer(kind: str) -> None:
    build, first, width = ATTENTIONS[kind]
    net = nets.Transformer(build).double()
    prunable = find_groups(net, [TOKENS])
    expected = {"embed": (16, 1)}
    for block in ("blocks.0", "blocks.1"):
        expected |= {f"{block}.attention.{first}": (4, width), f"{block}.fc1": (32, 1)}
    assert {group.name: (group.units, group.width) for group in prunable.groups} == expected
    macs = sum(cost.macs for cost in prunable.costs)
    tokens = 7
    assert macs == 2 * (tokens * 16 * 16 * (3 + 1 + 4) + 2 * tokens**2 * 16) + 16 * 3

    heads = {f"blocks.0.attention.{first}": np.array([0, 2, 3]), f"blocks.1.attention.{first}": np.array([1])}
    kept = {name: half(units) for name, (units, _) in expected.items()} | heads
    foretold = total_macs(prunable.costs, kept_shares(prunable.groups, kept))
    names = list(prunable.module.state_dict())
    pruned = prunable.cut(kept)
    assert list(pruned.state_dict()) == names
    assert total_macs(find_groups(pruned, [TOKENS]).costs, {}) == pytest.approx(foretold)
    counts = [
        value
        for module in pruned.modules()
        for name in ("num_heads", "num_attention_heads")
        if (value := getattr(module, name, None) or getattr(module, "meta", {}).get(name))
    ]
    assert counts == [3, 1]
    assert pruned.train()(torch.cat([TOKENS] * 3)).shape == (6, 3)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_cut_heads_leave_what_the_other_heads_compute(kind: str) -> None:
    """By hand: the columns that join the heads are zero."""
    build, first, _ = ATTENTIONS[kind]
    net = nets.Transformer(build).double().eval()
    pruned = find_groups(net, [TOKENS]).cut({f"blocks.0.attention.{first}": np.array([0, 2])})
    joins = {
        "separate": "proj",
        "packed": "proj",
        "width from input": "proj",
        "torch": "inner.out_proj",
        "BERT": "dense",
    }[kind]
    weight = net.get_parameter(f"blocks.0.attention.{joins}.weight")
    weight.data[:, 4:8] = 0
    weight.data[:, 12:] = 0
    torch.testing.assert_close(evaluated(pruned, TOKENS), evaluated(net, TOKENS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_heads_can_be_cut_again(kind: str) -> None:
    build, first, _ = ATTENTIONS[kind]
    name = f"blocks.1.attention.{first}"
    once = find_groups(nets.Transformer(build), [TOKENS]).cut({name: np.array([0, 1, 3]), "embed": np.arange(12)})
    again = find_groups(once, [TOKENS])
    assert {group.name: group.units for group in again.groups}[name] == 3 and again.remarks == ()
    assert find_groups(again.cut({name: np.array([1, 2])}), [TOKENS]).costs[-1].macs == 2 * 7 * 7 * 8


def test_attention_that_starts_with_its_normalization() -> None:
    prunable = find_groups(nets.Transformer(nets.NormInside), [TOKENS])
    groups = {group.name: (group.units, group.width) for group in prunable.groups}
    assert groups["blocks.0.attention.to_qkv"] == (4, 18) and groups["embed"] == (16, 1) and prunable.remarks == ()
    pruned = prunable.cut({"blocks.0.attention.to_qkv": np.array([0, 3]), "embed": np.arange(1, 12)})
    attention = pruned.get_submodule("blocks.0.attention")
    assert (attention.heads, attention.norm.normalized_shape) == (2, (11,))
    assert attention.to_qkv.weight.shape == (36, 11) and attention.to_out[0].weight.shape == (11, 12)


def test_queries_that_share_keys_and_values_go_together() -> None:
    prunable = find_groups(nets.Transformer(nets.GroupedQueries), [TOKENS])
    groups = {group.name: (group.units, group.width) for group in prunable.groups}
    assert groups["blocks.0.attention.wq"] == (2, 8)
    attention = prunable.cut({"blocks.0.attention.wq": np.array([1])}).get_submodule("blocks.0.attention")
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (2, 1, 4)
    assert attention.wk.weight.shape == (4, 16) and attention.wo.weight.shape == (16, 8)


def test_a_number_of_heads_in_forward_is_found_out() -> None:
    prunable = find_groups(
        nets.Transformer(lambda width, heads: nets.SelfAttention(width, heads, fixed=True)), [TOKENS]
    )
    assert "blocks.0.attention.q" not in {group.name for group in prunable.groups}
    assert any("blocks.0.attention.q stay" in remark for remark in prunable.remarks)


def test_torch_s_encoder_layers_with_masks() -> None:
    """Pruned attention takes the same masks as torch's, with every way to call it."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    prunable = find_groups(encoder, {"src": x.numpy()})
    pruned = prunable.cut({"layers.0.self_attn": np.array([1, 3])}).eval()
    weight = encoder.get_parameter("layers.0.self_attn.out_proj.weight")
    weight.data[:, :4] = weight.data[:, 8:12] = 0
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for call in (
        {},
        {"mask": causal},
        {"src_key_padding_mask": padding},
        {"mask": causal == 0, "src_key_padding_mask": padding},
    ):
        with torch.enable_grad():  # keeps torch's fused layers out, which put zeros where tokens are padded
            theirs = encoder.eval()(x, **call)
        torch.testing.assert_close(pruned(x, **call)[0], theirs[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(pruned(x, **call)[1, :3], theirs[1, :3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_in_the_place_of_torch_s_computes_the_same(batch_first: bool, need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(12, 3, batch_first=batch_first).double().eval()
    nn.init.normal_(theirs.in_proj_bias)
    ours = HeadAttention.of(theirs)
    x, y, z = (torch.randn(2, 5, 12).double() for _ in range(3))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    per_head = torch.randn(6, 5, 5).double()
    calls: list[tuple[tuple[Tensor, ...], dict[str, object]]] = [
        ((x, x, x), {}),
        ((x, y, z), {"average_attn_weights": False}),
        ((x, y, y), {"attn_mask": per_head}),
        ((x, x, x), {"key_padding_mask": padding.double() * -1e9, "attn_mask": per_head[0]}),
        ((x[0], y[0], z[0]), {"key_padding_mask": padding[1], "attn_mask": torch.eye(5, dtype=torch.bool)}),
    ]
    for inputs, options in calls:
        placed = inputs if batch_first or inputs[0].dim() == 2 else tuple(one.transpose(0, 1) for one in inputs)
        found = ours(*placed, need_weights=need_weights, **options)
        expected = theirs(*placed, need_weights=need_weights, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
        assert (found[1] is None) == (expected[1] is None)
        if expected[1] is not None:
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)


def test_a_decoder_s_two_attentions() -> None:
    net = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    prunable = find_groups(net, {"tgt": torch.randn(2, 5, 16), "memory": torch.randn(2, 7, 16)})
    assert {group.name: group.units for group in prunable.groups} == {
        "self_attn": 4,
        "multihead_attn": 4,
        "linear1": 32,
    }
    costs = {cost.name: cost.macs for cost in prunable.costs}
    assert costs["multihead_attn.in_proj"] == 16 * 16 * (5 + 7 + 7)
    assert costs["multihead_attn.attention"] == 2 * 5 * 7 * 16
    pruned = prunable.cut({"multihead_attn": np.array([0, 3]), "self_attn": np.array([2])})
    assert pruned.multihead_attn.out_proj.weight.shape == (16, 8)


def test_recurrent_layers_keep_what_they_read_and_make() -> None:
    class Recurrent(nn.Module):
        def __init__(self, kind: type[nn.RNNBase]) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 6)
            self.rnn, self.head = kind(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.b(F.relu(self.a(x))))[0])

    for kind in (nn.LSTM, nn.GRU):
        prunable = find_groups(Recurrent(kind), [torch.randn(2, 7, 3)])
        assert [group.name for group in prunable.groups] == ["a"]
        assert "channels of b" in prunable.remarks[0]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.out(x + F.relu(self.mix(x)))

    pruned = find_groups(Tied(), [TOKENS]).cut({"embed": np.arange(5)})
    assert pruned.out.weight is pruned.embed.weight and pruned.embed.weight.shape == (11, 5)


def test_weights_keep_their_gradients_and_flags() -> None:
    net = nets.Chain()
    net.conv2.weight.requires_grad_(False)
    prunable = find_groups(net, [IMAGES])
    prunable.module(IMAGES).sum().backward()
    gradient = prunable.module.conv1.weight.grad.clone()
    pruned = prunable.cut({"conv1": np.array([1, 6])})
    assert torch.equal(pruned.conv1.weight.grad, gradient[[1, 6]])
    assert not pruned.conv2.weight.requires_grad and net.conv1.weight.shape[0] == 8


def test_ignored_layers() -> None:
    assert [group.name for group in find_groups(nets.Chain(), [IMAGES], ignore=["conv*"]).groups] == ["fc1"]
    assert [group.name for group in find_groups(nets.Residual(), [IMAGES], ignore=["short", "b"]).groups] == ["a"]
    net = nets.Transformer(nets.SelfAttention)
    names = {group.name for group in find_groups(net, [TOKENS], ignore=["blocks.1", "embed"]).groups}
    assert names == {"blocks.0.attention.q", "blocks.0.fc1"}
    with pytest.raises(SourceError, match=r"'conv_1' in 'ignore'; did you mean 'conv1'"):
        find_groups(nets.Chain(), [IMAGES], ignore=["conv_1"])


def test_a_layer_inside_attention_is_ignored() -> None:
    net = nets.Transformer(nets.SelfAttention)
    names = {group.name for group in find_groups(net, [TOKENS], ignore=["blocks.0.attention.q"]).groups}
    assert names == {"embed", "blocks.0.fc1", "blocks.1.attention.q", "blocks.1.fc1"}
    names = {group.name for group in find_groups(net, [TOKENS], ignore=["blocks.0.attention.proj"]).groups}
    assert "embed" not in names and "blocks.0.attention.q" in names
    net = nets.Transformer(nets.BertAttention)
    names = {group.name for group in find_groups(net, [TOKENS], ignore=["*.key"]).groups}
    assert names == {"embed", "blocks.0.fc1", "blocks.1.fc1"}


def test_half_precision_stays() -> None:
    pruned = find_groups(nets.Residual().bfloat16(), [IMAGES.bfloat16()]).cut({"a": np.arange(2)})
    assert {value.dtype for value in pruned.parameters()} == {torch.bfloat16}
    assert pruned(IMAGES.bfloat16()).shape == (2, 4)


def test_what_cannot_be_cut_is_said() -> None:
    with pytest.raises(SourceError, match="Chain has no channels that can be cut"):
        find_groups(nets.Chain(), [IMAGES], ignore=["*"])
    with pytest.raises(SourceError, match="Linear has no channels"):
        find_groups(nn.Linear(3, 4), [torch.randn(2, 3)])

    class Detached(nets.Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(SourceError, match="no output of Detached depends on its weights"):
        find_groups(Detached(), [IMAGES])


def test_examples_that_do_not_fit() -> None:
    with pytest.raises(SourceError, match="the model does not run on the batch: RuntimeError"):
        find_groups(nets.Chain(), [IMAGES[:, :2]])
    with pytest.raises(SourceError, match="name and count them as forward does"):
        find_groups(nets.Chain(), [IMAGES, IMAGES])


def test_a_choice_that_does_not_fit() -> None:
    prunable = find_groups(nets.Chain(), [IMAGES])
    for choice, told in (
        ({"conv9": np.arange(3)}, "no group 'conv9'"),
        ({"conv1": np.array([], np.intp)}, "at least one"),
        ({"conv1": np.array([1, 1])}, "each once"),
        ({"conv1": np.array([8])}, "unit 8; it has 8"),
    ):
        with pytest.raises(DataError, match=told):
            prunable.cut(choice)
    prunable.cut({"conv1": np.arange(4)})
    with pytest.raises(SourceError, match="cut already"):
        prunable.cut({"conv1": np.arange(2)})


def test_what_depends_on_all_channels_is_found_out() -> None:
    """A mean over channels is another one without some: no mask shows that, the proof does."""

    class MeanOver(nets.Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act1(self.norm1(self.conv1(x)))
            return super().forward(IMAGES[:1] * 0 + x.mean(1, keepdim=True))

    prunable = find_groups(MeanOver(), [IMAGES])
    assert all("conv1" not in group.makers for group in prunable.groups)


def test_the_proof_sees_a_wrong_cut() -> None:
    prunable = find_groups(nets.Residual(), [IMAGES])
    [coupling] = [one for one in prunable._couplings if one.name == "a"]
    cut = Cut(coupling, np.array([0, 1]))
    assert prove(prunable.module, None, prunable._call, [cut], (), {}) == ""
    wrong = swapped(coupling)
    assert "is off by" in prove(prunable.module, None, prunable._call, [Cut(wrong, cut.removed)], (), {})
    prunable._couplings = (wrong,)
    before = copy.deepcopy(prunable.module.state_dict())
    with pytest.raises(SourceError, match="computes something else when channels of a are cut"):
        prunable.cut({"a": np.arange(2, 6)})
    assert prunable.module.state_dict().keys() == before.keys()
    assert prunable.module.a.out_channels == 6


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(BackendError, match=r"pip install 'edgekit\[train\]'"):
        find_groups(nets.Chain(), [IMAGES])


def swapped(coupling: Coupling) -> Coupling:
    """The same with the units of what reads them in another order."""
    members = [
        member
        if member.role != "reads"
        else Member(
            member.layer,
            member.role,
            tuple(Slot(slot.tensor, slot.axis, slot.places[::-1]) for slot in member.slots),
            member.channels,
        )
        for member in coupling.members
    ]
    return replace(coupling, members=tuple(members))


def randomized(net: nn.Module) -> nn.Module:
    """With statistics and scales of normalizations that are not those of a new network."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(module, name, None)
            if value is not None and value.dim() == 1:
                value.data = 0.5 + torch.rand(value.shape, generator=generator)
    return net


def half(units: int) -> np.ndarray:
    """Half of the units, not the first ones."""
    return np.sort(np.random.default_rng(3).permutation(units)[: (units + 1) // 2])


def evaluated(net: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).double().eval()(inputs.double() if inputs.is_floating_point() else inputs)
