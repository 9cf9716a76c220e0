"""What approximate sites are checked against: the same graph with attention by definition.

The operator's program says what an approximate site computes, so its reference is that program with every
score materialised (``kernels/reference.py``), in the dtype of the model and in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.kernels import dispatch
from flashfuse.kernels import expr as E
from flashfuse.kernels.ops import OPERATORS, empty_bhsd
from flashfuse.kernels.reference import attention_reference, max_reference
from flashfuse.kernels.spec import ScoreProgram
from flashfuse.passes.rewrite import copy_graph_module


def by_definition(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a rewritten ``gm`` in which each fused site is attention by definition, on the same seeds."""
    copied = copy_graph_module(gm)
    for node in list(copied.graph.nodes):
        if node.target in OPERATORS:
            # Without the block maps, which could be wrong.
            node.target = _attention if node.target is OPERATORS[0] else _attention_and_max
            node.args = (*node.args[:5], *node.args[6:])
        elif node.target is torch.ops.flashfuse.attention_weights.default:
            node.target = _weights
    for node in reversed(list(copied.graph.nodes)):
        if node.target is torch.ops.flashfuse.block_map.default:
            for part in list(node.users):
                copied.graph.erase_node(part)
            copied.graph.erase_node(node)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, by_definition(child))
    copied.recompile()
    return copied


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """``flashfuse::attention`` without block maps, in the operator's layout."""
    parsed = _in_dtype(program, q.dtype)
    keep = None
    if dropout_p and seed is not None:
        sizes = (*q.shape[:3], k.shape[2])
        keep = dispatch.implementation(variant).dropout_mask(seed, dropout_p, sizes)
    rate = dropout_p if keep is not None else 0.0
    out, lse = attention_reference(q, k, v, captures, ints, parsed, rate, keep)
    return empty_bhsd(q, out.shape).copy_(out), lse


def _attention_and_max(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``flashfuse::attention_and_max`` likewise."""
    captures, ints, _, program = args[:4]
    highest = max_reference(q, k, captures, ints, _in_dtype(program, q.dtype)).detach()
    return *_attention(q, k, v, *args), highest


def _weights(
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
    dtype: torch.dtype,
) -> Tensor:
    """``flashfuse::attention_weights``: attention to the rows of the identity."""
    identity = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    out, _ = _attention(q, k, identity, captures, ints, seed, program, dropout_p, variant)
    return out.to(dtype).contiguous()


@functools.lru_cache(maxsize=1024)
def _in_dtype(text: str, dtype: torch.dtype) -> ScoreProgram:
    """The program; in float64 with float64's own minimum, which absorbs as smaller ones did."""
    program = ScoreProgram.parse(text)
    if dtype != torch.float64:
        return program
    least = {torch.finfo(d).min for d in (torch.float32, torch.bfloat16, torch.float16)}

    def promote(node: E.Expr) -> E.Expr | None:
        is_least = node.is_const and isinstance(node.value, float) and node.value in least
        return E.const(torch.finfo(torch.float64).min) if is_least else None

    return dataclasses.replace(program, score=E.substitute(program.score, promote))
