"""Tensors of real numbers as a proof sees them.

A :class:`Value` is a residue modulo p, one modulo q for what may still be exponentiated, and where
masks are about a *level*: the part of the number so large that everything else is lost beside it, as
in ``score + finfo.min``.  Softmax looks at levels first and at residues among equal levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flashfuse.proof import field as F
from flashfuse.proof.certificate import NotProvable

MASK_LEVEL = 65504.0
"""Constants at least this large are levels: the largest of float16."""
MASKED_OUT = -1000.0
"""Levels this far below the highest have the weight 0: e^−1000 is 0 in every dtype."""
ABSORBING = 1.0
"""Beside a level that is rounded to multiples of this, scores are taken to be lost."""
MAX_CONSTANTS = 20_000

Operand: TypeAlias = "Value | Tensor | int | float"


@dataclass
class Draw:
    """One random choice of everything: fields, hash key, generators, constants; and what was met."""

    p: int
    q: int
    g: int
    key: int
    inputs: torch.Generator
    others: torch.Generator
    constants: F.Constants
    uninterpreted: dict[str, None] = field(default_factory=dict)
    masks: dict[float, float] = field(default_factory=dict)
    """Constants taken as masks, and the size of the scores that are lost beside each."""
    precision: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Mantissa and exponent bits with which each input reaches a product or the softmax."""
    _numbers: dict[float, Value] = field(default_factory=dict)

    @staticmethod
    def seeded(seed: int) -> Draw:
        # Inputs must not depend on how many constants or maxima were met before they were drawn.
        generator, others = (torch.Generator().manual_seed(n) for n in (seed, ~seed & 0xFFFFFFFF))
        p, q = F.PRIMES[seed % len(F.PRIMES)]
        root, key = torch.randint(2, q, (2,), generator=others).tolist()
        # Squares have order q, which is prime.
        return Draw(p, q, root * root % p, key, generator, others, F.Constants(p, q, others))

    def random(self, sizes: Sequence[int]) -> Value:
        """Independent residues in both fields."""
        sizes = tuple(sizes)
        p = F.random_residues(sizes, self.p, self.inputs)
        return Value(self, p, F.random_residues(sizes, self.q, self.inputs))

    def value(self, x: Operand) -> Value:
        """A number or a real tensor as it is; see ``Value.added`` and ``Value.factor`` for huge ones."""
        if isinstance(x, Value):
            return x
        if not isinstance(x, Tensor):
            if x not in self._numbers:
                self._numbers[x] = self._of_floats(torch.tensor(float(x), dtype=torch.float64))
            return self._numbers[x]
        if not x.is_floating_point():
            x = x.long()
            return Value(self, x % self.p, x % self.q, real=x.double())
        return self._of_floats(x.detach().double())

    def _of_floats(self, x: Tensor) -> Value:
        distinct, where = torch.unique(x, return_inverse=True)
        if distinct.numel() > MAX_CONSTANTS:
            raise NotProvable(f"{distinct.numel()} different constants")
        pairs, levels = [], []
        for c in distinct.tolist():
            pairs.append(self.constants(c) if math.isfinite(c) else (0, 0))
            levels.append(c if not abs(c) < MASK_LEVEL else 0.0)
        residues = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)[where]
        level = torch.tensor(levels, dtype=torch.float64)[where] if any(n != 0 for n in levels) else None
        return Value(self, residues[..., 0], residues[..., 1], level, real=x)

    def apply(self, name: str, *operands: Value) -> Value:
        """An uninterpreted function: equal arguments, equal results, nothing else."""
        self.uninterpreted[name] = None
        if any(x.has_levels for x in operands):
            raise NotProvable(f"`{name}` of a masked score")
        h = torch.tensor(hash_of_name(name))
        for x in operands:
            h = F.mix(h + x.p, self.key)
        return Value(self, h % self.p, F.mix(h, self.key) % self.q)


def hash_of_name(name: str) -> int:
    """Python's own hash of a string differs from process to process."""
    return int.from_bytes(name.encode(), "big") % (2**61 - 1)


