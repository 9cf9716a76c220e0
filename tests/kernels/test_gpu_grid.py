"""The Triton kernels on a real GPU over a covering array of the grid: any three values of the axes meet."""

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import site_of
from kernel_grid import FULL, MODES, NEVER_DEAD, PROGRAMS, Point, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")

# The array takes seconds to find, which machines without a GPU need not spend.
POINTS = FULL.covering(3) if torch.cuda.is_available() else []
BASE = Point("bf16", 64, 1000, "same", 3, "causal", "none", "plain", 0.0)


def implementation():
    from flashfuse.kernels import triton_attention

    return triton_attention


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_equal_under_rule(point):
    outcome = check(implementation(), FULL, point, "cuda")
    assert not outcome.failure, f"{point}: {outcome.failure}"


def programs():
    for program, mask, dropout in itertools.product(
        PROGRAMS, ("causal", "padding", "blocks by head"), (0.0, 0.17)
    ):
        dead = "none" if mask in NEVER_DEAD else MODES[len(program) % len(MODES)]
        yield dataclasses.replace(BASE, program=program, mask=mask, dead=dead, dropout=dropout)
    for dtype, dims in itertools.product(("fp16", "fp32"), (40, 128)):
        yield dataclasses.replace(BASE, dtype=dtype, dims=dims)
    yield dataclasses.replace(BASE, length=1, relation="more keys")


@pytest.mark.parametrize("point", list(programs()), ids=str)
def test_results_are_bitwise_repeatable(point):
    """Out, lse and all gradients, those of captures among them."""
    kernels = implementation()
    case = FULL.case(point)
    tensors, site, _ = site_of(kernels, case, "cuda", seed=0)
    q, k, v, do = tensors

    def run():
        out, lse = kernels.forward(q, k, v, *site)
        return [out, lse, *kernels.backward(do, q, k, v, out, lse, *site, case.grads)]

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        for _ in range(3):
            # Bits: a row without a key may be NaN.
            assert all(
                torch.equal(*(t.contiguous().view(torch.uint8) for t in pair))
                for pair in zip(first, run(), strict=True)
            )
    finally:
        torch.use_deterministic_algorithms(before)
