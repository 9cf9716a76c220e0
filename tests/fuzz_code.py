"""Random code, line by line: the text of a function of tensors, and what each of its tensors is.

A :class:`Writer` draws choices and writes lines; a :class:`Value` is a tensor of the text with one
letter for each dimension, so that every spelling knows what it may do next.  What comes out is a
:class:`Program`: code that a person can run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

ONE = "1"
"""The letter of a dimension of size 1 that broadcasts."""


@dataclass(frozen=True)
class Program:
    """A function ``attention`` as text, and the expressions of its arguments.

    Attributes:
        capture: ``symbolic``, ``dynamo`` or ``export``.
    """

    lines: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    capture: str

    @property
    def source(self) -> str:
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"def attention({', '.join(name for name, _ in self.inputs)}):\n{body}"

    @property
    def has_dropout(self) -> bool:
        return "dropout" in self.source

    @property
    def name(self) -> str:
        """Short, and the same in every process."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def function(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
        exec(compile(self.source, "<fuzz>", "exec"), scope)
        return scope["attention"]

    def arguments(self, seed: int = 0) -> list[Any]:
        torch.manual_seed(seed)
        return [eval(text, {"torch": torch}) for _, text in self.inputs]

    def __str__(self) -> str:
        made = "".join(f"    {text},  # {name}\n" for name, text in self.inputs)
        head = "import math\n\nimport torch\nimport torch.nn.functional as F\n\n\n"
        arguments = f"torch.manual_seed(0)\ninputs = [\n{made}]  # captured by {self.capture}\n"
        return f"{head}{self.source}\n\n{arguments}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows an example."""
        printer.text(f"Program:\n\n{self}")


@dataclass(frozen=True)
class Value:
    """A tensor of the text: its name, a letter for each dimension, its dtype."""

    name: str
    axes: str
    dtype: torch.dtype

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    def __str__(self) -> str:
        return self.name


class Writer:
    """Draws choices, writes lines.  Choices are ordered: the first is the plainest."""

    def __init__(self, draw: Callable[[Any], Any], capture: str) -> None:
        self._draw = draw
        self.capture = capture
        self.lines: list[str] = []
        self.inputs: list[tuple[str, str]] = []
        self.sizes: dict[str, int] = {ONE: 1}
        self._taken: dict[str, int] = {}

    # --- choices ------------------------------------------------------------------------------

    def pick(self, *choices: Any) -> Any:
        return self._draw(st.sampled_from(choices)) if len(choices) > 1 else choices[0]

    def chance(self, percent: int) -> bool:
        return self._draw(st.integers(0, 99)) >= 100 - percent

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def shuffled(self, axes: str) -> str:
        return "".join(self._draw(st.permutations(list(axes))))

    def some(self, axes: Iterable[str]) -> str:
        return "".join(axis for axis in axes if self.chance(50))

    # --- text ---------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self._taken[stem] = count = self._taken.get(stem, 0) + 1
        return stem if count == 1 else f"{stem}_{count}"

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, stem: str, expression: str, axes: str, dtype: torch.dtype) -> Value:
        name = self.fresh(stem)
        self.line(f"{name} = {expression}")
        return Value(name, axes, dtype)

    def same(self, x: Value, expression: str, stem: str = "") -> Value:
        """``expression`` under a name of its own; of the shape and dtype of ``x``."""
        return self.let(stem or x.name.rstrip("_0123456789"), expression, x.axes, x.dtype)

    def argument(self, stem: str, expression: str, axes: str, dtype: torch.dtype) -> Value:
        name = self.fresh(stem)
        self.inputs.append((name, expression))
        return Value(name, axes, dtype)

    def normal(self, stem: str, axes: str, dtype: torch.dtype) -> Value:
        """A float argument; now and then its memory is in another order."""
        order = self.shuffled(axes) if len(set(axes)) == len(axes) and self.chance(25) else axes
        text = f"torch.randn(({self.shape(order)})){self.cast(dtype)}{self.permutation(order, axes)}"
        return self.argument(stem, text, axes, dtype)

    # --- shapes -------------------------------------------------------------------------------

    def size(self, axes: str) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def shape(self, axes: str) -> str:
        """The sizes, separated by commas."""
        return ", ".join(str(self.sizes[a]) for a in axes)

    def cast(self, dtype: torch.dtype) -> str:
        return "" if dtype == torch.float32 else f".to({dtype})"

    def permutation(self, axes: str, wanted: str) -> str:
        if axes == wanted:
            return ""
        order = [axes.index(a) for a in wanted]
        moved = [i for i, o in enumerate(order) if i != o]
        if len(moved) == 2 and self.chance(70):
            i, j = moved
            back = self.pick(0, len(order))
            return f".transpose({i - back}, {j - back})"
        return f".permute({', '.join(map(str, order))})"

    def ordered(self, x: Value, wanted: str) -> Value:
        """``x`` with its dimensions in the order of ``wanted``."""
        return (
            x
            if x.axes == wanted
            else replace(self.same(x, x.name + self.permutation(x.axes, wanted)), axes=wanted)
        )

    def to(self, x: Value, dtype: torch.dtype) -> Value:
        if x.dtype == dtype:
            return x
        methods = {torch.float32: ".float()", torch.bfloat16: ".bfloat16()", torch.float16: ".half()"}
        text = self.pick(f".to({dtype})", methods.get(dtype, f".to(dtype={dtype})"))
        return replace(self.same(x, f"{x}{text}"), dtype=dtype)

    def placed(self, x: Value, axes: str) -> str:
        """The expression of ``x`` with dimensions of size 1 where ``axes`` has letters that it lacks."""
        own = "".join(a for a in axes if a in x.axes)
        text = x.name + self.permutation(x.axes, own)
        missing = [i for i, a in enumerate(axes) if a not in own]
        leading = 0
        while leading in missing and self.chance(60):
            leading += 1
        kept = range(leading, len(axes))
        if all(i not in missing for i in kept):
            return text
        how = self.pick("index", "view", "unsqueeze")
        if how == "index":
            return f"{text}[{', '.join('None' if i in missing else ':' for i in kept)}]"
        if how == "view" and own:
            call = "view" if own == x.axes else "reshape"
            return (
                f"{text}.{call}({', '.join('1' if i in missing else str(self.sizes[axes[i]]) for i in kept)})"
            )
        return text + "".join(f".unsqueeze({i - leading})" for i in kept if i in missing)


def promoted(*values: Value) -> torch.dtype:
    """The dtype of elementwise arithmetic of ``values``; tensors without dimensions do not widen."""
    dtype = values[0].dtype
    for value in values[1:]:
        if value.axes or not value.floating:
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def broadcast(*shapes: str) -> str:
    """The letters of the result where tensors of these dimensions meet, aligned to the right."""
    rank = max(map(len, shapes))
    padded = [ONE * (rank - len(s)) + s for s in shapes]
    return "".join(next((a for a in column if a != ONE), ONE) for column in zip(*padded, strict=True))


def without(axes: str, dropped: Sequence[str]) -> str:
    return "".join(a for a in axes if a not in dropped)
