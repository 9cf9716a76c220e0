"""Wrong rewrites, made from right ones: what the proof must reject.

A mutant is a change to the program's text, to the emitted nodes, or to the model of the kernels.
``programs`` are the originals, as people write them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.block_map import EMPTY, FULL, PARTIAL
from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import Expr, const
from flashfuse.kernels.spec import DeadRows, ScoreProgram
from flashfuse.passes import nodes
from flashfuse.passes.find import find_regions
from flashfuse.passes.plan import Fuse, plan
from flashfuse.passes.rewrite import copy_graph_module
from flashfuse.proof.prove import Replacement, emitted
from flashfuse.proof.tiled import Tiled

# --- right rewrites -----------------------------------------------------------------------------

B, H, G, SQ, SKV, D, DV = 2, 4, 2, 6, 7, 5, 3
"""All different, so that no axis passes for another by its size."""


@dataclass(frozen=True)
class Base:
    """An original, its graph, and its one planned site."""

    name: str
    gm: fx.GraphModule
    inputs: tuple[Tensor, ...]
    plan: Fuse

    @property
    def program(self) -> ScoreProgram:
        return self.plan.region.program


PROGRAMS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {}


def program(make_inputs: Callable[[], tuple[Tensor, ...]]) -> Callable[..., Any]:
    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        PROGRAMS[run.__name__] = run, make_inputs
        return run

    return register


def qkv(h_kv: int = H, q_len: int = SQ, kv_len: int = SKV) -> tuple[Tensor, ...]:
    sizes = ((H, q_len, D), (h_kv, kv_len, D), (h_kv, kv_len, DV))
    return tuple(torch.randn(B, *size, dtype=torch.float64) for size in sizes)


def some(*sizes: int) -> Tensor:
    """Conditions with a row of each kind: some, none, all true."""
    drawn = torch.rand(*sizes) < 0.6
    rows = drawn.view(-1, sizes[-1])
    rows[:, 0] = False
    rows[1::3], rows[2::3] = False, True
    return drawn


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


@program(qkv)
def plain(q, k, v):
    return softmax(q @ k.transpose(-1, -2) / math.sqrt(D)) @ v


@program(lambda: qkv(kv_len=SQ))
def causal(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.4
    future = torch.ones(SQ, SQ, dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(future, -math.inf)) @ v


@program(lambda: (*qkv(h_kv=G, kv_len=SQ), some(B, SQ)))
def grouped_and_padded(q, k, v, pad):
    k, v = (x[:, :, None].expand(-1, -1, H // G, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.45
    i = torch.arange(SQ)
    allowed = (i[None, :] <= i[:, None])[None, None] & pad[:, None, None, :]
    return softmax(scores + torch.where(allowed, 0.0, torch.finfo(torch.float32).min)) @ v


@program(lambda: qkv(q_len=SKV))
def window(q, k, v):
    i = torch.arange(SKV)
    near = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3)
    scores = (q * 0.4) @ k.transpose(-1, -2)
    return softmax(scores.masked_fill(~near, torch.finfo(scores.dtype).min)) @ v


@program(lambda: (*qkv(), randn(1, H, SQ, SKV)))
def bias(q, k, v, bias):
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@program(lambda: (*qkv(kv_len=SQ), some(B, SQ), randn(H)))
def sink(q, k, v, pad, sinks):
    scores = q @ k.transpose(-1, -2) * 0.4
    scores = scores.masked_fill(~pad[:, None, None, :], torch.finfo(scores.dtype).min)
    sinks = sinks.reshape(1, -1, 1, 1).expand(B, -1, SQ, -1)
    combined = torch.cat([scores, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return softmax(combined)[..., :-1] @ v


@program(lambda: (*qkv(h_kv=G), randn(H, 1, SKV), some(B, 1, SQ, SKV)))
def infinity_added(q, k, v, bias, mask):
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    return softmax(q @ k.transpose(-1, -2) * 0.4 + bias + torch.where(mask, 0.0, -math.inf)) @ v


@program(lambda: (*qkv(), randn(H)))
def alibi(q, k, v, slopes):
    distance = torch.arange(SKV)[None, :] - torch.arange(SQ)[:, None]
    return softmax(q @ k.transpose(-1, -2) * 0.3 + slopes[:, None, None] * distance) @ v


@program(lambda: qkv(kv_len=SQ))
def softcap(q, k, v):
    scores = torch.tanh(q @ k.transpose(-1, -2) * 0.35 / 3.0) * 3.0
    future = torch.ones(SQ, SQ, dtype=torch.bool).triu(1)
    return softmax(scores.masked_fill(future, torch.finfo(scores.dtype).min)) @ v


@program(lambda: qkv(kv_len=SQ))
def sdpa_causal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@program(lambda: (*qkv(), some(B, 1, SQ, SKV)))
def sdpa_masked(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)


@program(lambda: (*qkv(), some(B, 1, 1, SKV)))
def fill_and_dropout(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).div(2.5)
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min))
    return torch.nn.functional.dropout(weights, 0.25, True) @ v


@program(lambda: (*qkv(q_len=SKV), torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]])))
def documents(q, k, v, document):
    same = document[:, None, :, None] == document[:, None, None, :]
    scores = q @ k.transpose(-1, -2) * 0.5
    return softmax(scores.masked_fill(~same, -math.inf)) @ v


@program(lambda: (*qkv(), randn(H, 1, 1)))
def temperature(q, k, v, temperature):
    scores = q @ k.transpose(-1, -2) * temperature
    scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@program(lambda: tuple(x.flatten(0, 1) for x in qkv()))
def folded(q, k, v):
    return torch.bmm(softmax(torch.baddbmm(torch.zeros(1, dtype=q.dtype), q, k.mT, alpha=0.4)), v)


@program(lambda: (*(x.bfloat16() for x in qkv(kv_len=SQ)), some(B, 1, 1, SQ)))
def narrow(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)).float() * 0.4
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min))
    return weights.to(q.dtype) @ v


@program(lambda: tuple(torch.randn(1, 9, 96, 16, dtype=torch.float64) for _ in range(3)))
def long_window(q, k, v):
    """Of sizes that the proof shrinks."""
    i = torch.arange(96)
    near = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 40)
    scores = q @ k.transpose(-1, -2) / math.sqrt(16)
    return softmax(scores + torch.where(near, 0.0, torch.finfo(torch.float32).min)) @ v


def bases() -> list[Base]:
    """Every original, captured by Dynamo."""
    made = []
    for name, (run, make_inputs) in PROGRAMS.items():
        torch.manual_seed(1)
        torch._dynamo.reset()
        graphs: list[tuple[fx.GraphModule, tuple[Tensor, ...]]] = []

        def collect(gm: fx.GraphModule, _: Any, graphs: Any = graphs) -> Any:
            return lambda *given: graphs.append((gm, given)) or gm(*given)

        torch.compile(run, backend=collect, fullgraph=True, dynamic=False)(*make_inputs())
        ((gm, inputs),) = graphs
        new = copy_graph_module(gm)
        nodes.name_in_place_results(new.graph)
        (found,) = plan(find_regions(new.graph))
        assert isinstance(found, Fuse), (name, found)
        made.append(Base(name, new, inputs, found))
    return made


# --- wrong ones ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One change: a new program, a change of the emitted graph, or a wrong model of the kernels."""

    name: str
    program: ScoreProgram | None = None
    edit: Callable[[Replacement], None] | None = None
    model: type[Tiled] | None = None

    def apply(self, base: Base) -> tuple[Replacement, type[Tiled]]:
        replacement = emitted(base.plan)
        call = operator_call(replacement)
        if self.program is not None:
            named = dict(zip(base.program.captures, call.args[3], strict=True))  # type: ignore[arg-type]
            captures = [named[name] for name in self.program.captures]
            call.args = (*call.args[:3], captures, *call.args[4:7], self.program.text, *call.args[8:])
        if self.edit is not None:
            self.edit(replacement)
        return replacement, self.model or Tiled


