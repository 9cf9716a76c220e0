"""What FlashFuse did to a graph: values that print, and turn into JSON.

Field names of :class:`Report` and :class:`SiteReport` are public.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flashfuse.kernels.spec import AVERAGING, AttentionShape, Reason
from flashfuse.passes.plan import Approximation, Cost
from flashfuse.proof.certificate import Certificate

__all__ = [
    "Approximation",
    "AttentionShape",
    "Certificate",
    "CheckItem",
    "Cost",
    "ModelCheck",
    "Reason",
    "Report",
    "SiteCheck",
    "SiteReport",
]

WIDTH = 110
"""Columns of ``str(report)``."""

MAX_LISTED = 8
"""Rows of a list of failures before the rest is only counted."""


@dataclass(frozen=True)
class CheckItem:
    """One compared tensor: errors are against the float64 reference, ``ok`` is ours ≤ limit."""

    name: str
    error_ours: float
    error_original: float
    limit: float
    ok: bool
    note: str = ""

    @property
    def share(self) -> float:
        """Our error as a fraction of the limit; infinite where something other than size failed."""
        if self.ok:
            return self.error_ours / self.limit if self.limit > 0 and math.isfinite(self.error_ours) else 0.0
        return self.error_ours / self.limit if 0 < self.limit < self.error_ours else math.inf


@dataclass(frozen=True)
class SiteCheck:
    """The original site against its replacement.

    Attributes:
        ok: nothing that ran found a difference.
        items: numbers on the real kernels, where they were asked for or there is no proof.
        proof: the certificate, ``None`` where there is none.
        not_proved: why there is no proof.
        not_compared: why there are no numbers although they were asked for.
    """

    ok: bool
    items: tuple[CheckItem, ...] = ()
    proof: Certificate | None = None
    not_proved: str = ""
    not_compared: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """The original model against the rewritten one.

    Attributes:
        ok: no difference in the whole model, nor at any site.
        items: outputs and gradients of the whole model.
        sites: the report of each site, with its check.
        notes: what has to be known to read the items.
        peak_bytes: the most memory that the verification held at once, above what was held before.
        proof_ms: time that the proofs took.
    """

    ok: bool
    items: tuple[CheckItem, ...] = ()
    sites: tuple[SiteReport, ...] = ()
    notes: tuple[str, ...] = ()
    peak_bytes: int | None = None
    proof_ms: float = 0.0

    def __str__(self) -> str:
        return plain_text(self)

    def __rich__(self) -> RenderableType:
        return Group(*_render_model_check(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        fields: dict[str, Any] = _plain(self)
        return fields


@dataclass(frozen=True)
class SiteReport:
    """One attention site: what it is, and what became of it.

    Attributes:
        program: the score, e.g. ``s*0.125 where kv <= q``; empty if it was not understood.
        mask: the condition of the program alone, ``""`` if every key is attended.
        dead_rows: what a row without any key gives: ``none``, ``uniform``, ``uniform_s``, ``mean``, ``nan``,
            ``nan_s``, ``nan_all`` or ``zero`` (see :class:`~flashfuse.kernels.spec.ScoreProgram`).
        source: the user's line.
        variant: the kernels that run it; empty for a site left alone.
        notes: assumptions that the rewrite rests on.
        loads_full: captures that hold something for every pair of a query and a key, [.., Sq, Skv], and that
            the graph builds.
        given_full: such captures that the model hands over: inputs, parameters and views of them.
        approximation: the pattern that was asked for, which is in ``program`` and ``mask`` but not in
            what was proved; ``None``: the site is exact.
    """

    name: str
    status: Literal["fused", "left"]
    reasons: tuple[Reason, ...] = ()
    program: str = ""
    mask: str = ""
    dead_rows: str = "none"
    shape: AttentionShape | None = None
    dropout_p: float = 0.0
    gqa_group: Any = 1
    source: str = ""
    cost: Cost | None = None
    variant: str = ""
    notes: tuple[str, ...] = ()
    check: SiteCheck | None = None
    loads_full: tuple[str, ...] = ()
    given_full: tuple[str, ...] = ()
    approximation: Approximation | None = None


@dataclass(frozen=True)
class Report:
    """What became of every attention site of one graph; times are in milliseconds."""

    sites: tuple[SiteReport, ...] = ()
    graph_name: str = ""
    num_nodes_before: int = 0
    num_nodes_after: int = 0
    warnings: tuple[str, ...] = ()
    pass_ms: float = 0.0
    proof_ms: float = 0.0
    numbers_ms: float = 0.0
    check: ModelCheck | None = None

    @property
    def num_sites(self) -> int:
        return len(self.sites)

    @property
    def num_fused(self) -> int:
        return sum(site.status == "fused" for site in self.sites)

    @property
    def num_proved(self) -> int:
        return sum(site.status == "fused" and _is_proved(site) for site in self.sites)

    @property
    def num_approximate(self) -> int:
        return sum(site.approximation is not None for site in self.sites)

    @property
    def ok(self) -> bool:
        """No check that ran failed."""
        checks = [self.check, *(site.check for site in self.sites)]
        return all(check.ok for check in checks if check is not None)

    @property
    def hbm_bytes(self) -> tuple[int, int] | None:
        """(before, after) of all fused sites, forward; ``None`` if a size is symbolic or unknown."""
        costs = [site.cost for site in self.sites if site.status == "fused"]
        pairs = [(c.hbm_bytes_before, c.hbm_bytes_after) for c in costs if c is not None]
        if not pairs or len(pairs) < len(costs) or not all(type(n) is int for pair in pairs for n in pair):
            return None
        return sum(before for before, _ in pairs), sum(after for _, after in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; symbolic sizes and non-finite numbers as strings."""
        hbm = self.hbm_bytes
        counts: dict[str, Any] = {
            "num_sites": self.num_sites,
            "num_fused": self.num_fused,
            "num_proved": self.num_proved,
            "num_approximate": self.num_approximate,
            "ok": self.ok,
            "hbm_bytes_before": hbm[0] if hbm else None,
            "hbm_bytes_after": hbm[1] if hbm else None,
        }
        fields: dict[str, Any] = _plain(self)
        return counts | fields

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as strict JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    def __str__(self) -> str:
        return plain_text(self)

    def __rich__(self) -> RenderableType:
        return Group(*_render(self))


