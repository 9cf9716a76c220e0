"""The weights that a model returns: the operator against attention to the identity, with its gradients."""

import pytest
import torch
from tolerance import assert_equal_under_rule

from flashfuse.kernels import cpu
from flashfuse.kernels import ops as _ops  # noqa: F401  (defines torch.ops.flashfuse)
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

B, H, H_KV, SQ, SKV, D = 2, 4, 2, 9, 13, 8

EXTRA = {
    "pad": lambda: torch.arange(SKV)[None] >= torch.tensor([0, SKV])[:, None],
    "bias": lambda: torch.randn(H, SQ, SKV),
    "table": lambda: torch.randn(SQ + SKV, H),
    "slopes": lambda: torch.rand(H),
    "sinks": lambda: torch.tensor([0.5, -torch.inf, 30.0, -1.0]),
}
PROGRAMS = [
    "s*0.3",
    "tanh(s*0.1)*5.0 + bias[h, q, kv]",
    "s*0.3 + table[kv - q + Sq, h] where pad[b, kv] else uniform",
    "s*0.3 + slopes[h]*(kv - q) where kv <= q and pad[b, kv] else uniform_s",
    "s*0.3 + slopes[h]*(kv - q) where kv <= q and pad[b, kv] else nan_s",
    "s*0.3 + slopes[h]*(kv - q) where kv <= q and pad[b, kv] else nan_all",
    "s*slopes[h] where pad[b, kv] else mean",
    "s where pad[b, kv] else zero",
    "s where pad[b, kv] else nan",
    "s*0.3 where kv <= q sink 0.0",
    "s*slopes[h] where kv <= q sink slopes[h] + q*0.1",
    *(f"s*0.3 where pad[b, kv] sink sinks[h] else {tail}" for tail in ("uniform", "mean", "zero", "nan")),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("text", PROGRAMS)
def test_weights(text, dropout_p):
    torch.manual_seed(0)
    program = ScoreProgram.parse(text)
    q, k = torch.randn(B, H, SQ, D), torch.randn(B, H_KV, SKV, D)
    captures = [EXTRA[name]() for name in program.captures]
    seed = torch.tensor([7]) if dropout_p else None
    keep = cpu.dropout_mask(seed, dropout_p, (B, H, SQ, SKV)) if dropout_p else None
    do = torch.randn(B, H, SQ, SKV)

    def run(dtype, fused):
        floats = [t.to(dtype).requires_grad_() for t in (q, k, *captures) if t.is_floating_point()]
        given = iter(floats[2:])
        all_captures = [next(given) if c.is_floating_point() else c for c in captures]
        if fused:
            out = torch.ops.flashfuse.attention_weights(
                *floats[:2], all_captures, [], seed, text, dropout_p, "cpu", dtype
            )
        else:
            identity = torch.eye(SKV, dtype=dtype).expand(B, H_KV, SKV, SKV)
            out, _ = attention_reference(*floats[:2], identity, all_captures, [], program, dropout_p, keep)
        return [out.detach(), *torch.autograd.grad(out, floats, do.to(dtype))]

    exact, original, ours = run(torch.float64, False), run(torch.float32, False), run(torch.float32, True)
    for i, (a, o, x) in enumerate(zip(ours, original, exact, strict=True)):
        if program.dead_rows == "nan":
            # The oracle's gradients are NaN where the model's own, which pass a fill, are not.
            finite = x.isfinite()
            a, o, x = a[finite], o[finite], x[finite]
        assert_equal_under_rule(a, o, x, f"{text}: {i}")


def test_output_and_returned_weights_share_the_mask():
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, 40, D) for _ in range(3))
    seed, ops = torch.tensor([3]), torch.ops.flashfuse
    out, _ = ops.attention(q, k, v, [], [], [], seed, "s*0.3 where kv <= q", 0.4, "cpu")
    weights = ops.attention_weights(q, k, [], [], seed, "s*0.3 where kv <= q", 0.4, "cpu", torch.float32)
    assert_equal_under_rule(out, weights @ v, weights.double() @ v.double())


def test_dtype_and_empty():
    q, k = torch.randn(B, H, SQ, D).bfloat16(), torch.randn(B, H_KV, SKV, D).bfloat16()
    run = torch.ops.flashfuse.attention_weights
    assert run(q, k, [], [], None, "s", 0.0, "cpu", torch.float32).dtype == torch.float32
    assert run(q, k, [], [], None, "s", 0.0, "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert run(q[:, :, :0], k, [], [], None, "s", 0.0, "cpu", torch.float32).shape == (B, H, 0, SKV)
    with pytest.raises(ValueError, match="expected a seed"):
        run(q, k, [], [], None, "s", 0.5, "cpu", torch.float32)


def test_operator_contract():
    q, k = torch.randn(1, 2, 5, D, requires_grad=True), torch.randn(1, 2, 6, D, requires_grad=True)
    bias = torch.randn(2, 5, 6, requires_grad=True)
    args = (q, k, [bias], [], None, "s + bias[h, q, kv]", 0.0, "cpu", torch.float32)
    torch.library.opcheck(torch.ops.flashfuse.attention_weights.default, args)
