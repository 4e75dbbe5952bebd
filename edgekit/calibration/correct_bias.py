"""Bias correction: what quantization adds to a layer's output in the mean is taken off its bias."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from edgekit.calibration.layer_rows import F32, LinearLayer, Rows, linear_layers, matrix, numbers, rows_key
from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.operators import bias_place
from edgekit.quant.affine import constant_codes, dequantize, fake_quantize
from edgekit.quant.bias_correction import sampled_bias_shift


def correct_bias(model: ir.Model, rows: Rows) -> ir.Model:
    """Note for each quantized weight, as `QuantParams.shift`, by how much its layer's outputs are moved in the mean.

    The mean is taken over `rows`, with the input and the weight rounded. The float model stays as it is; lowering subtracts the
    shift where the layer is quantized. Layers whose weight is shared, or that have no place for a bias, are left out.

    See `edgekit.quant.bias_correction` for the papers.
    """
    model = model.clone()
    for layer in linear_layers(model.graph):
        params, sample = get_params(layer.weight), rows.get(rows_key(layer))
        if params is None or params.fixed or sample is None or len(layer.weight.uses()) > 1:
            continue
        if bias_place(layer.node) is not None:
            set_params(layer.weight, replace(params, shift=_shift(layer, sample.rows)))
    return model


def _shift(layer: LinearLayer, rows: F32) -> F32:
    params, grid = get_params(layer.weight), get_params(layer.source)
    assert params is not None
    weight = numbers(layer.weight)
    rounded = matrix(layer, dequantize(constant_codes(weight, params), params))
    return sampled_bias_shift(matrix(layer, weight), rounded, rows, rows if grid is None else fake_quantize(rows, grid))
