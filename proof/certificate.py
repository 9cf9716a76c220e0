"""What a proof says: a value that prints and turns into JSON."""

from __future__ import annotations

from dataclasses import dataclass


class NotProvable(Exception):
    """The site cannot be evaluated over a field; the message says what stands in the way."""


@dataclass(frozen=True)
class Certificate:
    """What was proved of one site, and on what it rests.

    Attributes:
        ok: original and replacement agree in every element.
        compared: the tensors, ``out dq dk dv d<capture>…``.
        primes: (p, q) of each draw; values live modulo p, exponents modulo q, and q divides p − 1.
        seeds: of each draw.
        elements: compared over all draws.
        failure_bound: the chance that a site that differs in an element passes all the same.
        sizes: the sizes of the site in the draws, smaller than the model's.
        uninterpreted: functions of which only "equal arguments, equal results" was used.
        masks: constants that were taken as masks.
        casts: where the replacement computes in a wider dtype than the original.
        assumptions: what else has to hold, a sentence each.
        difference: the first element that differs, ``""`` if none does.
        elapsed_ms: what the proof took; 0 where an identical site had been proved before.
    """

    ok: bool
    compared: tuple[str, ...]
    primes: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    elements: int
    failure_bound: float
    sizes: str
    uninterpreted: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    casts: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    difference: str = ""
    elapsed_ms: float = 0.0
