"""What a fused attention site computes: the contract between the passes and the kernels."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from flashfuse.kernels.expr import (
    INDEX_VARS,
    LENGTHS,
    ZERO,
    Expr,
    S,
    contains,
    is_bool,
    parse,
    truth,
    variables,
    walk,
)

DeadRows = Literal["none", "uniform", "uniform_s", "mean", "nan", "nan_s", "nan_all", "zero"]
UNIFORM: tuple[DeadRows, ...] = ("uniform", "uniform_s")
"""Dead rows whose gradients are those of equal scores."""
AVERAGING: tuple[DeadRows, ...] = (*UNIFORM, "mean")
"""Dead rows whose output is the average of v."""
NAN: tuple[DeadRows, ...] = ("nan", "nan_s", "nan_all")
"""Dead rows whose output is NaN."""
REACHING: tuple[DeadRows, ...] = (*UNIFORM, "nan_s", "nan_all")
"""Dead rows of which a gradient reaches the scores."""
SCORES_ONLY: tuple[DeadRows, ...] = ("uniform_s", "nan_s")
"""Those of them of which none reaches the captures."""

_RESERVED = {"s", *INDEX_VARS, *LENGTHS}


@dataclass(frozen=True)
class Reason:
    """Why something was not done: a stable ``code``, a sentence, the user's line, and what to do."""

    code: str
    message: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one site; integers, or symbolic sizes under dynamic shapes."""

    batch: Any
    num_q_heads: Any
    num_kv_heads: Any
    q_len: Any
    kv_len: Any
    head_dim: Any
    v_head_dim: Any
    dtype: torch.dtype

    @property
    def gqa_group(self) -> Any:
        """Query heads that share one key/value head."""
        return self.num_q_heads // self.num_kv_heads

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kv = f"H_kv{self.num_kv_heads} " if str(self.num_kv_heads) != str(self.num_q_heads) else ""
        dv = f" Dv{self.v_head_dim}" if str(self.v_head_dim) != str(self.head_dim) else ""
        lengths = f"Sq{self.q_len} Skv{self.kv_len}"
        return f"B{self.batch} H{self.num_q_heads} {kv}{lengths} D{self.head_dim}{dv} {dtype}"


@dataclass(frozen=True)
class ScoreProgram:
    """The scalar program of one site.

    .. math::
        S = \\text{score}(q_i \\cdot k_j, b, h, i, j), \\qquad
        P_{ij} = \\frac{\\exp S_{ij}}{\\exp \\text{sink}(b, h, i) + \\sum_j \\exp S_{ij}}
        \\text{ over the } j \\text{ with mask}(b, h, i, j)

    Without a sink its term is absent and P is a softmax.

    Text form: ``score [where mask] [sink logit] [else dead_rows]``, for example
    ``s*0.125 + bias[h, kv - q] where kv <= q and pad[b, kv] else mean`` or
    ``s*0.125 where kv <= q sink sinks[h]``.

    Attributes:
        score: the score; real-valued.  Never −inf: what is masked is said by ``mask``.  Indices of what it
            loads lie inside for every pair, also where the mask forbids it.
        mask: true = attend; ``None`` = every key.
        dead_rows: what a row with no key allowed gives.  A row can also be dead without a mask, where
            a captured float tensor holds −inf.  With a sink a row is dead only if the sink is −inf as
            well: any other sink has all the weight then, and the row gives 0.

            ============  =======================================  ==================================
            ``none``      proved not to happen
            ``uniform``   average of v over *all* keys: a finite   gradients as of equal scores, to
                          minimum is added to the scores           q, k, v and the captures
            ``uniform_s`` the same, where the captures are masked  gradients to q, k and v only
                          before they are added
            ``mean``      the same, where the scores are replaced  gradient to v only
                          by the minimum
            ``nan``       NaN: the scores are replaced by −inf     NaN to v, 0 to q, k and the captures
            ``nan_all``   NaN: −inf is added to the scores         NaN to its row of q, to every row of k
                                                                   and v of its head, and to what its
                                                                   scores load of the captures
            ``nan_s``     the same, where the captures are masked  NaN to q, k and v only
                          before they are added
            ``zero``      0: SDPA, ``_safe_softmax``               0
            ============  =======================================  ==================================
            Where −inf comes with a captured float tensor the original adds it, so that its gradients are
            as under ``nan_all``; those of ``nan`` are not NaN there, and out and dv are.  A sink has a
            gradient of 0 in a dead row.

        sink: a logit that only the sum sees, over ``b``, ``h``, ``q`` and captures.
    """

    score: Expr
    mask: Expr | None = None
    dead_rows: DeadRows = "none"
    sink: Expr | None = None

    def __hash__(self) -> int:
        # Programs are looked up at every call.
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.score, self.mask, self.dead_rows, self.sink))

    @functools.cached_property
    def captures(self) -> tuple[str, ...]:
        """Names of the captured tensors, in the order of their first appearance in the text."""
        return self._names("load")

    @functools.cached_property
    def differentiable(self) -> frozenset[str]:
        """Names of the captures that score or sink have a derivative in: not those of conditions only."""
        of_sink = frozenset() if self.sink is None else differentiable_loads(self.sink)
        return differentiable_loads(self.score) | of_sink

    @property
    def parts(self) -> tuple[Expr, ...]:
        """Score, mask and sink, as far as there are any."""
        return tuple(e for e in (self.score, self.mask, self.sink) if e is not None)

    @functools.cached_property
    def ints(self) -> tuple[str, ...]:
        """Names of the captured integers, in the order of their first appearance in the text."""
        return self._names("var")

    def _names(self, kind: str) -> tuple[str, ...]:
        nodes = [n for e in self.parts for n in walk(e)]
        found = {n.args[0] for n in nodes if n.op == kind} - _RESERVED
        text = self.text
        return tuple(sorted(found, key=lambda name: re.search(rf"\b{name}\b", text).start()))  # type: ignore[union-attr]

    @functools.cached_property
    def text(self) -> str:
        where = "" if self.mask is None else f" where {self.mask}"
        sink = "" if self.sink is None else f" sink {self.sink}"
        tail = "" if self.dead_rows == "none" else f" else {self.dead_rows}"
        return f"{self.score}{where}{sink}{tail}"

    def __str__(self) -> str:
        return self.text

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> ScoreProgram:
        """The program that ``text`` spells.

        Raises:
            ValueError: not a program; the message says which part was not understood.
        """
        body, has_else, dead = text.partition(" else ")
        body, has_sink, logit = body.partition(" sink ")
        head, where, condition = body.partition(" where ")
        dead = dead.strip() if has_else else "none"
        if dead not in get_args(DeadRows):
            raise ValueError(
                f"expected dead rows of {', '.join(get_args(DeadRows))}, got {dead!r} in {text!r}"
            )
        mask = truth(parse(condition)) if where else None
        if mask is not None and contains(mask, S):
            raise ValueError(
                f"expected a mask over indices and captures, got one over the score: {condition!r}"
            )
        sink = parse(logit) if has_sink else None
        if sink is not None and {"s", "kv"} & variables(sink):
            raise ValueError(f"expected a sink over b, h, q and captures, got {logit!r}")
        return ScoreProgram(parse(head), mask, dead, sink)  # type: ignore[arg-type]

    @property
    def mask_program(self) -> ScoreProgram:
        """The mask alone: what a block map is built from."""
        return ScoreProgram(ZERO, self.mask)

    @functools.cached_property
    def mask_variables(self) -> frozenset[str]:
        """The variables that the mask depends on."""
        return frozenset(variables(self.mask)) if self.mask is not None else frozenset()


def conditions(mask: Expr | None) -> tuple[Expr, ...]:
    """What must all hold where ``mask`` does."""
    return () if mask is None else tuple(mask.operands) if mask.op == "and" else (mask,)


def differentiable_loads(e: Expr) -> frozenset[str]:
    """Names of the loads whose values ``e`` has a derivative in."""
    found: set[str] = set()
    pending = [e]
    while pending:
        e = pending.pop()
        if e.op == "load":
            found.add(e.args[0])
        elif e.op != "var" and not e.is_const and not is_bool(e):
            pending += e.args[1:] if e.op == "where" else e.args
    return frozenset(found)