# --- values ------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


def format_bytes(count: int) -> str:
    """``12.3 MB``; decimal units, as memory bandwidth is quoted."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def plain_text(what: RenderableType) -> str:
    """``what`` as text without colours, at a fixed width, without trailing blanks."""
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, force_terminal=False, highlight=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- pages -------------------------------------------------------------------------------------


def _render(report: Report) -> Iterable[RenderableType]:
    yield _headline(report)
    for warning in report.warnings:
        yield Text.assemble(("warning: ", "bold yellow"), warning)
    if report.num_approximate:
        are = "site is" if report.num_approximate == 1 else "sites are"
        yield Text(f"{report.num_approximate} {are} APPROXIMATE, as asked for", style="bold magenta")
    groups = _fold(report.sites)
    fused = [group for group in groups if group[0].status == "fused"]
    left = [group for group in groups if group[0].status == "left"]
    for title, style, shown in (("Fused", "green", fused), ("Left as it was", "yellow", left)):
        if shown:
            yield Text()
            yield Text(title, style="bold")
        for group in shown:
            shape = f"  {group[0].shape}" if group[0].shape is not None else ""
            yield Text.assemble("  ", (_names(group), style), shape)
            yield _table(_facts_of(group[0]))
    hbm = report.hbm_bytes
    if hbm is not None:
        ratio = f" ({hbm[0] / hbm[1]:.1f}× less)" if 0 < hbm[1] < hbm[0] else ""
        yield Text()
        yield Text(
            f"Memory traffic of the fused sites, forward: {format_bytes(hbm[0])} before, "
            f"{format_bytes(hbm[1])} after{ratio}"
        )
    yield from _render_checks(report)


def _headline(report: Report) -> Text:
    name = f"{report.graph_name}: " if report.graph_name not in ("", "GraphModule") else ""
    if not report.sites:
        return Text(f"{name}no attention found, {_count(report.num_nodes_before, 'graph node')} unchanged")
    nodes = f"{report.num_nodes_before} → {report.num_nodes_after} graph nodes"
    proved = f", {report.num_proved} proved" if any(map(_was_to_prove, report.sites)) else ""
    times = [f"passes took {report.pass_ms:.0f} ms"]
    times += [f"proofs took {report.proof_ms:.0f} ms"] if proved else []
    return Text.assemble(
        f"{name}{_count(report.num_sites, 'attention site')}, ",
        (f"{report.num_fused} fused", "bold green" if report.num_fused else "bold yellow"),
        f"{proved}, {report.num_sites - report.num_fused} left · {nodes} · {' · '.join(times)}",
    )


def _was_to_prove(site: SiteReport) -> bool:
    return site.check is not None and bool(site.check.proof is not None or site.check.not_proved)


def _is_proved(site: SiteReport) -> bool:
    return site.check is not None and site.check.proof is not None and site.check.proof.ok


def _fold(sites: Sequence[SiteReport]) -> list[list[SiteReport]]:
    """Sites that differ in nothing but their name, their numbers, and the time their proof took."""
    groups: dict[Any, list[SiteReport]] = {}
    for site in sites:
        # Symbolic sizes must not be compared, that would add guards to the trace: compare their text.
        alike = dataclasses.replace(site, name="", check=_without_figures(site.check))
        groups.setdefault(json.dumps(_plain(alike)), []).append(site)
    return list(groups.values())


def _without_figures(check: SiteCheck | None) -> SiteCheck | None:
    if check is None or not (check.proof or check.not_proved):
        return None
    proof = dataclasses.replace(check.proof, elapsed_ms=0.0) if check.proof is not None else None
    return SiteCheck(True, proof=proof, not_proved=check.not_proved, not_compared=check.not_compared)


def _names(group: Sequence[SiteReport]) -> str:
    first, last = group[0].name, group[-1].name
    if len(group) == 1:
        return first
    split = [re.split(r"(\d+)", name) for name in (first, last)]
    unequal = [i for i, (a, b) in enumerate(zip(*split, strict=False)) if a != b]
    if len(split[0]) == len(split[1]) and len(unequal) == 1 and unequal[0] % 2:
        i = unequal[0]
        return (
            "".join([*split[0][:i], f"{split[0][i]}…{split[1][i]}", *split[0][i + 1 :]]) + f" ×{len(group)}"
        )
    return f"{first} … {last} ×{len(group)}"


def _table(facts: Iterable[tuple[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts:
        table.add_row(name, Text(fact))
    return Padding(table, (0, 0, 0, 4), expand=False)


def _facts_of(site: SiteReport) -> Iterable[tuple[str, str]]:
    if site.approximation is not None:
        yield "APPROXIMATE", _approximation(site.approximation)
    if site.program:
        yield "score", site.program.partition(" where ")[0]
        yield "mask", _mask(site)
    if str(site.gqa_group) != "1":
        yield "groups", f"{site.gqa_group} query heads share a key head"
    if site.dropout_p:
        yield "dropout", f"{site.dropout_p:g}"
    if site.variant:
        yield "kernels", site.variant
    if site.cost is not None and site.status == "fused":
        before, after = site.cost.hbm_bytes_before, site.cost.hbm_bytes_after
        if type(before) is type(after) is int:
            yield "traffic", f"{format_bytes(before)} → {format_bytes(after)}"
    if site.source:
        yield "source", _short(site.source)
    yield from _reasons_of(site)
    for note in site.notes:
        yield "note", note
    if site.loads_full or site.given_full:
        given = [f"{name} (given)" for name in site.given_full]
        yield "matrices", ", ".join((*site.loads_full, *given)) + ": loaded for every query and key"
    if site.check is not None:
        yield from _proof_of(site.check)


def _reasons_of(site: SiteReport) -> Iterable[tuple[str, str]]:
    for reason in site.reasons:
        line = f" ({_short(reason.where)})" if reason.where and reason.where != site.source else ""
        yield "reason", f"{reason.code}: {reason.message}{line}"
        if reason.hint:
            yield "remedy", reason.hint


def _proof_of(check: SiteCheck) -> Iterable[tuple[str, str]]:
    """The certificate in a line, and one more for each thing that it rests on."""
    proof = check.proof
    if proof is None:
        if check.not_proved:
            instead = "; compared numerically" if check.items else ""
            yield "proof", f"not proved ({check.not_proved}){instead}"
    elif not proof.ok:
        yield "differs", proof.difference
    else:
        primes = ", ".join(str(p) for p in dict.fromkeys(p for p, _ in proof.primes))
        yield (
            "proved",
            f"{', '.join(proof.compared)} · {_count(len(proof.seeds), 'draw')}, {proof.elements:,} elements, "
            f"p = {primes}, chance of a miss {_bound(proof.failure_bound)} · at {proof.sizes}",
        )
        if proof.uninterpreted:
            yield "assumes", f"{', '.join(proof.uninterpreted)} uninterpreted"
        if proof.masks:
            yield (
                "assumes",
                f"{', '.join(proof.masks)} {'is a mask' if len(proof.masks) == 1 else 'are masks'}",
            )
        for assumption in proof.assumptions:
            yield "assumes", assumption
        for cast in proof.casts:
            yield "wider", cast
    if check.not_compared:
        yield "numbers", f"not compared on its own: {check.not_compared}"


def _bound(chance: float) -> str:
    """``< 1e-15``: the next power of ten above."""
    return f"< 1e{math.floor(math.log10(chance)) + 1}" if 0 < chance < 1 else f"≤ {chance:g}"


_DEAD_ROWS = {"nan": "NaN", "nan_s": "NaN", "nan_all": "NaN", "zero": "0"}


def _mask(site: SiteReport) -> str:
    if not site.mask:
        return "none"
    density = site.cost.density if site.cost is not None else None
    left = f"; leaves {density:.0%} of the scores" if density is not None else ""
    dead = "the mean of v" if site.dead_rows in AVERAGING else _DEAD_ROWS.get(site.dead_rows)
    return site.mask + left + (f"; a row without keys gives {dead}" if dead else "")


def _approximation(made: Approximation) -> str:
    kept = f"keeps {made.density:.1%} of the scores" if made.density is not None else ""
    exact = f" where the exact mask keeps {made.exact_density:.1%}" if made.exact_density is not None else ""
    return f"{made.pattern}" + (f": {kept}{exact}" if kept else "") + "; the proof is that of the exact site"


def _short(source: str) -> str:
    """A source line without the part of its path that says only where packages are installed."""
    return re.sub(r"^\S*/(?:site|dist)-packages/", "", source)


RULE = "Checked against float64 (limit: 2 × the original's own error, plus rounding)"


def _render_checks(report: Report) -> Iterable[RenderableType]:
    sites = list(_render_numbers(report.sites))
    if not sites and report.check is None:
        return
    yield Text()
    yield Text(RULE, style="bold")
    yield from sites
    if report.check is not None:
        yield from _render_check("whole model", report.check.items, report.check.ok, report.check.notes)


def _render_numbers(sites: Sequence[SiteReport]) -> Iterable[RenderableType]:
    checked = [(site.name, site.check) for site in sites if site.check is not None and site.check.items]
    if checked:
        items = [
            dataclasses.replace(item, name=f"{name}.{item.name}")
            for name, check in checked
            for item in check.items
        ]
        ok = all(item.ok for item in items)
        yield from _render_check(_count(len(checked), "site"), items, ok)


def _render_model_check(check: ModelCheck) -> Iterable[RenderableType]:
    """What ``verify`` found: proofs, numbers of sites, numbers of the whole model, memory."""
    if any(map(_was_to_prove, check.sites)):
        proved, count = sum(map(_is_proved, check.sites)), len(check.sites)
        yield Text(f"Proof: {proved} of {_count(count, 'site')}, {check.proof_ms:.0f} ms", style="bold")
        for group in _fold(check.sites):
            site = group[0]
            yield Text.assemble("  ", (_names(group), "green" if site.status == "fused" else "yellow"))
            facts = list(_proof_of(site.check)) if site.check is not None else []
            if site.approximation is not None:
                facts.insert(0, ("APPROXIMATE", _approximation(site.approximation)))
            yield _table([*facts, *(_reasons_of(site) if site.status == "left" else ())])
        yield Text()
    yield Text(RULE, style="bold")
    yield from _render_numbers(check.sites)
    yield from _render_check("whole model", check.items, all(i.ok for i in check.items), check.notes)
    if check.peak_bytes is not None:
        yield Text(f"  peak memory of the verification: {format_bytes(check.peak_bytes)}")


def _render_check(
    what: str, items: Sequence[CheckItem], ok: bool, notes: Sequence[str] = ()
) -> Iterable[RenderableType]:
    verdict = ("equal", "bold green") if ok else ("DIFFERENT", "bold red")
    failed = sorted((item for item in items if not item.ok), key=lambda item: -item.share)
    if not items:
        yield Text.assemble(f"  {what}: ", verdict)
        return
    worst = max(items, key=lambda item: item.share)
    if failed:
        summary = f", {len(failed)} of {_count(len(items), 'tensor')} outside the limit"
    else:
        tensors = _count(len(items), "tensor")
        summary = f", {tensors}, largest error {worst.share:.2f} of its limit ({worst.name})"
    yield Text.assemble(f"  {what}: ", verdict, summary, *(f"; {note}" for note in notes))
    for item in failed[:MAX_LISTED]:
        note = f", {item.note}" if item.note else ""
        yield Text(
            f"    {item.name}: error {item.error_ours:.3g}, limit {item.limit:.3g}, "
            f"the original's {item.error_original:.3g}{note}",
            style="red",
        )
    if len(failed) > MAX_LISTED:
        yield Text(f"    and {len(failed) - MAX_LISTED} more", style="red")
