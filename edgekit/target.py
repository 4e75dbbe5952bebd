"""Deployment targets: hardware, runtime and quantization rules, read from one TOML file each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgekit.errors import TargetError
from edgekit.quant.spec import QuantSpec
from edgekit.toml_file import Table, read_toml, validate
from edgekit.words import nearest

Rule = Literal["quantize", "pass_through", "float"]
Format = Literal["qdq", "qoperator", "integer"]
WeightType = Literal["int8", "int4", "uint4", "int2", "uint2"]
BlockSize = Literal[0, 16, 32, 64, 128, 256]

PORTABLE = "portable"
"""The rules that every shipped target extends; models are compressed for it unless a target is named."""


class Device(Table):
    """The machine: `arch` as `platform.machine()` says it, and the instruction sets that saturation depends on."""

    arch: str = ""
    isa: tuple[str, ...] = ()


class Graph(Table):
    """The ONNX graph to write: its default format, the formats the runtime takes (and why no others), its opset."""

    format: Format = "qdq"
    formats: tuple[Format, ...] = ("qdq",)
    formats_reason: str = ""
    opset: Annotated[int, Field(ge=13, le=25)] = 21

    @model_validator(mode="after")
    def _format_is_one_of_formats(self) -> Graph:
        if self.format not in self.formats:
            raise ValueError(
                f"'graph.format' is {self.format!r}, which is none of graph.formats ({', '.join(self.formats)})"
            )
        return self


class Tensor(Table):
    """A `QuantSpec` as it stands in a file."""

    dtype: Literal["int8", "uint8", "int16", "uint16"] = "uint8"
    symmetric: bool = False
    per_channel: bool = False
    narrow_range: bool = False

    @property
    def spec(self) -> QuantSpec:
        """The same as a `QuantSpec`."""
        return QuantSpec(self.dtype, self.symmetric, self.per_channel, self.narrow_range)


class Quantization(Table):
    """Which operators run quantized, on which grids, and where Quantize/DequantizeLinear stand.

    Attributes:
        activation, weight: the grids.
        output_q: "always" puts Q/DQ on the output of each quantized operator, "when-consumed" only where a quantized
            operator reads it.
        bias: "int32" stores it on the accumulator's grid behind a DequantizeLinear, "float" leaves it alone.
        residual_add: "both" quantizes both inputs of an Add, "skip" only the one that no convolution feeds.
        absorb: activations that may stand between an operator and its Q.
        drop_redundant: activations that are deleted where the output's range already clips as they do.
        unify: operators whose inputs and output share one grid.
        quantize, pass_through: operator types; all others stay float.
        pass_through_q: "around" puts Q/DQ before and behind an operator that passes codes through, "before" only before
            it. What is read behind it has the same grid either way.
        wide: whether layers whose activations were given 16 bits run so, or in float, which all shipped runtimes are faster in.
        attention: whether the two products of attention (queries by keys, probabilities by values) are quantized.
        integer_pad: where Pad runs on codes, padding with the zero point: "always", "never" (in float), or where that is
            "zero".
        reduce_range: whether weights that meet codes use 7 of their 8 bits, for CPUs that add pairs of products in 16 bits.
    """

    activation: Tensor = Tensor()
    weight: Tensor = Tensor(dtype="int8", symmetric=True, per_channel=True, narrow_range=True)
    output_q: Literal["always", "when-consumed"] = "when-consumed"
    bias: Literal["float", "int32"] = "float"
    residual_add: Literal["both", "skip"] = "both"
    absorb: tuple[str, ...] = ("Relu", "Clip")
    drop_redundant: tuple[Literal["Relu", "Clip"], ...] = ()
    unify: tuple[str, ...] = ("Concat",)
    quantize: tuple[str, ...] = ()
    pass_through: tuple[str, ...] = ()
    pass_through_q: Literal["around", "before"] = "around"
    wide: Literal["quantize", "float"] = "float"
    attention: Literal["quantize", "float"] = "float"
    integer_pad: Literal["always", "zero", "never"] = "never"
    reduce_range: bool = False

    @model_validator(mode="after")
    def _one_rule_for_an_operator(self) -> Quantization:
        twice = sorted(set(self.quantize) & set(self.pass_through))
        if twice:
            raise ValueError(
                f"{twice[0]!r} is in quantization.quantize and in quantization.pass_through; keep one of the two"
            )
        return self


class Weights(Table):
    """Weights as codes where activations have no grid, and tables that are looked up.

    Attributes:
        matmul: what the runtime multiplies floats with: types, and for each the block sizes; 0 is one scale an output channel.
        channel_blocks: one scale an output channel is written as blocks of so many inputs, with the same scale each; 0 leaves it.
        ragged: whether the last block may be shorter than the others.
        shared: whether two layers may read the same codes; else each has its own.
        add_axis: whether products of two axes that a bias follows are written with three.
        conv: the types for Conv and ConvTranspose, which stay float with any other.
        dynamic: who quantizes activations at inference: "graph" by operators for it, in front of MatMul and Gemm; "runtime" by
            itself, when it meets weights as codes; "never".
        tables: look up "codes", "dequantize" before the look-up, or "float".
        recurrent: of LSTM, GRU and RNN: "codes", which the runtime makes floats of once; "dynamic" for LSTMs whose activations were
            asked to get their scale at run time, else "float"; or always "float".
    """

    matmul: dict[WeightType, tuple[BlockSize, ...]] = Field(default_factory=dict)
    channel_blocks: BlockSize = 0
    ragged: bool = False
    shared: bool = True
    add_axis: bool = False
    conv: tuple[WeightType, ...] = ()
    dynamic: Literal["graph", "runtime", "never"] = "never"
    tables: Literal["codes", "dequantize", "float"] = "float"
    recurrent: Literal["codes", "dynamic", "float"] = "float"


class Pruning(Table):
    """What structured pruning should leave.

    Attributes:
        channels: numbers that layers should have multiples of, as the runtime's kernels work in such steps. A layer takes the largest
            of them that it has several of.
    """

    channels: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (8,)


class Runtime(Table):
    """How the runtime is set up; `options` go to it as they are."""

    threads: Annotated[int, Field(ge=1)] = 2
    float_dtype: Literal["float32", "float16"] = "float32"
    artifact: str = ""
    options: dict[str, str] = Field(default_factory=dict)


class Target(Table):
    """One deployment target."""

    name: str
    summary: str
    backend: str = ""
    device: Device = Device()
    graph: Graph = Graph()
    quantization: Quantization = Quantization()
    weights: Weights = Weights()
    pruning: Pruning = Pruning()
    runtime: Runtime = Runtime()

    def rule_for(self, op_type: str) -> Rule:
        """What this target does with an operator of the default ONNX domain."""
        if op_type in self.quantization.quantize:
            return "quantize"
        if op_type in self.quantization.pass_through:
            return "pass_through"
        return "float"


def target_folder() -> Path:
    """The folder of the shipped target files: inside the installed package, or the repository's own."""
    packaged = Path(__file__).parent / "targets"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "targets"


