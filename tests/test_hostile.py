"""ONNX files that are damaged or made to do harm: refused by name, with bounded memory, and nothing outside is read."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from conftest import Cli
from edgekit import Method
from edgekit.errors import EdgekitError, GraphError, SourceError
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.pipelines.compress import CompressResult
from graphs import normal
from networks import Net

DATA = {"x": normal(40, 1, 8, 8)}
QUICK = Method(calibrator="minmax", bias_correction=False, smooth=False)


def small_net() -> onnx.ModelProto:
    """Two layers, three of whose tensors have raw data."""
    net = Net(seed=1)
    x = net.conv_relu(net.input("x", ["n", 1, 8, 8]), "conv", 1, 2)
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "pool")], "flat", axis=1)
    return net.proto(net.gemm(x, "head", 2, 3))


def compress(model: onnx.ModelProto | bytes, folder: Path) -> CompressResult:
    (folder / "net.onnx").write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return edgekit.compress(folder / "net.onnx", folder / "out", calibration=DATA, method=QUICK, proxy="none")


def refused(model: onnx.ModelProto | bytes, folder: Path) -> str:
    """What is said of the file; nothing is written."""
    with pytest.raises(SourceError) as caught:
        compress(model, folder)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".data") == ["net.onnx"]
    assert str(folder / "net.onnx") in str(caught.value)
    return str(caught.value)


# Damage.


def test_the_whole_file_is_compressed(tmp_path: Path) -> None:
    assert compress(small_net(), tmp_path).model.is_file()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = small_net().SerializeToString()
    for length in range(0, len(data), 9):
        assert re.search(
            r"truncated|cannot be read|holds no ONNX graph|is made by no node|expected",
            refused(data[:length], tmp_path),
        )


@pytest.mark.parametrize(
    "content", [b"", b"# A model\n\nSee the release page.\n", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04"]
)
def test_other_files_with_the_ending_of_onnx_are_refused(content: bytes, tmp_path: Path, cli: Cli) -> None:
    np.savez(tmp_path / "data.npz", x=DATA["x"])
    (tmp_path / "net.onnx").write_bytes(content)
    done = cli("compress", tmp_path / "net.onnx", "-o", tmp_path / "out", "--calibration", tmp_path / "data.npz")
    assert (done.code, done.stdout) == (3, "")
    assert re.match(r"edgekit: .*net\.onnx: (is not a readable|cannot be read as|holds no) ONNX", done.stderr)
    assert "Traceback" not in done.stderr


def flipped(data: bytes, seed: int) -> bytes:
    """With one to three bits changed."""
    rng = np.random.default_rng(seed)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    bits[rng.integers(0, len(bits), rng.integers(1, 4))] ^= 1
    return np.packbits(bits).tobytes()


@pytest.mark.parametrize("annotated", [False, True])
def test_flipped_bits_are_survived_or_explained(annotated: bool, tmp_path: Path) -> None:
    source = compress(small_net(), tmp_path).model if annotated else tmp_path / "net.onnx"
    data = source.read_bytes() if annotated else small_net().SerializeToString()
    survived = 0
    for seed in range(60):
        try:
            compress(flipped(data, seed), tmp_path)
            survived += 1
        except EdgekitError as error:
            # What only shows when ONNX Runtime loads the graph is said in its words, of the node.
            assert re.search(r"net\.onnx|ONNX Runtime cannot|input 'x'|tensor '|metadata|opset", str(error)), str(error)
    assert 0 < survived < 60


@pytest.mark.parametrize(
    "description",
    [
        '{"dtype": "uint8"',
        "[1]",
        '{"dtype": "uint9"}',
        '{"axis": "0"}',
        '{"range": [0.0]}',
        '{"range": 3}',
        "[" * 50_000,
    ],
)
def test_metadata_of_a_grid_that_edgekit_did_not_write_is_refused(description: str, tmp_path: Path) -> None:
    compressed = onnx.load(compress(small_net(), tmp_path).model)
    entry = next(entry for entry in compressed.graph.input[0].metadata_props if entry.key == "edgekit.quant")
    entry.value = description
    onnx.save(compressed, tmp_path / "net.onnx")
    with pytest.raises(GraphError, match=r"metadata 'edgekit\.quant' of a tensor or node is .*not what edgekit writes"):
        load_annotated(tmp_path / "net.onnx")


# Graphs that are none.


def cyclic(model: onnx.ModelProto) -> str:
    model.graph.node[0].input[0] = "pool_y"
    return r"nodes wait for each other in a circle \((conv|conv\.relu|pool) <- "


def waiting_for_itself(model: onnx.ModelProto) -> str:
    model.graph.node[2].input[0] = "pool_y"
    return r"nodes wait for each other in a circle \(pool <- pool\)"


def made_by_nobody(model: onnx.ModelProto) -> str:
    model.graph.node[2].input[0] = "ghost"
    return r"node 'pool' \(GlobalAveragePool\) reads 'ghost', which is no input, no initializer and no node's output"


def output_of_nobody(model: onnx.ModelProto) -> str:
    model.graph.output[0].name = "ghost"
    return "output 'ghost' of the graph is made by no node"


def two_makers(model: onnx.ModelProto) -> str:
    model.graph.node[1].output[0] = "conv_y"
    model.graph.node[2].input[0] = "conv_y"
    return r"1 values are made more than once \(first 'conv_y'\)"


def two_initializers(model: onnx.ModelProto) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((2, 1, 3, 3), np.float32), "conv.weight"))
    return r"1 values are made more than once \(first 'conv\.weight'\)"


def node_over_initializer(model: onnx.ModelProto) -> str:
    model.graph.node[1].output[0] = "head.bias"
    return r"values are made more than once \(first 'head\.bias'\)"


def add_branches(model: onnx.ModelProto, reads: str) -> None:
    """An If that makes `z`, whose branches read a value."""
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Neg", [reads], ["inner"], "neg")], "branch", [], [output])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], "if", then_branch=branch, else_branch=branch))


def inside_a_branch(model: onnx.ModelProto) -> str:
    add_branches(model, "ghost")
    return r"node 'neg' \(Neg\) reads 'ghost'"


def circle_through_a_branch(model: onnx.ModelProto) -> str:
    add_branches(model, "z")
    return r"nodes wait for each other in a circle \(if <- if\)"


def functions(model: onnx.ModelProto, count: int, calls: int, last: str) -> None:
    """A chain of functions, each of which calls the next one several times."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]
    model.opset_import.append(opsets[1])
    for index in range(count):
        name, domain = (f"F{index + 1}", "my") if index < count - 1 else (last, "my" if last.startswith("F") else "")
        values = ["a", *(f"t{call}" for call in range(calls - 1)), "b"]
        nodes = [helper.make_node(name, [a], [b], domain=domain) for a, b in itertools.pairwise(values)]
        model.functions.append(helper.make_function("my", f"F{index}", ["a"], ["b"], nodes, opsets))
    model.graph.node[1].CopyFrom(helper.make_node("F0", ["conv_y"], ["conv.relu_y"], "conv.relu", domain="my"))


