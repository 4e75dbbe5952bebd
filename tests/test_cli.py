from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from torch import nn

import edgekit
from conftest import Outcome, TinyFiles, tiny_images, tiny_network
from edgekit import errors
from edgekit.cli import EXIT_CODES, main
from edgekit.console import print_rows
from edgekit.records import read_compressed, read_manifests
from edgekit.report import Row

Cli = Callable[..., Outcome]
Snapshot = Callable[[Path], dict[str, str]]
COMMANDS = ("compress", "export", "benchmark", "inspect", "targets", "demo")


def strict_json(text: str) -> Any:
    """The one JSON document that a text is; NaN and Infinity, which are not JSON, are errors."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


# Help.


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from edgekit.cli import main
for command in ([], *([name] for name in {COMMANDS})):
    main([*command, "--help"], standalone_mode=False)
    main([*command, "-h"], standalone_mode=False)
heavy = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "tensorrt_rtx", "pydantic", "numpy", "rich", "PIL")
print("LOADED", *(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: ") == 2 * (1 + len(COMMANDS))
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_every_command_and_option_is_documented() -> None:
    assert set(main.commands) == set(COMMANDS)
    for name, command in main.commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"
                assert parameter.help[0].isupper() or parameter.help[0] in ".`", f"{name} {parameter.name}"
                assert parameter.help.split("  [")[0].endswith((".", "!")), f"{name} {parameter.name}"


def test_every_exit_code_is_documented_twice(cli: Cli) -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and each is not errors.EdgekitError]
    codes = {each.exit_code for each in classes}
    assert codes == {3, 4, 5, 6, 7, 8, 9}
    documented = {int(code) for code in re.findall(r"(?:^|\s{2,})(\d)  ", EXIT_CODES, re.MULTILINE)}
    assert documented == codes | {0, 1, 2}
    drawn = dict(re.findall(r"── (\w+) +(\d)", errors.__doc__ or ""))
    assert drawn == {each.__name__: str(each.exit_code) for each in classes}
    assert "Exit codes:" in cli("--help").stdout


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version").stdout == f"edgekit, version {edgekit.__version__}\n"


# What commands print.

NOISY = """
import os

def quality(run):
    print("noise from python")
    os.system("echo noise from a child")
    return 0.5
"""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A metric that prints to stdout."""
    path = tmp_path_factory.mktemp("noisy") / "noisy.py"
    path.write_text(NOISY)
    return f"{path}:quality"


def test_compress_prints_json_and_nothing_else(tiny: TinyFiles, tmp_path: Path, cli_process: Cli, noisy: str) -> None:
    out = tmp_path / "out"
    done = cli_process(
        "compress",
        tiny.model,
        "--calibration",
        tiny.data,
        "--evaluate",
        noisy,
        "-o",
        out,
        "--json",
        env={"FORCE_COLOR": "1"},
    )
    assert done.code == 0
    document = strict_json(done.stdout)
    assert document == read_compressed(out).model_dump(mode="json")
    assert set(done.stderr.split("\n")) == {"noise from python", "noise from a child", ""}


def test_export_and_benchmark_print_json_and_nothing_else(
    exported: Path, numpy_target: Callable[..., str], cli: Cli
) -> None:
    done = cli("export", exported, "--target", numpy_target("other", absent="not here"), "--json")
    assert (done.code, done.stderr) == (0, "")
    [manifest] = strict_json(done.stdout)
    assert manifest == read_manifests(exported)["other"].model_dump(mode="json")

    done = cli("benchmark", exported, "--iterations", "2", "--json")
    assert (done.code, done.stderr) == (0, "")
    numpy, other = strict_json(done.stdout)["targets"]
    assert [timing["label"] for timing in numpy["timings"]] == ["f32", "int8"]
    assert (other["timings"], other["reason"]) == ([], "not here")


