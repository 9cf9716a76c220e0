"""Score expressions: text both ways, exact simplification, and the order of real sums."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, SKV, SQ, B, Expr, H, Q, S, const, load, parse
from flashfuse.kernels.reference import evaluate
from flashfuse.kernels.spec import DeadRows, ScoreProgram

SIZES = {"b": 2, "h": 3, "q": 5, "kv": 7}
LOWEST = torch.finfo(torch.float32).min


def environment() -> dict[str, object]:
    """Index grids, float64 scores, and a capture of each kind."""
    generator = torch.Generator().manual_seed(0)
    env = {"Sq": 5, "Skv": 7, "n": 3}
    for axis, (name, size) in enumerate(SIZES.items()):
        env[name] = torch.arange(size).view([size if d == axis else 1 for d in range(4)])
    # Few bits, so that float64 computes what the real numbers do.
    env["s"] = torch.randint(-9, 9, tuple(SIZES.values()), generator=generator).double() / 8
    env["bias"] = torch.randint(-9, 9, (3, 5, 7), generator=generator).double() / 4
    env["pad"] = torch.rand(2, 7, generator=generator) < 0.5
    env["doc"] = torch.arange(7).expand(2, 7) // 3
    return env


ENV = environment()

# Raw trees, not simplified: ``rebuilt`` makes the simplified ones of them.

_SMALL = st.integers(-4, 9).map(const)
_INDEX = st.one_of(st.sampled_from([B, H, Q, KV, SQ, SKV, E.var("n")]), _SMALL)


def _integer(inner):
    positive = st.integers(1, 5).map(const)
    return st.one_of(
        st.tuples(st.just("+"), inner, inner),
        st.tuples(st.just("+"), inner, inner, inner),
        st.tuples(st.just("*"), inner, _SMALL),
        st.tuples(st.sampled_from(["//", "%"]), inner, positive),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner),
    ).map(lambda parts: Expr(*parts))


INTEGERS = st.recursive(_INDEX, _integer, max_leaves=8)

_CONDITION = st.one_of(
    st.tuples(st.sampled_from(sorted(E.COMPARISONS)), INTEGERS, INTEGERS).map(lambda t: Expr(*t)),
    st.sampled_from([load("pad", [B, KV]), E.TRUE, E.FALSE]),
    st.just(Expr("==", load("doc", [B, Q]), load("doc", [B, KV]))),
)


def _logic(inner):
    return st.one_of(
        st.tuples(st.sampled_from(["and", "or"]), inner, inner),
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("where"), inner, inner, inner),
        st.tuples(st.sampled_from(["==", "!="]), inner, st.sampled_from([const(0), const(1), E.TRUE])),
        st.tuples(
            st.just("!="), st.tuples(st.just("where"), inner, _SMALL, _SMALL).map(lambda t: Expr(*t)), _SMALL
        ),
    ).map(lambda parts: Expr(*parts))


CONDITIONS = st.recursive(_CONDITION, _logic, max_leaves=6)

_REAL = st.one_of(
    st.just(S),
    st.just(load("bias", [H, Q, KV])),
    st.sampled_from([0.0, -0.5, 0.125, 1.5]).map(const),
    _INDEX,
)


def _real(inner):
    return st.one_of(
        st.tuples(st.sampled_from(["+", "*", "min", "max"]), inner, inner),
        st.tuples(st.just("+"), inner, inner, inner),
        st.tuples(st.just("abs"), inner),
        st.tuples(st.just("where"), CONDITIONS, inner, inner),
        st.tuples(st.just("/"), inner, st.sampled_from([const(2.0), const(-4.0), const(8)])),
    ).map(lambda parts: Expr(*parts))


REALS = st.recursive(_REAL, _real, max_leaves=6)


def rebuilt(e: Expr) -> Expr:
    """``e`` through the simplifying constructors."""
    return E.substitute(e, lambda node: None)


def values(e: Expr) -> torch.Tensor:
    return torch.as_tensor(evaluate(e, ENV), dtype=torch.float64).expand(*SIZES.values())


def truths(e: Expr) -> torch.Tensor:
    return values(e) != 0


@settings(max_examples=300, deadline=None)
@given(INTEGERS)
def test_integers_simplify_exactly(e):
    assert torch.equal(values(rebuilt(e)), values(e))


@settings(max_examples=300, deadline=None)
@given(CONDITIONS)
def test_conditions_simplify_exactly(e):
    assert torch.equal(truths(E.truth(rebuilt(e))), truths(e))
    assert torch.equal(truths(E.logical_not(rebuilt(e))), ~truths(e))


@settings(max_examples=300, deadline=None)
@given(REALS)
def test_reals_simplify_to_the_same_function(e):
    assert torch.equal(values(rebuilt(e)), values(e))


@settings(max_examples=200, deadline=None)
@given(st.one_of(INTEGERS, CONDITIONS, REALS))
def test_text_and_back(e):
    simple = rebuilt(e)
    again = parse(str(simple))
    assert str(again) == str(simple)
    assert torch.equal(values(again).nan_to_num(7.5), values(simple).nan_to_num(7.5))


@settings(max_examples=100, deadline=None)
@given(REALS, CONDITIONS, st.sampled_from(get_args(DeadRows)))
def test_programs_round_trip(score, mask, dead):
    condition = E.truth(rebuilt(mask))
    program = ScoreProgram(rebuilt(score), None if condition == E.TRUE else condition, dead)
    again = ScoreProgram.parse(program.text)
    assert again.text == program.text
    assert (again.captures, again.ints, again.dead_rows) == (program.captures, program.ints, dead)


# --- order --------------------------------------------------------------------------------------


def test_real_sums_keep_their_order():
    m = load("m", [KV])
    e = E.sub(E.add(S, m), m)
    assert str(e) == "s + m[kv] - m[kv]"
    env = {"s": torch.tensor([1.5]), "m": torch.tensor([LOWEST]), "kv": torch.tensor([0])}
    # Taken together, the two would cancel; the model's own arithmetic loses the score.
    assert evaluate(e, env).item() == 0.0


def test_constants_are_not_moved_past_a_score():
    e = E.add(E.add(const(1.0), S), const(-1.0))
    assert [str(a) for a in e.operands] == ["1.0", "s", "-1.0"]


def test_scaling_does_not_leave_the_range_of_float32():
    assert str(E.mul(E.mul(S, const(1e-30)), const(1e-30))) == "s*1e-30*1e-30"
    assert str(E.mul(E.mul(S, const(0.5)), const(0.25))) == "s*0.125"


# --- what people read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("e", "text"),
    [
        (E.compare("<", KV, E.add(Q, const(1))), "kv <= q"),
        (E.compare("<=", E.sub(KV, Q), const(0)), "kv <= q"),
        (E.compare(">=", E.sub(Q, KV), const(0)), "kv <= q"),
        (E.logical_not(E.compare(">", KV, Q)), "kv <= q"),
        (E.compare("==", E.where(E.compare("<=", KV, Q), const(1.0), const(0.0)), const(0)), "kv > q"),
        (E.logical_not(E.logical_or(E.compare(">", KV, Q), E.compare("<=", KV, E.sub(Q, const(4))))),
         "kv <= q and kv > q - 4"),
        (E.add(E.mul(E.floordiv(H, const(4)), const(4)), E.mod(H, const(4))), "h"),
        (E.add(E.mul(E.floordiv(B, const(3)), const(6)), E.mul(E.mod(B, const(3)), const(2)), Q), "q + b*2"),
        (E.floordiv(E.add(E.mul(B, const(4)), E.mod(H, const(4))), const(4)), "b"),
        (E.sub(SKV, SKV), "0"),
        (E.logical_and(E.compare("<=", KV, Q), E.compare(">", KV, Q)), "False"),
    ],
)  # fmt: skip
def test_canonical_forms(e, text):
    assert str(e) == text


@pytest.mark.parametrize("x", [math.nan, 0.0, -1.0, 2.0])
def test_negated_comparisons_of_reals_keep_nan(x):
    e = E.compare("<=", S, load("bias", []))
    env = {"s": torch.tensor(x), "bias": torch.tensor(0.5)}
    assert bool(evaluate(E.logical_not(e), env)) == (not x <= 0.5)


@pytest.mark.parametrize(
    "text", ["", "s +", "s ** 2", "foo(s)", "a.b", "s if q else kv", "'s'", "x[1:2]", "kv <= q <= 3"]
)
def test_what_is_no_expression_is_an_error(text):
    with pytest.raises(ValueError, match="expected a score expression"):
        parse(text)


def test_programs_that_are_none():
    with pytest.raises(ValueError, match="expected dead rows of"):
        ScoreProgram.parse("s where kv <= q else maybe")
    with pytest.raises(ValueError, match="over the score"):
        ScoreProgram.parse("s where s > 0")


def test_what_follows_a_real_zero_is_collected():
    b = E.var("b")
    assert str(E.add(E.const(0.0), b, b)) == str(E.add(E.const(0.5), E.const(-0.5), b, b)) == "b*2"