@dataclass
class Value:
    """Residues and levels, broadcast against each other like any tensors.

    Attributes:
        p: [..] int64, the number modulo p.
        q: the number modulo q, or ``None`` after an exponential.
        level: [..] float64; 0 for ordinary numbers, NaN for NaN; ``None`` is 0 everywhere.
        real: the numbers themselves where they are known.
        factor: of a logarithm: the number is q + ln(factor).
    """

    draw: Draw
    p: Tensor
    q: Tensor | None = None
    level: Tensor | None = None
    real: Tensor | None = None
    factor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.p.shape

    @property
    def has_levels(self) -> bool:
        return self.level is not None and bool((self.level != 0).any())

    def map(self, run: Any) -> Value:
        """``run`` on every component: for what only moves elements and fills with 0."""
        plain = self.exponent_only()
        q = None if plain.q is None else run(plain.q)
        level = None if plain.level is None else run(plain.level.expand(plain.p.shape))
        return Value(self.draw, run(plain.p), q, level)

    def exponent_only(self) -> Value:
        """Without ``factor``: a logarithm becomes an exponent that nothing is known of."""
        if self.factor is None:
            return self
        return Value(self.draw, self.p, F.mix(self.p, self.draw.key) % self.draw.q, self.level)

    def exponent(self) -> Tensor:
        """The residue modulo q; that of an exponential is an uninterpreted one."""
        if self.q is None:
            self.draw.uninterpreted["exp of exp"] = None
            return F.mix(self.p, self.draw.key) % self.draw.q
        return self.q

    # --- arithmetic ---------------------------------------------------------------------------

    def added(self) -> Value:
        """As a summand: beside a huge constant nothing else is left."""
        if self.real is None or self.level is None:
            return self
        huge = self.level != 0
        assert self.q is not None
        return Value(self.draw, self.p.masked_fill(huge, 0), self.q.masked_fill(huge, 0), self.level)

    def __add__(self, other: Operand) -> Value:
        a, b = self.added(), self.draw.value(other).added()
        p = (a.p + b.p) % self.draw.p
        q = None if a.q is None or b.q is None else (a.q + b.q) % self.draw.q
        factor = None
        if a.factor is not None or b.factor is not None:
            one = torch.ones((), dtype=torch.int64)
            factor = (one if a.factor is None else a.factor) * (one if b.factor is None else b.factor)
            factor = factor % self.draw.p
        return Value(self.draw, p, q, _sum_of_levels(a, b), factor=factor)

    def __neg__(self) -> Value:
        q = None if self.q is None else -self.q % self.draw.q
        level = None if self.level is None else -self.level
        real = None if self.real is None else -self.real
        factor = None if self.factor is None else F.inverse(self.factor, self.draw.p)
        return Value(self.draw, -self.p % self.draw.p, q, level, real, factor)

    def __sub__(self, other: Operand) -> Value:
        return self + -self.draw.value(other)

    def __mul__(self, other: Operand) -> Value:
        a, b = self.exponent_only(), self.draw.value(other).exponent_only()
        p = a.p * b.p % self.draw.p
        q = None if a.q is None or b.q is None else a.q * b.q % self.draw.q
        return Value(self.draw, p, q, _product_of_levels(a, b))

    def reciprocal(self) -> Value:
        """1 / x; a zero gives NaN."""
        a = self.exponent_only()
        p = F.inverse(a.p, self.draw.p)
        q = None if a.q is None else F.inverse(a.q, self.draw.q)
        level = torch.where(a.p == 0, math.nan, 0.0).double() if bool((a.p == 0).any()) else None
        if a.level is not None:
            nan = a.level.isnan() | (a.p == 0)
            if bool(((a.level != 0) & ~nan).any()) and a.real is None:
                raise NotProvable("a division by a masked score")
            level = torch.where(nan, math.nan, 0.0).double()
        return Value(self.draw, p, q, level, real=None if a.real is None else 1 / a.real)

    def __truediv__(self, other: Operand) -> Value:
        return self * self.draw.value(other).reciprocal()

    def __matmul__(self, other: Value) -> Value:
        """Batched product of matrices."""
        a, b = self.exponent_only(), other.exponent_only()
        p = F.matmul(a.p, b.p, self.draw.p)
        q = None if a.q is None or b.q is None else F.matmul(a.q, b.q, self.draw.q)
        level = None
        if a.has_levels or b.has_levels:
            parts = [
                torch.zeros(x.shape, dtype=torch.float64) if x.level is None else x.level for x in (a, b)
            ]
            if not all(bool((t.isnan() | (t == 0)).all()) for t in parts):
                raise NotProvable("a product of masked scores")
            level = parts[0] @ torch.ones_like(parts[1]) + torch.ones_like(parts[0]) @ parts[1]
        return Value(self.draw, p, q, level)

    def sum(self, dims: Sequence[int], keepdim: bool = False) -> Value:
        a = self.exponent_only()
        dims = tuple(dims) or tuple(range(a.p.ndim))
        if not dims:
            return a
        q = None if a.q is None else a.q.sum(dims, keepdim) % self.draw.q
        level = None if a.level is None else a.level.sum(dims, keepdim)
        return Value(self.draw, a.p.sum(dims, keepdim) % self.draw.p, q, level)

    def rounded(self, dtype: torch.dtype) -> Value:
        """With levels as ``dtype`` holds them, and alone where it holds nothing beside them."""
        if self.level is None or not dtype.is_floating_point:
            return self
        if not self.has_levels:
            return Value(self.draw, self.p, self.q, None, self.real, self.factor)
        level = self.level.to(dtype).double()
        rounding = level.abs() * torch.finfo(dtype).eps / 2
        absorbing = (level != 0) & ~(rounding < ABSORBING)
        for c in level[absorbing & ~level.isnan()].unique().tolist():
            lost = abs(c) * torch.finfo(dtype).eps / 2
            self.draw.masks[c] = min(lost / 2, self.draw.masks.get(c, math.inf))
        if self.real is not None:
            return Value(self.draw, self.p, self.q, level, self.real)
        p = self.p.masked_fill(absorbing, 0)
        q = None if self.q is None else self.q.masked_fill(absorbing, 0)
        factor = None if self.factor is None else torch.where(absorbing, 1, self.factor)
        return Value(self.draw, p, q, level, factor=factor)

    # --- functions ----------------------------------------------------------------------------

    def exp(self) -> Value:
        """g^q; 0 at levels far below 0."""
        draw = self.draw
        p = F.power_of(draw.g, self.exponent(), draw.p)
        if self.factor is not None:
            p = p * self.factor % draw.p
        if not self.has_levels:
            return Value(draw, p)
        assert self.level is not None
        nan, low = self.level.isnan(), self.level <= MASKED_OUT
        if not bool((nan | low | (self.level == 0)).all()):
            raise NotProvable("an exponential of a huge number")
        level = torch.where(nan, math.nan, 0.0).double() if bool(nan.any()) else None
        return Value(draw, torch.where(low, 0, p), None, level)

    def log(self) -> Value:
        """The logarithm of an exponential is exact again inside of ``exp``."""
        result = self.draw.apply("log", self)
        result.q, result.factor = torch.zeros_like(self.p), self.p
        return result

    def log_sum_exp(self, dim: int, keepdim: bool) -> Value:
        """At the highest level of each row, of the numbers there."""
        if not self.has_levels:
            return self.exp().sum((dim,), keepdim).log()
        assert self.level is not None
        top = self.level.expand(self.p.shape).amax(dim, keepdim=True)
        relative = (self.level - top).masked_fill(top == -math.inf, -math.inf)
        total = (
            Value(self.draw, self.p, self.q, relative, factor=self.factor).exp().sum((dim,), keepdim).log()
        )
        total.level = top if keepdim else top.squeeze(dim)
        return total

    def softmax(self, dim: int, dead_rows_are_zero: bool = False) -> Value:
        """Softmax by levels first.  A row of −∞ is NaN, or 0."""
        if not self.has_levels:
            weights = self.exp()
            return weights * weights.sum((dim,), True).reciprocal()
        assert self.level is not None
        level = self.level.expand(self.p.shape)
        top = level.amax(dim, keepdim=True)
        dead = top == -math.inf
        relative = torch.where(dead, 0.0 if dead_rows_are_zero else math.nan, level - top)
        weights = Value(self.draw, self.p, self.q, relative, factor=self.factor).exp()
        result = weights * weights.sum((dim,), True).reciprocal()
        return result.where(~dead, 0) if dead_rows_are_zero else result

    def largest(self, dim: int, keepdim: bool) -> Value:
        """The maximum as a function of the set of numbers at the highest level, and of nothing else."""
        draw = self.draw
        draw.uninterpreted["max"] = None
        level = torch.zeros(self.p.shape).double() if self.level is None else self.level.expand(self.p.shape)
        top = level.amax(dim, keepdim=True)
        counted = (level == top) & (top != -math.inf)
        p = torch.where(counted, F.mix(self.p, draw.key + 2) % draw.p, 0).sum(dim, keepdim) % draw.p
        return Value(draw, p, F.mix(p, draw.key) % draw.q, top if keepdim else top.squeeze(dim))

    def amax(self, dims: Sequence[int], keepdim: bool) -> Value:
        """Some element of the highest level: which one is drawn anew each time, so it must cancel."""
        dims = sorted(d % self.p.ndim for d in (dims or range(self.p.ndim)))
        others = [d for d in range(self.p.ndim) if d not in dims]
        flat = self.map(lambda t: t.expand(self.p.shape).permute(*others, *dims).flatten(len(others)))
        chance = torch.rand(flat.p.shape, generator=self.draw.others, dtype=torch.float64)
        if flat.level is not None:
            nan = flat.level.isnan()
            top = torch.where(nan, math.inf, flat.level).amax(-1, keepdim=True)
            chance = chance.masked_fill(torch.where(nan, math.inf, flat.level) < top, -1.0)
        pick = chance.argmax(-1, keepdim=True)
        sizes = [1 if d in dims else n for d, n in enumerate(self.p.shape)] if keepdim else None
        return flat.map(lambda t: t.gather(-1, pick).squeeze(-1).view(sizes or t.shape[:-1]))

    def sign(self) -> Tensor:
        """−1, 0 or 1: of the level, else an uninterpreted odd function."""
        draw = self.draw
        if self.real is not None:
            return self.real.sign().long()
        draw.uninterpreted["sign"] = None
        flipped = self.p > draw.p // 2
        bit = F.mix(torch.where(flipped, draw.p - self.p, self.p), draw.key) & 1
        result = torch.where(self.p == 0, 0, (2 * bit - 1) * torch.where(flipped, -1, 1))
        if self.level is not None:
            result = torch.where(self.level == 0, result, self.level.sign().long())
        return result

    def where(self, condition: Tensor, other: Operand) -> Value:
        a, b = self.added(), self.draw.value(other).added()
        p = torch.where(condition, a.p, b.p)
        q = None if a.q is None or b.q is None else torch.where(condition, a.q, b.q)
        level = None
        if a.level is not None or b.level is not None:
            zero = torch.zeros((), dtype=torch.float64)
            first, second = (zero if x.level is None else x.level for x in (a, b))
            level = torch.where(condition, first, second)
        return Value(self.draw, p, q, level)

    def maximum(self, other: Operand) -> Value:
        b = self.draw.value(other)
        return self.where(
            (self - b).sign() >= 0 if not _levels_tie(self, b) else _first_is_higher(self, b), b
        )

    def minimum(self, other: Operand) -> Value:
        return -(-self).maximum(-self.draw.value(other))

    def power(self, exponent: float) -> Value:
        """By an integer exactly; else an uninterpreted function."""
        if exponent == 0.5:
            return self.draw.apply("sqrt", self)
        if exponent != int(exponent) or abs(exponent) > 8:
            return self.draw.apply(f"power {exponent}", self)
        result = self.draw.value(1)
        for _ in range(abs(int(exponent))):
            result = result * self
        return result.reciprocal() if exponent < 0 else result

    def equals(self, other: Operand) -> Tensor:
        """Elementwise; NaN equals nothing."""
        b = self.draw.value(other)
        a_level, b_level = (0.0 if x.level is None else x.level for x in (self, b))
        same = (self.added().p == b.added().p) & torch.as_tensor(a_level == b_level)
        return same


