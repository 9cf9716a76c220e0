"""Patterns of an approximate attention: which blocks of queries and keys are kept.

A pattern is a condition over ``b h q kv`` in the language of score programs, in which ``q`` is the position
of the query among the keys.  It says nothing of a graph; ``sparsify.py`` brings it into a site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import INDEX_VARS, KV, LENGTHS, B, Expr, H, Q, const
from flashfuse.kernels.spec import AttentionShape

MAP_BLOCK = 128
"""Edge of the blocks that the kernels skip."""
_FURTHEST = 1 << 20
"""Blocks; a power of two."""

KEEP = "keep"
"""The name under which a condition of a :class:`BlockMask` loads its tensor."""


class Pattern:
    """A condition on positions; see the subclasses."""

    def condition(self) -> Expr:
        """True where the key ``kv`` is kept for the query at the position ``q``."""
        raise NotImplementedError

    def __or__(self, other: object) -> Pattern:
        return AnyOf((self, other)) if isinstance(other, Pattern) else NotImplemented


@dataclass(frozen=True)
class Butterfly(Pattern):
    """A block of queries i sees a block of keys j where i xor j is 0 or a power of two.

    These are the factors of a fast Fourier transform, so log2(n) + 1 blocks of n in a row: the flat block
    butterfly of Pixelated Butterfly (arXiv 2112.00029).

    Attributes:
        block: the edge of a block in positions, a multiple of 128 or one of 16, 32 and 64.
    """

    block: int = MAP_BLOCK

    def __post_init__(self) -> None:
        _check_block(self.block)

    def condition(self) -> Expr:
        i, j = (E.floordiv(x, const(self.block)) for x in (Q, KV))
        # A distance of 2^l is a step of butterfly l where the lower of the two has bit l unset.
        distance = E.maximum(E.call("abs", E.sub(i, j)), const(1))
        is_power = E.compare("==", E.mod(const(_FURTHEST), distance), const(0))
        unset = E.compare("==", E.mod(E.floordiv(E.minimum(i, j), distance), const(2)), const(0))
        return E.logical_or(E.compare("==", i, j), E.logical_and(is_power, unset))

    def __str__(self) -> str:
        return f"butterfly of blocks of {self.block}"


@dataclass(frozen=True)
class LocalGlobal(Pattern):
    """A band of blocks, the first blocks of keys and of queries, and every so many blocks.

    Block i of the queries sees block j of the keys where |i − j| ≤ ``local``, or one of them is among the
    first ``global_``, or i − j is a multiple of ``stride``.  (Longformer, arXiv 2004.05150; BigBird, arXiv
    2007.14062; Sparse Transformers, arXiv 1904.10509.)

    Attributes:
        local: blocks to either side that are seen, besides the query's own.
        global_: blocks at the start that see all and are seen by all.
        stride: in blocks; 0 for none.
        block: as for :class:`Butterfly`.
    """

    local: int = 1
    global_: int = 1
    stride: int = 0
    block: int = MAP_BLOCK

    def __post_init__(self) -> None:
        _check_block(self.block)
        for name in ("local", "global_", "stride"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"expected {name} to be a number of blocks of at least 0, got {value!r}")

    def condition(self) -> Expr:
        i, j = (E.floordiv(x, const(self.block)) for x in (Q, KV))
        near = E.compare("<=", E.call("abs", E.sub(i, j)), const(self.local))
        parts = [near if self.local else E.compare("==", i, j)]
        if self.global_:
            first = const(self.global_ * self.block)
            parts += [E.compare("<", KV, first), E.compare("<", Q, first)]
        if self.stride:
            parts.append(E.compare("==", E.mod(E.sub(i, j), const(self.stride)), const(0)))
        return E.logical_or(*parts)

    def __str__(self) -> str:
        parts = [f"{self.local} local"]
        parts += [f"{self.global_} global"] if self.global_ else []
        parts += [f"every {self.stride}th"] if self.stride else []
        return f"{', '.join(parts)} of blocks of {self.block}"


@dataclass(frozen=True)
class Formula(Pattern):
    """A condition as text, such as ``"abs(q//128 - kv//128) <= 4 or kv < 128"``.

    ``q`` is the position of the query among the keys; ``b``, ``h``, ``Sq`` and ``Skv`` are known too.
    """

    text: str

    def __post_init__(self) -> None:
        condition = E.parse(self.text)
        loads = [n.args[0] for n in E.walk(condition) if n.op == "load"]
        unknown = [*loads, *sorted(E.variables(condition) - {*INDEX_VARS, *LENGTHS})]
        if unknown:
            raise ValueError(
                f"expected a condition over {', '.join((*INDEX_VARS, *LENGTHS))}, "
                f"got {unknown[0]!r} in {self.text!r}"
            )
        if not E.is_bool(condition):
            raise ValueError(f"expected a condition that is true where a key is kept, got {self.text!r}")
        if condition == E.FALSE:
            raise ValueError(f"expected a condition that keeps a key, got {self.text!r}")

    def condition(self) -> Expr:
        return E.parse(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class AnyOf(Pattern):
    """What one of the ``patterns`` keeps: ``Butterfly() | LocalGlobal()``."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if sum(mask_of(p) is not None for p in self.patterns) > 1:
            raise ValueError("expected at most one BlockMask among patterns that are joined")

    def condition(self) -> Expr:
        return E.logical_or(*(p.condition() for p in self.patterns))

    def __str__(self) -> str:
        return " or ".join(map(str, self.patterns))