def recursive(model: onnx.ModelProto) -> str:
    functions(model, 2, 1, "F0")
    return r"model-local functions call themselves \(F\d -> F\d -> F\d\)"


def exploding(model: onnx.ModelProto) -> str:
    functions(model, 12, 10, "Relu")
    return r"has 1,000,000,000,004 nodes once its model-local functions are inlined; at most 1,000,000 are read"


def untyped_attribute(model: onnx.ModelProto) -> str:
    model.graph.node[0].attribute[0].ClearField("type")
    return "attribute 'kernel_shape' of a node has no type"


def untyped_input(model: onnx.ModelProto) -> str:
    model.graph.input[0].type.tensor_type.elem_type = 0
    return "input 'x' has no element type"


GRAPHS: list[Callable[[onnx.ModelProto], str]] = [
    *(
        cyclic,
        waiting_for_itself,
        made_by_nobody,
        output_of_nobody,
        two_makers,
        two_initializers,
        node_over_initializer,
    ),
    *(inside_a_branch, circle_through_a_branch, recursive, exploding, untyped_attribute, untyped_input),
]


@pytest.mark.parametrize("break_it", GRAPHS, ids=lambda function: function.__name__)
def test_a_graph_that_is_none_is_refused_with_the_name_that_is_wrong(
    break_it: Callable[[onnx.ModelProto], str], tmp_path: Path
) -> None:
    model = small_net()
    assert re.search(break_it(model), refused(model, tmp_path))


def test_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    model = small_net()
    model.graph.initializer.append(tensor("unused", [1], float_data=[1.0]))
    data = model.SerializeToString()
    assert r"is b'\xff\xfeat" in refused(data.replace(b"flat", b"\xff\xfeat"), tmp_path)
    assert r"tensor b'\xffnused' has a name" in refused(data.replace(b"unused", b"\xffnused"), tmp_path)


