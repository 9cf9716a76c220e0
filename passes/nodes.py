"""What is known of a node before anything runs: value, sizes, source line, liveness, aliases."""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from flashfuse.passes import dialect

Size: TypeAlias = "int | sympy.Expr"


def value(node: Any) -> Any:
    """The example (fake) value of a node; a literal is its own value."""
    if not isinstance(node, fx.Node):
        return node
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    return None


def constant(x: Any) -> Any:
    """A float argument as a plain number.

    Dynamo makes float attributes symbolic under ``dynamic=True``; reading one adds a guard on it.
    """
    example = value(x)
    return float(example) if isinstance(example, torch.SymFloat) else example


def tensor(node: Any) -> torch.Tensor | None:
    """The example tensor of a node, or ``None`` where it is no dense tensor."""
    example = value(node)
    if isinstance(example, torch.Tensor) and example.layout == torch.strided and not example.is_nested:
        return example
    return None


def is_parameter(node: fx.Node) -> bool:
    """True for a parameter or buffer of the model, read directly or through views and casts."""
    while True:
        op = dialect.read(node)
        if op is None or op.name not in dialect.VIEWS | dialect.CASTS or not isinstance(op.input, fx.Node):
            return node.op == "get_attr" or isinstance(value(node), torch.nn.Parameter)
        node = op.input


def folded_rank(node: fx.Node) -> int:
    """Dimensions of a tensor, or of what was folded into its 2 dimensions: rows of a projection."""
    rank = len(shape(node))
    op = dialect.read(node)
    if rank == 2 and op is not None and op.name in ("view", "reshape", "flatten"):
        return max(rank, len(shape(op.input)))
    return rank


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


def unify(a: Any, b: Any) -> None:
    """Make two sizes that an operation needs to be equal one symbol, by a guard where there are two.

    Dynamo gives a cache of keys and one of values lengths of their own, and SDPA does not compare them.
    """
    if not isinstance(a, torch.SymInt) or not isinstance(b, torch.SymInt) or same(size_of(a), size_of(b)):
        return
    try:
        bool(a == b)
    except Exception:
        # A size that depends on data: nothing can be said when the graph is compiled.
        return


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


def between(start: Container[fx.Node], end: fx.Node) -> set[fx.Node]:
    """``end`` and the nodes that it is computed by from those in ``start``, which are not among them."""
    pending, seen = [end], {end}
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand not in seen and operand not in start:
                seen.add(operand)
                pending.append(operand)
    return seen