class BlockMask(Pattern):
    """Blocks that are kept, by a tensor: for all heads, for each head, or for each entry of the batch too.

    The compiled model reads the tensor at each call, so :meth:`update` between calls is seen without a
    compilation.  Masks are compared by identity.

    Args:
        keep: bool [nq, nkv], [H, nq, nkv] or [B, H, nq, nkv]; B and H may be 1.  It is copied.
        block: the edge of a block in positions, as for :class:`Butterfly`.

    Raises:
        TypeError, ValueError: a tensor of another kind.
    """

    def __init__(self, keep: Tensor, block: int = MAP_BLOCK) -> None:
        _check_block(block)
        _check_keep(keep)
        self.block, self.shape = block, tuple(keep.shape)
        self._on = {keep.device: keep.detach().clone(memory_format=torch.contiguous_format)}

    @property
    def keep(self) -> Tensor:
        """A copy of what is kept now."""
        return next(iter(self._on.values())).clone()

    @torch.no_grad()
    def update(self, keep: Tensor) -> None:
        """Keep these blocks from the next call on; ``keep`` has the shape of the first.

        Update between steps: a backward needs the mask of its forward, and raises where it was changed since.
        """
        _check_keep(keep)
        if tuple(keep.shape) != self.shape:
            raise ValueError(f"expected keep of shape {list(self.shape)}, got {list(keep.shape)}")
        for own in self._on.values():
            own.copy_(keep)

    def on(self, device: torch.device) -> Tensor:
        """The tensor that sites on ``device`` read."""
        if device not in self._on:
            self._on[device] = next(iter(self._on.values())).to(device)
        return self._on[device]

    def condition(self) -> Expr:
        lead = [const(0) if size == 1 else own for size, own in zip(self.shape[-3::-1], (H, B), strict=False)]
        return E.load(KEEP, (*reversed(lead), *(E.floordiv(x, const(self.block)) for x in (Q, KV))))

    def misfit(self, shape: AttentionShape) -> str:
        """Why the mask cannot be used for a site, or ``""``."""
        *lead, rows, columns = self.shape
        for size, wanted, what in zip(
            reversed(lead), (shape.num_q_heads, shape.batch), ("heads", "batch entries"), strict=False
        ):
            if size != 1 and not (isinstance(wanted, int) and size == wanted):
                return f"the mask is for {size} {what}, the site has {wanted}"
        if not isinstance(shape.q_len, int) or not isinstance(shape.kv_len, int):
            return "the mask has a fixed number of blocks, the lengths of the site are symbolic"
        covered = self.block * min(rows, columns)
        if shape.kv_len > covered:
            return f"the mask covers {covered} positions, the site has {shape.kv_len}"
        return ""

    def __str__(self) -> str:
        return f"mask {list(self.shape)} of blocks of {self.block}"


Choice = Callable[[AttentionShape], "Pattern | str | None"]
"""Chooses for each site; ``None`` leaves it exact."""
Sparsity = Union[Pattern, Choice]


def mask_of(pattern: Pattern) -> BlockMask | None:
    """The mask in ``pattern`` that holds a tensor."""
    if isinstance(pattern, AnyOf):
        return next((m for m in map(mask_of, pattern.patterns) if m is not None), None)
    return pattern if isinstance(pattern, BlockMask) else None


def read(value: object) -> Pattern:
    """A pattern, or the text of one.

    Raises:
        TypeError: neither.
        ValueError: the text is no condition.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return Formula(value)
    hint = "; a tensor of blocks goes into flashfuse.BlockMask" if isinstance(value, Tensor) else ""
    raise TypeError(f"expected a pattern or the text of a condition, got {type(value).__name__}{hint}")


def _check_block(block: object) -> None:
    if type(block) is not int or block < 16 or (block % MAP_BLOCK and MAP_BLOCK % block):
        raise ValueError(f"expected block to be 16, 32, 64 or a multiple of {MAP_BLOCK}, got {block!r}")


def _check_keep(keep: object) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"expected keep to be a tensor of torch.bool, got {got}")
    if keep.ndim not in (2, 3, 4) or not keep.numel():
        raise ValueError(
            f"expected keep of shape [nq, nkv], [H, nq, nkv] or [B, H, nq, nkv], got {list(keep.shape)}"
        )
