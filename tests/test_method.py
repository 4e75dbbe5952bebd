"""How models are to be quantized: what is asked for each layer, on the command line and in recipes, and mistakes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgekit.errors import TargetError
from edgekit.method import CALIBRATORS, EVERYTHING, LayerMethod, Method
from edgekit.pipelines.recipe import load_recipe, merged_method
from edgekit.quant.spec import QuantSpec

WANTED = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)


def layered(*layers: dict[str, Any]) -> Method:
    return Method.model_validate({"weights": "int8", "layers": layers})


def test_without_exceptions_every_layer_is_like_the_others() -> None:
    method = Method(calibrator="kld", precision="int16")
    assert method.for_layer("anything") == method


def test_an_exception_changes_what_it_names_and_nothing_else() -> None:
    method = layered({"match": "layer1.*", "precision": "float", "calibrator": "minmax"})
    own = method.for_layer("layer1.conv")
    assert (own.precision, own.calibrator) == ("float", "minmax")
    assert own.model_copy(update={"precision": "int8", "calibrator": "auto"}) == method
    assert method.for_layer("layer2.conv") == method
    assert method.for_layer("xlayer1.conv") == method


def test_of_two_exceptions_the_later_one_wins_key_by_key() -> None:
    method = layered(
        {"match": "*", "weights": "int4", "block_size": 32, "rounding": "nearest"},
        {"match": "head*", "weights": "int8", "block_size": 0},
        {"match": "*.[0-1]", "rounding": "adaround"},
    )
    found = {name: method.for_layer(name) for name in ("body", "head", "head.1", "head.2")}
    assert {name: (own.weights, own.block_size, own.rounding) for name, own in found.items()} == {
        "body": ("int4", 32, "nearest"),
        "head": ("int8", 0, "nearest"),
        "head.1": ("int8", 0, "adaround"),
        "head.2": ("int8", 0, "nearest"),
    }


def test_names_are_matched_with_their_case() -> None:
    assert layered({"match": "Conv*", "precision": "float"}).for_layer("conv1").precision == "int8"


def test_calibrators_are_all_that_anyone_asks_for() -> None:
    method = layered({"match": "a", "calibrator": "kld"}, {"match": "b", "precision": "float"})
    assert method.calibrators == {"auto", "kld"}
    assert EVERYTHING.calibrators == {"auto"}


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_calibrator_can_be_asked_for(name: str) -> None:
    assert Method(calibrator=name).calibrator == name
    assert LayerMethod(match="*", calibrator=name).calibrator == name


@pytest.mark.parametrize(("name", "near"), [("mimmax", "minmax"), ("Auto", "auto"), ("percentil", "percentile")])
@pytest.mark.parametrize("whole", [True, False])
def test_an_unknown_calibrator_gets_a_hint(name: str, near: str, whole: bool) -> None:
    fields: dict[str, Any] = {"calibrator": name} if whole else {"layers": [{"match": "a", "calibrator": name}]}
    with pytest.raises(ValidationError, match=f"did you mean '{near}'.*known calibrators: auto, eq"):
        Method.model_validate(fields)


def test_a_calibrator_like_no_other_gets_the_list() -> None:
    with pytest.raises(ValidationError, match="known calibrators: auto, eq") as caught:
        Method(calibrator="zzzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": "int3"},
        {"block_size": 48},
        {"rounding": "up"},
        {"rounding_budget": 0},
        {"precision": "int5"},
        {"colour": "red"},
        {"layers": [{"precision": "float"}]},
        {"layers": [{"match": "*", "colour": "red"}]},
    ],
    ids=str,
)
def test_what_there_is_not_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Method.model_validate(fields)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, WANTED),
        ({"weights": "int8", "block_size": 32}, QuantSpec("int8", True, True, narrow_range=True, block_size=32)),
        ({"weights": "int4"}, QuantSpec("int4", True, True)),
        ({"weights": "int4", "block_size": 64}, QuantSpec("int4", True, True, block_size=64)),
        ({"weights": "uint4", "block_size": 32}, QuantSpec("uint4", False, True, block_size=32)),
        ({"weights": "uint2"}, QuantSpec("uint2", False, True)),
    ],
    ids=str,
)
def test_the_grid_of_weights(choices: dict[str, Any], expected: QuantSpec) -> None:
    assert Method.model_validate(choices).weight_spec(WANTED) == expected


def test_a_target_that_wants_one_scale_a_tensor_gets_it() -> None:
    wanted = QuantSpec("int8", symmetric=True)
    assert EVERYTHING.weight_spec(wanted) == wanted


@pytest.mark.parametrize(
    ("choices", "summary"),
    [
        ({}, "int8 weights, int8 activations, 'auto' ranges"),
        (
            {"weights": "int4", "block_size": 32, "activations": "none"},
            "int4 weights in blocks of 32, float activations",
        ),
        ({"activations": "dynamic"}, "int8 weights, dynamic activations"),
        ({"precision": "int16", "calibrator": "kld"}, "int8 weights, int16 activations, 'kld' ranges"),
    ],
    ids=str,
)
def test_a_summary_says_the_main_choices(choices: dict[str, Any], summary: str) -> None:
    assert Method.model_validate(choices).summary == summary


def test_the_command_line_wins_over_the_recipe() -> None:
    base = Method(calibrator="kld", weights="int4", layers=(LayerMethod(match="a", precision="int16"),))
    method = merged_method(
        base, {"calibrator": "mse"}, ["a:precision=int8,block_size=32", "b:c*:weights=uint4"], ["head*"]
    )
    assert (method.calibrator, method.weights) == ("mse", "int4")
    assert method.layers == (
        LayerMethod(match="a", precision="int16"),
        LayerMethod(match="a", precision="int8", block_size=32),
        LayerMethod(match="b:c*", weights="uint4"),
        LayerMethod(match="head*", precision="float"),
    )
    assert method.for_layer("a").precision == "int8"
    assert merged_method(base, {}) == base


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layer1",
        "layer1:",
        ":precision=float",
        "layer1:precision",
        "layer1:precision=",
        "layer1:=float",
        "a:precision=float,",
    ],
)
def test_an_exception_that_is_no_pattern_and_choices(text: str) -> None:
    with pytest.raises(
        TargetError, match=r"expected PATTERN:KEY=VALUE.*precision, calibrator, weights, block_size, rounding"
    ):
        merged_method(EVERYTHING, {}, [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:precison=float", "unknown key 'layers.0.precison'; "),
        ("a:precision=int9", "'layers.0.precision' is 'int9': "),
        ("a:block_size=48", "'layers.0.block_size' is 48: "),
        ("a:calibrator=mimmax", "'layers.0.calibrator' is 'mimmax': did you mean 'minmax'"),
    ],
)
def test_a_mistake_in_an_exception_says_where(text: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        merged_method(EVERYTHING, {}, [text])
    assert message in str(caught.value)
    assert str(caught.value).startswith("command line: ")


def test_a_mistake_in_the_given_fields_says_where() -> None:
    with pytest.raises(TargetError, match="command line: 'calibrator' is 'mimmax': did you mean 'minmax'"):
        merged_method(EVERYTHING, {"calibrator": "mimmax"})


def test_a_recipe_is_read_with_its_exceptions(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[method]\ncalibrator = "kld"\n[[method.layers]]\nmatch = "head"\nprecision = "float"\n')
    method = load_recipe(path).method
    assert method == Method(calibrator="kld", layers=(LayerMethod(match="head", precision="float"),))
    path.write_text('[method]\nsmooth = true\ncalibrator = "mimmax"\n')
    with pytest.raises(TargetError, match=r"line 3: 'method.calibrator' is 'mimmax': did you mean 'minmax'"):
        load_recipe(path)


def test_a_misspelt_key_of_an_exception_is_explained() -> None:
    with pytest.raises(TargetError, match=r"unknown key 'layers\.0\.precison'; did you mean 'precision'\?"):
        merged_method(Method(), {}, ["head*:precison=float"])
    with pytest.raises(TargetError, match=r"--layer 'head\*:match=x': expected PATTERN:KEY=VALUE"):
        merged_method(Method(), {}, ["head*:match=x"])
