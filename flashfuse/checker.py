"""What is asked of a site before it is rewritten: a proof, numbers, or both; and what follows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from flashfuse import repro
from flashfuse.kernels.spec import Reason
from flashfuse.passes import nodes
from flashfuse.passes.plan import Fuse, Left, SitePlan
from flashfuse.passes.row_results import without_results
from flashfuse.passes.tables import sizes_of
from flashfuse.proof import prove
from flashfuse.proof.certificate import Certificate, NotProvable
from flashfuse.proof.key import site_key, site_nodes
from flashfuse.report import CheckItem, SiteCheck
from flashfuse.site import Site, extract, extract_approximation

MAX_SITE_BYTES = 6 << 30
"""A site whose float64 score matrices would take more is not compared on its own."""
_RUN = "the run itself"
"""What stands for the tensors of a site that could not be run."""


@dataclass
class SiteChecker:
    """Checks sites before they are rewritten; identical ones once.

    A site that differs is left.  One without a proof is compared in numbers instead; where that is
    not possible either, it is left too.

    Attributes:
        policy: ``proof`` asks for numbers only where there is no proof, ``full`` for both.
        repro: a folder that gets a file for each distinct site that differs.
        on_step: told in a few words what is being done.
        proof_ms, numbers_ms: time spent so far.
    """

    policy: Literal["proof", "full"]
    repro: Path | None = None
    on_step: Callable[[str], None] = lambda text: None
    proof_ms: float = 0.0
    numbers_ms: float = 0.0
    _done: dict[Hashable, _Done] = field(default_factory=dict)
    _compared: dict[Hashable, SiteCheck] = field(default_factory=dict)

    def check_all(self, plans: Sequence[SitePlan]) -> tuple[tuple[SitePlan, ...], dict[str, SiteCheck]]:
        """The plans with every site that did not pass left, and the check of each site by name."""
        checks: dict[str, SiteCheck] = {}
        kept: list[SitePlan] = []
        for plan in plans:
            if isinstance(plan, Fuse):
                done = self._check(plan)
                reason = _reason_to_leave(plan, done)
                if reason is not None and plan.region.row_results:
                    # The output alone may be the same function.
                    region = without_results(plan.region, plan.region.row_results, reason.message)
                    plan = dataclasses.replace(plan, region=region)
                    done = self._check(plan)
                    reason = _reason_to_leave(plan, done)
                checks[plan.region.name] = done.check
                plan = plan if reason is None else Left(plan.region, (reason,))
            kept.append(plan)
        return tuple(kept), checks

    def check_approximations(
        self, plans: Sequence[SitePlan], checks: Mapping[str, SiteCheck]
    ) -> tuple[tuple[SitePlan, ...], dict[str, SiteCheck]]:
        """As :meth:`check_all`, for what approximate sites compute beside what was proved.

        Under ``full`` the real kernels are compared with attention by definition under the same pattern.
        """
        found = dict(checks)
        kept: list[SitePlan] = []
        for plan in plans:
            if isinstance(plan, Fuse) and plan.approximation is not None and self.policy == "full":
                name, where = plan.region.name, plan.region.source
                known, compared = found[name], self._compared_approximation(plan)
                found[name] = dataclasses.replace(
                    known,
                    ok=known.ok and compared.ok,
                    items=(*known.items, *compared.items),
                    not_compared=known.not_compared or compared.not_compared,
                )
                if not compared.ok:
                    message = f"the kernels differ from the definition in {_difference(compared)}"
                    plan = Left(plan.region, (Reason("check_failed", message, where),))
            kept.append(plan)
        return tuple(kept), found

    def _compared_approximation(self, plan: Fuse) -> SiteCheck:
        captures = (plan.region.scope.captures[c] for c in plan.region.program.captures)
        key = (site_key(plan), tuple(map(str, map(sizes_of, captures))))
        if key not in self._compared:
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                check = self._compare(plan, SiteCheck(True), extract_approximation)
            items = tuple(dataclasses.replace(i, name=f"{i.name} under the pattern") for i in check.items)
            self._compared[key] = dataclasses.replace(check, items=items)
        return self._compared[key]

    def check(self, plan: Fuse) -> SiteCheck:
        """What is known of one site."""
        return self._check(plan).check

    def _check(self, plan: Fuse) -> _Done:
        key = site_key(plan)
        names = plan.region.program.captures
        if key in self._done:
            known = self._done[key]
            return dataclasses.replace(known, check=_renamed(known.check, known.names, names))
        # A graph is compiled among fake tensors; what is compared is real.
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            check = self._prove(plan)
            if self.policy == "full" or (check.proof is None and check.ok):
                check = self._compare(plan, check)
            path = self._reproducer(plan, check)
        self._done[key] = _Done(check, names, path)
        return self._done[key]

    def _prove(self, plan: Fuse) -> SiteCheck:
        self.on_step(f"proving {plan.region.name}")
        started = time.perf_counter()
        try:
            certificate = prove.prove_site(plan)
        except NotProvable as why:
            return SiteCheck(True, not_proved=str(why))
        except Exception as error:
            # A fault of the proof is no proof, and no reason to break a compile.
            return SiteCheck(True, not_proved=f"{type(error).__name__}: {error}")
        finally:
            self.proof_ms += (time.perf_counter() - started) * 1e3
        return SiteCheck(certificate.ok, proof=certificate)

    def _compare(self, plan: Fuse, check: SiteCheck, extract: Callable[[Fuse], Site] = extract) -> SiteCheck:
        too_large = _not_comparable(plan)
        if too_large:
            return dataclasses.replace(check, not_compared=too_large)
        self.on_step(f"comparing {plan.region.name} on the real kernels")
        started = time.perf_counter()
        try:
            items = extract(plan).check()
        except (MemoryError, torch.OutOfMemoryError) as error:
            return dataclasses.replace(check, not_compared=f"out of memory: {error}")
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            items = (CheckItem(_RUN, math.inf, 0.0, 0.0, False, note),)
        finally:
            self.numbers_ms += (time.perf_counter() - started) * 1e3
        return dataclasses.replace(check, ok=check.ok and all(i.ok for i in items), items=items)

    def _reproducer(self, plan: Fuse, check: SiteCheck) -> str:
        """What to do about a site that differs."""
        if check.ok:
            return ""
        if self.repro is None:
            return 'options={"repro": "FOLDER"} writes a file that shows the difference; please report it'
        try:
            path = repro.write(plan, _difference(check), self.repro)
        except (OSError, repro.NotWritable) as error:
            return f"no reproducer could be written: {error}"
        return f"python {path} shows the difference; please attach it to a report"


@dataclass(frozen=True)
class _Done:
    check: SiteCheck
    names: tuple[str, ...]
    hint: str


def _not_comparable(plan: Fuse) -> str:
    """Why a site cannot be run on its own, or ``""``."""
    s = plan.region.shape
    inputs = [nodes.value(node) for node, leaf in site_nodes(plan.region) if leaf]
    sizes = [n for x in inputs for n in (x.shape if isinstance(x, torch.Tensor) else (x,))]
    if any(isinstance(n, torch.SymInt) for n in sizes):
        return "its sizes are symbolic"
    needed = 8 * 6 * math.prod((s.batch, s.num_q_heads, s.q_len, s.kv_len))
    return f"it would take {needed / 2**30:.0f} GiB" if needed > MAX_SITE_BYTES else ""


def _difference(check: SiteCheck) -> str:
    """The first thing that differs, in words."""
    if check.proof is not None and not check.proof.ok:
        return check.proof.difference
    failed = next(i for i in check.items if not i.ok)
    size = f"error {failed.error_ours:.3g}, allowed {failed.limit:.3g}"
    return f"{failed.name}: {failed.note or size}" + (f" ({size})" if failed.note and failed.limit else "")


def _reason_to_leave(plan: Fuse, done: _Done) -> Reason | None:
    check, where = done.check, plan.region.source
    if not check.ok:
        proved_wrong = check.proof is not None and not check.proof.ok
        message = f"the fused site differs from the original in {_difference(check)}"
        if not proved_wrong and any(item.name == _RUN for item in check.items):
            message = f"the fused site and the original could not be compared in {_difference(check)}"
        return Reason("proof_failed" if proved_wrong else "check_failed", message, where, done.hint)
    if check.proof is None and not check.items:
        return Reason(
            "not_proved",
            f"not proved ({check.not_proved}), and not compared in numbers ({check.not_compared})",
            where,
            'options={"verify": "off"} fuses it unchecked',
        )
    return None


def _renamed(check: SiteCheck, old: Sequence[str], new: Sequence[str]) -> SiteCheck:
    """The check of an identical site, with the names of this one's captures; its proof took no time."""
    names = {f"d{a}": f"d{b}" for a, b in zip(old, new, strict=True)}

    def name(text: str) -> str:
        first, space, rest = text.partition(" ")
        return names.get(first, first) + space + rest

    proof: Certificate | None = None
    if check.proof is not None:
        compared = tuple(map(name, check.proof.compared))
        proof = dataclasses.replace(check.proof, compared=compared, elapsed_ms=0.0)
    items = tuple(dataclasses.replace(i, name=name(i.name)) for i in check.items)
    return dataclasses.replace(check, proof=proof, items=items)