def test_functions_that_are_called_several_times_and_unsorted_nodes_are_no_harm(tmp_path: Path) -> None:
    model = small_net()
    functions(model, 3, 3, "Relu")
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert compress(model, tmp_path).model.is_file()
    assert len(load_onnx(tmp_path / "net.onnx").functions) == 3


# Tensors whose data is not what they say.


def tensor(name: str, dims: list[int], dtype: int = TensorProto.FLOAT, **data: object) -> onnx.TensorProto:
    return TensorProto(name=name, dims=dims, data_type=dtype, **data)  # type: ignore[arg-type]


WEIGHT = "conv.weight"
TENSORS = [
    (tensor(WEIGHT, [2, 1, -3, 3], raw_data=bytes(72)), r"the shape \[2, 1, -3, 3\]; expected dimensions from 0 on"),
    (tensor(WEIGHT, [2**40, 1, 3, 3]), r"0 numbers in float_data; expected 9895604649984"),
    (tensor(WEIGHT, [2**40, 1, 3, 3], TensorProto.UINT4), r"0 numbers in int32_data; expected 4947802324992"),
    (tensor(WEIGHT, [2**40, 1, 3, 3], raw_data=bytes(72)), r"72 bytes of data; expected 39582418599936"),
    (tensor(WEIGHT, [2**62, 2**62]), r"at most 2\*\*48 elements"),
    (tensor(WEIGHT, [0, 2**62]), r"at most 2\*\*48 elements"),
    (tensor(WEIGHT, [2, 1, 3, 3], raw_data=bytes(68)), r"68 bytes of data; expected 72"),
    (tensor(WEIGHT, [2, 1, 3, 3], raw_data=bytes(76)), r"76 bytes of data; expected 72"),
    (tensor(WEIGHT, [2, 1, 3, 3]), r"0 numbers in float_data; expected 18"),
    (tensor(WEIGHT, [2, 1, 3, 3], float_data=[1.0] * 17), r"17 numbers in float_data; expected 18"),
    (tensor(WEIGHT, [2, 1, 3, 3], int32_data=[1] * 18), r"0 numbers in float_data; expected 18"),
    (tensor(WEIGHT, [0], int64_data=[1]), r"0 numbers in float_data; expected 0"),
    (tensor(WEIGHT, [2, 1, 3, 3], 0, raw_data=bytes(72)), r"element type 0, which ONNX does not know"),
    (tensor(WEIGHT, [2, 1, 3, 3], 99, raw_data=bytes(72)), r"element type 99, which ONNX does not know"),
    (tensor(WEIGHT, [1], TensorProto.STRING, raw_data=b"a"), r"the type STRING, but 1 bytes of data"),
]


@pytest.mark.parametrize("place", ["initializer", "attribute"])
@pytest.mark.parametrize(("broken", "message"), TENSORS)
def test_a_tensor_that_has_not_the_data_of_its_shape_is_named(
    broken: onnx.TensorProto, message: str, place: str, tmp_path: Path
) -> None:
    model = small_net()
    kept = [each for each in model.graph.initializer if each.name != WEIGHT]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept if place == "attribute" else [*kept, broken])
    if place == "attribute":
        model.graph.node.insert(0, helper.make_node("Constant", [], [WEIGHT], "constant", value=broken))
    said = refused(model, tmp_path)
    assert said.startswith(f"{tmp_path / 'net.onnx'}: tensor 'conv.weight' has ")
    assert re.search(message, said)


CHILD = """
import resource, sys, time
from pathlib import Path
from edgekit.errors import SourceError
from edgekit.graph.io import load_onnx
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
begin = time.perf_counter()
for path in sys.argv[1:]:
    try:
        load_onnx(Path(path))
    except SourceError as error:
        print(error)
assert time.perf_counter() - begin < 2
try:
    bytearray(2**27)
except MemoryError:
    print("the limit holds")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_declared_shape_costs_no_memory(tmp_path: Path) -> None:
    files = []
    for index, (broken, _) in enumerate(TENSORS):
        model = small_net()
        model.graph.initializer[0].CopyFrom(broken)
        files.append(tmp_path / f"{index}.onnx")
        files[-1].write_bytes(model.SerializeToString())
    done = subprocess.run([sys.executable, "-c", CHILD, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "the limit holds"
    assert [line.split(":")[0] for line in lines] == [str(file) for file in files]
