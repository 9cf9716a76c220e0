"""Tensors that the rewrite is to build: recipes of calls on nodes of the graph.

A capture of a site is a node of the graph, or a :class:`Table`: a tensor that no node holds, made by
the user's own operations on fewer elements (``condense.py``).  A recipe is a tree of plain values, so
equal recipes are one table, whichever layer asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import fx

from flashfuse.passes import nodes
from flashfuse.passes.nodes import Size


class Call:
    """``target(*args, **kwargs)``; arguments are nodes, other calls, lengths, numbers, dtypes, tuples.

    Calls are equal where they would compute the same: 1, 1.0 and True are different arguments.
    """

    __slots__ = ("_hash", "_key", "args", "kwargs", "target")

    def __init__(self, target: Any, *args: Any, **kwargs: Any) -> None:
        self.target, self.args, self.kwargs = target, args, kwargs
        self._key = (target, _typed(args), _typed(kwargs))
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Call) and self._hash == other._hash and self._key == other._key

    def key(self, number: Callable[[fx.Node], Any]) -> Any:
        """A value that is equal for recipes that differ in their nodes only by ``number``."""
        return str(self.target), _numbered(self.args, number), _numbered(self.kwargs, number)


@dataclass(frozen=True)
class Length:
    """A symbolic size as an argument."""

    size: Size


@dataclass(frozen=True)
class Table:
    """A tensor of ``shape`` that ``recipe`` makes."""

    recipe: Call
    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device

    def mapped(self, mapping: Mapping[fx.Node, fx.Node]) -> Table:
        """The same table over other nodes."""
        recipe = _rebuilt(self.recipe, mapping, {})
        return Table(recipe, self.shape, self.dtype, self.device)


Capture = Union[fx.Node, Table]


def leaves(capture: Capture) -> dict[fx.Node, None]:
    """The nodes of the graph that a capture is made of."""
    if isinstance(capture, fx.Node):
        return {capture: None}
    return dict.fromkeys(_nodes(capture.recipe, set()))


def sizes_of(capture: Capture) -> tuple[Size, ...]:
    return nodes.shape(capture) if isinstance(capture, fx.Node) else capture.shape


def dtype_of(capture: Capture) -> torch.dtype:
    dtype: torch.dtype = nodes.value(capture).dtype if isinstance(capture, fx.Node) else capture.dtype
    return dtype


def device_of(capture: Capture) -> torch.device:
    device: torch.device = nodes.value(capture).device if isinstance(capture, fx.Node) else capture.device
    return device


def arguments(x: Any, replace: Callable[[Any], Any]) -> Any:
    """``x`` with every node, call and length in it replaced."""
    if isinstance(x, (fx.Node, Call, Length)):
        return replace(x)
    if isinstance(x, (tuple, list)):
        return type(x)(arguments(item, replace) for item in x)
    if isinstance(x, dict):
        return {name: arguments(item, replace) for name, item in x.items()}
    return x


def _typed(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *map(_typed, x))
    if isinstance(x, dict):
        return ("dict", *((name, _typed(item)) for name, item in sorted(x.items())))
    return x if isinstance(x, (fx.Node, Call, Length)) else (type(x).__name__, repr(x))


def _numbered(x: Any, number: Callable[[fx.Node], Any]) -> Any:
    if isinstance(x, fx.Node):
        return "node", number(x)
    if isinstance(x, Call):
        return x.key(number)
    if isinstance(x, Length):
        return "length", str(x.size)
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *(_numbered(item, number) for item in x))
    if isinstance(x, dict):
        return ("dict", *((name, _numbered(item, number)) for name, item in sorted(x.items())))
    return type(x).__name__, repr(x)


def _nodes(call: Call, seen: set[Call]) -> Iterator[fx.Node]:
    if call in seen:
        return
    seen.add(call)
    found: list[Any] = []
    arguments((call.args, call.kwargs), found.append)
    for x in found:
        if isinstance(x, fx.Node):
            yield x
        elif isinstance(x, Call):
            yield from _nodes(x, seen)


def _rebuilt(call: Call, mapping: Mapping[fx.Node, fx.Node], memo: dict[Call, Call]) -> Call:
    def replace(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return mapping[x]
        return _rebuilt(x, mapping, memo) if isinstance(x, Call) else x

    if call not in memo:
        memo[call] = Call(call.target, *arguments(call.args, replace), **arguments(call.kwargs, replace))
    return memo[call]
