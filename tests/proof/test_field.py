"""The pair of fields, and reals as elements of it."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfuse.proof import field as F
from flashfuse.proof.value import Draw


@pytest.mark.parametrize(("p", "q"), F.PRIMES)
def test_pairs_are_what_they_are_said_to_be(p, q):
    assert p == 2 * q + 1 < 2**31 < 4 * q
    assert sympy.isprime(p) and sympy.isprime(q)
    for n in (2, 3, 5, 7, 11, 13, 17, 19, 23):
        assert pow(n, (p - 1) // 2, p) == pow(n, (q - 1) // 2, q) == 1


@pytest.mark.parametrize("seed", range(len(F.PRIMES)))
def test_arithmetic_against_python_integers(seed):
    draw = Draw.seeded(seed)
    p, q = draw.p, draw.q
    assert draw.g != 1 and pow(draw.g, q, p) == 1
    x = F.random_residues((3, 5), p, draw.inputs)
    assert (x * F.inverse(x, p) % p == 1).all()
    assert F.inverse(torch.zeros(1000, dtype=torch.int64), p).eq(0).all()
    assert (x.repeat(200, 1) * F.inverse(x.repeat(200, 1), p) % p == 1).all()
    exponents = torch.randint(0, q, (7,), generator=draw.inputs)
    assert F.power_of(draw.g, exponents, p).tolist() == [pow(draw.g, e, p) for e in exponents.tolist()]


@pytest.mark.parametrize("sizes", [(2, 3, 4), (1, 1, 1), (30, 70, 40)])
def test_matrix_products_against_python_integers(sizes):
    n, k, m = sizes
    draw = Draw.seeded(0)
    a, b = F.random_residues((n, k), draw.p, draw.inputs), F.random_residues((k, m), draw.p, draw.inputs)
    a[0], b[:, 0] = draw.p - 1, draw.p - 1  # the largest
    rows, columns = a.tolist(), b.T.tolist()
    exact = [[sum(x * y for x, y in zip(r, c, strict=True)) % draw.p for c in columns] for r in rows]
    assert F.matmul(a, b, draw.p).tolist() == exact


@pytest.mark.parametrize("d", [8, 24, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256])
def test_constants_that_agree_up_to_rounding_are_one(d):
    constant = Draw.seeded(3).constants
    (a, _), (b, _) = constant(1 / math.sqrt(d)), constant(math.sqrt(d))
    assert a * b % constant.p == 1
    assert constant(float(torch.tensor(d**-0.5, dtype=torch.float32))) == constant(d**-0.5)
    assert constant(d**-0.5 * 50.0)[0] == a * 50 % constant.p
    assert constant(d**-0.5 * 1.001) != constant(d**-0.5)
    assert constant(-(d**-0.5))[0] == -a % constant.p


def test_constants_are_symbols_where_nothing_else_is_known():
    constant = Draw.seeded(4).constants
    first, second = 2.718281828459045, 0.5772156649015329
    (e, _), (gamma, _) = constant(first), constant(second)
    assert constant(first * second)[0] == e * gamma % constant.p
    assert constant(3 / first)[0] * e % constant.p == 3
    assert constant(0.1)[0] * 10 % constant.p == 1
    assert constant(1 / 0.83)[0] * constant(0.83)[0] % constant.p == 1


@settings(max_examples=50, deadline=None)
@given(st.floats(0.001, 1000), st.floats(1e-4, 1e-2))
def test_constants_that_differ_are_told_apart(c, more):
    constant = Draw.seeded(5).constants
    assert constant(c) != constant(c * (1 + more))