def operator_call(replacement: Replacement) -> fx.Node:
    (call,) = (n for n in replacement.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    return call


def both(a: Mutant, b: Mutant) -> Mutant | None:
    """Two changes at once, where they do not undo or replace each other."""
    for one, other in ((a.program, b.program), (a.model, b.model)):
        if one is not None and other is not None:
            return None

    def edit(replacement: Replacement) -> None:
        for mutant in (a, b):
            if mutant.edit is not None:
                mutant.edit(replacement)

    return Mutant(f"{a.name} + {b.name}", a.program or b.program, edit, a.model or b.model)


def mutants(base: Base) -> list[Mutant]:
    """All single changes that make sense for ``base``."""
    return [*of_program(base.program), *of_graph(base), *of_model(base)]


# Of the program.


def of_program(p: ScoreProgram) -> Iterator[Mutant]:
    def mutant(name: str, **change: Any) -> Mutant:
        return Mutant(name, dataclasses.replace(p, **change))

    for name, score in changed(p.score, of_reals, "score"):
        yield mutant(name, score=score)
    if p.mask is not None:
        yield mutant("mask lost", mask=None)
        yield mutant("mask inverted", mask=E.logical_not(p.mask))
        for name, mask in changed(p.mask, of_conditions, "mask"):
            yield mutant(name, mask=E.truth(mask))
    if p.sink is not None:
        yield mutant("sink lost", sink=None)
        for name, sink in changed(p.sink, of_reals, "sink"):
            yield mutant(name, sink=sink)
    for rule in get_args(DeadRows):
        if rule != p.dead_rows:
            yield mutant(f"dead rows {rule}", dead_rows=rule)


def changed(e: Expr, change: Callable[[Expr], Iterator[tuple[str, Expr]]], part: str) -> Iterator[Any]:
    """``e`` with one node of it changed, every way."""
    for name, new in change(e):
        yield f"{part}: {name} of {e}", new
    for i, arg in enumerate(e.args):
        if isinstance(arg, Expr):
            for name, new in changed(arg, change, part):
                yield name, Expr(e.op, *e.args[:i], new, *e.args[i + 1 :])


def of_reals(e: Expr) -> Iterator[tuple[str, Expr]]:
    if e.is_const and isinstance(e.value, float):
        yield "a part in a thousand more", const(e.value * 1.001)
        yield "the negative", const(-e.value)
        yield "the inverse", const(1 / e.value)
    if e == E.S:
        yield "twice", Expr("*", e, const(2))
        yield "none", const(0)
    if e.op == "+":
        for i, term in enumerate(e.args):
            rest = [*e.args[:i], *e.args[i + 1 :]]
            yield f"dropped {term}", rest[0] if len(rest) == 1 else Expr("+", *rest)
            yield f"doubled {term}", Expr("+", *e.args, term)
            yield f"negated {term}", Expr("+", *rest, Expr("*", term, const(-1)))
    if e.op == "*" and e.args[0].op == "tanh" and e.args[0].args[0].op == "*":
        inner = e.args[0].args[0]
        yield (
            "cap before the scale",
            Expr("*", Expr("*", Expr("tanh", inner.args[0]), inner.args[1]), e.args[1]),
        )
        yield "cap lost", inner
    if e.op == "load":
        yield from of_indices(e)


def of_conditions(e: Expr) -> Iterator[tuple[str, Expr]]:
    if e.op in E.COMPARISONS:
        for op in E.COMPARISONS:
            if op != e.op:
                yield f"{op} for {e.op}", Expr(op, *e.args)
        for shift in (-1, 1):
            yield f"edge moved by {shift}", Expr(e.op, e.args[0], E.add(e.args[1], const(shift)))
    if e.op in ("and", "or"):
        yield "the other connective", Expr("or" if e.op == "and" else "and", *e.args)
        for i, part in enumerate(e.args):
            rest = [*e.args[:i], *e.args[i + 1 :]]
            yield f"dropped {part}", rest[0] if len(rest) == 1 else Expr(e.op, *rest)
    if e.op == "load":
        yield from of_indices(e)


def of_indices(e: Expr) -> Iterator[tuple[str, Expr]]:
    """A capture read at another index: swapped variables, a wrong head or batch."""
    for i, index in enumerate(e.args[1:], 1):
        others = {E.B: [const(0)], E.H: [const(0), Expr("//", E.H, const(2))], E.Q: [E.KV], E.KV: [E.Q]}
        for other in others.get(index, []):
            if other not in (E.Q, E.KV) or SQ == SKV:
                yield f"{other} for {index}", Expr("load", e.args[0], *e.args[1:i], other, *e.args[i + 1 :])
        if E.contains(index, E.KV) or E.contains(index, E.Q):
            smaller = Expr("max", E.sub(index, const(1)), const(0))
            yield "one before", Expr("load", e.args[0], *e.args[1:i], smaller, *e.args[i + 1 :])


# Of the emitted graph.


def inserted(argument: int, run: Callable[[Tensor], Tensor]) -> Callable[[Replacement], None]:
    """An edit that puts ``run`` between q, k or v and the operator."""

    def edit(replacement: Replacement) -> None:
        call = operator_call(replacement)
        with replacement.graph.inserting_before(call):
            new = replacement.graph.call_function(run, (call.args[argument],))
        call.args = (*call.args[:argument], new, *call.args[argument + 1 :])

    return edit


def of_captures(i: int, run: Callable[[Tensor], Tensor]) -> Callable[[Replacement], None]:
    def edit(replacement: Replacement) -> None:
        call = operator_call(replacement)
        captures = list(call.args[3])  # type: ignore[call-overload, arg-type]
        if i >= len(captures):
            return  # the other change of a pair has lost it
        with replacement.graph.inserting_before(call):
            captures[i] = replacement.graph.call_function(run, (captures[i],))
        call.args = (*call.args[:3], captures, *call.args[4:])

    return edit


def of_output(run: Callable[[Tensor], Tensor]) -> Callable[[Replacement], None]:
    def edit(replacement: Replacement) -> None:
        (out,) = replacement.outputs
        with replacement.graph.inserting_after(out):
            replacement.outputs[0] = replacement.graph.call_function(run, (out,))

    return edit


def argument(position: int, value: Any) -> Callable[[Replacement], None]:
    def edit(replacement: Replacement) -> None:
        call = operator_call(replacement)
        call.args = (*call.args[:position], value, *call.args[position + 1 :])

    return edit


def rolled(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.roll(t, 1, dim)


def permuted_by_mistake(t: Tensor) -> Tensor:
    """The elements read with the last two axes exchanged: a transposed tensor taken for another."""
    return t.transpose(-1, -2).reshape(t.shape)


def of_graph(base: Base) -> Iterator[Mutant]:
    s = base.plan.region.shape
    heads = {0: s.num_q_heads, 1: s.num_kv_heads, 2: s.num_kv_heads}
    for i, name in enumerate("qkv"):
        yield Mutant(f"{name} read with its axes exchanged", edit=inserted(i, permuted_by_mistake))
        yield Mutant(f"{name} of the row before", edit=inserted(i, rolled(2)))
        if heads[i] > 1:
            yield Mutant(f"{name} of another head", edit=inserted(i, rolled(1)))
        if s.batch > 1:
            yield Mutant(f"{name} of another batch entry", edit=inserted(i, rolled(0)))
        yield Mutant(f"{name} detached", edit=inserted(i, Tensor.detach))
        yield Mutant(f"{name} through float16", edit=inserted(i, lambda t: t.to(torch.float16).to(t.dtype)))
    yield Mutant("output of the row before", edit=of_output(rolled(-2)))
    yield Mutant("output negated", edit=of_output(torch.neg))
    yield Mutant("output in float16", edit=of_output(lambda t: t.to(torch.float16)))
    for i, name in enumerate(base.program.captures):
        example = nodes.tensor(base.plan.region.scope.captures[name])
        assert example is not None
        for dim, n in enumerate(example.shape):
            if n > 1:
                yield Mutant(f"{name} rolled along {dim}", edit=of_captures(i, rolled(dim)))
        if example.is_floating_point():
            yield Mutant(f"{name} detached", edit=of_captures(i, Tensor.detach))
            yield Mutant(f"{name} through float16", edit=of_captures(i, lambda t: t.half().to(torch.float64)))
        elif example.dtype == torch.bool:
            yield Mutant(f"{name} inverted", edit=of_captures(i, torch.logical_not))
    if base.plan.region.dropout_p:
        yield Mutant("dropout lost", edit=argument(8, 0.0))
        yield Mutant("another dropout rate", edit=argument(8, 0.3))


# Of the kernels.

Predicate = Callable[[Base], bool]
MODELS: list[tuple[str, Predicate, type[Tiled]]] = []


def always(base: Base) -> bool:
    return True


def has_mask(base: Base) -> bool:
    return base.program.mask is not None


def has_blocks(kind: int) -> Predicate:
    """Causal programs have blocks of every kind, whatever the block sizes."""
    return lambda base: base.name in ("causal", "softcap", "sdpa_causal") and kind in (EMPTY, PARTIAL, FULL)


def has_gradient(base: Base) -> bool:
    return any(n.op == "load" for n in E.walk(base.program.score))


def drops(base: Base) -> bool:
    return bool(base.plan.region.dropout_p)


def wrong(name: str, applies: Predicate = always) -> Callable[[type[Tiled]], type[Tiled]]:
    def register(model: type[Tiled]) -> type[Tiled]:
        MODELS.append((name, applies, model))
        return model

    return register


def of_model(base: Base) -> Iterator[Mutant]:
    for name, applies, model in MODELS:
        if applies(base):
            yield Mutant(name, model=model)


@wrong("delta missing")
class _(Tiled):
    def delta(self, do, out):
        return super().delta(do, out) * 0


@wrong("delta of half the columns")
class _(Tiled):
    def delta(self, do, out):
        return (do * out).map(lambda t: t[..., :1]).sum((-1,), True)


@wrong("gradients of a group not summed", lambda base: base.plan.region.shape.gqa_group > 1)
class _(Tiled):
    def of_key_heads(self, x):
        return x.map(lambda t: t.unflatten(1, (self.k.shape[1], -1))[:, :, 0])


@wrong("heads of a group interleaved", lambda base: base.plan.region.shape.gqa_group > 1)
class _(Tiled):
    def repeated(self, t):
        return t.repeat(1, self.q.shape[1] // t.shape[1], 1, 1)


@wrong("gradient of a capture not summed over its broadcast axes", has_gradient)
class _(Tiled):
    def add_capture_gradients(self, totals, dx, env):
        first = {n: self.zeros(c.shape) for n, c in totals.items()}
        only = dx.where(env["b"] == 0, 0)
        super().add_capture_gradients(first, only, env)
        for name, grad in first.items():
            totals[name] = totals[name] + grad


@wrong("gradient of a capture of the weights, not of the scores", has_gradient)
class _(Tiled):
    def add_capture_gradients(self, totals, dx, env):
        super().add_capture_gradients(totals, dx * dx, env)


@wrong("running maximum without rescaling of the sum")
class _(Tiled):
    def accumulated(self, l, acc, rescale, weights, kept, v):
        return l + weights.sum((-1,), True), acc * rescale + kept @ v


@wrong("running maximum without rescaling of the output")
class _(Tiled):
    def accumulated(self, l, acc, rescale, weights, kept, v):
        return l * rescale + weights.sum((-1,), True), acc + kept @ v


@wrong("dropout before the sum", drops)
class _(Tiled):
    def accumulated(self, l, acc, rescale, weights, kept, v):
        return l * rescale + kept.sum((-1,), True), acc * rescale + kept @ v


@wrong("weights of the backward not normalised")
class _(Tiled):
    def backward(self, do, out, m, l):
        return super().backward(do, out, m, l.where(l.p == 0, 1))


@wrong("a maximum of the backward that is not the forward's")
class _(Tiled):
    def backward(self, do, out, m, l):
        return super().backward(do, out, self.highest(m, m), l)


@wrong("dropout not scaled", drops)
class _(Tiled):
    def drop_scaled(self, x):
        return x


@wrong("dropout scaled twice", drops)
class _(Tiled):
    def drop_scaled(self, x):
        return super().drop_scaled(super().drop_scaled(x))


@wrong("dropout seeded differently in the backward", drops)
class _(Tiled):
    def backward(self, do, out, m, l):
        self.keep = self.keep.roll(1, -1)
        return super().backward(do, out, m, l)


@wrong("no dropout in the backward", drops)
class _(Tiled):
    def backward(self, do, out, m, l):
        self.keep = torch.ones_like(self.keep)
        return super().backward(do, out, m, l)


@wrong("softmax over the queries")
class _(Tiled):
    def forward(self):
        _, m, l = super().forward()
        everything = (slice(0, self.sizes[2]), slice(0, self.sizes[3]))
        env = self.environment(*everything) | {"s": self.products(*everything)}
        weights = self.evaluated(self.program.score, env).softmax(-2)
        return weights @ self.v_of_heads, m, l


@wrong("no mask in the backward", has_mask)
class _(Tiled):
    def backward(self, do, out, m, l):
        self.states = None if self.states is None else torch.full_like(self.states, FULL)
        return super().backward(do, out, m, l)


def restated(before: int, after: int) -> type[Tiled]:
    class Restated(Tiled):
        def forward(self):
            assert self.states is not None
            self.states = torch.where(self.states == before, after, self.states.long())
            return super().forward()

    return Restated


for _before, _after in itertools.permutations((EMPTY, PARTIAL, FULL), 2):
    if (_before, _after) in ((EMPTY, PARTIAL), (FULL, PARTIAL)):
        continue  # slower, not wrong
    _names = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
    MODELS.append(
        (
            f"a {_names[_before]} block taken as {_names[_after]}",
            has_blocks(_before),
            restated(_before, _after),
        )
    )


@wrong("the derivative of the score missing", lambda base: derivative(base.program.score, E.S) != E.ONE)
class _(Tiled):
    def backward_tile(self, *args):
        found = super().backward_tile(*args)
        return None if found is None else (found[1], *found[1:])


@wrong("dead rows ignored in the backward", lambda base: base.program.dead_rows in ("uniform", "mean"))
class _(Tiled):
    def backward_tile(self, r, c, do, delta, m, l, dead, uniform):
        return None if uniform else super().backward_tile(r, c, do, delta, m, l, dead, uniform)


@wrong("weights of dv dropped twice over", drops)
class _(Tiled):
    def backward_tile(self, r, c, *rest):
        found = super().backward_tile(r, c, *rest)
        return None if found is None else (*found[:2], self.kept(found[2], r, c), found[3])


@wrong("the last block of keys forgotten")
class _(Tiled):
    def allowed(self, rows, columns):
        is_last = columns.start > 0 and columns.stop == self.sizes[3]
        return None if is_last else super().allowed(rows, columns)


def has_sink(base: Base) -> bool:
    return base.program.sink is not None


@wrong("the sink left out of the sum", has_sink)
class _(Tiled):
    def start(self, lead, rows):
        m, l = super().start(lead, rows)
        return m, l * 0


@wrong("the gradient of the sink missing", has_sink)
class _(Tiled):
    def add_sink_gradients(self, totals, delta, m, l, dead):
        super().add_sink_gradients(totals, delta * 0, m, l, dead)


@wrong("the weight of the sink not normalised", has_sink)
class _(Tiled):
    def add_sink_gradients(self, totals, delta, m, l, dead):
        super().add_sink_gradients(totals, delta, m, l * 0 + 1, dead)
