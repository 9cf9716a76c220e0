"""Scalar functions that generated programs and the kernels call on the device.

Arguments are tensors of any shape that broadcast; integers follow Python's floor rule for ``//``
and ``%``, which the hardware's truncating division does not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
MODERATE: tl.constexpr = tl.constexpr(4096.0)
"""Below it float32 adds a number up with scores well; NaN and infinity are not."""


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no instruction of a device."""
    return bool(triton.knobs.runtime.interpret)


INTERPRETED: tl.constexpr = tl.constexpr(is_interpreted())


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
def power_of_e(x, less, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(x) / 2^less, where ``less`` is small.

    The hardware's exp2 of x·log2(e) has the rounding of that product: |x| roundings of the result.
    """
    if PRECISION != "ieee":
        return tl.exp2(x * LOG2E - less)
    elif INTERPRETED:
        return tl.exp(x) * tl.exp2(-less)
    else:
        return libdevice.exp(x) * tl.exp2(-less)


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b; in full float32 the product is summed by itself first, which rounds less."""
    if PRECISION == "ieee":
        # A nonzero max_num_imprecise_acc (which only 8-bit products heed) keeps the sum from being merged.
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def sum_up(total, low, part):  # type: ignore[no-untyped-def]
    """(total + part, low), where ``low`` is what rounding has taken from the sum (Kahan's summation).

    A sum over thousands of tiles is a chain of so many additions, where libraries add in a tree.
    Where ``low`` is not as large as ``total`` (see :func:`zeros_beside`), part is added as it is.
    """
    if low.shape[0] == 1:
        return total + part, low
    else:
        part = part - low
        result = total + part
        return result, (result - total) - part


@triton.jit
def dot_sum(a, b, acc, low, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """:func:`sum_up` of the product a b, where ``low`` is as large as acc; else the product is added."""
    if low.shape[0] == 1:
        return dot_add(a, b, acc, PRECISION), low
    else:
        product = tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
        return sum_up(acc, low, product)


@triton.jit
def zeros_beside(acc, KEPT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first ``low`` of :func:`sum_up`; unless KEPT a number that stays as it is."""
    return tl.zeros_like(acc) if KEPT else tl.zeros([1, 1], tl.float32)


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a bᵀ [M, N] of a [M, K] and b [N, K].

    In full float32 a product is one chain of K sums.  Libraries cut long ones, which rounds less.
    """
    M: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[0]
    K: tl.constexpr = a.shape[1]
    # NumPy, which multiplies for the interpreter, makes no such chains.
    if PRECISION == "ieee" and (128 if INTERPRETED else 32) < K:
        PARTS: tl.constexpr = K // 32
        parts_a = tl.permute(tl.reshape(a, [M, PARTS, 32]), (1, 0, 2))
        parts_b = tl.permute(tl.reshape(b, [N, PARTS, 32]), (1, 2, 0))
        return tl.sum(tl.dot(parts_a, parts_b, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def sink_of_rows(  # type: ignore[no-untyped-def]
    b, h, rows, Sq, Skv, ptrs, nums, SINK: tl.constexpr, BASE_2: tl.constexpr, BM: tl.constexpr
):
    """[BM] float32: the sinks of ``rows``, in units of log 2 where BASE_2."""
    sink = SINK(b, h, rows, Sq, Skv, ptrs, nums) + tl.zeros([BM], tl.float32)
    if BASE_2:
        # The largest numbers must not become infinite: only −inf is no sink.
        used = tl.minimum(tl.maximum(sink, -2.3e38), 2.3e38) * LOG2E
        sink = tl.where(tl.abs(sink) < float("inf"), used, sink)
    return sink


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Absolute error of float32's epsilon: enough behind products of 16-bit numbers, and cheap."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def as_written(x):  # type: ignore[no-untyped-def]
    """``x`` [M, N] float32, past which the compiler moves nothing.

    A choice between x and 0 in front of a rounding to 16 bits would be moved behind it, where two numbers
    share a register and each choice takes three instructions.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_scattered(ptrs):  # type: ignore[no-untyped-def]
    """The elements at a tile of pointers, read by the threads that compute with them; floats as float32.

    ``tl.load`` gives a tile a layout in which neighbours are read together, through which the scores would
    have to go, and room in shared memory.  Entries of a small table come from the cache in any order.
    """
    if not ptrs.type.is_block():
        value = tl.load(ptrs)
        if value.dtype.is_floating():
            value = value.to(tl.float32)
        return value if value.dtype == tl.int1 else widened(value)
    elif ptrs.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptrs], dtype=tl.float32, is_pure=True, pack=1
        )
    elif ptrs.dtype.element_ty == tl.float16:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 x; ld.global.nc.b16 x, [$1]; cvt.f32.f16 $0, x; }",
            "=f,l", [ptrs], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    elif ptrs.dtype.element_ty == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 x; ld.global.nc.u16 x, [$1]; shl.b32 $0, x, 16; }",
            "=r,l", [ptrs], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return bits.to(tl.float32, bitcast=True)
    elif ptrs.dtype.element_ty == tl.int64:
        return tl.inline_asm_elementwise(
            "ld.global.nc.s64 $0, [$1];", "=l,l", [ptrs], dtype=tl.int64, is_pure=True, pack=1
        )
    elif ptrs.dtype.element_ty == tl.int32:
        return tl.inline_asm_elementwise(
            "ld.global.nc.s32 $0, [$1];", "=r,l", [ptrs], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ptrs.dtype.element_ty == tl.int1:
        byte = tl.inline_asm_elementwise(
            "{ .reg .b16 x; ld.global.nc.u8 x, [$1]; cvt.u32.u16 $0, x; }",
            "=r,l", [ptrs], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return byte != 0
    else:
        return widened(tl.load(ptrs))


@triton.jit
def tanh_approx(x):  # type: ignore[no-untyped-def]
    """The hardware's: relative error 2^-11, one instruction."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh_precise(x):  # type: ignore[no-untyped-def]
    """Relative error of float32's epsilon: the odd series near 0, where the formula cancels."""
    x2 = x * x
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    series = 0.133333333 + x2 * (-0.0539682540 + x2 * 0.0218694885)
    near = tl.abs(x) * (1.0 + x2 * (-0.333333333 + x2 * series))
    t = tl.where(x2 < 0.0625, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def in_eights(kv):  # type: ignore[no-untyped-def]
    """The positions of a tile's keys in rows of whole eights, which lie side by side in memory.

    kv is a tile's first key, a multiple of 8, and those that follow, but for those past the last one, for
    which that stands: they may be anywhere in a row.  Clamped numbers, of which the compiler knows nothing,
    are read one by one.
    """
    ROWS: tl.constexpr = kv.shape[0]
    COLUMNS: tl.constexpr = kv.shape[1]
    column = tl.reshape(tl.arange(0, ROWS * COLUMNS), [ROWS, COLUMNS])
    at = kv // 8 * 8 + column % 8
    if ROWS == 1:
        return tl.max_contiguous(tl.multiple_of(at, [1, 8]), [1, 8])
    else:
        return tl.max_contiguous(tl.multiple_of(at, [8, 1]), [8, 1])


@triton.jit
def add_gradient(Buffer, Scale, offset, value, inside, ALONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add ``value``, a number or a tile of numbers, to Buffer at ``offset`` where it is ``inside``.

    If ALONE, nothing else is added there, so that it is written.

    A buffer of floats is added to as it comes.  An int64 buffer holds multiples of 1 / Scale[0], a power of
    two: their sum does not depend on the order.  An int32 buffer gets the bits of the largest magnitude,
    which such a scale is made from.
    """
    if Buffer.dtype.element_ty == tl.int32:
        largest = tl.abs(value).to(tl.float32)
        # Bits of numbers that are not negative have their order; NaN counts as infinite.
        bits = tl.where(largest == largest, largest, float("inf")).to(tl.int32, bitcast=True)
        if bits.type.is_block():
            bits = tl.max(tl.max(bits, 1), 0)
        tl.atomic_max(Buffer, bits, sem="relaxed")
    else:
        if Buffer.dtype.element_ty == tl.int64:
            value = value * tl.load(Scale)
        value = value.to(Buffer.dtype.element_ty)
        if ALONE:
            tl.store(Buffer + offset, value, mask=inside)
        else:
            tl.atomic_add(Buffer + offset, value, mask=inside, sem="relaxed")


@triton.jit
def block_min(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least value along ``axis``, or the only one; −inf where a NaN is among them."""
    if x.dtype.is_floating():
        x = tl.where(x == x, x, float("-inf"))
    elif x.dtype == tl.int1:
        x = x.to(tl.int32)
    return tl.min(x, axis) if x.type.is_block() else x


@triton.jit
def block_max(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The greatest value along ``axis``, or the only one; +inf where a NaN is among them."""
    if x.dtype.is_floating():
        x = tl.where(x == x, x, float("inf"))
    elif x.dtype == tl.int1:
        x = x.to(tl.int32)
    return tl.max(x, axis) if x.type.is_block() else x


@triton.jit
def _product(a, b):  # type: ignore[no-untyped-def]
    """The (upper, lower) halves of the 64-bit products of a tile and a constant, uint32, one instruction."""
    if INTERPRETED:
        return tl.umulhi(a, tl.zeros_like(a) + b), a * b
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 x; mul.wide.u32 x, $2, $3; mov.b64 {$1, $0}, x; }",
            "=r,=r,r,r", [a, tl.zeros_like(a) + b], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def philox_7(seed, c0, c1, c2):  # type: ignore[no-untyped-def]
    """Philox-4x32-7 at the counter (c0, c1, c2, 0) of uint32 tiles under a key of 64 bits.

    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(7):
        high_0, low_0 = _product(c0, 0xD2511F53)
        high_2, low_2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_draw(seed, bh, q_start, kv_start, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One uniform int32 per element of the [BM, BN] tile at (q_start, kv_start), multiples of BM and BN.

    One call of Philox at the counter (4 (kv // 32) + kv % 8 // 2, 8 (q // 16) + q % 8, bh, 0) serves 16
    elements: its word (kv // 8) % 4, turned by 8 bits in odd columns and by 16 in rows with (q // 8) % 2 = 1.
    So the draw does not depend on the tile sizes, every element is uniform over 32 bits, and two that share
    a word depend on each other only where one meets the threshold in all of its upper 8 bits.  These are
    the elements that one thread holds in the layout of the tensor cores.  BM is a multiple of 16, BN of 32.
    """
    rows: tl.constexpr = BM // 2
    columns: tl.constexpr = BN // 8
    row = (q_start // 2 + tl.arange(0, rows)).to(tl.uint32)[:, None]
    column = (kv_start // 8 + tl.arange(0, columns)).to(tl.uint32)[None, :]
    zeros = tl.zeros([rows, columns], tl.uint32)
    r0, r1, r2, r3 = philox_7(seed, zeros + column, zeros + row, zeros + bh.to(tl.uint32))
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [rows, columns, 2, 2]: [..., i, j] is word 2 i + j
    draws = tl.join(words, (words << 8) | (words >> 24))  # ..., kv % 2
    draws = tl.join(draws, (draws << 16) | (draws >> 16))  # ..., kv % 2, q // 8 % 2
    draws = tl.reshape(draws, [BM // 16, 8, BN // 32, 4, 2, 2, 2, 2])
    draws = tl.permute(draws, (0, 7, 1, 2, 4, 5, 3, 6))
    return tl.reshape(draws, [BM, BN]).to(tl.int32, bitcast=True)