def name_in_place_results(graph: fx.Graph) -> None:
    """Let later readers of a tensor that was updated in place read the update's result.

    ``x.masked_fill_(m, c); f(x)`` becomes ``y = x.masked_fill_(m, c); f(y)``: the same object under a
    name that says which value it holds, so that data flow is what the graph's edges say.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        op = dialect.read(node)
        if op is None or not op.mutates or dialect.writes(node) != [op.input]:
            continue
        for user in list(op.input.users):
            if position[user] > position[node]:
                user.replace_input_with(op.input, node)


_MAY_ALIAS = dialect.VIEWS | dialect.CASTS | {"contiguous", "getitem", "index", "dropout"}


def written_to(node: fx.Node) -> bool:
    """Whether something writes to ``node``, itself or through a view of it."""
    pending, seen = [node], {node}
    while pending:
        viewed = pending.pop()
        for user in viewed.users:
            if viewed in dialect.writes(user):
                return True
            if user not in seen and viewed in _bases(user):
                seen.add(user)
                pending.append(user)
    return False


class Memory:
    """Who shares memory with whom, and when it is written to.

    Conservative: every operation that may return a view is taken to do so, and so is every tensor
    whose example value shares its storage with another's.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        # What the lifts of this graph found out, for each other.
        self.condensed: dict[Any, Any] = {}
        first: dict[int, fx.Node] = {}
        for node in graph.nodes:
            self._parent[node] = node
            storage = _storage(node)
            others = [*_bases(node), *([first.setdefault(storage, node)] if storage is not None else [])]
            for other in others:
                self._parent[self._root(node)] = self._root(other)
        for node in graph.nodes:
            self._members.setdefault(self._root(node), []).append(node)
            for written in dialect.writes(node):
                self._writes.setdefault(self._root(written), []).append(node)

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _writes_after(self, node: fx.Node) -> list[fx.Node]:
        return [w for w in self._writes.get(self._root(node), ()) if self.position[w] > self.position[node]]

    def written_after(self, node: fx.Node) -> bool:
        """Whether anything later writes to the memory of ``node``."""
        return bool(self._writes_after(node))

    @functools.cached_property
    def opaque(self) -> frozenset[fx.Node]:
        """Nodes whose memory is later written to by something outside the vocabulary.

        What they hold when read is not what the operation that made them computed.
        """
        strange = {r: [w for w in ws if dialect.read(w) is None] for r, ws in self._writes.items()}
        return frozenset(
            n
            for root, writes in strange.items()
            for n in self._members[root]
            if any(self.position[w] > self.position[n] for w in writes)
        )

    @functools.cached_property
    def without_gradient(self) -> frozenset[fx.Node]:
        """Nodes that the graph computes under ``no_grad`` from floating-point tensors."""
        found, enabled = set(), True
        for node in self.position:
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif not enabled and any(
                t is not None and t.is_floating_point() for t in map(tensor, node.all_input_nodes)
            ):
                found.add(node)
        return frozenset(found)

    def barriers(self, end: fx.Node) -> frozenset[fx.Node]:
        """Nodes that a site ending in ``end`` must not look through."""
        return self.opaque if end in self.without_gradient else self._all_barriers

    @functools.cached_property
    def _all_barriers(self) -> frozenset[fx.Node]:
        return self.opaque | self.without_gradient

    def loads_change(self, node: fx.Node, end: fx.Node, readers: Container[fx.Node]) -> bool:
        """True when reading ``node`` at ``end`` may differ from reading it where ``readers`` do."""
        writes = [w for w in self._writes_after(node) if self.position[w] < self.position[end]]
        return bool(writes) and any(
            read < self.position[w] for read in self._reads(node, end, readers) for w in writes
        )

    def _reads(self, node: fx.Node, end: fx.Node, readers: Container[fx.Node]) -> list[int]:
        """Where ``readers`` read values of ``node``, by itself or through views of it."""
        found, pending, seen = [], [node], {node}
        while pending:
            viewed = pending.pop()
            for user in viewed.users:
                if self.position[user] > self.position[end] or _overwrites(user, viewed):
                    continue
                if not _is_view(user, viewed):
                    if user in readers:
                        found.append(self.position[user])
                elif user not in seen:
                    seen.add(user)
                    pending.append(user)
        return found

    def meaning_changes(self, node: fx.Node, end: fx.Node, visited: Container[fx.Node]) -> bool:
        """True when ``node``, read as the value its operation computed, may not be that value.

        In-place operations are read as their functional meaning.  That is right where the lift went
        through the operation itself and nobody uses an older name of the memory afterwards.
        """
        for w in self._writes_after(node):
            if self.position[w] >= self.position[end]:
                continue
            older = [x for x in self._members[self._root(node)] if self.position[x] < self.position[w]]
            stale = any(self.position[u] > self.position[w] for x in older for u in x.users)
            if w not in visited or stale:
                return True
        return False


_MAY_COPY = {"reshape", "reshape_as", "flatten", "index"}


def _is_view(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is another name for memory of ``node``, and reads nothing of it."""
    op = dialect.read(user)
    if op is None or op.mutates or op.args.get("input") is not node or op.name in _MAY_COPY:
        return False
    if op.name == "getitem":
        items = op.args["index"] if isinstance(op.args["index"], tuple) else (op.args["index"],)
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in items)
    return op.name in dialect.VIEWS


def _overwrites(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` writes to ``node`` without reading what was there."""
    target = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    plain = target.partition(".")[0].rstrip("_") in ("copy", "fill", "zero", "setitem")
    return plain and dialect.writes(user) == [node] and list(user.args).count(node) == 1


def _storage(node: fx.Node) -> int | None:
    example = tensor(node)
    if example is None:
        return None
    try:
        return example.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _bases(node: fx.Node) -> list[fx.Node]:
    """The arguments that the result of ``node`` may share memory with, by its operation."""
    written = dialect.writes(node)
    if written:
        return written
    op = dialect.read(node)
    if op is not None and op.name in _MAY_ALIAS and isinstance(op.input, fx.Node):
        return [op.input]
    return []
