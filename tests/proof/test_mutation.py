"""The checker is checked: wrong rewrites made from right ones must be rejected."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import mutants
import pytest
import torch
from mutants import Base, Mutant
from torch import Tensor, fx

from flashfuse.proof.certificate import Certificate
from flashfuse.proof.prove import emitted, prove_replacement
from flashfuse.proof.tiled import Tiled

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = 12
"""Pairs of changes for each base, drawn with a fixed seed."""


@functools.lru_cache
def bases() -> dict[str, Base]:
    return {base.name: base for base in mutants.bases()}


@functools.lru_cache
def all_mutants(name: str) -> tuple[Mutant, ...]:
    single = mutants.mutants(bases()[name])
    pairs = list(itertools.combinations(single, 2))
    random.Random(name).shuffle(pairs)
    double = (mutants.both(a, b) for a, b in pairs)
    return (*single, *itertools.islice((m for m in double if m is not None), PAIRS))


def prove(base: Base, mutant: Mutant | None = None) -> Certificate:
    replacement, model = mutant.apply(base) if mutant else (emitted(base.plan), Tiled)
    return prove_replacement(base.plan.region, replacement, model=model)


@pytest.mark.parametrize("name", mutants.PROGRAMS)
def test_right_rewrites_are_proved(name):
    certificate = prove(bases()[name])
    assert certificate.ok, certificate.difference
    assert {"out", "dq", "dk", "dv"} <= set(certificate.compared)


@pytest.mark.parametrize("name", mutants.PROGRAMS)
def test_every_mutant_that_changes_the_function_is_rejected(name, mutation_score):
    """A survivor must be one that numbers in float64 cannot tell from the original either."""
    base, survivors = bases()[name], []
    for mutant in all_mutants(name):
        accepted = prove(base, mutant).ok
        same = accepted and mutant.model is None and same_function(base, mutant)
        mutation_score(f"{name}: {mutant.name}", not accepted, same)
        if accepted and not same:
            survivors.append(mutant.name)
    assert survivors == []


def test_there_are_enough_mutants():
    names = {(name, m.name) for name in mutants.PROGRAMS for m in all_mutants(name)}
    assert len(mutants.PROGRAMS) >= 12
    assert len(names) >= 400


def same_function(base: Base, mutant: Mutant) -> bool:
    """Whether original and mutant agree on the real kernels, in float64, with all gradients."""
    floats = {t.dtype for t in base.inputs if t.is_floating_point()}
    if base.plan.region.dropout_p or floats != {torch.float64}:
        return False
    replacement, _ = mutant.apply(base)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = [t + torch.randn_like(t) if t.is_floating_point() else t for t in base.inputs]
        original, ours = (evaluated(base, r, inputs) for r in (None, replacement))
        for a, b in zip(original, ours, strict=True):
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True):
                return False
    return True


def evaluated(base: Base, replacement: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients, of the original or of a replacement."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    env: dict[fx.Node, Any] = {}

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            env[n] = super().run_node(n)
            return env[n]

    Recording(base.gm).run(*leaves)
    out = env[base.plan.region.output]
    if replacement is not None:
        graph = fx.Graph()
        graph.graph_copy(replacement.graph, mapping := {})
        graph.output(mapping[replacement.outputs[0]])
        arguments = [env[node] for node in replacement.inputs]
        out = fx.GraphModule({}, graph)(*arguments)
    floats = [t for t in leaves if t.requires_grad]
    if not out.requires_grad:
        return [out, *map(torch.zeros_like, floats)]
    do = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(out, floats, do, allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, floats, strict=True))]
