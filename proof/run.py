"""Runs graphs on field elements: the user's nodes as they are, and the emitted ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.kernels.block_map import EMPTY, PARTIAL, block_states
from flashfuse.kernels.ops import OPERATORS
from flashfuse.kernels.reference import sdpa_by_definition
from flashfuse.kernels.spec import ScoreProgram
from flashfuse.passes import dialect, nodes
from flashfuse.proof import field as F
from flashfuse.proof.certificate import NotProvable
from flashfuse.proof.shrink import Shrink
from flashfuse.proof.tensor import SOFTMAX, FieldTensor, bits_of
from flashfuse.proof.tiled import Tiled, weights_by_definition
from flashfuse.proof.value import Draw, Value

Env = dict[fx.Node, Any]


@dataclass
class Runner:
    """Evaluates nodes under one draw and one mapping of sizes.

    Attributes:
        blocks: rows and columns of a block in the model of the kernels.
        model: that model; tests put broken ones in its place.
        unscaled: for a dropout of weights that were scaled, the weights as they were.
        maxima: nodes whose maximum of each row is a result, not what the scores are shifted by.
        of_rows: whether results of rows are asked for.
    """

    draw: Draw
    shrink: Shrink
    blocks: tuple[int, int]
    model: type[Tiled] = Tiled
    unscaled: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    maxima: Container[fx.Node] = ()
    of_rows: bool = False

    def run(self, graph_nodes: Iterable[fx.Node], env: Env) -> Any:
        """Adds every node's value to ``env``; returns the last one."""
        result: Any = None
        for node in graph_nodes:
            if node not in env:
                env[node] = self.node(node, env)
            result = env[node]
        return result

    def node(self, node: fx.Node, env: Env) -> Any:
        """The value of one node; under autocast its inputs are cast as the example value says."""
        result, example = self.call(node, env), nodes.value(node)
        if isinstance(result, FieldTensor) and isinstance(example, Tensor) and result.dtype != example.dtype:
            cast = {n: _cast_floats(env[n], example.dtype) for n in node.all_input_nodes}
            result = self.call(node, cast).to(example.dtype)
        return result

    def call(self, node: fx.Node, env: Env) -> Any:
        op = self.shrink.op(node)
        if op is not None and op.name in ("dropout", "native_dropout"):
            on = op.args.get("training", op.args.get("train")) is not False
            rate = nodes.constant(op.get("p", 0.5)) if on else 0.0
            drawn_for = env[self.unscaled.get(node, op.input)]
            return self.dropped(env[op.input], rate, op.name == "native_dropout", drawn_for)
        if op is not None and op.name == "scaled_dot_product_attention":
            return self.sdpa(op, env)
        if op is not None and node in self.maxima:
            return self.maximum(op, env)
        if node.target is torch.randint:
            return None  # the seed: which weights are kept is an input here
        args, kwargs = (
            _on_cpu(fx.node.map_aggregate(self.shrink.literals(node, x), functools.partial(_in, env)))
            for x in (node.args, node.kwargs)
        )
        return self.meaning(node)(*args, **kwargs)

    def meaning(self, node: fx.Node) -> Callable[..., Any]:
        """What the node calls."""
        if node.target in OPERATORS:
            return self.attention
        if node.target is torch.ops.flashfuse.attention_weights.default:
            return self.weights
        if node.target is torch.ops.flashfuse.block_map.default:
            return self.block_map
        if node.op == "call_method":
            return getattr(Tensor, str(node.target))  # type: ignore[no-any-return]
        if node.op == "call_module":
            owner = node.graph.owning_module
            assert owner is not None
            return owner.get_submodule(str(node.target))
        assert callable(node.target)
        return node.target

    # --- what is not run as PyTorch runs it -----------------------------------------------------

    def dropped(self, x: Tensor, rate: float, pair: bool, drawn_for: Any = None) -> Any:
        """Dropout, where an element is kept by a hash of itself: alike in original and replacement.

        ``drawn_for`` is the element before it was scaled.
        """
        drawn_for = x if drawn_for is None else drawn_for
        if not isinstance(x, FieldTensor) or not isinstance(drawn_for, FieldTensor):
            raise NotProvable("dropout of something that is no score")
        if not rate:
            return (x, torch.ones(x.shape, dtype=torch.bool)) if pair else x
        if drawn_for.shape != x.shape:
            raise NotProvable("dropout of something that is no score")
        keep = self.keep(drawn_for.value, rate)
        # As PyTorch has it, by a product: NaN stays NaN.
        result = x * torch.where(keep, 1 / (1 - rate), 0.0)
        return (result, keep) if pair else result

    def maximum(self, op: dialect.Op, env: Env) -> Any:
        """The largest of each row, with the places of the largest after it where it is a pair."""
        x, dim = env[op.input], op.args["dim"]
        if not isinstance(x, FieldTensor):
            raise NotProvable("a maximum of something that is no score")
        (dim,) = dim if isinstance(dim, (list, tuple)) else (dim,)
        top = _Maximum.apply(x, dim, bool(op.get("keepdim", False)))  # type: ignore[no-untyped-call]
        return top if op.name == "amax" else (top, None)

    def keep(self, weights: Value, rate: float) -> Tensor:
        """Which weights dropout keeps."""
        if rate >= 1:
            raise NotProvable("dropout of everything")
        return (F.mix(weights.p, self.draw.key + 1) & 0xFFFF) >= round(rate * 0x10000)

    def sdpa(self, op: dialect.Op, env: Env) -> Tensor:
        """``scaled_dot_product_attention`` by its definition, with the scale of the model's own size."""
        given = {name: env[x] if isinstance(x, fx.Node) else x for name, x in op.args.items()}
        rate = nodes.constant(given.pop("dropout_p", 0.0)) or 0.0
        if given.get("scale") is None:
            width = nodes.shape(op.args["query"])[-1]
            given["scale"] = (width if isinstance(width, int) else self.shrink(width)) ** -0.5
        return sdpa_by_definition(**given, dropped=lambda weights: self.dropped(weights, rate, False))

    def attention(
        self,
        q: FieldTensor,
        k: FieldTensor,
        v: FieldTensor,
        captures: Sequence[Any],
        ints: Sequence[int],
        maps: Sequence[Tensor],
        seed: None,
        program: str,
        dropout_p: float,
        variant: str,
    ) -> tuple[FieldTensor, FieldTensor | None, FieldTensor | None]:
        """The fused operator, run as the model of the blockwise kernels; lse and max where asked for."""
        smaller = self.shrink.program(ScoreProgram.parse(program))
        for x in (q, k, v, *captures):
            self.draw.precision |= x.via if isinstance(x, FieldTensor) else {}
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.draw.precision[SOFTMAX] = bits_of(dtype)
        site = self.model(
            q.value, k.value, v.value,
            [c.value if isinstance(c, FieldTensor) else c for c in captures],
            ints, smaller, self.blocks, maps[0] if maps else None, dropout_p,
            dtype=dtype,
        )  # fmt: skip
        if site.states is None and smaller.mask is not None:
            mask = smaller.mask_program
            named = dict(zip(smaller.captures, captures, strict=True))
            numbers = dict(zip(smaller.ints, ints, strict=True))
            site.states = self.block_map(
                [named[n] for n in mask.captures], [numbers[n] for n in mask.ints], q, *site.sizes, mask
            )[0]
        if dropout_p:
            site.keep = self.keep(weights_by_definition(site), dropout_p)
        run = functools.partial(_Attention.apply, site, q.dtype, self.of_rows)
        return run(q, k, v, *captures)  # type: ignore[no-any-return]

    def weights(
        self,
        q: FieldTensor,
        k: FieldTensor,
        captures: Sequence[Any],
        ints: Sequence[int],
        seed: None,
        program: str,
        dropout_p: float,
        variant: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """The weights: attention to the rows of the identity."""
        kv_len = k.shape[2]
        identity = self.draw.value(torch.eye(kv_len, dtype=torch.int64))
        v = identity.map(lambda t: t.expand(*k.shape[:2], kv_len, kv_len))
        rows = FieldTensor.of(v, q.dtype, {})
        out = self.attention(q, k, rows, captures, ints, (), seed, program, dropout_p, variant)[0]
        return out.to(dtype)

    def block_map(
        self, captures: Any, ints: Any, like: Any, B: int, H: int, Sq: int, Skv: int, mask: Any
    ) -> tuple[Tensor, Tensor]:
        """The states of the blocks, as the kernels classify them, twice: by rows and by columns."""
        program = self.shrink.program(ScoreProgram.parse(mask)) if isinstance(mask, str) else mask
        if any(isinstance(c, FieldTensor) for c in captures):
            # A condition on real numbers is uninterpreted here, so intervals say nothing.
            counts = (-(-Sq // self.blocks[0]), -(-Skv // self.blocks[1]))
            states = torch.full((1, 1, *counts), PARTIAL, dtype=torch.int8)
        else:
            device = torch.device("cpu")
            states = block_states(captures, ints, device, (B, H, Sq, Skv), program, self.blocks)
        assert EMPTY == 0
        return states, states.transpose(-1, -2)


class _Maximum(torch.autograd.Function):
    """``Value.largest``, through which no gradient may go: a fused maximum has none."""

    @staticmethod
    def forward(ctx: Any, x: FieldTensor, dim: int, keepdim: bool) -> FieldTensor:  # type: ignore[override]
        return FieldTensor.of(x.value.largest(dim, keepdim), x.dtype, {})

    @staticmethod
    def backward(ctx: Any, grad: FieldTensor) -> Any:  # type: ignore[override]
        raise NotProvable("the gradient of a maximum")


class _Attention(torch.autograd.Function):
    """Forward and backward of the model, seen by PyTorch as one operation."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, site: Tiled, dtype: torch.dtype, of_rows: bool, *tensors: Any
    ) -> tuple[FieldTensor, FieldTensor | None, FieldTensor | None]:
        ctx.site, ctx.dtype = site, dtype
        out, ctx.m, ctx.l = site.forward()
        ctx.out = out
        ctx.wanted = [isinstance(t, FieldTensor) for t in tensors]
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        made = FieldTensor.of(out, dtype, {})
        if not of_rows:
            return made, None, None
        results = site.log_sum_exp(ctx.m, ctx.l), site.largest()
        lse, top = (FieldTensor.of(x.rounded(site.dtype), site.dtype, {}) for x in results)
        ctx.mark_non_differentiable(top)
        return made, lse, top

    @staticmethod
    def backward(ctx: Any, do: FieldTensor | None, dlse: FieldTensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        slope = ctx.site.zeros(ctx.out.shape) if do is None else do.value
        of_lse = () if dlse is None else (dlse.value,)
        grads = ctx.site.backward(slope, ctx.out, ctx.m, ctx.l, *of_lse)
        made = [
            FieldTensor.of(g, dtype, {}) if wanted and g is not None else None
            for g, wanted, dtype in zip(grads, ctx.wanted, ctx.dtypes, strict=True)
        ]
        return None, None, None, *made


def _on_cpu(x: Any) -> Any:
    """Devices in arguments; field elements live in main memory."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if isinstance(x, str) and x.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(x, (tuple, list)):
        return type(x)(_on_cpu(item) for item in x)
    if isinstance(x, dict):
        return {name: _on_cpu(item) for name, item in x.items()}
    return x


def _in(env: Env, x: Any) -> Any:
    return env[x] if isinstance(x, fx.Node) else x


def _cast_floats(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.to(dtype)
    return type(x)(_cast_floats(item, dtype) for item in x) if isinstance(x, (tuple, list)) else x
