"""A bias on the accumulator's grid: int32 codes of scale `s_x * s_w`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.lowering.units import Operand, Unit, operand, row
from edgekit.lowering.writer import node_name

INT32_MAX = 2**31 - 1


def bias_codes(
    unit: Unit, value: ir.Value | None, grid: NDArray[np.float64], factor: float = 1.0
) -> NDArray[np.int32] | None:
    """The constant row `value`, times `factor`, in units of `grid`, shape `(C_out,)` or `()`; None where it is absent.

    Codes that already stand on that grid are kept as they are. `grid` is `()` or `(C_out,)`.

    Raises:
        GraphError: a bias that is computed, of another shape, or that does not fit into int32.
    """
    if value is None:
        return None
    reals = row(value)
    if reals is None:
        raise GraphError(
            f"{unit.node.op_type} {node_name(unit.node)!r}: its bias {value.name!r} is computed or has several rows; "
            "expected a constant with one value for each output channel"
        )
    found = operand(value)
    if found is not None and factor == 1.0 and _on_grid(found, grid):
        assert found.constant_codes is not None
        return found.constant_codes.astype(np.int32).reshape(reals.shape[-1:])
    codes = np.rint(reals.reshape(reals.shape[-1:]) * factor / grid)
    worst = float(np.max(np.abs(codes), initial=0.0))
    if worst > INT32_MAX:
        raise GraphError(
            f"{unit.node.op_type} {node_name(unit.node)!r}: its bias needs the code {worst:.3g} on the accumulator's "
            "grid (input scale times weight scale), beyond int32; give the weight of that channel a larger scale"
        )
    return codes.astype(np.int32)


def _on_grid(found: Operand, grid: NDArray[np.float64]) -> bool:
    """Whether stored int32 codes have the accumulator's scale, up to the rounding of a float32 product."""
    return (
        found.dtype == ir.DataType.INT32
        and not np.any(found.zero_points)
        and found.scales.shape in ((), grid.shape)
        and np.allclose(found.scales, grid, rtol=1e-5, atol=0.0)
    )
