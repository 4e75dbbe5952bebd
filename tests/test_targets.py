"""Target files: the shipped ones, and what a mistake in one's own is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.backend import backend_names
from edgekit.errors import TargetError
from edgekit.quant.spec import QuantSpec
from edgekit.target import PORTABLE, Quantization, Target, load_target, target_folder, target_names

MINIMAL = 'name = "board"\nsummary = "a board"\n'


def written(folder: Path, text: str, name: str = "board.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(TargetError) as caught:
        load_target(written(folder, text))
    return str(caught.value)


@pytest.mark.parametrize("name", target_names())
def test_every_shipped_target_has_a_backend_and_rules(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.backend in backend_names()
    assert target.device.arch and target.summary
    assert target.graph.format in target.graph.formats
    assert {"Conv", "MatMul", "Gemm", "Add"} <= set(target.quantization.quantize)
    assert not set(target.quantization.quantize) & set(target.quantization.pass_through)


def test_the_names_of_shipped_targets_leave_out_the_rules_that_they_extend() -> None:
    assert target_names() == ["arm-onnxruntime", "cuda-tensorrt", "x86-onnxruntime", "x86-openvino"]
    assert (target_folder() / f"{PORTABLE}.toml").is_file()


def test_weights_are_one_grid_for_all_and_activations_are_what_each_runtime_wants() -> None:
    weight = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)
    activations = {
        "arm-onnxruntime": QuantSpec("int8"),
        "cuda-tensorrt": QuantSpec("int8", symmetric=True),
        "x86-onnxruntime": QuantSpec("uint8"),
        "x86-openvino": QuantSpec("uint8"),
        "portable": QuantSpec("uint8"),
    }
    for name, activation in activations.items():
        rules = load_target(name).quantization
        assert rules.weight.spec == weight, name
        assert rules.activation.spec == activation, name


@pytest.mark.parametrize(
    ("op_type", "rule"), [("Conv", "quantize"), ("MaxPool", "pass_through"), ("Softmax", "float"), ("Pad", "float")]
)
def test_the_rule_for_an_operator(op_type: str, rule: str) -> None:
    assert load_target("portable").rule_for(op_type) == rule


def test_every_shipped_target_quantizes_no_more_than_the_portable_rules_calibrate() -> None:
    portable = load_target("portable").quantization
    for name in target_names():
        rules = load_target(name).quantization
        assert set(rules.quantize) <= set(portable.quantize), name
        assert set(rules.pass_through) <= set(portable.pass_through), name


def test_a_file_by_its_path_extends_a_shipped_target_key_by_key(tmp_path: Path) -> None:
    text = MINIMAL + 'extends = "arm-onnxruntime"\n[device]\nisa = ["dotprod", "i8mm"]\n[runtime]\nthreads = 2\n'
    target, base = load_target(written(tmp_path, text)), load_target("arm-onnxruntime")
    assert (target.name, target.backend) == ("board", "onnxruntime")
    assert (target.device.arch, target.device.isa) == ("aarch64", ("dotprod", "i8mm"))
    assert (target.runtime.threads, target.runtime.options) == (2, base.runtime.options)
    assert target.quantization == base.quantization


def test_a_file_extends_its_neighbour_before_a_shipped_target(tmp_path: Path) -> None:
    written(
        tmp_path, 'extends = "portable"\nname = "mine"\nsummary = "s"\n[runtime]\nthreads = 7\n', "x86-openvino.toml"
    )
    target = load_target(written(tmp_path, MINIMAL + 'extends = "x86-openvino"\n'))
    assert target.runtime.threads == 7


def test_a_target_without_extends_has_the_plain_defaults(tmp_path: Path) -> None:
    target = load_target(written(tmp_path, MINIMAL))
    assert target.quantization == Quantization()
    assert (target.backend, target.graph.opset, target.runtime.threads) == ("", 21, 2)


def test_targets_are_frozen() -> None:
    target = load_target("portable")
    with pytest.raises(ValueError, match="frozen"):
        target.quantization.integer_pad = "always"


def test_an_unknown_target_is_answered_with_the_nearest_name_and_all_of_them() -> None:
    with pytest.raises(TargetError) as caught:
        load_target("x86-openvno")
    message = str(caught.value)
    assert "unknown target 'x86-openvno'" in message and "did you mean 'x86-openvino'?" in message
    assert "arm-onnxruntime, cuda-tensorrt, x86-onnxruntime, x86-openvino" in message and ".toml" in message


def test_an_unknown_target_that_resembles_nothing_gets_no_guess() -> None:
    with pytest.raises(TargetError, match="unknown target 'zzz'") as caught:
        load_target("zzz")
    assert "did you mean" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"nowhere\.toml' does not exist"):
        load_target(str(tmp_path / "nowhere.toml"))


def test_an_unknown_key_is_shown_with_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    text = MINIMAL + "\n[runtime]\n# how many\nthread = 4\n"
    message = refused(tmp_path, text)
    assert "board.toml" in message
    assert "line 6: unknown key 'runtime.thread'; did you mean 'threads'?" in message


def test_an_unknown_table_is_shown_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "\n[quantisation]\nbias = 'int32'\n")
    assert "line 4: unknown key 'quantisation'; did you mean 'quantization'?" in message


def test_an_unknown_key_that_resembles_nothing_gets_the_list(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "[device]\nzzz = 1\n")
    assert "line 4: unknown key 'device.zzz'; known keys are arch, isa" in message


def test_an_unknown_key_in_an_inline_table(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + '[quantization]\nactivation = { dtype = "int8", symetric = true }\n')
    assert "line 4: unknown key 'quantization.activation.symetric'; did you mean 'symmetric'?" in message


def test_a_wrong_type_is_shown_with_its_line_what_was_found_and_what_was_expected(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + '[runtime]\nthreads = "two"\n')
    assert "line 4: 'runtime.threads' is 'two': input should be a valid integer" in message


def test_a_wrong_choice_is_answered_with_the_choices(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + '[quantization]\noutput_q = "sometimes"\nbias = "int32"\n')
    assert "line 4: 'quantization.output_q' is 'sometimes'" in message
    assert "'always' or 'when-consumed'" in message


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + "[runtime]\nthreads = 0\n[graph]\nopset = 12\n")
    assert "line 4: 'runtime.threads' is 0: input should be greater than or equal to 1" in message
    assert "line 6: 'graph.opset' is 12: input should be greater than or equal to 13" in message


def test_the_same_key_in_two_tables_is_found_in_the_right_one(tmp_path: Path) -> None:
    text = MINIMAL + '[quantization.activation]\ndtype = "int8"\n[quantization.weight]\ndtype = "int9"\n'
    assert "line 6: 'quantization.weight.dtype' is 'int9'" in refused(tmp_path, text)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "key 'summary' is missing; add it" in refused(tmp_path, 'name = "board"\n')


def test_a_wrong_entry_of_a_list_is_shown_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + '[quantization]\ndrop_redundant = ["Relu", "LeakyRelu"]\n')
    assert "line 4: 'quantization.drop_redundant.1' is 'LeakyRelu'" in message and "'Relu' or 'Clip'" in message


def test_a_mistake_in_the_file_that_is_extended_names_that_file(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL + "[runtime]\nthread = 4\n", "base.toml")
    message = refused(tmp_path, MINIMAL + 'extends = "base"\n')
    assert "base.toml: line 4: unknown key 'runtime.thread'" in message


def test_text_that_is_no_toml_is_shown_with_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, "name = board\n")
    assert "board.toml: is not valid TOML" in message and "line 1" in message


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(TargetError, match="is not UTF-8 text"):
        load_target(str(path))


def test_a_folder_is_no_target_file(tmp_path: Path) -> None:
    (tmp_path / "board.toml").mkdir()
    with pytest.raises(TargetError, match=r"board\.toml' does not exist"):
        load_target(str(tmp_path / "board.toml"))


def test_targets_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL + 'extends = "second"\n', "first.toml")
    written(tmp_path, MINIMAL + 'extends = "first"\n', "second.toml")
    with pytest.raises(TargetError, match=r"extends itself, through first\.toml -> second\.toml"):
        load_target(str(tmp_path / "first.toml"))


def test_a_target_that_extends_itself_is_refused(tmp_path: Path) -> None:
    assert "extends itself" in refused(tmp_path, MINIMAL + 'extends = "board"\n')


def test_an_unknown_base_names_the_file_that_asks_for_it(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + 'extends = "portabel"\n')
    assert "board.toml: extends: unknown target 'portabel'; did you mean 'portable'?" in message


def test_extends_must_be_a_name(tmp_path: Path) -> None:
    assert "'extends' is 3: expected the name of a target" in refused(tmp_path, MINIMAL + "extends = 3\n")


def test_a_format_that_the_runtime_does_not_take_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, MINIMAL + '[graph]\nformat = "integer"\nformats = ["qdq"]\n')
    assert "'graph.format' is 'integer'" in message and "formats" in message


def test_an_operator_with_two_rules_is_refused(tmp_path: Path) -> None:
    message = refused(
        tmp_path, MINIMAL + '[quantization]\nquantize = ["Conv", "MaxPool"]\npass_through = ["MaxPool"]\n'
    )
    assert "'MaxPool'" in message and "quantize" in message and "pass_through" in message


def test_a_target_is_one_value(tmp_path: Path) -> None:
    text = MINIMAL + 'extends = "portable"\n'
    assert load_target(written(tmp_path, text)) == load_target(written(tmp_path, text))
    assert isinstance(load_target("portable"), Target)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "examples").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_examples_are_valid(path: Path) -> None:
    target = load_target(str(path))
    assert target.name not in target_names() and target.backend in backend_names()
