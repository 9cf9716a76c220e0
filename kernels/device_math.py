"""Scalar functions that generated programs and the kernels call on the device.

Arguments are tensors of any shape that broadcast; integers follow Python's floor rule for ``//``
and ``%``, which the hardware's truncating division does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def widened(x):  # type: ignore[no-untyped-def]
    """Integers of fewer than 32 bits as int32: their own arithmetic would overflow."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.int32)
    return x


@triton.jit
def floordiv_int(a, b):  # type: ignore[no-untyped-def]
    r = a % b
    return a // b - ((r != 0) & ((r < 0) != (b < 0))).to(tl.int32)


@triton.jit
def mod_int(a, b):  # type: ignore[no-untyped-def]
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def floordiv_float(a, b):  # type: ignore[no-untyped-def]
    return tl.floor(a / b)


@triton.jit
def mod_float(a, b):  # type: ignore[no-untyped-def]
    return a - tl.floor(a / b) * b


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    # (1 - e) / (1 + e) cancels near 0, where the odd series is exact to float32 instead.
    x2 = x * x
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    series = 0.133333333 + x2 * (-0.0539682540 + x2 * 0.0218694885)
    near = tl.abs(x) * (1.0 + x2 * (-0.333333333 + x2 * series))
    t = tl.where(x2 < 0.0625, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def block_min(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least value along ``axis``; −inf where a NaN is among them."""
    if x.dtype.is_floating():
        x = tl.where(x == x, x, float("-inf"))
    elif x.dtype == tl.int1:
        x = x.to(tl.int32)
    return tl.min(x, axis)


@triton.jit
def block_max(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The greatest value along ``axis``; +inf where a NaN is among them."""
    if x.dtype.is_floating():
        x = tl.where(x == x, x, float("inf"))
    elif x.dtype == tl.int1:
        x = x.to(tl.int32)
    return tl.max(x, axis)


@triton.jit
def keep_draw(seed, bh, q, kv_start, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One uniform int32 per element of a [BM, BN] tile; ``q`` is [BM], ``kv_start`` a multiple of BN.

    Element (q, kv) takes lane (kv // 8) % 4 of Philox-4x32-7 at the counter (8 (kv // 32) + kv % 8, q, bh, 0), so
    that the draw does not depend on the tile sizes (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3).
    BN is a multiple of 32.
    """
    group = tl.arange(0, BN // 4) // 8
    column = kv_start // 4 + group * 8 + tl.arange(0, BN // 4) % 8
    c0 = column[None, :] + tl.zeros([BM, BN // 4], tl.int32)
    c1 = q[:, None] + tl.zeros([BM, BN // 4], tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c0 * 0 + bh, c0 * 0, n_rounds=7)
    low = tl.join(r0, r2)  # [BM, BN/4, 2]: lanes 0 and 2
    high = tl.join(r1, r3)  # lanes 1 and 3
    lanes = tl.join(low, high)  # [BM, BN/4, 2, 2]: [..., i, j] is lane 2 i + j
    lanes = tl.reshape(lanes, [BM, BN // 32, 8, 2, 2])
    lanes = tl.permute(lanes, (0, 1, 3, 4, 2))  # [BM, BN/32, 2, 2, 8]
    return tl.reshape(lanes, [BM, BN]).to(tl.int32, bitcast=True)