def test_inspect_prints_json_of_float_annotated_and_qdq_files(tiny: TinyFiles, exported_once: Path, cli: Cli) -> None:
    found = {}
    for path in (tiny.model, exported_once, exported_once / "model.onnx", exported_once / "numpy" / "model.onnx"):
        done = cli("inspect", path, "--json")
        assert (done.code, done.stderr) == (0, "")
        document = strict_json(done.stdout)
        found[path] = document
        assert [layer["name"] for layer in document["layers"]] == ["stem", "block", "deep", "head"]
        assert (
            sum(layer["macs"] for layer in document["layers"]) == 8 * 9 * 64 + 8 * 8 * 9 * 64 + 8 * 16 * 9 * 16 + 16 * 4
        )
    float_file, folder, annotated, lowered = found.values()
    assert float_file["tensors"] == []
    assert folder == annotated
    weight = next(tensor for tensor in annotated["tensors"] if tensor["name"] == "block.weight")
    assert (weight["kind"], weight["dtype"], weight["axis"], weight["zero_point"]) == ("weight", "int8", 0, [0, 0])
    assert weight["scale"][0] < weight["scale"][1]
    image = next(tensor for tensor in annotated["tensors"] if tensor["name"] == "image")
    assert (image["kind"], image["dtype"], image["axis"], image["observer"]) == ("activation", "uint8", None, "kld")
    # The lowered file says the same by its Quantize and DequantizeLinear nodes.
    grids = {
        tensor["name"]: (tensor["dtype"], tensor["scale"], tensor["zero_point"]) for tensor in annotated["tensors"]
    }
    read = {tensor["name"]: (tensor["dtype"], tensor["scale"], tensor["zero_point"]) for tensor in lowered["tensors"]}
    assert {"image", "add_y", "block_y"} & read.keys()
    assert all(read[name] == grids[name] for name in read if name in grids)


def test_inspect_prints_tables(tiny: TinyFiles, compressed_once: Path, cli: Cli) -> None:
    plain = cli("inspect", tiny.model).stdout
    assert "no tensor carries quant attributes" in plain
    assert re.search(r"opset 21, 11 nodes, 59,968 MACs, 1,[0-9]{3} parameters", plain)
    table = cli("inspect", compressed_once).stdout
    assert re.search(r"block\.weight .*weight .*8x8x3x3 .*int8 .* to .* 0 +\W 0", table)
    assert re.search(r"stem +\W Conv +\W \?x1x8x8 +\W \?x8x8x8 +\W 4,608", table)


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path, cli: Cli) -> None:
    model = tiny_network()
    next(iter(model.graph)).name = "[/bold] [red]stem"
    ir.save(model, tmp_path / "net.onnx")
    assert "[/bold] [red]stem" in cli("inspect", tmp_path / "net.onnx").stdout


def test_targets_are_listed(cli: Cli) -> None:
    names = ["arm-onnxruntime", "cuda-tensorrt", "x86-onnxruntime", "x86-openvino"]
    table = cli("targets").stdout
    assert re.findall(r"^ ?([a-z0-9]+-[a-z]+) ", table, re.MULTILINE) == names
    done = cli("targets", "--json")
    assert done.stderr == ""
    listed = strict_json(done.stdout)
    assert [target["name"] for target in listed] == names
    x86 = listed[2]
    assert x86["backend"] == "onnxruntime"
    assert x86["availability"]["can_convert"] is True
    assert x86["quantization"]["weight"]["per_channel"] is True


def test_compress_export_and_benchmark_tell_people(tiny: TinyFiles, tmp_path: Path, plugin: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    data = ("--calibration", tiny.data, "--evaluate", tiny.data, "--proxy", "none", "--samples", 20)
    done = cli("compress", tiny.model, *data, "-o", out)
    assert (done.code, done.stderr) == (0, "")
    first, metric, note = done.stdout.splitlines()
    assert (
        first
        == f"{out / 'model.onnx'}: tiny.onnx for 'portable', int8 weights, int8 activations, 'auto' ranges from 20 samples"
    )
    assert re.fullmatch(r"  top-1: 1\.0000 in float, 0\.\d{4} in simulation", metric)
    assert note == "  note: calibrated on 20 samples only; a few hundred give ranges that hold"

    done = cli("export", out, "--target", plugin / "numpy.toml")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out / 'numpy'}: model.int8.onnx, ")
    assert re.search(
        r"numpy +\W checked on onnx [\d.]+ +\W [\d,]+ +\W \d\d\.\d\d % +\W \+\d+\.\d\d points", done.stdout
    )
    assert done.stdout.endswith(f"report: {out / 'report.md'}\n")

    done = cli("benchmark", out, "--iterations", 2, "--batch-size", 2)
    assert (done.code, done.stderr) == (0, "")
    assert re.search(r"numpy +\W ran on onnx [\d.]+ .*x .*x f32", done.stdout)


