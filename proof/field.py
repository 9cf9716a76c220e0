"""A pair of prime fields, and the arithmetic of tensors in them.

A real number x is represented by a residue modulo p and, as long as it may still become an exponent,
one modulo q, where q divides p − 1.  ``exp(x)`` is ``g^(x mod q) mod p`` for a g of order q, so that
``exp(a + b) = exp(a)·exp(b)`` holds exactly (Mirage, arXiv 2405.05751, section 5).  All tensors are
int64; products of residues fit because p < 2³¹.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

PRIMES = (
    (1086363599, 543181799),
    (1185666719, 592833359),
    (1215456479, 607728239),
    (1231534079, 615767039),
    (1269575999, 634787999),
    (1286854799, 643427399),
    (1305333119, 652666559),
    (1396755359, 698377679),
    (1442335439, 721167719),
    (1545851999, 772925999),
    (1559545679, 779772839),
)
"""All pairs with p = 2q + 1 < 2³¹ < 4q for which 2, 3, … 23 have square roots in both fields."""

_WINDOW = 8


@functools.lru_cache(maxsize=64)
def _powers(g: int, p: int) -> tuple[Tensor, ...]:
    """Tables of g^(i·2^(8w)) for the four bytes w of an exponent."""
    tables = []
    base = g
    for _ in range(4):
        row = [1]
        for _ in range((1 << _WINDOW) - 1):
            row.append(row[-1] * base % p)
        tables.append(torch.tensor(row))
        base = pow(base, 1 << _WINDOW, p)
    return tuple(tables)


def power_of(g: int, exponent: Tensor, p: int) -> Tensor:
    """g^exponent mod p, for exponents of 0 to 2³² − 1."""
    tables = _powers(g, p)
    result = tables[0][exponent & 255]
    for w in range(1, 4):
        result = result * tables[w][(exponent >> (w * _WINDOW)) & 255] % p
    return result


def inverse(x: Tensor, p: int) -> Tensor:
    """1 / x mod p, and 0 for 0."""
    if x.numel() <= 512:
        flat = [pow(n, -1, p) if n else 0 for n in x.flatten().tolist()]
        return torch.tensor(flat, dtype=torch.int64).view(x.shape)
    result, square, exponent = torch.ones_like(x), x, p - 2  # Fermat: x^(p − 2)
    while exponent:
        if exponent & 1:
            result = result * square % p
        exponent >>= 1
        square = square * square % p
    return result


def matmul(a: Tensor, b: Tensor, p: int) -> Tensor:
    """a @ b mod p."""
    if a.numel() * b.shape[-1] <= 1 << 14:
        return (a.unsqueeze(-1) * b.unsqueeze(-3) % p).sum(-2) % p
    # In two halves of 16 bits, whose products with b add up exactly below 2⁵³, and so 256 times below 2⁶¹.
    terms = b.double()
    parts = [torch.zeros((), dtype=torch.int64)] * 2
    for i in range(0, a.shape[-1], 32):
        rows = terms[..., i : i + 32, :]
        for n, half in enumerate((a >> 16, a & 0xFFFF)):
            before = parts[n] if (i + 32) % 8192 else parts[n] % p
            parts[n] = before + (half[..., i : i + 32].double() @ rows).long()
    return (((parts[0] % p) << 16) + parts[1]) % p


def mix(x: Tensor, key: int) -> Tensor:
    """A keyed hash of int64 to 62 bits: equal for equal arguments, else as good as random."""
    x = x ^ (key & 0x7FFFFFFFFFFFFFFF)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 0x2545F4914F6CDD1D)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ (x >> 29)) & 0x3FFFFFFFFFFFFFFF


def random_residues(sizes: tuple[int, ...] | torch.Size, p: int, generator: torch.Generator) -> Tensor:
    """Uniform in 1 … p − 1."""
    return torch.randint(1, p, sizes, generator=generator)


class Constants:
    """Real constants as residues, so that what agrees up to rounding is one number.

    Simple fractions and their square roots are themselves: ``1/√48`` is the inverse of ``√48``.  Any
    other real is a symbol, a random residue, unless it is a simple multiple of a known symbol, of its
    inverse, or of a product or quotient of two.
    """

    def __init__(self, p: int, q: int, generator: torch.Generator) -> None:
        self.p, self.q = p, q
        self._generator = generator
        self._known: dict[float, tuple[int, int]] = {}
        self._symbols: list[tuple[float, tuple[int, int]]] = []

    def __call__(self, c: float) -> tuple[int, int]:
        """Residues of the finite number ``c`` modulo p and q."""
        if isinstance(c, int):
            return c % self.p, c % self.q
        found = self._known.get(c)
        if found is None:
            found = self._known[c] = self._new(c)
        return found

    def _new(self, c: float) -> tuple[int, int]:
        if c == int(c) and abs(c) < 2**53:
            return self(int(c))
        if c < 0:
            r = self(-c)
            return -r[0] % self.p, -r[1] % self.q
        simple = _simple(c)
        if simple is not None:
            return self._fraction(simple)
        square = _simple(c * c)
        if square is not None:
            r = self._fraction(square)
            # p and q are 3 modulo 4; the root that is a square itself, so that roots multiply.
            root = pow(r[0], (self.p + 1) // 4, self.p), pow(r[1], (self.q + 1) // 4, self.q)
            if (root[0] ** 2 % self.p, root[1] ** 2 % self.q) == r:
                return root
        for value, residues in self._related():
            ratio = _simple(c / value)
            if ratio is not None:
                r = self._fraction(ratio)
                return r[0] * residues[0] % self.p, r[1] * residues[1] % self.q
        drawn = torch.randint(1, self.q, (2,), generator=self._generator).tolist()
        symbol = (drawn[0], drawn[1])
        self._symbols.append((c, symbol))
        return symbol

    def _related(self) -> list[tuple[float, tuple[int, int]]]:
        """The known symbols, their inverses, and products of two of these."""
        single = []
        for value, (a, b) in self._symbols[:16]:
            single += [(value, (a, b)), (1 / value, (pow(a, -1, self.p), pow(b, -1, self.q)))]
        pairs = [
            (x * y, (a[0] * b[0] % self.p, a[1] * b[1] % self.q))
            for i, (x, a) in enumerate(single)
            for y, b in single[i:]
        ]
        return [r for r in single + pairs if r[0] not in (0, math.inf)]

    def _fraction(self, f: Fraction) -> tuple[int, int]:
        n, d = f.numerator, f.denominator
        return n * pow(d, -1, self.p) % self.p, n * pow(d, -1, self.q) % self.q


def _simple(c: float) -> Fraction | None:
    """The simple fraction, or the inverse of one, that ``c`` is up to rounding.

    Few numbers count as simple, so that hardly any other real is one by chance.
    """
    if not 1e-30 < abs(c) < 1e30:
        return None
    for value, flipped in ((c, False), (1 / c, True)):
        for f, tolerance in _candidates(value):
            if f and abs(float(f) - value) <= abs(value) * tolerance:
                return 1 / f if flipped else f
    return None


def _candidates(value: float) -> Iterator[tuple[Fraction, float]]:
    """Fractions near ``value`` and how near they must be: literals of a few digits, small fractions."""
    yield Fraction(f"{value:.6g}"), 4e-16
    yield Fraction(f"{value:.3g}"), 1e-7
    small = Fraction(value).limit_denominator(64)
    if abs(small.numerator * small.denominator) <= 4096:
        yield small, 2e-7
