"""What Triton's interpreter lacks of bfloat16, as a GPU does it: products, and rounding to the nearest.

The interpreter keeps bfloat16 as its bits, multiplies these as integers, and cuts float32 off where a GPU
rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def widened(bits: Any) -> Any:
    """The float32 values of bfloat16 ``bits`` (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: Any) -> Any:
    """The bits (uint16) of float32 ``values`` rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)


def install() -> None:
    """Teach the interpreter of this process, which TRITON_INTERPRET=1 has chosen."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def as_float32(x: Any) -> Any:
        return TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, as_float32(a), as_float32(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
