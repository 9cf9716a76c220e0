"""Original against replacement, element by element, over finite fields."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from flashfuse.kernels import expr as E
from flashfuse.kernels.spec import NAN, ScoreProgram
from flashfuse.passes import nodes
from flashfuse.passes.plan import Fuse
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.rewrite import Emitter
from flashfuse.passes.tables import sizes_of
from flashfuse.proof.certificate import Certificate, NotProvable
from flashfuse.proof.key import cut_nodes, site_nodes
from flashfuse.proof.run import Env, Runner
from flashfuse.proof.shrink import Shrink, Symbols, shrink, unchanged
from flashfuse.proof.tensor import SOFTMAX, FieldTensor, bits_of
from flashfuse.proof.tiled import Tiled
from flashfuse.proof.value import Draw, Value

DRAWS = 2
MAX_UNSHRUNK = 1 << 16
"""Scores of a site that is proved at its own sizes where smaller ones do not work."""
UNRELATED = 4
"""Draws of symbolic sizes in any order before those of the trace are taken."""


class DoesNotRun(Exception):
    """Inside the proof: the user's own nodes raise at the sizes drawn."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class Replacement:
    """The emitted nodes: ``graph`` has a placeholder for each node of the site that it reads.

    ``outputs`` are what stands for the site's output, for its weights that something else uses, and for its
    results of rows.
    """

    graph: fx.Graph
    inputs: Mapping[fx.Node, fx.Node]
    outputs: list[fx.Node]


def prove_site(plan: Fuse, seed: int = 0, draws: int = DRAWS) -> Certificate:
    """Compares the user's nodes of a site with its replacement as emitted, forward and backward.

    Both are run on the same random field elements; each draw has its own primes, inputs, masks and block
    sizes.  The operator itself is run as ``tiled.Tiled``.

    Raises:
        NotProvable: an operation of the site has no meaning over a field, or the site could not be
            run at smaller sizes and is too large at its own.
    """
    # What the user set as the default device is not ours.
    elsewhere = torch.get_default_device().type != "cpu"
    with unset_fake_temporarily(), torch.device("cpu") if elsewhere else contextlib.nullcontext():
        return prove_replacement(plan.region, emitted(plan), seed, draws)


def emitted(plan: Fuse) -> Replacement:
    """The replacement of a site in a graph of its own, by the emitter that rewrites models."""
    region, graph = plan.region, fx.Graph()
    wanted = [*cut_nodes(region), *(n for n in region.output.graph.nodes if _is_symbol(n))]
    here: dict[fx.Node, fx.Node] = {}
    for node in wanted:
        if node not in here:
            here[node] = graph.placeholder(node.name)
            here[node].meta["val"] = nodes.value(node)
    variant = plan.selection.variant
    results = Emitter(graph).site(region.mapped(here), variant.name, variant.needs_block_map)
    return Replacement(graph, here, [results[n] for n in region.outputs])


