"""Masks that are made outside of the graph inside a graph which reads them, made inside.

Activation checkpointing puts a layer into a graph of its own (the body), called by a higher-order
operator.  A mask that all layers share is made once before them and handed to each: inside it is a tensor
with an entry for every pair of a query and a key, of which nothing is known.  :func:`move_in` repeats in
the body the nodes that make it, down to what the caller was given itself.  Once a site has taken these as
its program, neither body nor caller builds the tensor any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from flashfuse.passes import dialect, nodes
from flashfuse.passes.rewrite import copy_graph_module

_MAX_NODES = 256


def movable(caller: fx.GraphModule, name: str) -> dict[str, fx.Node]:
    """Arguments that the body called ``name`` could make itself: the caller's nodes by placeholder.

    They are computed by operations of the vocabulary alone, without products, random numbers, gradients
    or memory that is written to, so that the body computes the same.
    """
    passed = _arguments(caller, name, _body(caller, name))
    found = {p.name: a for p, a in passed if isinstance(a, fx.Node) and _is_of_pairs(a) and _is_repeatable(a)}
    if not found or any(n.target is torch.amp.autocast_mode._enter_autocast for n in caller.graph.nodes):
        return {}
    memory = nodes.Memory(caller.graph)
    return {placeholder: argument for placeholder, argument in found.items() if _makers(argument, memory)}


def move_in(
    caller: fx.GraphModule, name: str, arguments: dict[str, fx.Node]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """A copy of the body that makes ``arguments`` itself, and what it is to be called with.

    Args:
        arguments: what :func:`movable` gave, or a part of it.
    """
    body = copy_graph_module(_body(caller, name))
    passed = _arguments(caller, name, body)
    inside = {argument: p for p, argument in passed if isinstance(argument, fx.Node)}
    memory = nodes.Memory(caller.graph)
    made = {n for argument in arguments.values() for n in _makers(argument, memory)}
    read = {i for n in made for i in n.all_input_nodes} - made - set(inside)
    with body.graph.inserting_before(next(n for n in body.graph.nodes if n.op != "placeholder")):
        for node in [n for n in caller.graph.nodes if n in read]:
            inside[node] = placeholder = body.graph.placeholder(node.name)
            placeholder.target = placeholder.name
            placeholder.meta = dict(node.meta)
            passed.append((placeholder, node))
        for node in [n for n in caller.graph.nodes if n in made]:
            inside[node] = body.graph.node_copy(node, lambda n: inside[n])
    for placeholder, argument in passed:
        if placeholder.name in arguments:
            placeholder.replace_all_uses_with(inside[argument])
            body.graph.erase_node(placeholder)
    body.graph.lint()
    body.recompile()
    return body, tuple(argument for placeholder, argument in passed if not placeholder._erased)


def call_with(caller: fx.GraphModule, name: str, arguments: Sequence[Any]) -> None:
    """Call the body called ``name`` with other ``arguments``; what only made the former ones goes."""
    call = _the_call(caller, name)
    assert call is not None
    former = [argument for _, argument in _arguments(caller, name, _body(caller, name))]
    call.args = (*call.args[: len(call.args) - len(former)], *arguments)
    pending = [n for n in former if isinstance(n, fx.Node)]
    while pending:
        node = pending.pop()
        if (
            not node._erased
            and not node.users
            and dialect.read(node) is not None
            and not dialect.writes(node)
        ):
            pending += node.all_input_nodes
            caller.graph.erase_node(node)
    caller.recompile()


def _body(caller: fx.GraphModule, name: str) -> fx.GraphModule:
    body = caller.get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    return body


def _arguments(caller: fx.GraphModule, name: str, body: fx.GraphModule) -> list[tuple[fx.Node, Any]]:
    """Placeholders of ``body``, the one called ``name`` or a copy, and what they are called with."""
    call = _the_call(caller, name)
    placeholders = body.graph.find_nodes(op="placeholder")
    return list(zip(placeholders, call.args[-len(placeholders) :], strict=True)) if call is not None else []


def _the_call(caller: fx.GraphModule, name: str) -> fx.Node | None:
    """The only call of a body, where it is called for checkpointing and once."""
    users = [u for n in caller.graph.find_nodes(op="get_attr", target=name) for u in n.users]
    if len(users) != 1 or users[0].target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    return users[0]


def _is_of_pairs(node: fx.Node) -> bool:
    """Whether the last two dimensions may be those of queries and keys."""
    example = nodes.tensor(node)
    return (
        example is not None and example.dim() >= 2 and 1 not in (nodes.shape(node)[-1], nodes.shape(node)[-2])
    )


def _makers(node: fx.Node, memory: nodes.Memory) -> set[fx.Node]:
    """The nodes that compute ``node`` from what its graph was given; none where they cannot be repeated."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        maker = pending.pop()
        if maker in found:
            continue
        if memory.written_after(maker):
            return set()
        if maker.op in ("placeholder", "get_attr"):
            continue
        if not _is_repeatable(maker) or maker in memory.without_gradient or len(found) == _MAX_NODES:
            return set()
        found.add(maker)
        pending += maker.all_input_nodes
    return found


def _is_repeatable(node: fx.Node) -> bool:
    op = dialect.read(node)
    if op is None or op.mutates or op.name in dialect.PRODUCTS | {"dropout", "embedding"}:
        return False
    example = nodes.value(node)
    return not (isinstance(example, torch.Tensor) and example.requires_grad)
