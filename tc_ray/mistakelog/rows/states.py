"""Hidden states as the table holds them: bf16 bits, or 8-bit numbers with one scale for each state (`log.states`).

Invariant: in memory states are bf16 bits, whatever the table holds, so that only this module and the table's users outside tc-ray
know of 8 bits. A number that comes back differs by at most half a scale, which is 1/127 of the state's largest number, and by the
rounding to bf16. A state that is not finite comes back as one. Used by `records`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

from tc_ray.mistakelog.rows.ragged import Array, binary_array, flat_column, lengths_of, list_arrays
from tc_ray.mistakelog.rows.schema import LogSchemaError

StateType = Literal["bf16", "int8"]

_STEPS = 127
_AT_ONCE = 1 << 16
"""Numbers that are converted at a time, so that what is made on the way stays in the processor's cache."""


def quantised(bits: Array) -> tuple[Array, Array]:
    """bf16 bits, uint16 [n, d] -> (int8 [n, d], float32 scales [n]); a number is about its int8 times its state's scale."""
    numbers = np.empty(bits.shape, np.int8)
    scales = np.empty(len(bits), np.float32)
    step = max(1, _AT_ONCE // bits.shape[1])
    for first in range(0, len(bits), step):
        part = bits[first : first + step]
        # without their sign, bits are in the order of the numbers
        largest = _numbers((part & 0x7FFF).max(1, initial=0))
        scale = scales[first : first + step] = largest / np.float32(_STEPS)
        divisor = np.where(scale == 0, np.float32(1), scale)
        values = _numbers(part)
        with np.errstate(invalid="ignore"):  # of a state that is not finite the scale says so
            values /= divisor[:, None]
            np.rint(values, out=values)
            numbers[first : first + step] = values
    return numbers, scales


def dequantised(numbers: Array, scales: Array) -> Array:
    """Inverse of `quantised`: (int8 [n, d], float32 [n]) -> bf16 bits, uint16 [n, d], rounded to the nearest, ties to even."""
    bits = np.empty(numbers.shape, np.uint16)
    step = max(1, _AT_ONCE // numbers.shape[1])
    for first in range(0, len(numbers), step):
        part, scale = numbers[first : first + step], scales[first : first + step]
        with np.errstate(invalid="ignore"):
            wide = (part * scale[:, None]).view(np.uint32)
        wide += ((wide >> 16) & 1) + np.uint32(0x7FFF)
        bits[first : first + step] = wide >> 16
        bits[first : first + step][~np.isfinite(scale)] = 0x7FC0  # rounding could carry a NaN over to a number
    return bits


def state_columns(states: Array, offsets: Array, kind: StateType) -> dict[str, pa.Array]:
    """Columns `rationale` and `rationale_scale` of N records.

    Args:
        states: uint16 [positions, layers, d]; bf16: the cells are over its memory.
        offsets: int64 [N+1] in positions.
    """
    _, layers, dim = states.shape
    own = states[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    if kind == "bf16":
        empty = pa.nulls(len(offsets) - 1, pa.list_(pa.float32()))
        return {"rationale": _cells(offsets * (layers * dim * 2), own), "rationale_scale": empty}
    numbers, scales = quantised(own.reshape(-1, dim))
    return {
        "rationale": _cells(offsets * (layers * dim), numbers),
        "rationale_scale": list_arrays([scales], offsets * layers)[0],
    }


def states_of(table: pa.Table, layers: int, dim: int, kind: StateType) -> tuple[Array, Array]:
    """Inverse of `state_columns`: (uint16 [positions * layers, d] or flat, int64 offsets [N+1] in positions); bf16: a view.

    Raises LogSchemaError: a cell does not fit the widths.
    """
    values, offsets = flat_column(table.column("rationale"))
    width = layers * dim * (1 if kind == "int8" else 2)
    if (offsets % width).any():
        raise LogSchemaError(f"column rationale: a cell is not a whole number of {layers} x {dim} {kind} states")
    offsets //= width
    if kind == "bf16":
        return values.view(np.uint16), offsets
    scales, scale_offsets = flat_column(table.column("rationale_scale"))
    if not np.array_equal(lengths_of(scale_offsets), lengths_of(offsets) * layers):
        raise LogSchemaError("column rationale_scale: not one scale for each state of column rationale")
    return dequantised(values.view(np.int8).reshape(-1, dim), scales), offsets


def _numbers(bits: Array) -> Array:
    """float32 numbers of bf16 bits."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _cells(offsets: Array, values: Array) -> pa.Array:
    return binary_array(offsets.astype(np.int32), values.reshape(-1))
