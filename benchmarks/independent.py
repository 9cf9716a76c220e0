"""Attention sites of a graph, counted without any code of the passes: what the sweep measures reach against.

A site is a softmax that a product of two activations feeds, through anything that is not another product,
and that feeds a product; or a call of ``scaled_dot_product_attention`` or ``multi_head_attention_forward``.
What reaches no result of the graph, such as the last layer of a branch that nothing reads, is no site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

_PRODUCTS = {"matmul", "bmm", "mm", "einsum", "baddbmm", "__matmul__"}
_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax"}
_CALLS = {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"}
_LAYERS = {
    "linear", "conv1d", "conv2d", "conv3d", "addmm", "layer_norm", "rms_norm", "batch_norm", "group_norm",
    "embedding", "native_layer_norm", "convolution", "topk", "argmax", "argsort", "sort", "index_add",
}  # fmt: skip
"""What ends the way from a product to a softmax, or from a softmax to a product."""


def attention_sites(gm: fx.GraphModule) -> list[str]:
    """Names of the softmaxes and calls that are attention, in graph order, those of subgraphs included."""
    found = []
    results = [n for n in gm.graph.nodes if n.op == "output" or _writes(n)]
    used = set(_ancestors(results))
    for node in gm.graph.nodes:
        name = _name(node)
        site = name in _CALLS or (name in _SOFTMAXES and _from_product(node) and _to_product(node))
        if site and node in used:
            found.append(node.name)
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            found += attention_sites(child)
    return found


def _writes(node: fx.Node) -> bool:
    """Whether ``node`` changes a tensor in place, as it may be one that is returned."""
    name = _name(node)
    return (
        name in ("setitem", "copy_")
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name != "__invert__")
        or "out" in node.kwargs
    )


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _walk(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Nodes reached, past anything but products and layers; those are yielded and not passed."""
    pending, seen = list(start), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if _name(node) not in _PRODUCTS | _LAYERS | _SOFTMAXES | _CALLS:
            pending += step(node)


def _from_product(softmax: fx.Node) -> bool:
    return any(
        _name(node) in _PRODUCTS and all(_is_activation(n) for n in _factors(node))
        for node in _walk(softmax.all_input_nodes[:1], lambda n: n.all_input_nodes)
    )


def _to_product(softmax: fx.Node) -> bool:
    return any(_name(node) in _PRODUCTS for node in _walk(softmax.users, lambda n: n.users))


def _factors(product: fx.Node) -> list[fx.Node]:
    inputs = [n for n in product.all_input_nodes if isinstance(_value(n), torch.Tensor)]
    return inputs[1:] if _name(product) == "baddbmm" and len(inputs) == 3 else inputs


def _is_activation(node: fx.Node) -> bool:
    """Whether something else than a parameter is behind ``node``."""
    return any(n.op == "placeholder" and "_parameters_" not in n.name for n in _ancestors([node]))


def _ancestors(start: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """``start`` and all that it is made from."""
    pending, seen = list(start), set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += node.all_input_nodes


def _value(node: fx.Node) -> object:
    return node.meta.get("example_value", node.meta.get("val"))