def test_progress_is_shown_on_a_terminal(tiny: TinyFiles, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    code = "from edgekit.cli import main; main()"
    arguments = ["compress", tiny.model, "--calibration", tiny.data, "-o", tmp_path / "out"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert b"calibrate" in shown
    assert b"model.onnx" in printed
    assert b"\x1b" not in printed


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


# Recipes.


def test_a_recipe_gives_options_and_the_command_line_overrides_them(tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
        [compress]
        calibration = {json.dumps(str(tiny.data))}
        samples = 33
        target = "x86-openvino"
        [method]
        calibrator = "minmax"
        layers = [{{ match = "deep*", precision = "float" }}]
    """)
    assert cli("compress", tiny.model, "--recipe", recipe, "-o", tmp_path / "a").code == 0
    record = read_compressed(tmp_path / "a")
    assert (record.samples, record.method.calibrator, record.target, record.evaluate) == (
        33,
        "minmax",
        "x86-openvino",
        "",
    )

    overriding = ("--samples", 40, "--calibrator", "kld", "--portable", "--evaluate", tiny.data)
    assert cli("compress", tiny.model, "--recipe", recipe, "-o", tmp_path / "b", *overriding).code == 0
    record = read_compressed(tmp_path / "b")
    assert (record.samples, record.method.calibrator, record.target) == (40, "kld", "portable")
    assert record.method.layers == (edgekit.LayerMethod(match="deep*", precision="float"),)
    assert record.evaluate == str(tiny.data)


def test_images_are_preprocessed_as_the_recipe_says(tmp_path: Path, cli: Cli) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 12), np.uint8)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index, each in enumerate(pixels):
            Image.fromarray(each).save(tmp_path / "image.png")
            archive.write(tmp_path / "image.png", f"{index}.png")
    (tmp_path / "recipe.toml").write_text("""
        [data.preprocess]
        channels = "L"
        crop = 8
        mean = [0.5]
        std = [0.29]
    """)
    ir.save(tiny_network(), tmp_path / "net.onnx")
    arguments = ("compress", tmp_path / "net.onnx", "--calibration", tmp_path / "images.zip", "-o", tmp_path / "out")
    assert "expected N x 1 x 8 x 8" in cli(*arguments).stderr
    assert cli(*arguments, "--recipe", tmp_path / "recipe.toml").code == 0
    with np.load(tmp_path / "out" / "held_back.npz") as held_back:
        image = held_back["image"][0, 0]
    restored = np.round((image * 0.29 + 0.5) * 255).astype(np.uint8)
    assert any(np.array_equal(restored, each[2:10, 2:10]) for each in pixels)


# Wrong arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress"], "Missing argument 'SOURCE'"),
        (["compress", "net.onnx"], "Missing option '-o' / '--output'"),
        (["compress", "net.onnx", "-o", "out"], "Missing option '--calibration'"),
        (["compress", "net.onnx", "-o", "out", "--samples", "many"], "'many' is not a valid integer"),
        (["compress", "net.onnx", "-o", "out", "--calibartion", "x.npz"], "No such option '--calibartion'"),
        (
            ["compress", "net.onnx", "-o", "out", "--portable", "--target", "x86-openvino"],
            "--portable and --target exclude each other",
        ),
        (["export", "out"], "Missing option '--target'"),
        (["export", "out", "--target", "x86-openvino", "--format", "gguf"], "'gguf' is not one of 'qdq'"),
        (["benchmark", "out", "--batch-size", "0"], "0 is not in the range x>=1"),
        (["compres"], "No such command 'compres'"),
    ],
)
def test_wrong_arguments_are_clicks_business(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli(*arguments)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr


# Bad input. Each case writes its files into a folder and gives the exit code, the arguments and parts of the message.


class Scorer(nn.Module):
    """A linear layer under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(image.flatten(1))
        return scores


FACTORIES = """
import torch
from torch import nn

class Scorer(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.head = nn.Linear(width, 4)

    def forward(self, image):
        return self.head(image.flatten(1))

def scorer():
    return Scorer()

def renamed():
    model = Scorer()
    model.tail, model.head = model.head, nn.Identity()
    return model

def wide():
    return Scorer(81)

def raising():
    return Scorer(undefined_width)

not_a_function = 3
"""

Case = Callable[[Path, TinyFiles], tuple[int, list[Any], list[str]]]


def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Scorer().state_dict(), folder / "weights.pt")
    (folder / "nets.py").write_text(FACTORIES)
    return folder / "weights.pt"


def missing_file(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    return (
        3,
        [folder / "no.onnx", "--calibration", tiny.data],
        ["no.onnx: no such file", "give the path of an ONNX file"],
    )


def missing_checkpoint(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    return 3, [folder / "no.pt", "--calibration", tiny.data], ["no.pt does not exist; give a .pt, .pth"]


def folder_as_source(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    return 3, [folder, "--calibration", tiny.data], ["is a folder; give a .pt, .pth"]


def unknown_suffix(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "weights.h5").write_bytes(b"HDF")
    return 3, [folder / "weights.h5", "--calibration", tiny.data], ["unknown suffix '.h5'; known suffixes: .pt2, "]


def truncated_onnx(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "cut.onnx").write_bytes(tiny.model.read_bytes()[:-500])
    return (
        3,
        [folder / "cut.onnx", "--calibration", tiny.data],
        ["cut.onnx: is not a readable ONNX file, or is truncated", "again"],
    )


def no_onnx(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "text.onnx").write_text("<html>404 Not Found</html>")
    return 3, [folder / "text.onnx", "--calibration", tiny.data], ["text.onnx: ", "ONNX"]


def truncated_checkpoint(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    path.write_bytes(path.read_bytes()[:600])
    arguments = [path, "--model", f"{folder / 'nets.py'}:scorer", "--calibration", tiny.data]
    return 3, arguments, ["weights.pt", "truncated"]


def no_factory(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    return (
        3,
        [path, "--calibration", tiny.data],
        ["holds weights without their model; name its factory with --model FILE.py:factory"],
    )


def wrong_keys(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    return (
        3,
        [path, "--model", f"{folder / 'nets.py'}:renamed", "--calibration", tiny.data],
        ["weights.pt", "tail.", "head."],
    )


def wrong_shapes(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    return 3, [path, "--model", f"{folder / 'nets.py'}:wide", "--calibration", tiny.data], ["head.weight", "64", "81"]


def raising_factory(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    arguments = [path, "--model", f"{folder / 'nets.py'}:raising", "--calibration", tiny.data]
    return 3, arguments, ["NameError: name 'undefined_width' is not defined", "nets.py, line 25"]


def missing_factory(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    return (
        3,
        [path, "--model", f"{folder / 'nets.py'}:scorr", "--calibration", tiny.data],
        ["has no 'scorr'; did you mean 'scorer'?"],
    )


def factory_that_is_none(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    path = checkpoint(folder)
    arguments = [path, "--model", f"{folder / 'nets.py'}:not_a_function", "--calibration", tiny.data]
    return 3, arguments, ["is a int; give a function or class that makes the model"]


def missing_data(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    return (
        4,
        [tiny.model, "--calibration", folder / "no.npz"],
        ["no.npz: does not exist; expected an .npz or .npy file"],
    )


def broken_data(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "cut.npz").write_bytes(tiny.data.read_bytes()[:1000])
    return (
        4,
        [tiny.model, "--calibration", folder / "cut.npz"],
        ["cut.npz: cannot be read", "write it with numpy.savez"],
    )


def wrong_name(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    np.savez(folder / "x.npz", images=tiny_images())
    return (
        4,
        [tiny.model, "--calibration", folder / "x.npz"],
        ["no array for input 'image' (arrays found: 'images'); rename 'images'"],
    )


def wrong_shape(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    np.savez(folder / "x.npz", image=np.zeros((9, 8, 8, 1), np.float32))
    message = ["input 'image' (float32, N x 1 x 8 x 8) got an array of shape (9, 8, 8, 1)", "transpose to (N, C, H, W)"]
    return 4, [tiny.model, "--calibration", folder / "x.npz"], message


def wrong_type(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    np.savez(folder / "x.npz", image=np.zeros((9, 1, 8, 8), np.uint8))
    return (
        4,
        [tiny.model, "--calibration", folder / "x.npz"],
        ["got an array of type uint8; save the values", ".astype('float32') / 255"],
    )


def empty_data(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    np.savez(folder / "x.npz", image=np.zeros((0, 1, 8, 8), np.float32))
    return (
        4,
        [tiny.model, "--calibration", folder / "x.npz"],
        ["holds no samples; give at least one, better a few hundred"],
    )


def nan_in_data(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    images = tiny_images()
    images[17, 0, 3, 3] = np.nan
    np.savez(folder / "x.npz", image=images)
    return 4, [tiny.model, "--calibration", folder / "x.npz"], ["has NaN", "in sample 17; repair or remove that sample"]


def infinity_in_data(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    images = tiny_images()
    images[90, 0, 3, 3] = -np.inf
    np.savez(folder / "x.npz", image=images)
    return 4, [tiny.model, "--calibration", folder / "x.npz"], ["in sample 90; repair or remove that sample"]


def no_samples_wanted(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    return 4, [tiny.model, "--calibration", tiny.data, "--samples", 0], ["samples is 0; at least one is needed"]


def unknown_target(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    arguments = [tiny.model, "--calibration", tiny.data, "--target", "x86-openvnio"]
    return 5, arguments, ["unknown target 'x86-openvnio'; did you mean 'x86-openvino'?"]


def misspelt_key_in_target(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "board.toml").write_text(
        'name = "board"\nextends = "portable"\nsummary = "s"\n\n[quantization]\nquantise = ["Conv"]\n'
    )
    arguments = [tiny.model, "--calibration", tiny.data, "--target", folder / "board.toml"]
    return 5, arguments, ["board.toml", "line 6: unknown key 'quantization.quantise'; did you mean 'quantize'?"]


def misspelt_key_in_recipe(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "recipe.toml").write_text("[method]\nsmooth = false\ncalibrater = 'kld'\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--recipe", folder / "recipe.toml"]
    return 5, arguments, ["recipe.toml", "line 3: unknown key 'method.calibrater'; did you mean 'calibrator'?"]


def misspelt_key_in_preprocess(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "recipe.toml").write_text("[data.preprocess]\nsize = 8\nmeen = 0.5\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--recipe", folder / "recipe.toml"]
    return 5, arguments, ["recipe.toml", "line 3: unknown key 'data.preprocess.meen'; did you mean 'mean'?"]


def broken_recipe(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "recipe.toml").write_text("[compress]\nsamples = = 20\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--recipe", folder / "recipe.toml"]
    return 5, arguments, ["recipe.toml: is not valid TOML", "line 2"]


def unknown_calibrator(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    return (
        5,
        [tiny.model, "--calibration", tiny.data, "--calibrator", "minmx"],
        ["'calibrator' is 'minmx': did you mean 'minmax'?"],
    )


def raising_metric(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "quality.py").write_text("def quality(run):\n    return 1 / 0\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--evaluate", f"{folder / 'quality.py'}:quality"]
    return 4, arguments, ["--evaluate quality raised ZeroDivisionError: division by zero (quality.py, line 2)"]


def nan_metric(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "quality.py").write_text("def quality(run):\n    return float('nan')\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--evaluate", f"{folder / 'quality.py'}:quality"]
    return 4, arguments, ["--evaluate quality returned nan; it must return a finite number"]


def metric_of_words(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "quality.py").write_text("def quality(run):\n    return 'good'\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--evaluate", f"{folder / 'quality.py'}:quality"]
    return 4, arguments, ["--evaluate quality returned 'good'; it must return one number, higher is better"]


def metric_that_feeds_the_wrong_input(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    (folder / "quality.py").write_text("def quality(run):\n    return run({'img': [1.0]})\n")
    arguments = [tiny.model, "--calibration", tiny.data, "--evaluate", f"{folder / 'quality.py'}:quality"]
    return 4, arguments, ["--evaluate quality raised", "image", "(quality.py, line 2)"]


def labels_of_another_model(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    np.savez(folder / "test.npz", image=tiny_images(), labels=np.arange(96))
    return (
        4,
        [tiny.model, "--calibration", tiny.data, "--evaluate", folder / "test.npz"],
        ["is out of range: the model has 4 classes"],
    )


def metric_without_labels(folder: Path, tiny: TinyFiles) -> tuple[int, list[Any], list[str]]:
    np.savez(folder / "test.npz", image=tiny_images())
    return (
        4,
        [tiny.model, "--calibration", tiny.data, "--evaluate", folder / "test.npz"],
        ["test.npz: has no labels; sort images"],
    )


CASES = [
    missing_file,
    missing_checkpoint,
    folder_as_source,
    unknown_suffix,
    truncated_onnx,
    no_onnx,
    truncated_checkpoint,
    no_factory,
    wrong_keys,
    wrong_shapes,
    raising_factory,
    missing_factory,
    factory_that_is_none,
    missing_data,
    broken_data,
    wrong_name,
    wrong_shape,
    wrong_type,
    empty_data,
    nan_in_data,
    infinity_in_data,
    no_samples_wanted,
    unknown_target,
    misspelt_key_in_target,
    misspelt_key_in_recipe,
    misspelt_key_in_preprocess,
    broken_recipe,
    unknown_calibrator,
    raising_metric,
    nan_metric,
    metric_of_words,
    metric_that_feeds_the_wrong_input,
    labels_of_another_model,
    metric_without_labels,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_explained_in_one_sentence_and_changes_nothing(
    case: Case, tiny: TinyFiles, compressed: Path, tmp_path: Path, cli: Cli, snapshot: Snapshot
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    code, arguments, parts = case(folder, tiny)
    before = snapshot(compressed)
    for out in (compressed, tmp_path / "new"):
        done = cli("compress", *arguments, "-o", out)
        assert (done.code, done.stdout) == (code, ""), done
        assert explained(done.stderr, parts)
    assert snapshot(compressed) == before
    assert not (tmp_path / "new").exists()


def explained(stderr: str, parts: list[str]) -> bool:
    """Whether a message is one line of edgekit's that holds all `parts` and says what to do after a colon or semicolon."""
    assert stderr.startswith("edgekit: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr, stderr
    return True


def occupied_by_a_file(folder: Path) -> tuple[Path, str]:
    (folder / "out").write_text("mine")
    return folder / "out", "is a file; give a folder for"


def below_a_file(folder: Path) -> tuple[Path, str]:
    (folder / "file").write_text("mine")
    return folder / "file" / "out", "cannot be written (Not a directory)"


def unwritable(folder: Path) -> tuple[Path, str]:
    return Path("/proc/edgekit/out"), "cannot be written ("


def somebody_elses(folder: Path) -> tuple[Path, str]:
    (folder / "thesis.tex").write_text("mine")
    return (
        folder,
        "is not empty and holds no compress.json, so it is not an edgekit output folder; give a new or empty folder",
    )


@pytest.mark.parametrize(
    "place", [occupied_by_a_file, below_a_file, unwritable, somebody_elses], ids=lambda place: place.__name__
)
def test_an_output_folder_that_cannot_be_used_is_explained(
    place: Callable[[Path], tuple[Path, str]], tiny: TinyFiles, tmp_path: Path, cli: Cli, snapshot: Snapshot
) -> None:
    out, message = place(tmp_path)
    before = snapshot(tmp_path)
    done = cli("compress", tiny.model, "--calibration", tiny.data, "-o", out)
    assert (done.code, done.stdout) == (8, "")
    assert explained(done.stderr, [str(out), message])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "code", "parts"),
    [
        (
            ["export", "--target", "x86-openvino"],
            8,
            ["compress.json: does not exist; give the folder that `edgekit compress -o` wrote"],
        ),
        (["benchmark"], 8, ["compress.json: does not exist; give the folder that `edgekit compress -o` wrote"]),
        (["inspect"], 3, ["model.onnx: no such file; give the path of an ONNX file"]),
    ],
)
def test_a_folder_without_a_model_is_explained(
    tmp_path: Path, cli: Cli, command: list[str], code: int, parts: list[str]
) -> None:
    done = cli(command[0], tmp_path, *command[1:])
    assert (done.code, done.stdout) == (code, "")
    assert explained(done.stderr, parts)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_the_previous_result(
    tiny: TinyFiles, compressed: Path, tmp_path: Path, cli: Cli, snapshot: Snapshot
) -> None:
    (tmp_path / "quality.py").write_text("def quality(run):\n    raise KeyboardInterrupt\n")
    before = snapshot(compressed)
    arguments = ("--calibration", tiny.data, "--evaluate", f"{tmp_path / 'quality.py'}:quality", "-o", compressed)
    done = cli("compress", tiny.model, *arguments)
    assert (done.code, done.stdout) == (130, "")
    assert done.stderr == "edgekit: interrupted; nothing is left half-written\n"
    assert snapshot(compressed) == before


def test_a_bug_keeps_its_traceback(tiny: TinyFiles, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.pipelines.quantize.unify_params", lambda graph, rules: graph.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        cli("compress", tiny.model, "--calibration", tiny.data, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("columns", "form"), [(60, "block"), (200, "table")])
def test_a_narrow_terminal_gets_blocks_instead_of_broken_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, form: str
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    row = Row(
        "arm-onnxruntime",
        "checked on onnxruntime 1.32.0",
        219_576,
        "99.80 %",
        "+0.00 points",
        "",
        "",
        "",
        "100.0 % ran",
    )
    print_rows([row])
    printed = capsys.readouterr().out
    assert "arm-onnxruntime" in printed
    assert ("drop: +0.00 points" in printed) == (form == "block")
