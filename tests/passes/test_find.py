"""Every spelling of the zoo, in every capture: found as what it is, and the rewrite computes the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
import zoo_families  # noqa: F401  (registers its specimens)
import zoo_layouts  # noqa: F401
import zoo_masks  # noqa: F401
import zoo_papers  # noqa: F401
import zoo_scores  # noqa: F401
import zoo_sinks  # noqa: F401
import zoo_tables  # noqa: F401
import zoo_weights  # noqa: F401
from tolerance import holds
from torch import fx

from flashfuse import pipeline
from flashfuse.numbers import check_graph
from flashfuse.options import Options

pytestmark = pytest.mark.usefixtures("one_thread")


def _chosen(i: int, specimen: zoo.Specimen) -> list[str]:
    """Every spelling under Dynamo and ``symbolic_trace``, and a part of them exported, which is slow."""
    slow = "export" if i % 2 == 0 else "decomposed" if i % 6 == 1 else ""
    return [c for c in specimen.captures if c in ("dynamo", "symbolic", slow) or specimen.captures == (c,)]


CASES = [pytest.param(s, c, id=f"{s}-{c}") for i, s in enumerate(zoo.SPECIMENS) for c in _chosen(i, s)]


def capture(specimen: zoo.Specimen, how: str, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Sequence[Any]]:
    """The graph of ``specimen`` as ``how`` writes it, and its inputs in the order of its placeholders."""
    if how == "dynamo":
        torch._dynamo.reset()
        graphs = []

        def collect(gm: fx.GraphModule, _: Any) -> Any:
            def run(*given: Any) -> Any:
                graphs.append((gm, [t.clone() if isinstance(t, torch.Tensor) else t for t in given]))
                return gm(*given)

            return run

        torch.compile(specimen.run, backend=collect, fullgraph=True, dynamic=False)(*inputs)
        return graphs[0]
    if how == "symbolic":
        return pipeline.with_example_values(fx.symbolic_trace(specimen.run), inputs), inputs
    module = torch.nn.Module()
    module.forward = specimen.run
    exported = torch.export.export(module, tuple(inputs))
    if how == "decomposed":
        exported = exported.run_decompositions()
    return exported.module(), inputs


def captured(specimen: zoo.Specimen, how: str, seed: int = 0) -> tuple[fx.GraphModule, list[Any]]:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export's own
        gm, inputs = capture(specimen, how, list(specimen.inputs()))
    return gm, list(inputs)


@pytest.mark.parametrize(("specimen", "how"), [c for c in CASES if c.values[0].code is None])
def test_found_and_equal(specimen, how):
    holds(lambda seed: found_and_equal(specimen, how, seed))


def found_and_equal(specimen, how, seed):
    gm, inputs = captured(specimen, how, seed)
    before = str(gm.graph)
    new, report = pipeline.run(gm, Options(verify="full" if specimen.dropout_p else "off"))
    assert not [r for site in report.sites for r in site.reasons]
    assert same_programs([site.program for site in report.sites], specimen.programs, how)
    assert {site.dropout_p for site in report.sites} == {specimen.dropout_p}
    if how != "decomposed":
        assert {site.gqa_group for site in report.sites} == {specimen.group}
    if specimen.dropout_p:
        assert all(site.check is not None and site.check.ok for site in report.sites)
    assert_equal(specimen, gm, new, inputs)
    assert str(gm.graph) == before


@pytest.mark.parametrize(("specimen", "how"), [c for c in CASES if c.values[0].code is not None])
def test_left_alone(specimen, how):
    gm, _ = captured(specimen, how)
    new, report = pipeline.run(gm, Options())
    assert new is gm
    assert {r.code for site in report.sites for r in site.reasons} == (
        {specimen.code} if specimen.code else set()
    )
    assert all(site.status == "left" and r.message for site in report.sites for r in site.reasons)


def test_zoo():
    """Spellings have twins: every family holds both kinds, and nothing is there twice."""
    kinds = {(s.family, s.code is None) for s in zoo.SPECIMENS}
    assert {family for family, _ in kinds} == {family for family, found in kinds if found}
    assert {family for family, _ in kinds} == {family for family, found in kinds if not found}
    assert len({str(s) for s in zoo.SPECIMENS}) == len(zoo.SPECIMENS)


def assert_equal(specimen: zoo.Specimen, gm: Any, new: Any, inputs: Sequence[Any]) -> None:
    check = check_graph(gm, new, inputs, backward=True)
    assert check.items
    assert check.ok, [item for item in check.items if not item.ok]


def same_programs(found: Sequence[str], expected: Sequence[str], how: str) -> bool:
    """Texts alike but for the names of captures, which each capture chooses itself.

    ``symbolic_trace`` runs what depends on no input, so closed forms are stored constants there; the
    inference dialect has SDPA's scale on q and k.
    """
    if how == "symbolic" and any("_tensor_constant" in text for text in found):
        return len(found) == len(expected)
    if how == "decomposed":
        found = [re.sub(r"^s\b(?!\*)", expected[0].split(" ")[0], text) for text in found]
    return list(map(renamed, found)) == list(map(renamed, expected))


def renamed(program: str) -> str:
    names: dict[str, str] = {}
    return re.sub(r"\b\w+(?=\[)", lambda m: names.setdefault(m[0], f"c{len(names)}"), program)
