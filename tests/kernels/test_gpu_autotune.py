"""Tuned tiles on a real GPU: equal by the rule, remembered by the next process, and each candidate right."""

import json
import subprocess
import sys

import pytest
import torch
from kernel_cases import Case, run_case, site_of

from flashfuse.kernels import autotune, dispatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
BF16, F32 = torch.bfloat16, torch.float32
CAUSAL = "s*0.125 where kv <= q"
TABLE = "s*0.125 + table[h, kv - q + Sq - 1] where kv <= q"


def tables(b, h, sq, skv):
    return [torch.randn(h, sq + skv - 1)]


def site(text=CAUSAL, dim=64, **kwargs):
    return Case(
        text, **{"sizes": (2, 4, 500, 500), "kv_heads": 4, "dtype": BF16, "dims": (dim, dim), **kwargs}
    )


T5 = site(TABLE, captures=tables, grads=(0,))
AGAIN = f"""
import torch
from flashfuse.kernels import autotune, dispatch
from flashfuse.kernels.spec import ScoreProgram
elapsed_ms = autotune.elapsed_ms
autotune.elapsed_ms = lambda run: print("timed") or elapsed_ms(run)
tuned = dispatch.implementation("triton_tuned")
q, k, v, do = (torch.randn(2, 4, 500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
table = torch.randn(4, 999, device="cuda", dtype=torch.bfloat16)
site = ([table], (), (), None, ScoreProgram.parse({TABLE!r}), 0.0)
out, lse = tuned.forward(q, k, v, *site)
tuned.backward(do, q, k, v, out, lse, *site, (0,))
print(sorted(autotune._known.values(), key=str))
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    from flashfuse.kernels import triton_attention

    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})
    triton_attention._SITES.clear()
    yield
    triton_attention._SITES.clear()


def test_a_tuned_site_is_equal_under_rule_and_the_next_process_reads_what_was_found(tmp_path):
    run_case(dispatch.implementation("triton_tuned"), T5, "cuda")
    stored = {path: path.read_text() for path in tmp_path.iterdir()}
    found = [json.loads(text) for text in stored.values()]
    assert sorted(f["key"]["kernel"] for f in found) == ["dkdv", "dq", "forward", "table"]
    run = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(sorted((autotune.Config(**f["config"]) for f in found), key=str))
    assert {path: path.read_text() for path in tmp_path.iterdir()} == stored


def test_nothing_is_tuned_unless_asked_for_nor_under_deterministic_algorithms(tmp_path):
    run_case(dispatch.implementation("triton"), site(), "cuda")
    tuned = dispatch.implementation("triton_tuned")
    (q, k, v, do), given, _ = site_of(tuned, T5, "cuda", 0)
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = tuned.forward(q, k, v, *given)
        tuned.backward(do, q, k, v, out, lse, *given, (0,))
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(tmp_path.iterdir()) == []


def test_a_cuda_graph_records_what_was_tuned_before_it():
    from flashfuse.kernels.spec import ScoreProgram

    tuned = dispatch.implementation("triton_tuned")
    q, k, v = (torch.randn(1, 4, 500, 64, device="cuda", dtype=BF16) for _ in range(3))
    rest = ((), (), (), None, ScoreProgram.parse("s*0.125"), 0.0)
    expected = tuned.forward(q, k, v, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = tuned.forward(q, k, v, *rest)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, recorded, strict=True))


CASES = [
    site(),
    site(dim=128, kv_heads=2),
    site(dim=256, sizes=(1, 2, 300, 300), kv_heads=2),
    site("tanh(s*0.02)*20.0 where kv <= q and kv > q - 100", dim=128),
    site(TABLE, captures=tables, grads=(0,), dropout_p=0.1),
    site("s*0.158", dim=40, dtype=F32),
    site("s*0.07 where kv <= q", dim=192),
]


@pytest.mark.parametrize("kernel", list(autotune.WRITTEN))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_candidate_is_equal_under_rule(monkeypatch, case, kernel):
    from triton.runtime.errors import OutOfResources

    from flashfuse.kernels import triton_attention, triton_site

    if kernel == "table" and not case.grads:
        pytest.skip("no table")
    apart = max(case.dims) > 128 and torch.cuda.get_device_capability()[0] == 9
    if kernel in (("dkdv",) if apart else ("dk", "dv")):
        pytest.skip("dk and dv are kernels of their own" if apart else "one kernel for dk and dv")
    choices = []
    position = 0

    def tuned(self, name, make, tensors):
        if name != kernel:
            return make()
        shared = autotune.shared_memory(self.device)
        sizes = autotune.Sizes(self.d_pad, self.dv_pad, self.itemsize, shared, self.dropout)
        choices[:] = autotune.candidates(name, self.config(name), sizes)
        return make(config=choices[position])

    monkeypatch.setattr(triton_site.Site, "tuned", tuned)
    implementation = dispatch.implementation("triton_tuned")
    while position == 0 or position < len(choices):
        triton_attention._SITES.clear()
        try:
            run_case(implementation, case, "cuda")
        except OutOfResources:
            assert position, "the tables' choice"
        position += 1
