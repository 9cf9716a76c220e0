"""What is known of a node before anything runs: value, sizes, source line, liveness, aliases."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.passes import dialect

Size = int | sympy.Expr


def value(node: Any) -> Any:
    """The example (fake) value of a node; a literal is its own value."""
    if not isinstance(node, fx.Node):
        return node
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    return None


def tensor(node: Any) -> torch.Tensor | None:
    """The example tensor of a node, or ``None`` where it is no dense tensor."""
    example = value(node)
    if isinstance(example, torch.Tensor) and example.layout == torch.strided and not example.is_nested:
        return example
    return None


def size_of(size: Any) -> Size:
    """A size as an integer or, under dynamic shapes, as the sympy expression of its symbol."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def shape(node: fx.Node) -> tuple[Size, ...]:
    example = tensor(node)
    assert example is not None
    return tuple(size_of(s) for s in example.shape)


def same(a: Size, b: Size) -> bool:
    """Equal by form; never adds a guard."""
    return bool(a == b) if isinstance(a, int) or isinstance(b, int) else bool(sympy.expand(a - b) == 0)


def product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)')


def source(node: fx.Node) -> str:
    """``file:line in function: code`` of the user's line that made the node, or ``""``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, function, code = frames[-1]
    return f"{file}:{line} in {function}: {code.strip()}"


def live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an output or a side effect needs."""
    needed = [n for n in graph.nodes if n.op == "output" or n.is_impure() or dialect.writes(n)]
    seen: set[fx.Node] = set(needed)
    while needed:
        for operand in needed.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                needed.append(operand)
    return seen


class Memory:
    """Who shares memory with whom, and when it is written to.

    Conservative: every operation that may return a view is taken to do so.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        for node in graph.nodes:
            self._root[node] = self._origin(node)
            for written in dialect.writes(node):
                self._writes.setdefault(self._root[written], []).append(self.position[node])

    def _origin(self, node: fx.Node) -> fx.Node:
        written = dialect.writes(node)
        if written:
            return self._root[written[0]]
        op = dialect.read(node)
        if op is not None and op.name in dialect.VIEWS | dialect.CASTS | {"contiguous", "getitem", "index", "dropout"}:
            base = op.input
            if isinstance(base, fx.Node):
                return self._root[base]
        return node

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory ``node`` may be a view of."""
        return self._root[node]

    def written_between(self, node: fx.Node, end: fx.Node) -> bool:
        """True when the memory of ``node`` may be written to after it is made and before ``end``."""
        writes = self._writes.get(self._root[node], ())
        return any(self.position[node] < w < self.position[end] for w in writes)

    def written_after(self, node: fx.Node) -> bool:
        return any(self.position[node] < w for w in self._writes.get(self._root[node], ()))