def _is_symbol(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(nodes.value(node), torch.SymInt)


def prove_replacement(
    region: AttentionRegion,
    replacement: Replacement,
    seed: int = 0,
    draws: int = DRAWS,
    model: type[Tiled] = Tiled,
) -> Certificate:
    """As ``prove_site``, for any replacement and any model of the kernels."""
    started = time.perf_counter()
    site = dict(site_nodes(region))
    numbered = (*site, *replacement.graph.nodes)
    small = _is_small(region)
    try:
        sizes, done = _at_smaller_sizes(region, replacement, site, numbered, seed, draws, model)
    except NotProvable:
        raise
    except Exception as error:
        if not small:
            problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise NotProvable(f"the site does not run at smaller sizes: {problem}") from error
        done = []
    if small and not (done and not done[-1].difference):
        # A number was read as a size that is none, or the other way round: the real sizes decide.
        sizes = unchanged(numbered)
        done = _drawn(region, replacement, site, sizes, seed, draws, model)
    return _certificate(region, sizes, done, (time.perf_counter() - started) * 1e3)


def _at_smaller_sizes(
    region: AttentionRegion,
    replacement: Replacement,
    site: Mapping[fx.Node, bool],
    numbered: Sequence[fx.Node],
    seed: int,
    draws: int,
    model: type[Tiled],
) -> tuple[Shrink, list[_Comparison]]:
    """The comparisons, and the sizes at which they were made.

    A graph may need symbolic sizes to be in some order, or equal, which nothing says: a gather from a mask
    that has a length of its own.  Where the user's nodes do not run others are drawn, and in the end
    those of the trace, at which they did.
    """
    apart = shrink(region.shape, numbered, seed, tells_apart=True)
    if apart.twice:
        # Where they were told apart wrongly, the batch stays as large as it is.
        with contextlib.suppress(Exception):
            done = _drawn(region, replacement, site, apart, seed, draws, model)
            if not done[-1].difference:
                return apart, done
    attempts: list[Symbols] = ["lengths", *(["any"] * UNRELATED), "hints"]  # type: ignore[list-item]
    for i, symbols in enumerate(attempts):
        told = i == 0 and not apart.twice
        sizes = apart if told else shrink(region.shape, numbered, seed + i, symbols)
        try:
            return sizes, _drawn(region, replacement, site, sizes, seed, draws, model)
        except DoesNotRun as error:
            if not sizes.symbols or symbols == "hints":
                raise error.reason from None
    raise AssertionError("every attempt returns or raises")


def _drawn(
    region: AttentionRegion,
    replacement: Replacement,
    site: Mapping[fx.Node, bool],
    sizes: Shrink,
    seed: int,
    draws: int,
    model: type[Tiled],
) -> list[_Comparison]:
    """One comparison after the other, until one differs."""
    done: list[_Comparison] = []
    for i in range(draws):
        rows: Rows = "masked" if i else "mixed"
        if any(c.hidden for c in done):
            # NaN hid a gradient; without rows that give it, it is seen.
            rows = "alive"
        done.append(_Comparison(region, replacement, site, sizes, seed + i, rows, model))
        done[-1].run()
        if done[-1].difference:
            break
    return done


def _is_small(region: AttentionRegion) -> bool:
    s = region.shape
    sizes = (s.batch, s.num_q_heads, s.q_len, s.kv_len)
    return all(isinstance(n, int) for n in sizes) and math.prod(sizes) <= MAX_UNSHRUNK


# --- one draw -----------------------------------------------------------------------------------


Rows = Literal["mixed", "masked", "alive"]


class _Comparison:
    """One draw of fields, inputs and block sizes for a site and its replacement.

    ``rows`` says which keys inputs leave to them: ``mixed`` some, none or all of them by stored
    conditions; ``masked`` by −∞ in stored masks of reals as well; ``alive`` all.
    """

    def __init__(
        self,
        region: AttentionRegion,
        replacement: Replacement,
        site: Mapping[fx.Node, bool],
        sizes: Shrink,
        seed: int,
        rows: Rows,
        model: type[Tiled],
    ) -> None:
        self.region, self.replacement, self.site, self.sizes = region, replacement, site, sizes
        self.seed, self.rows = seed, rows
        self.draw = Draw.seeded(seed)
        lengths = (sizes(region.shape.q_len), sizes(region.shape.kv_len))
        # Two blocks each way, the second one usually shorter.
        blocks = [self.random(-(-n // 2), max(n, 2)) for n in lengths]
        unscaled = dict([region.unscaled]) if region.unscaled is not None else {}
        of_rows = region.row_results
        maxima = {r.reduction for r in of_rows if r.kind == "max"}
        self.runner = Runner(self.draw, sizes, (blocks[0], blocks[1]), model, unscaled, maxima, bool(of_rows))
        self.names = cut_nodes(region)
        self.compared_names: list[str] = []
        self.wider: list[str] = []
        self.difference = ""
        self.elements = self.hidden = self.not_compared = 0

    def random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.draw.inputs))

    def run(self) -> None:
        """Runs both, and keeps what was compared and the first difference."""
        inputs = {node: self.input(node) for node, leaf in self.site.items() if leaf}
        inputs |= {n: self.input(n) for n in self.replacement.inputs if n not in inputs}
        leaves = {n: x for n, x in inputs.items() if isinstance(x, FieldTensor)}
        draw = self.draw
        with torch.inference_mode(False), torch.enable_grad():
            user: Env = dict(inputs)
            try:
                self.runner.run(self.site, user)
                original = self.with_gradients([user[n] for n in self.region.outputs], leaves)
            except NotProvable:
                raise
            except Exception as error:
                raise DoesNotRun(error) from error
            before, draw.precision = draw.precision, {}
            env: Env = {here: inputs[node] for node, here in self.replacement.inputs.items()}
            self.runner.run(self.replacement.graph.nodes, env)
            ours = self.with_gradients([env[n] for n in self.replacement.outputs], leaves)
        self.wider, differences = self.compared_precision(before, draw.precision)
        for name, a, b in self.pairs(original, ours, list(leaves)):
            if a is None and b is None:
                continue
            count, difference = self.compared(name, a, b)
            self.compared_names.append(name)
            self.elements += count
            differences += [difference] if difference else []
        self.difference = differences[0] if differences else ""

    def with_gradients(
        self, outputs: Sequence[Any], leaves: Mapping[fx.Node, FieldTensor]
    ) -> tuple[Sequence[FieldTensor], list[FieldTensor | None]]:
        """The outputs, and what fixed random cotangents of all of them together give each input."""
        if not all(isinstance(out, FieldTensor) for out in outputs):
            raise NotProvable("the output does not depend on the inputs")
        generator = torch.Generator().manual_seed(self.seed)
        cotangents = []
        for out in outputs:
            p = torch.randint(1, self.draw.p, out.shape, generator=generator)
            cotangents.append(FieldTensor.of(Value(self.draw, p), out.dtype, {}))
        roots = [(out, do) for out, do in zip(outputs, cotangents, strict=True) if out.requires_grad]
        if not roots:
            return outputs, [None] * len(leaves)
        given, wanted = zip(*roots, strict=True)
        grads: Any = torch.autograd.grad(given, list(leaves.values()), wanted, allow_unused=True)
        return outputs, list(grads)

    def pairs(self, original: Any, ours: Any, leaves: Sequence[fx.Node]) -> Any:
        weights = (_OUTPUTS[2 if w.dropped else 1] for w in self.region.weights)
        names = (_OUTPUTS[0], *weights, *(r.kind for r in self.region.row_results))
        yield from zip(names, original[0], ours[0], strict=True)
        grads = dict(zip(leaves, zip(original[1], ours[1], strict=True), strict=True))
        for node in sorted(grads, key=[*self.names, *leaves].index):
            yield f"d{self.names.get(node, node.name)}", *grads[node]

    # --- inputs ---------------------------------------------------------------------------------

    def input(self, node: fx.Node) -> Any:
        """Random field elements for reals; real random conditions and integers."""
        example = nodes.value(node)
        if not isinstance(example, Tensor):
            return self.sizes(example) if isinstance(example, (int, torch.SymInt)) else example
        if nodes.tensor(node) is None or example.is_complex():
            raise NotProvable(f"`{node.name}` is not a dense real tensor")
        shape = self.sizes.shape(nodes.shape(node))
        expanded = [stride == 0 for stride in map(nodes.size_of, example.stride())]
        own = tuple(1 if e else n for n, e in zip(shape, expanded, strict=True))
        if example.is_floating_point():
            name = self.names.get(node, node.name)
            via = {name: bits_of(example.dtype)}
            drawn = self.draw.random(own)
            program = self.region.program
            if self.rows == "masked" and program.mask is None and name in _added(program):
                drawn = drawn.where(self.conditions(own), -math.inf)
            if self.rows == "mixed" and name in _sinks(program):
                # Every other sink is none, so that rows without a key are dead there.
                drawn = drawn.where((torch.arange(math.prod(own)) % 2 == 0).view(own), -math.inf)
            made = FieldTensor.of(_laid_out(drawn, example), example.dtype, via)
            return made.requires_grad_().expand(shape) if any(expanded) else made.requires_grad_()
        if example.dtype == torch.bool:
            return self.conditions(own).expand(shape)
        return self.integers(node, own).to(example.dtype).expand(shape)

    def conditions(self, shape: tuple[int, ...]) -> Tensor:
        """Rows of conditions: some, none and all true in turn; columns in every other draw."""
        if self.rows == "alive":
            return torch.ones(shape, dtype=torch.bool)
        if self.rows == "masked" and len(shape) > 1 and min(shape[-2:]) > 1:
            return self.by_rows((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2).contiguous()
        return self.by_rows(shape)

    def by_rows(self, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.rand(shape, generator=self.draw.inputs) < 0.6
        if not shape:
            return drawn
        rows = drawn.view(-1, shape[-1])
        rows[:, 0] &= torch.rand(len(rows), generator=self.draw.inputs) < 0.5
        for i in range(len(rows)) if len(rows) > 1 else ():
            kind = (i + self.seed) % 3
            if kind:
                rows[i] = kind == 2
        return drawn

    def integers(self, node: fx.Node, shape: tuple[int, ...]) -> Tensor:
        """Positions where the program compares or indexes with them, else zeros and ones."""
        name = self.names.get(node)
        rows = _rows_selected(self.region, name) if name is not None else None
        if rows is not None:
            low, high = map(self.sizes, rows)
            return torch.randint(low, high, shape, generator=self.draw.inputs)
        if name is not None and _is_position(self.region.program, name):
            return torch.randint(0, self.sizes(self.region.shape.kv_len), shape, generator=self.draw.inputs)
        return self.conditions(shape).long()

    # --- comparison -----------------------------------------------------------------------------

    def compared(self, name: str, a: FieldTensor | None, b: FieldTensor | None) -> tuple[int, str]:
        """How many elements were compared, and the first that differs."""
        present = a if a is not None else b
        assert present is not None
        if a is not None and b is not None and (a.shape != b.shape or a.dtype != b.dtype):
            return 0, f"{name} is {_described(b)} instead of {_described(a)}"
        zero = Value(self.draw, torch.zeros(present.shape, dtype=torch.int64))
        x, y = (zero if t is None else t.value for t in (a, b))
        nan_x, nan_y = _is_nan(x), _is_nan(y)
        skipped, dead = torch.zeros_like(nan_x), self.region.program.dead_rows
        if name not in _OUTPUTS and dead in NAN:
            # What other rows give to such a gradient is not seen; where all rows are alive it is.
            self.hidden += int(nan_x.sum())
            skipped = nan_x if dead == "nan" else skipped
        same = ((x.p == y.p) & ~nan_x & ~nan_y) | (nan_x & nan_y) | skipped
        self.not_compared += int(skipped.sum())
        if bool(same.all()):
            return int((~skipped).sum()), ""
        wrong = (~same).nonzero()
        at = ", ".join(map(str, wrong[0].tolist()))
        return same.numel(), f"{name}[{at}] differs, as do {len(wrong)} of {same.numel()} elements of {name}"

    def compared_precision(
        self, original: Mapping[str, tuple[int, int]], ours: Mapping[str, tuple[int, int]]
    ) -> tuple[list[str], list[str]]:
        """Inputs that we read in a wider dtype than the original, and in a narrower one.

        The kernels' softmax may not be narrower either; that it is wider goes without saying.
        """
        wider, narrower = [], []
        for name, own in ours.items():
            theirs = original.get(name, own)
            text = f"{_dtype_of(own)} instead of {_dtype_of(theirs)}"
            if own[0] < theirs[0] or own[1] < theirs[1]:
                narrower.append(f"{name} narrower: {text}")
            elif own != theirs and name != SOFTMAX:
                wider.append(f"{name}: {text}")
        return wider, narrower


_OUTPUTS = ("out", "weights", "dropped weights", "lse", "max")


def _described(t: FieldTensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _dtype_of(bits: tuple[int, int]) -> str:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    found = next((d for d in dtypes if bits_of(d) == bits), None)
    return (
        str(found).removeprefix("torch.") if found else f"{bits[0]} bits of mantissa, {bits[1]} of exponent"
    )


def _is_nan(v: Value) -> Tensor:
    if v.level is None:
        return torch.zeros(v.shape, dtype=torch.bool)
    return v.level.isnan().expand(v.shape)


def _laid_out(value: Value, example: Tensor) -> Value:
    """``value`` with its dimensions in the order in memory that those of ``example`` have."""
    strides = [nodes.size_of(s) for s in example.stride()]
    if not all(isinstance(s, int) for s in strides):
        return value
    order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
    back = [order.index(d) for d in range(len(order))]
    return value.map(lambda t: t.permute(order).contiguous().permute(back))


def _added(program: ScoreProgram) -> tuple[str, ...]:
    """Captured reals that are added to the score, as masks of −∞ and biases are; not rows of tables."""
    terms = program.score.operands if program.score.op == "+" else ()
    return tuple(t.args[0] for t in terms if t.op == "load" and not E.selects(t))


def _rows_selected(region: AttentionRegion, name: str) -> tuple[Any, Any] | None:
    """The range of a captured integer that selects elements: what every element that it selects allows."""
    lows: list[Any] = []
    highs: list[Any] = []
    for e in (region.program.score, region.program.mask):
        for n in E.walk(e) if e is not None else ():
            if n.op != "load":
                continue
            sizes = sizes_of(region.scope.captures[n.args[0]]) or (1,)
            for i, size in zip(n.operands, sizes, strict=True):
                if not any(part.op == "load" and part.args[0] == name for part in E.walk(i)):
                    continue
                alone = i.args[2] if i.op == "where" else i
                if alone.op == "load" and alone.args[0] == name:
                    lows.append(-size if i.op == "where" else 0)
                    highs.append(size)
                else:
                    # Of a sum the other terms take most of the range.
                    lows.append(0)
                    highs.append(3)
    return (max(lows, key=_shown), min(highs, key=_shown)) if lows else None


def _shown(size: Any) -> tuple[bool, Any]:
    """An order of numbers, with symbolic sizes after them."""
    return (False, size) if isinstance(size, int) else (True, str(size))


def _sinks(program: ScoreProgram) -> tuple[str, ...]:
    """The captured real that is the sink, where it may be −∞ without more being assumed."""
    sink = program.sink
    if sink is None or sink.op != "load" or program.dead_rows == "zero":
        return ()
    return (sink.args[0],)


def _is_position(program: ScoreProgram, name: str) -> bool:
    """Whether a captured integer is compared with something or used as an index."""
    parents = [n for e in program.parts for n in E.walk(e)]
    parents = [n for n in parents if n.op in E.COMPARISONS or n.op in ("load", "+", "*", "//", "%")]
    return any(child.op == "load" and child.args[0] == name for n in parents for child in n.operands)


# --- the certificate ----------------------------------------------------------------------------


def _certificate(
    region: AttentionRegion, sizes: Shrink, done: Sequence[_Comparison], elapsed_ms: float
) -> Certificate:
    draws, program = [c.draw for c in done], region.program
    kv_len = sizes(region.shape.kv_len)
    described, smaller = _sizes(region, sizes)
    assumptions = _absorbed(draws)
    assumptions += [f"`{name}` is finite" for name in _added(program) if program.mask is not None]
    if (
        program.sink is not None
        and not program.sink.is_const
        and any(math.isfinite(c) for d in draws for c in d.masks)
    ):
        assumptions.append("the sink is far above what masks a score")
    if _real_positions(program) and smaller:
        assumptions.append("conditions on real functions of positions hold beyond the smaller sizes too")
    if sizes.as_traced:
        assumptions.append("symbolic sizes that were equal in the trace are equal")
    if any(c.not_compared for c in done):
        assumptions.append("gradients that are NaN in the original are not compared")
    difference = done[-1].difference
    return Certificate(
        ok=not difference,
        compared=tuple(dict.fromkeys(n for c in done for n in c.compared_names)),
        primes=tuple((d.p, d.q) for d in draws),
        seeds=tuple(c.seed for c in done),
        elements=sum(c.elements for c in done),
        # An element is a fraction of polynomials with a few terms for each key (Schwartz–Zippel).
        failure_bound=math.prod(8 * kv_len / d.q for d in draws),
        sizes=described,
        uninterpreted=tuple(dict.fromkeys(name for d in draws for name in d.uninterpreted)),
        masks=tuple(dict.fromkeys(f"{c:.4g}" for d in draws for c in d.masks if math.isfinite(c))),
        casts=tuple(dict.fromkeys(text for c in done for text in c.wider)),
        assumptions=tuple(assumptions),
        difference=difference,
        elapsed_ms=elapsed_ms,
    )


def _real_positions(program: ScoreProgram) -> bool:
    """Whether a condition compares real numbers made of positions, such as ``(kv - q)*0.1 < 3.2``."""
    everything = [n for e in program.parts for n in E.walk(e)]
    sides = [a for n in everything if n.op in E.COMPARISONS for a in n.operands if not E.is_integral(a)]
    return any(_places(a) for a in sides)


def _places(e: E.Expr) -> bool:
    """Whether a position is in ``e``, other than as the index of a load."""
    return e in (E.Q, E.KV) or (e.op != "load" and any(map(_places, e.operands)))


def _absorbed(draws: Sequence[Draw]) -> list[str]:
    """Masks beside which large scores would still be seen in a row without a key."""
    lost = {c: size for d in draws for c, size in d.masks.items() if size < 1e4}
    return [f"scores below {size:.3g} are lost beside {c:.4g}" for c, size in lost.items()]


def _sizes(region: AttentionRegion, sizes: Shrink) -> tuple[str, bool]:
    """The sizes of the draws, and whether they are smaller than the site's."""
    s = region.shape
    names = ("batch", "num_q_heads", "num_kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim")
    fields: dict[str, Any] = {name: sizes(getattr(s, name)) for name in names}
    smaller = str(dataclasses.replace(s, **fields))
    if smaller == str(s):
        return smaller, False
    return f"{smaller.rpartition(' ')[0]} standing for {s}", True
