"""The CPU variant against the oracle: results, gradients, corner cases, and what it must not cost."""

import itertools

import pytest
import torch
from tolerance import assert_equal_under_rule

from flashfuse.kernels import cpu, ops
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

EXTRA = {
    "pad": lambda g, b, h, q, kv: torch.arange(kv) < torch.randint(1, kv + 1, (b, 1), generator=g),
    "left": lambda g, b, h, q, kv: torch.arange(kv) >= torch.randint(0, kv, (b, 1), generator=g),
    "doc": lambda g, b, h, q, kv: torch.randint(0, 2, (b, max(q, kv)), generator=g).cumsum(-1) // 20,
    "prefix": lambda g, b, h, q, kv: torch.randint(0, kv + 1, (b,), generator=g),
    "allowed": lambda g, b, h, q, kv: torch.rand(b, q, kv, generator=g) < 0.7,
    "bias": lambda g, b, h, q, kv: torch.randn(h, q, kv, generator=g, dtype=torch.float64),
    "table": lambda g, b, h, q, kv: torch.randn(h, q + kv, generator=g, dtype=torch.float64),
    "slopes": lambda g, b, h, q, kv: torch.rand(h, generator=g, dtype=torch.float64) / 8,
    "temperature": lambda g, b, h, q, kv: 0.1 + torch.rand(h, generator=g, dtype=torch.float64) / 4,
}


class Case:
    """Inputs of one site in float64, and the three computations that the rule compares."""

    def __init__(self, text, sizes=(2, 4, 63, 63), dims=(40, 40), group=1, dtype=torch.float32, dropout_p=0.0):
        batch, heads, q_len, kv_len = sizes
        self.program, self.dtype, self.dropout_p = ScoreProgram.parse(text), dtype, dropout_p
        self.ints = [7] * len(self.program.ints)
        g = torch.Generator().manual_seed(0)

        def draw(h, s, d):
            # Memory as models have it: [B, S, H, D].
            return torch.randn(batch, s, h, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)

        kv_heads = heads // group
        self.tensors = [draw(heads, q_len, dims[0]), draw(kv_heads, kv_len, dims[0]), draw(kv_heads, kv_len, dims[1])]
        self.captures = [EXTRA[name](g, *sizes) for name in self.program.captures]
        self.captures = [c.to(dtype) if c.is_floating_point() else c for c in self.captures]
        self.do = draw(heads, q_len, dims[1])
        self.seed = torch.tensor([12345])
        self.keep = cpu.dropout_mask(self.seed, dropout_p, sizes) if dropout_p else None

    def run(self, function, dtype, capture_grads):
        """out, lse, then gradients of q, k, v and the floating captures."""

        def leaf(t, wanted=True):
            return t.detach().to(dtype).requires_grad_(wanted) if t.is_floating_point() else t

        tensors = [leaf(t) for t in self.tensors]
        captures = [leaf(c, capture_grads) for c in self.captures]
        out, lse = function(*tensors, captures)
        leaves = tensors + [c for c in captures if c.requires_grad]
        names = ["dq", "dk", "dv"] + [f"d{n}" for n, c in zip(self.program.captures, captures) if c.requires_grad]
        grads = torch.autograd.grad(out, leaves, self.do.to(dtype))
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads))}

    def reference(self, q, k, v, captures):
        return attention_reference(q, k, v, captures, self.ints, self.program, self.dropout_p, self.keep)

    def ours(self, q, k, v, captures):
        return torch.ops.flashfuse.attention(
            q, k, v, captures, self.ints, [], self.seed, self.program.text, self.dropout_p, "cpu"
        )

    def check(self, capture_grads=True):
        ours = self.run(self.ours, self.dtype, capture_grads)
        original = self.run(self.reference, self.dtype, capture_grads)
        exact = self.run(self.reference, torch.float64, capture_grads)
        original["lse"] = original["lse"].to(ours["lse"].dtype)
        assert ours["lse"].dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        assert ours["out"].transpose(1, 2).is_contiguous() and ours["lse"].is_contiguous()
        for name, value in ours.items():
            assert_equal_under_rule(value, original[name], exact[name], f"{self.program}: {name}")


MASKS = {
    "none": "",
    "causal": " where kv <= q",
    "causal at the end": " where kv <= q + Skv - Sq",
    "window": " where kv <= q and kv > q - 20",
    "two-sided window": " where kv <= q + n and kv >= q - n",
    "pad": " where pad[b, kv]",
    "causal and right pad": " where kv <= q and pad[b, kv]",
    "causal and left pad": " where kv <= q and left[b, kv] else zero",
    "chunk": " where kv <= q and kv // 16 == q // 16",
    "document": " where doc[b, kv] == doc[b, q] and kv <= q",
    "prefix": " where kv <= q or kv < prefix[b]",
    "dense": " where allowed[b, q, kv] else zero",
    "dilated": " where (q - kv) % 3 == 0",
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("score", ["s*0.125", "s*0.125 + table[h, kv - q + Sq]"], ids=["plain", "bias"])
def test_masks(mask, score):
    Case(score + mask).check()
    Case(score + mask, sizes=(2, 2, 257, 257)).check(capture_grads=False)
