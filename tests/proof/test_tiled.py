"""The blockwise algorithm against its definition, in the field, for any block sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashfuse.kernels.block_map import block_states
from flashfuse.kernels.spec import ScoreProgram
from flashfuse.proof.tensor import FieldTensor
from flashfuse.proof.tiled import Tiled, weights_by_definition
from flashfuse.proof.value import Draw, Value

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, G, D, DV = 2, 4, 2, 3, 2
PROGRAMS = (
    "s*0.5",
    "s*0.5 where kv <= q + 1",
    "s where kv <= q and kv > q - 3",
    "s*0.5 where kv < q else zero",
    "s*0.5 where kv < q else mean",
    "s*0.5 where kv < q else uniform",
    "s where pad[b, kv] else uniform",
    "s*t[h] + (kv - q)*t[h] where pad[b, kv] else uniform_s",
    "tanh(s*0.02)*50 + r[h, kv - q + 12] where kv <= q and pad[b, kv] else uniform",
    "s + x[b, h, q, kv]",
)


def site(
    text: str, draw: Draw, q_len: int, kv_len: int, blocks: tuple[int, int], p: float, sinks: bool
) -> Tiled:
    program = ScoreProgram.parse(f"{text} sink z[h]*2 + z[0]" if sinks else text)
    sizes = {"t": (H,), "z": (H,), "r": (H, 32), "x": (B, H, q_len, kv_len)}
    pad = torch.rand((B, kv_len), generator=draw.inputs) < 0.5
    captures: list[Value | Tensor] = [draw.random(sizes[n]) if n in sizes else pad for n in program.captures]
    states = None
    if program.mask is not None:
        mask = program.mask_program
        given = [pad for _ in mask.captures]
        states = block_states(given, (), torch.device("cpu"), (B, H, q_len, kv_len), mask, blocks)
    keep = torch.rand((B, H, q_len, kv_len), generator=draw.inputs) >= p if p else None
    q, k = draw.random((B, H, q_len, D)), draw.random((B, G, kv_len, D))
    v = draw.random((B, G, kv_len, DV))
    return Tiled(q, k, v, captures, (), program, blocks, states, p, keep)


def by_definition(s: Tiled, do: Value) -> list[Value | None]:
    """The output, and the gradients that PyTorch finds for it."""
    leaves = {
        name: FieldTensor.of(Value(x.draw, x.p.clone(), x.q.clone()), torch.float32, {}).requires_grad_()
        for name, x in (("q", s.q), ("k", s.k), ("v", s.v), *s.float_captures.items())
        if x is not None and x.q is not None
    }
    out = definition(s, leaves)
    grads = torch.autograd.grad(out, [*leaves.values()], FieldTensor.of(do, torch.float32, {}))
    return [out.value, *(g.value for g in grads)]


def definition(s: Tiled, leaves: dict[str, Tensor]) -> Tensor:
    """Attention as ``kernels.reference`` has it, with sinks as one more key of value 0."""
    from flashfuse.kernels.reference import environment, evaluate

    q, k, v = (leaves[n] for n in "qkv")
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    captures = [leaves.get(n, c) for n, c in zip(s.program.captures, s.captures, strict=True)]
    env = environment(s.program, captures, (), s.sizes, "cpu") | {"s": q @ k.mT}
    x = torch.as_tensor(evaluate(s.program.score, env))
    allowed = torch.ones(s.sizes, dtype=torch.bool)
    if s.program.mask is not None:
        allowed = (torch.as_tensor(evaluate(s.program.mask, env)) != 0).expand(s.sizes)
    dead = ~allowed.any(-1, keepdim=True)
    masked = x.masked_fill(~allowed, -torch.inf)
    if s.program.sink is not None:
        column = torch.as_tensor(evaluate(s.program.sink, env)).expand(*s.sizes[:3], 1)
        masked = torch.cat([masked, column], -1)
    weights = torch.ops.aten._safe_softmax(masked, -1)[..., : s.sizes[3]]
    if s.program.dead_rows in ("uniform", "uniform_s"):
        if s.program.dead_rows == "uniform_s":
            env |= {n: c.detach() for n, c in zip(s.program.captures, captures, strict=True)}
            x = torch.as_tensor(evaluate(s.program.score, env))
        weights = torch.where(dead, (x - x.detach()).softmax(-1), weights)
    elif s.program.dead_rows == "mean":
        weights = torch.where(dead, 1 / s.sizes[3], weights)
    if s.keep is not None:
        weights = torch.where(s.keep, weights / (1 - s.dropout_p), 0)
    return weights @ v


def assert_proved(s: Tiled) -> None:
    do = s.draw.random((B, H, s.sizes[2], DV))
    out, m, l = s.forward()
    ours = [out, *(g for g in s.backward(do, out, m, l) if g is not None)]
    for a, b in zip(by_definition(s, do), ours, strict=True):
        assert bool((a.p == b.p).all())
    everything = (slice(0, s.sizes[2]), slice(0, s.sizes[3]))
    assert bool(((s.kept(weights_by_definition(s), *everything) @ s.v_of_heads).p == out.p).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(PROGRAMS),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from((0.0, 0.25)),
    st.integers(0, 2**20),
)
def test_tiled_is_the_definition(text, lengths, blocks, p, seed):
    assert_proved(site(text, Draw.seeded(seed), *lengths, blocks, p, sinks=False))


@pytest.mark.parametrize("text", [p for p in PROGRAMS if "else" not in p])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_sinks(text, p):
    assert_proved(site(text, Draw.seeded(1), 7, 9, (3, 4), p, sinks=True))


class SinkForgotten(Tiled):
    def start(self, lead, rows):
        m, l = super().start(lead, rows)
        return m, l * 0


class SinkWithoutItsPartOfDelta(Tiled):
    def add_sink_gradients(self, totals, delta, m, l, dead):
        super().add_sink_gradients(totals, delta * 0, m, l, dead)


@pytest.mark.parametrize("wrong", [SinkForgotten, SinkWithoutItsPartOfDelta])
def test_wrong_sinks_are_noticed(wrong):
    s = site("s*0.5 where kv <= q + 1", Draw.seeded(2), 6, 7, (3, 3), 0.0, sinks=True)
    with pytest.raises(AssertionError):
        assert_proved(wrong(**{f: getattr(s, f) for f in Tiled.__dataclass_fields__}))
