"""Sinks: the text form, the CPU variant against the oracle, and rows that only the sink is left to."""

import dataclasses

import pytest
import torch
from kernel_cases import Case, hostile_sinks, left_pad, run_case, sinks
from tolerance import assert_equal_under_rule

from flashfuse.kernels import cpu
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (2, 6, 37, 45)
LONG = (2, 6, 290, 290)


CASES = (
    Case("s*0.158 sink sinks[h]", SMALL, 2, captures=sinks, grads=(0,)),
    Case("s*0.158 sink 0.0", SMALL, 3),
    Case("s*0.158 where kv <= q sink sinks[h]", LONG, 2, captures=sinks, grads=(0,)),
    Case("s*0.158 where kv <= q sink sinks[h]", LONG, 2, captures=sinks, grads=(0,), dtype=torch.bfloat16),
    Case("s*0.158 where kv <= q sink sinks[h]", SMALL, 6, captures=sinks, grads=(0,), dropout_p=0.2),
    Case("s*0.158 where kv <= q and kv > q - 9 sink t[h]*2.0 + 1.0", LONG, captures=sinks, grads=(0,)),
    Case("tanh(s*0.05)*20.0 where kv <= q sink x[b, h, q, 0]", SMALL,
         captures=lambda b, h, sq, skv: [torch.randn(b, h, sq, 1)], grads=(0,)),
    Case("s*t[h]*0.1 where kv <= q sink t[h]", SMALL, captures=sinks, grads=(0,)),
    *(
        Case(f"s*0.158 where kv <= q and pad[b, kv] sink sinks[h]{tail}", sizes, 2, grads=(1,),
             captures=lambda *n: [*left_pad(*n), *made(*n)], dropout_p=p)  # noqa: B023
        for made in (sinks, hostile_sinks)
        for tail in (" else mean", " else uniform", " else zero")
        for sizes, p in ((SMALL, 0.0), (SMALL, 0.1), ((2, 6, 140, 140), 0.0))
    ),
    Case("s*0.158 sink sinks[h] else nan", LONG, 2, captures=hostile_sinks, grads=(0,)),
)  # fmt: skip


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}|{c.captures.__name__}")
def test_cpu_is_equal_under_the_rule(case, aux):
    run_case(cpu, dataclasses.replace(case, aux=aux), "cpu", draws=6)


def test_text_form():
    text = "s*0.125 where kv <= q and pad[b, kv] sink sinks[h] else uniform"
    program = ScoreProgram.parse(text)
    assert program.text == text and ScoreProgram.parse(program.text) == program
    assert program.captures == ("pad", "sinks") and program.differentiable == {"sinks"}
    assert program.mask_program.text == "0 where kv <= q and pad[b, kv]"
    assert ScoreProgram.parse("s sink where(q == 0, n, t[b, q])").ints == ("n",)
    for wrong in ("s sink s", "s sink t[kv]", "s sink bias[h, kv - q]"):
        with pytest.raises(ValueError, match="a sink over"):
            ScoreProgram.parse(wrong)


def test_the_oracle_is_one_more_key_of_value_zero():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    logits = torch.randn(2, dtype=torch.float64)
    program = ScoreProgram.parse("s*0.5 where kv < q sink sinks[h] else nan")
    out, lse = attention_reference(q, k, v, [logits], (), program)
    scores = (q @ k.mT * 0.5).masked_fill(~torch.ones(5, 5).tril(-1).bool(), -torch.inf)
    combined = torch.cat([scores, logits.view(1, 2, 1, 1).expand(1, 2, 5, 1)], -1)
    expected = combined.softmax(-1)[..., :-1] @ v, combined.logsumexp(-1)
    for ours, original in zip((out, lse), expected, strict=True):
        assert_equal_under_rule(ours, original, original)
    assert bool((out[:, :, 0] == 0).all())


def test_a_sink_of_minus_infinity_is_none():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    pad = torch.arange(40) >= torch.tensor([0, 9])[:, None]
    for tail in ("nan", "mean", "uniform", "zero"):
        given = ([], None, ScoreProgram.parse(f"s*0.2 where kv <= q and pad[b, kv] else {tail}"), 0.0)
        bare = cpu.forward(q, k, v, [pad], (), *given)
        given = (
            [], None, ScoreProgram.parse(f"s*0.2 where kv <= q and pad[b, kv] sink t[h] else {tail}"), 0.0
        )  # fmt: skip
        ours = cpu.forward(q, k, v, [pad, torch.full((2,), -torch.inf)], (), *given)
        torch.testing.assert_close(ours, bare, equal_nan=True)
