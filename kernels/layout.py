"""How tensors lie in memory, as the Triton kernels are told."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashfuse.kernels.printer import CaptureType, capture_type


def is_aligned(*tensors: Tensor) -> bool:
    """Every pointer is a multiple of 16 bytes."""
    bits = 0
    for t in tensors:
        bits |= t.data_ptr()
    return bits % 16 == 0


def typed(tensors: Sequence[Tensor]) -> tuple[tuple[CaptureType, ...], tuple[tuple[int, ...], ...]]:
    """The types of captures, and the strides to pass at run time."""
    pairs = [capture_type(t) for t in tensors]
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def padded(size: int) -> int:
    """The power of two, at least 16, that ``size`` fits in."""
    return max(16, 1 << (size - 1).bit_length())


def whole_eights(size: int) -> int:
    """The multiple of 8 that ``size`` fits in."""
    return -(-size // 8) * 8


def bshd(sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes [B, H, S, D], and the strides of what lies as [B, S, H, D], as of ``ops.empty_bhsd``."""
    b, h, s, d = sizes
    return (b, h, s, d), (s * h * d, d, h * d, 1)


def fits(t: Tensor) -> bool:
    """The last axis is dense, the other strides are whole units of 8 elements, tile offsets fit 32 bits."""
    strides = t.stride()
    units = all(n == 1 or s % 8 == 0 for n, s in zip(t.shape[:3], strides[:3], strict=True))
    return strides[3] == 1 and units and strides[2] < 2**23


def is_describable(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can read ``t``, which fits: no axis repeats its elements."""
    return all(n == 1 or 0 < s < 2**36 for n, s in zip(t.shape, t.stride(), strict=True))


def strides_of(t: Tensor | None) -> tuple[int, int, int]:
    """Strides of b, h and s in units of 8 elements."""
    if t is None:
        return 0, 0, 0
    b, h, s, _ = t.stride()
    return b // 8, h // 8, s // 8


def map_strides(block_map: Tensor | None) -> tuple[int, int, int]:
    """Strides of b, h and the row; an axis of size 1 serves every b or h."""
    if block_map is None:
        return 0, 0, 0
    lead_b, lead_h, rows, row = block_map.shape
    return (lead_h * rows * row if lead_b > 1 else 0), (rows * row if lead_h > 1 else 0), row
