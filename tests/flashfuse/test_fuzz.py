"""Random attention code comes out equal, or left alone with a reason; what the fuzz found stays found."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz_code import Program
from fuzz_programs import programs
from fuzz_property import Outcome, outcome
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = 300


def test_random_programs():
    """The same 300 programs in every run; ``benchmarks/fuzz.py`` runs as many others as one likes."""
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def comes_out_equal_or_left(program: Program) -> None:
        found = outcome(program)
        counts["programs"] += 1
        counts["with a fused site"] += found.fused > 0
        counts["with a site left"] += bool(found.left)
        assert not found.failure, found.failure

    comes_out_equal_or_left()
    assert counts["with a fused site"] >= 0.6 * counts["programs"], counts
    assert counts["with a site left"] >= 0.1 * counts["programs"], counts


# --- what it found ------------------------------------------------------------------------------

QKV = {"q": "torch.randn(2, 3, 5, 4)", "k": "torch.randn(2, 3, 5, 4)", "v": "torch.randn(2, 3, 5, 4)"}
DEAD_ROW = {"mask": "torch.rand(2, 1, 5, 5) < torch.tensor([0.7, 0.0, 0.7, 0.7, 0.7])[:, None]"}


def attention(*lines: str, capture: str = "symbolic", **inputs: str) -> Outcome:
    return outcome(Program(lines, tuple((QKV | inputs).items()), capture))


def is_fused(found: Outcome) -> bool:
    return found == Outcome(fused=1)


@pytest.mark.parametrize("update", ["out.mul_(2.0)", "out[:, 0].add_(1.0)", "out.transpose(1, 2).mul_(2.0)"])
def test_output_written_to(update):
    """The operator's own output, or a view of it, was handed to in-place operations, which autograd refuses.

    Where the original's strides were the operator's (one query, one head) there was no copy between.
    """
    line = "out = torch.softmax(q @ k.transpose(-2, -1), -1) @ v"
    one_query = {"q": "torch.randn(2, 3, 1, 4)"}
    assert is_fused(attention(line, update, "return out", capture="dynamo", **one_query))


def test_dead_rows_of_an_added_infinity():
    """−inf added to the scores, not filled in: the gradient of a dead row is NaN, and ours was 0."""
    lines = "scores = q @ k.mT + torch.where(mask, 0.0, -torch.inf)", "return torch.softmax(scores, -1) @ v"
    assert is_fused(attention(*lines, **DEAD_ROW))


def test_dead_rows_of_an_infinity_added_to_a_bias():
    """NaN reaches a bias, a table of distances and every head that shares the keys."""
    lines = (
        "k = k[:, :1].expand(2, 3, 5, 4)",
        "place = torch.arange(5)[None] - torch.arange(5)[:, None] + 4",
        "scores = q @ k.mT * 0.5 + bias + table[:, place]",
        "scores = scores + torch.where(mask, 0.0, -torch.inf)",
        "return torch.softmax(scores, -1) @ v",
    )
    inputs = {"bias": "torch.randn(3, 1, 5)", "table": "torch.randn(3, 9)"}
    assert is_fused(attention(*lines, **DEAD_ROW, **inputs, capture="dynamo"))


def test_dead_rows_of_a_bias_after_the_fill():
    """A bias added after −inf was filled in has a gradient of NaN in dead rows, and ours was 0."""
    lines = (
        "scores = (q @ k.mT).masked_fill(~mask, -torch.inf) + bias",
        "return torch.softmax(scores, -1) @ v",
    )
    found = attention(*lines, **DEAD_ROW, bias="torch.randn(5, 5)")
    assert found == Outcome(left=("dead_rows_unclear",))


def test_dead_rows_of_a_bias_before_the_fill():
    """The twin that stays fused: no gradient reaches what the fill replaced."""
    lines = (
        "scores = (q @ k.mT + bias).masked_fill(~mask, -torch.inf)",
        "return torch.softmax(scores, -1) @ v",
    )
    assert is_fused(attention(*lines, **DEAD_ROW, bias="torch.randn(5, 5)"))


def test_columns_broadcast():
    """q and k were read before an expansion of the dimension that the product sums over: a crash."""
    lines = "k = k.expand(2, 3, 5, 4)", "return torch.softmax(q @ k.mT, -1) @ v"
    assert is_fused(attention(*lines, k="torch.randn(2, 3, 5, 1)"))


def test_rows_broadcast():
    """The same for an expansion of the keys."""
    lines = "k = k.expand(2, 3, 5, 4)", "return torch.softmax(q @ k.mT + bias, -1) @ v"
    assert is_fused(attention(*lines, k="torch.randn(2, 3, 1, 4)", bias="torch.randn(5, 5)"))


@pytest.mark.parametrize("dtype", ["double", "float", "bfloat16"])
def test_constants_of_float64(dtype):
    """Derivatives that choose between two numbers, as that of a clamp does, rounded them to float32."""
    lines = "scores = (q @ k.mT).clamp(-2.0, 2.0) * 0.1", "return torch.softmax(scores, -1) @ v"
    assert is_fused(attention(*lines, **{name: f"{text}.{dtype}()" for name, text in QKV.items()}))


@pytest.mark.parametrize(
    "weights",
    ["torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))", "e / e.sum(-1, keepdim=True)"],
)
def test_dead_rows_of_softmaxes_without_the_maximum(weights):
    """Of equal finite minima ``exp(x - logsumexp(x))`` makes ones, ``exp(x) / sum`` NaN; ours the mean."""
    lines = "scores = (q @ k.mT).masked_fill(~mask, -1e9)", "e = scores.exp()", f"return ({weights}) @ v"
    assert attention(*lines, **DEAD_ROW) == Outcome(left=("dead_rows_unclear",))


def test_dead_rows_of_stored_minima_without_the_maximum():
    """The same where the minima come with a stored mask: ``exp(x - logsumexp(x))`` makes ones of them."""
    lines = "scores = q @ k.mT + minima", "return torch.exp(scores - torch.logsumexp(scores, -1, True)) @ v"
    minima = "torch.where(torch.arange(5)[:, None] == 2, torch.finfo(torch.float32).min, 0.0).expand(5, 5)"
    assert attention(*lines, minima=minima) == Outcome(left=("dead_rows_unclear",))


def test_float_mask_read_as_a_condition():
    """Where q is NaN, a float padding mask that is only compared got a gradient of NaN instead of none."""
    lines = (
        "q = q + q.detach() * torch.nan",
        "scores = (q @ k.mT).masked_fill(pad[:, None, None, :] == 0, -torch.inf)",
        "return torch.softmax(scores, -1) @ v",
    )
    assert is_fused(attention(*lines, pad="torch.ones(2, 5)"))


def test_gradient_of_a_factor_of_masked_scores():
    """The derivative of ``(s + mask) * factor * 2`` by the factor overflows at −3.4e38: 0 · ∞ was NaN."""
    lines = (
        "scores = (q @ k.mT + mask) * factor[:, None, None] * 2",
        "return torch.softmax(scores, -1) @ v",
    )
    minimum = "torch.where(torch.arange(5) < 3, 0.0, torch.finfo(torch.float32).min)"
    assert is_fused(attention(*lines, mask=minimum, factor="torch.rand(3) + 0.5"))


def test_minimum_of_float16_that_is_scaled():
    """A quarter of −65504 absorbs a bias in float16, but not in our float32: dead rows differed."""
    lines = (
        "scores = (q @ k.mT).masked_fill(~mask, torch.finfo(torch.float16).min) / 4",
        "return torch.softmax((scores + bias) / 4, -1) @ v",
    )
    halves = {name: f"{text}.half()" for name, text in QKV.items()}
    found = attention(*lines, **halves, **DEAD_ROW, bias="torch.randn(5, 5).half()")
    assert found.fused == 0 and found.left == ("proof_failed",) and not found.failure


def test_softmax_in_a_wider_dtype():
    """Scores that the model itself normalises in float64 were normalised in float32."""
    lines = "scores = (q @ k.mT).double()", "return torch.softmax(scores, -1).float() @ v"
    found = attention(*lines)
    assert found.fused == 0 and found.left == ("proof_failed",) and not found.failure


def test_dropout_of_rows_that_are_not_numbers():
    """NaN times a keep mask of 0 is NaN; a proof that dropped it to 0 refused a right rewrite."""
    lines = (
        "scores = (q @ k.mT).masked_fill(~mask, -torch.inf)",
        "return F.dropout(torch.softmax(scores, -1), 0.25, True) @ v",
    )
    assert attention(*lines, **DEAD_ROW).left == ()
