"""What makes two sites the same to a check: a key of plain values.

Two layers of a model share one proof only where the user's own nodes are alike, not where they were
lifted to the same program: a fault of the lift would show in one original and not in the other.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from flashfuse.passes import dialect, nodes
from flashfuse.passes.plan import Fuse
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.tables import Table, leaves

BESIDE = re.compile(r"[qk]_beside\d+$")
"""Names of the rows that are laid beside those of q and k."""
FACTOR = re.compile(r"weights_factor\d+$")
"""Names of the factors that the output or v takes."""


def cut_nodes(region: AttentionRegion) -> dict[fx.Node, str]:
    """The tensors that the site starts from, named ``q k v`` and as the program names its captures.

    What is laid beside q and k is ``q_beside1 k_beside1`` and so on, factors of the weights are
    ``weights_factor1`` and so on.  A tensor that plays two parts has the name of the first.  A table starts
    from the tensors it is made of, which keep their own names.
    """
    parts = [("q", region.q.node), ("k", region.k.node), ("v", region.v.node)]
    for n, (q, k) in enumerate(region.beside, 1):
        parts += [(f"q_beside{n}", q.node), (f"k_beside{n}", k.node)]
    captures = {name: region.scope.captures[name] for name in region.program.captures}
    parts += [(name, c) for name, c in captures.items() if isinstance(c, fx.Node)]
    parts += [(f"weights_factor{n}", node) for n, node in enumerate(region.factors, 1)]
    cut: dict[fx.Node, str] = {}
    for name, node in parts:
        cut.setdefault(node, name)
    for table in captures.values():
        for leaf in leaves(table):
            cut.setdefault(leaf, _other_name(leaf.name, {*captures, *cut.values()}))
    return cut


def _other_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def site_nodes(region: AttentionRegion) -> Iterator[tuple[fx.Node, bool]]:
    """The user's own nodes from the cut to the outputs, in graph order: ``(node, is_leaf)``.

    Leaves are the cut, inputs and constants, sizes and other numbers, and tensors of which only the sizes
    and the dtype are read (``zeros_like(hidden)``): what made them is not part of the site.
    """
    leaves: set[fx.Node] = set(cut_nodes(region))
    needed: set[fx.Node] = set()
    measured: set[fx.Node] = set()
    pending = [*region.outputs]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        if node in leaves or node.op in ("placeholder", "get_attr") or _is_number(node):
            leaves.add(node)
        else:
            only = _measured(node)
            measured.update(only)
            pending += [n for n in node.all_input_nodes if n not in only]
    leaves |= measured - needed
    for node in region.output.graph.nodes:
        if node in needed or node in measured:
            yield node, node in leaves


def _is_number(node: fx.Node) -> bool:
    return isinstance(nodes.value(node), (int, float, torch.SymInt, torch.SymFloat))


def _measured(node: fx.Node) -> list[fx.Node]:
    """The operands of which ``node`` reads nothing but the sizes and the dtype."""
    op = dialect.read(node)
    if op is None:
        return []
    if op.name.endswith("_like") or op.name.startswith("new_"):
        return node.all_input_nodes
    other = op.args.get("other")
    by_example = op.name in ("reshape_as", "expand_as", "type_as")
    return [other] if by_example and isinstance(other, fx.Node) and other is not op.input else []


def site_key(plan: Fuse) -> tuple[Hashable, ...]:
    """Equal for sites of which one check says all: original nodes, program, operands and kernels.

    The names of nodes and captures do not count; sizes are compared by their text, so no guard is
    added under dynamic shapes.
    """
    region, program = plan.region, plan.region.program
    is_leaf = dict(site_nodes(region))
    number: dict[fx.Node, int] = {}
    described: list[Hashable] = []
    for node in _by_use(region.outputs, is_leaf):
        call = ("leaf",) if is_leaf[node] else _call(node, number)
        described.append((*call, _value(nodes.value(node))))
        number[node] = len(number)
    # Where memory is written to, the order of the nodes has a meaning of its own.
    written = any(dialect.writes(node) for node, leaf in is_leaf.items() if not leaf)
    order = tuple(number[node] for node in is_leaf) if written else ()
    operands = [(number.get(o.node), tuple(map(str, o.index))) for o in region.operands]
    captures: list[Hashable] = []
    for capture in (region.scope.captures[name] for name in program.captures):
        known = capture.recipe.key(number.get) if isinstance(capture, Table) else number.get(capture)
        captures.append(known)
    ints = [_literal(nodes.value(region.scope.ints[name]), number) for name in program.ints]
    return (
        tuple(described), order, tuple(operands), tuple(captures), tuple(ints),
        _unnamed(program.text, (*program.captures, *program.ints)), tuple(map(str, region.out_index)),
        tuple((number.get(w.node), tuple(map(str, w.index)), w.dropped) for w in region.weights),
        tuple((number.get(r.node), tuple(map(str, r.index)), r.kind) for r in region.row_results),
        tuple((_literal(g.node, number), tuple(map(str, g.index)), g.onto, g.divides) for g in region.gates),
        str(region.shape), region.dropout_p, plan.selection.variant.name,
    )  # fmt: skip


def _by_use(outputs: Sequence[fx.Node], is_leaf: Mapping[fx.Node, bool]) -> dict[fx.Node, None]:
    """Every node after what it uses, in an order that does not depend on the rest of the graph."""
    ordered: dict[fx.Node, None] = {}
    pending = [(output, False) for output in reversed(outputs)]
    while pending:
        node, inputs_done = pending.pop()
        if node in ordered:
            continue
        if inputs_done or is_leaf[node]:
            ordered[node] = None
            continue
        pending.append((node, True))
        pending += [(n, False) for n in reversed(node.all_input_nodes)]
    return ordered


def _unnamed(text: str, names: tuple[str, ...]) -> str:
    """``text`` with its names numbered."""
    numbers = {name: f"@{i}" for i, name in enumerate(names)}
    return re.sub(r"\b[A-Za-z_]\w*", lambda found: numbers.get(found[0], found[0]), text)


def _call(node: fx.Node, number: dict[fx.Node, int]) -> tuple[Hashable, ...]:
    target: Hashable = node.target
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        module = owner.get_submodule(str(node.target))
        target = (type(module), repr(module), module.training)
    return node.op, target, _literal(node.args, number), _literal(node.kwargs, number)


def _literal(x: Any, number: dict[fx.Node, int]) -> Hashable:
    """An argument as a value that is equal only to itself: 0.0 is not −0.0, nor 1 True."""
    if isinstance(x, fx.Node):
        return "node", number[x]
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *(_literal(item, number) for item in x))
    if isinstance(x, dict):
        return ("dict", *((name, _literal(item, number)) for name, item in sorted(x.items())))
    if isinstance(x, slice):
        return ("slice", *(_literal(item, number) for item in (x.start, x.stop, x.step)))
    return type(x).__name__, str(x) if isinstance(x, (torch.SymInt, torch.SymFloat)) else repr(x)


def _value(example: Any) -> Hashable:
    if isinstance(example, torch.Tensor):
        strides = example.stride() if example.layout == torch.strided else ()
        sizes = (*map(str, example.shape), "/", *map(str, strides))
        return str(example.dtype), str(example.device), sizes
    if isinstance(example, (tuple, list)):
        return tuple(map(_value, example))
    return str(example)