def target_names() -> list[str]:
    """The names of the shipped targets that have a backend, sorted."""
    return sorted(path.stem for path in target_folder().glob("*.toml") if path.stem != PORTABLE)


def load_target(name: str) -> Target:
    """The target of a shipped name, or of the path of a TOML file.

    Raises:
        TargetError: unknown name, unreadable file, or a mistake in it.
    """
    path = _find(name)
    target = validate(_merged(path, seen=()), Target, path=path)
    if (target_folder() / f"{target.name}.toml").is_file() and path.parent != target_folder():
        raise TargetError(f"{path}: a shipped target is called {target.name!r}; give yours another `name`")
    return target


def _find(name: str) -> Path:
    shipped = target_folder() / f"{name}.toml"
    if shipped.is_file():
        return shipped
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise TargetError(f"target file {name!r} does not exist")
        return path
    names = [*target_names(), PORTABLE]
    near = nearest(name, names, cutoff=0.5)
    hint = f"did you mean {near!r}? " if near else ""
    raise TargetError(f"unknown target {name!r}; {hint}known targets: {', '.join(names)}; or give a .toml file")


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tables over those of the target it extends."""
    if path in seen:
        raise TargetError(f"{path}: extends itself, through {' -> '.join(str(p.name) for p in (*seen, path))}")
    data = read_toml(path)
    base_name = data.pop("extends", None)
    if base_name is None:
        return data
    if not isinstance(base_name, str):
        raise TargetError(f"{path}: 'extends' is {base_name!r}: expected the name of a target")
    beside = path.parent / f"{base_name}.toml"
    try:
        base = beside if beside.is_file() else _find(base_name)
    except TargetError as error:
        raise TargetError(f"{path}: extends: {error}") from error
    inherited = _merged(base, (*seen, path))
    validate(inherited, Target, path=base)  # a mistake is shown where it stands
    return _overlay(inherited, data)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