def _levels_tie(a: Value, b: Value) -> bool:
    """Whether a and b are both at a level other than 0 somewhere."""
    return a.level is not None and b.level is not None and bool(((a.level != 0) & (b.level != 0)).any())


def _first_is_higher(a: Value, b: Value) -> Tensor:
    """a ≥ b where levels may be equal and infinite, so that their difference says nothing."""
    assert a.level is not None and b.level is not None
    plain = Value(a.draw, a.p, a.q) - Value(b.draw, b.p, b.q)
    tie = torch.where((a.level == 0) & (b.level == 0), plain.sign() >= 0, True)
    return (a.level > b.level) | ((a.level == b.level) & tie) | a.level.isnan()


def _sum_of_levels(a: Value, b: Value) -> Tensor | None:
    if a.level is None or b.level is None:
        return a.level if b.level is None else b.level
    return a.level + b.level


def _product_of_levels(a: Value, b: Value) -> Tensor | None:
    """A level times a known number; NaN times anything."""
    if a.real is not None and b.real is None:
        a, b = b, a
    if b.real is not None and a.real is None:
        # A huge constant as a factor is a number like others.
        if not a.has_levels:
            return torch.where(b.real.isnan(), math.nan, 0.0).double() if bool(b.real.isnan().any()) else None
        assert a.level is not None
        return torch.where(a.level == 0, 0.0, a.level * b.real)
    if not a.has_levels and not b.has_levels:
        return None
    nan = torch.zeros((), dtype=torch.bool)
    for x in (a, b):
        if x.level is not None:
            if bool(((x.level != 0) & ~x.level.isnan()).any()):
                raise NotProvable("a masked score times an unknown number")
            nan = nan | x.level.isnan()
    return torch.where(nan, math.nan, 0.0).double()
