"""Values that are much alike: what is left of ``dP - delta`` is of the size of its roundings.

The hardest figure of it is the gradient of a vector that is added to all keys.  It is exactly 0, for softmax
does not see what all scores of a row have in common.  So it shows how far rows of dS are from adding up to 0.
"""

import pytest
import torch
from tolerance import assert_equal_under_rule

from flashfuse.kernels import cpu
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

CAPTURES = {
    "pad": lambda b, h, q, kv: torch.arange(kv) < torch.tensor([[kv], [kv - 40]]),
    "left": lambda b, h, q, kv: torch.arange(kv) >= torch.tensor([[0], [40]]),
    "bias": lambda b, h, q, kv: torch.randn(h, q, kv),
    "sinks": lambda b, h, q, kv: torch.randn(h),
}
SIZES = (2, 4, 200, 200)


class Case:
    def __init__(self, text: str, alike: float, group: int = 1, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.program = ScoreProgram.parse(text)
        b, h, sq, skv = SIZES
        self.q, self.do = torch.randn(b, h, sq, 16), torch.randn(b, h, sq, 16)
        self.k = torch.randn(b, h // group, skv, 16)
        self.v = alike * torch.randn(b, h // group, 1, 16) + torch.randn(b, h // group, skv, 16)
        self.captures = [CAPTURES[name](*SIZES) for name in self.program.captures]

    def ours(self, q, k, v, captures):
        return torch.ops.flashfuse.attention(
            q, k, v, captures, [], [], torch.zeros(1, dtype=torch.int64), self.program.text, 0.0, "cpu"
        )[0]

    def reference(self, q, k, v, captures):
        return attention_reference(q, k, v, captures, [], self.program, 0.0, None)[0]

    def run(self, function, dtype=torch.float32):
        """``out``, dq, dv, and the gradients of what is added to all keys and to all queries of a head."""
        q, k, v = (x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        captures = [c.to(dtype) if c.is_floating_point() else c for c in self.captures]
        k_bias, q_bias = (x.new_zeros(1, x.shape[1], 1, 16).requires_grad_() for x in (k, q))
        out = function(q + q_bias, k + k_bias, v, captures)
        return out, *torch.autograd.grad(out, (q, v, k, q_bias, k_bias), self.do.to(dtype))


@pytest.mark.parametrize("alike", [0.3, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize(
    "text, group",
    [
        ("s*0.25", 1),
        ("s*0.25", 2),
        ("s*0.25 where kv <= q", 1),
        ("s*0.25 + bias[h, q, kv]", 1),
        ("s*0.25 where pad[b, kv]", 2),
        ("s*0.25 where pad[b, kv] sink sinks[h]", 1),
        ("s*0.25 where kv <= q and left[b, kv] else zero", 1),
        ("s*0.25 where kv <= q and left[b, kv] else mean", 2),
    ],
)
def test_errors_are_those_of_a_softmax(text, group, alike, monkeypatch):
    monkeypatch.setattr(cpu.cpu_blas, "forward", None)
    cases = [Case(text, alike, group, seed) for seed in range(3)]
    if all("mean" not in c.program.dead_rows and c.program.sink is None for c in cases):
        monkeypatch.setattr(cpu.cpu_blas, "backward", None)
    runs = [(c.run(c.ours), c.run(c.reference), c.run(c.reference, torch.float64)) for c in cases]
    for i, name in enumerate(("out", "dq", "dv", "dk", "dq_bias", "dk_bias")):
        ours, original, exact = (torch.stack([r[who][i] for r in runs]) for who in range(3))
        assert_equal_under_rule(ours, original, exact, f"{text}, {alike}: {name}")


def test_values_that_no_row_attends_to_do_not_count():
    """Their mean would be 10^20, beside which all others are lost."""
    case = Case("s*0.25 where pad[b, kv]", 1.0)
    case.v[1, :, -30:] = 1e20
    ours, original, exact = (
        case.run(case.ours),
        case.run(case.reference),
        case.run(case.reference, torch.float64),
    )
    for i in (0, 1, 3, 5):
        assert_equal_under_rule(ours[i], original[i], exact[i], str(i))


@pytest.mark.parametrize("value", [float("inf"), 1e35, 1e-40])
def test_extreme_values(value):
    case = Case("s*0.25", 0.0)
    case.v[0, 0, :, 3] = value
    case.v[0, 1, 0, 3] = value
    assert_equal_under_rule(
        case.run(case.ours)[0], case.run(case.reference)[0], case.run(case.reference, torch.float64)[0]
    )


def test_values_of_zero_stay_exact():
    """Padding: whatever is taken off all values would have to be added up as often as there are keys."""
    case = Case("s*0.25", 0.0)
    case.q *= 1e-3
    case.v[:, :, 8:] = 0
    assert_equal_under_rule(
        case.run(case.ours)[0], case.run(case.reference)[0], case.run(case.reference, torch.float64)[0]
    )


def test_rows_add_up_to_zero_as_where_a_maximum_is_subtracted():
    """The gradient of the maximum takes off what roundings leave of a row's sum."""

    def original(q, k, v, captures):
        scores = (q @ k.mT * 0.25 + captures[0]) / 32
        return torch.softmax((scores - scores.amax(-1, keepdim=True)) * 32, -1) @ v

    errors = []
    for seed in range(3):
        case = Case("s*0.25 + bias[h, q, kv]", 10.0, seed=seed)
        case.captures[0].requires_grad_()
        errors.append(
            [case.run(case.ours)[-1], case.run(original)[-1], case.run(original, torch.float64)[-1]]
        )
    assert_equal_under_rule(*(torch.stack(e) for e in zip(*errors, strict=True)))
