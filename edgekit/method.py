"""How a model is quantized after training: the choices that the command line and the recipe offer, for all layers and for some."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from edgekit.quant.estimators import ESTIMATORS
from edgekit.quant.spec import QuantSpec
from edgekit.toml_file import Table
from edgekit.words import nearest

Precision = Literal["int2", "int4", "int8", "int16", "float"]
WeightType = Literal["int8", "int4", "uint4", "int2", "uint2", "binary"]
BINARY = "binary"
"""A sign for each weight and one scale for each output channel: for training only, exported in the codes of int2."""
Rounding = Literal["auto", "nearest", "gptq", "adaround"]
BlockSize = Literal[0, 16, 32, 64, 128, 256]

AUTO, EASYQUANT = "auto", "eq"
"""Calibrators that look at the outputs of layers; all others look at the histogram of a tensor alone."""
CALIBRATORS = (AUTO, EASYQUANT, *ESTIMATORS)


def _known_calibrator(name: str) -> str:
    if name not in CALIBRATORS:
        near = nearest(name, CALIBRATORS)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(f"{hint}known calibrators: {', '.join(CALIBRATORS)}")
    return name


Calibrator = Annotated[str, AfterValidator(_known_calibrator)]


class LayerMethod(Table):
    """Other choices for the layers whose names match a pattern; what is None is as for all the others.

    Attributes:
        match: shell-style pattern of node names, such as "layer1.*".
        precision: of the layer's inputs: "int2" to "int16", or "float" to leave it alone.
    """

    match: str
    precision: Precision | None = None
    calibrator: Calibrator | None = None
    weights: WeightType | None = None
    block_size: BlockSize | None = None
    rounding: Rounding | None = None


class Method(Table):
    """Post-training quantization, as asked for.

    Attributes:
        activations: "static" scales are chosen from data; "dynamic" ones at run time; with "none" only weights are quantized.
        precision: of activations. Fewer than 8 bits are for training; runtimes execute them as limited 8-bit grids.
        weights, block_size: type of the weights, and how many of them share a scale along the axis that a layer sums over; 0 is one
            scale for each output channel.
        calibrator: what chooses ranges of activations, one of `CALIBRATORS`.
        rounding: what chooses codes of weights. "auto" is GPTQ for matrix products and for weights of fewer than 8 bits, and the
            nearest codes for 8-bit convolutions, where GPTQ takes long and gains little.
        rounding_budget: seconds that "adaround" may take for all layers together.
        bias_correction: take off each bias what quantization adds to the layer's output in the mean.
        smooth: move outliers of activations into weights in front of matrix products (SmoothQuant).
        equalize: even out the channels of consecutive layers (cross-layer equalization).
        dequantize: take away the grids that the source came with, and choose none: the float model.
        layers: exceptions; a later one wins.
    """

    activations: Literal["static", "dynamic", "none"] = "static"
    precision: Precision = "int8"
    weights: WeightType = "int8"
    block_size: BlockSize = 0
    calibrator: Calibrator = AUTO
    rounding: Rounding = "auto"
    rounding_budget: Annotated[float, Field(gt=0)] = 600.0
    bias_correction: bool = True
    smooth: bool = True
    equalize: bool = False
    dequantize: bool = False
    layers: tuple[LayerMethod, ...] = ()

    def for_layer(self, name: str) -> Method:
        """The choices for the layer of a name."""
        changes: dict[str, object] = {}
        for layer in self.layers:
            if fnmatchcase(name, layer.match):
                changes |= layer.model_dump(exclude_none=True, exclude={"match"})
        return self.model_copy(update=changes) if changes else self

    @property
    def calibrators(self) -> set[str]:
        """All that are asked for, for some layers or others."""
        return {self.calibrator, *(layer.calibrator for layer in self.layers if layer.calibrator is not None)}

    @property
    def has_binary(self) -> bool:
        """Whether the weights of some layers are to be binary."""
        return BINARY in (self.weights, *(layer.weights for layer in self.layers))

    @property
    def has_few_bits(self) -> bool:
        """Whether inputs or weights of some layers are rounded to fewer than 8 bits."""
        types: set[str | None] = {self.precision, self.weights}
        for layer in self.layers:
            types |= {layer.precision, layer.weights}
        return not types <= {"int8", "int16", "float", None}

    @property
    def summary(self) -> str:
        """The main choices in a few words."""
        if self.dequantize:
            return "float"
        weights = f"{self.weights} weights" + (f" in blocks of {self.block_size}" if self.block_size else "")
        if self.activations != "static":
            return f"{weights}, {'dynamic' if self.activations == 'dynamic' else 'float'} activations"
        return f"{weights}, {self.precision} activations, {self.calibrator!r} ranges"

    def weight_spec(self, wanted: QuantSpec) -> QuantSpec:
        """The grid of a weight: the target's, with this type and block size."""
        if self.weights == wanted.dtype and not self.block_size:
            return wanted
        if self.weights == BINARY:
            return QuantSpec("int2", symmetric=True, per_channel=True, narrow_range=True)
        signed = self.weights.startswith("int")
        narrow = wanted.narrow_range and self.weights == "int8"
        return QuantSpec(
            self.weights, symmetric=signed, per_channel=True, narrow_range=narrow, block_size=self.block_size
        )


EVERYTHING = Method()
"""The default: weights and activations in 8 bits, ranges by the error at the layers' outputs."""
