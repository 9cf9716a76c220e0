"""The Triton kernels under Triton's interpreter: tiny shapes, every path, no GPU.

The interpreter is chosen by an environment variable when triton is imported, so the cases run in one
subprocess; the rest of the suite is unaffected.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent.parent

CASES = """
    dict(program="s*0.158", sizes=(1, 3, 37, 70)),
    dict(program="s*0.158 where kv <= q", sizes=(1, 3, 140, 133), dims=(40, 24), aux=True),
    dict(program="s*0.158 where kv <= q + 30", sizes=(2, 3, 33, 70), dropout_p=0.3),
    dict(program="s*0.158 where kv <= q and pad[b, kv] else mean", sizes=(2, 2, 33, 65), kv_heads=2,
         captures=left_pad, aux=True),
    dict(program="s*0.158 where kv <= q and pad[b, kv] else mean", sizes=(2, 2, 33, 33), captures=left_pad,
         dropout_p=0.2, aux=True),
    dict(program="s*0.158 where kv <= q and pad[b, kv] else nan", sizes=(2, 2, 33, 33), captures=left_pad),
    dict(program="s*0.158 where kv <= q and pad[b, kv] else nan_s", sizes=(2, 4, 33, 33), captures=left_pad,
         kv_heads=2),
    dict(program="s*0.158 + e[h, kv] where kv <= q and pad[b, kv] else nan_s", sizes=(2, 2, 33, 33),
         captures=lambda b, h, sq, skv: [torch.randn(h, skv), *left_pad(b, h, sq, skv)], grads=(0,)),
    dict(program="tanh(s*0.05)*4.0 + e[h] + t[h, kv - q + Sq - 1] where kv <= q and pad[b, kv] else nan_all",
         captures=lambda b, h, sq, skv: [torch.randn(h), torch.randn(h, sq + skv - 1),
                                         *left_pad(b, h, sq, skv)],
         sizes=(2, 2, 33, 40), grads=(0, 1), dropout_p=0.2),
    dict(program="tanh(s*0.05)*4.0 + e[h] where kv <= q and pad[b, kv] else uniform", sizes=(2, 2, 33, 33),
         captures=lambda *n: [torch.randn(n[1]), *left_pad(*n)], grads=(0,), dropout_p=0.2,
         draws=3, aux=True),
    dict(program="s*0.158 + t[h, kv - q + Sq - 1] where kv <= q + n", sizes=(1, 3, 33, 40), ints=(7,),
         captures=lambda b, h, sq, skv: [torch.randn(h, sq + skv - 1)], grads=(0,), aux=True),
    dict(program="s*0.158 + bias[b, 0, q, kv]", sizes=(2, 2, 33, 40), captures=hostile_bias),
    dict(program="s*0.158 + slope[h]*(kv - q)", sizes=(1, 2, 33, 40), captures=lambda *n: [torch.rand(n[1])],
         grads=(0,), dtype=torch.float16, dropout_p=0.1, aux=True),
    dict(program="s*0.158 + t[where(i[q, kv] < 0, i[q, kv] + 9, i[q, kv]), h]", sizes=(3, 2, 33, 40),
         captures=looked_up, grads=(0,)),
    dict(program="tanh(s*0.158)*t[i[q, kv]] + e[h] where kv <= q", sizes=(2, 3, 33, 40), dtype=torch.float16,
         captures=lambda b, h, sq, skv: [torch.randn(9), torch.randint(0, 9, (sq, skv)), torch.randn(h)],
         grads=(0, 2), dropout_p=0.1),
    dict(program="s*0.158 + t[h, kv - q + Sq - 1] + u[kv - q + Sq - 1]", sizes=(2, 2, 33, 40), grads=(0, 1),
         captures=lambda b, h, sq, skv: [torch.randn(h, sq + skv - 1), torch.randn(sq + skv - 1)]),
    *(dict(program="s*0.158 + bias[h]", sizes=(1, 2, 33, 1), captures=lambda *n: [torch.rand(n[1])],
           grads=(0,), aux=aux) for aux in (False, True)),
    dict(program="s*x[b, kv // 3]*0.1 where doc[b, q] == doc[b, kv] else zero", sizes=(2, 2, 33, 33),
         captures=lambda *n: [torch.rand(n[0], 11), *documents(*n)], grads=(0,), layout="packed"),
    dict(program="s*0.158 sink sinks[h]", sizes=(2, 6, 37, 45), kv_heads=2, captures=sinks, grads=(0,)),
    dict(program="s*0.158 sink sinks[h] else nan", sizes=(1, 6, 33, 40), captures=hostile_sinks, grads=(0,),
         aux=True),
    dict(program="s*0.158 sink 0.0", sizes=(1, 3, 37, 1)),
    dict(program="s*0.158 + bias[h] sink sinks[h]", sizes=(1, 2, 33, 1), grads=(0, 1),
         captures=lambda *n: [torch.rand(n[1]), *sinks(*n)]),
    dict(program="s*0.158 where kv <= q sink sinks[h]", sizes=(1, 3, 140, 133), dims=(40, 24), captures=sinks,
         grads=(0,), dtype=torch.float16),
    dict(program="tanh(s*0.05)*20.0 where kv <= q sink x[b, h, q, 0]*0.5", sizes=(1, 2, 33, 40), grads=(0,),
         captures=lambda b, h, sq, skv: [torch.randn(b, h, sq, 1)], dtype=torch.float16, dropout_p=0.1),
    dict(program="s*t[h]*0.1 where kv <= q sink t[h] + where(q < n, 0.5, h)", sizes=(1, 3, 37, 45), ints=(9,),
         captures=sinks, grads=(0,)),
    dict(program="s*0.158 + bias[b, 0, q, kv] sink sinks[h] else nan", sizes=(2, 6, 33, 40), grads=(1,),
         captures=lambda *n: [*hostile_bias(*n), *hostile_sinks(*n)]),
    *(dict(program=f"s*0.158 where kv <= q and pad[b, kv] sink sinks[h] else {tail}", sizes=(2, 6, 33, 33),
           kv_heads=2, captures=lambda *n: [*left_pad(*n), *hostile_sinks(*n)], grads=(1,), dropout_p=p,
           dtype=dtype, aux=p > 0)
      for tail in ("mean", "uniform", "nan", "zero")
      for p, dtype in ((0.0, torch.float32), (0.2, torch.float16))),
    dict(program="s*0.158 + 0.1*c[()]", sizes=(1, 2, 33, 40), captures=lambda *n: [torch.randn(())],
         grads=(0,)),
    # The only dead row has the last of 160 flags.
    *(dict(program=f"s*0.158 where kv > last[h, q] else {tail}", sizes=(1, 32, 300, 8), captures=last_is_dead,
           dims=(8, 8), dtype=torch.float16)
      for tail in ("uniform", "nan")),
"""

# Few queries: the forward alone, since the backward is that of any site.
FEW_QUERIES = """
    dict(program="s*0.158", sizes=(2, 2, 1, 300), kv_heads=2, aux=True),
    dict(program="s*0.158", sizes=(1, 8, 1, 389), kv_heads=1, dims=(40, 24)),
    dict(program="s*0.158", sizes=(1, 8, 5, 256), kv_heads=2, dtype=torch.float16),
    dict(program="s*0.08", sizes=(1, 4, 2, 300), kv_heads=2, dims=(192, 40)),
    dict(program="s*0.158 where kv <= q + Skv - Sq", sizes=(1, 4, 5, 389), kv_heads=1),
    dict(program="s*0.158 where kv <= q + Skv - Sq and kv > q + Skv - Sq - 130", sizes=(1, 8, 2, 700)),
    dict(program="s*0.158 where kv <= n", sizes=(1, 4, 1, 900), ints=(200,), dtype=torch.float16),
    *(dict(program=f"s*0.158 where kv <= q + Skv - Sq and pad[b, kv] else {tail}", sizes=(2, 4, 3, 300),
           kv_heads=2, captures=mostly_padding, aux=True)
      for tail in ("mean", "uniform", "nan", "zero")),
    dict(program="s*0.158 where kv < 0 else mean", sizes=(1, 4, 2, 257), kv_heads=2, dtype=torch.float16),
    dict(program="s*0.158 sink sinks[h]", sizes=(2, 6, 1, 300), kv_heads=2, captures=sinks, aux=True),
    dict(program="s*0.158 where kv <= q + Skv - Sq and pad[b, kv] sink sinks[h] else mean",
         sizes=(2, 6, 2, 300), kv_heads=2, captures=lambda *n: [*mostly_padding(*n), *hostile_sinks(*n)]),
    dict(program="s*0.158 + bias[b, 0, q, kv]", sizes=(2, 4, 5, 300), captures=hostile_bias),
    dict(program="s*0.158 + bias[b, 0, q, kv] sink sinks[h] else nan", sizes=(2, 6, 7, 300), kv_heads=2,
         captures=lambda *n: [*hostile_bias(*n), *hostile_sinks(*n)]),
    dict(program="s*0.158 + t[h, kv - q + Sq - 1]", sizes=(1, 6, 3, 300), kv_heads=2,
         captures=lambda b, h, sq, skv: [torch.randn(h, sq + skv - 1)], aux=True),
    dict(program="tanh(s*0.05)*20.0 where kv <= q + Skv - Sq", sizes=(1, 8, 2, 300), kv_heads=2,
         dtype=torch.float16, aux=True),
    dict(program="s*0.158 where kv >= first[h] else zero", sizes=(1, 6, 1, 300), kv_heads=2,
         captures=window_by_head),
    dict(program="s*0.158 where kv >= first[h] else zero", sizes=(2, 2, 3, 300), kv_heads=2,
         captures=window_by_head),
    dict(program="s*0.158 + slope[h]*(kv - q)", sizes=(1, 12, 16, 256), dims=(24, 40), dtype=torch.float16,
         captures=lambda *n: [torch.rand(n[1])]),
    dict(program="s*x[b, kv // 3]*0.1 where doc[b, q] == doc[b, kv] else zero", sizes=(2, 2, 3, 300),
         kv_heads=2, captures=lambda *n: [torch.rand(n[0], 100), *documents(*n)], layout="packed"),
"""

SCRIPT = """
import json, sys, torch
import numpy as np
from triton.runtime import interpreter
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[1] + "/kernels")
from kernel_cases import *
from flashfuse.kernels import block_map, block_map_triton, decode, launch
from flashfuse.kernels import triton_attention, triton_site
from flashfuse.kernels.spec import ScoreProgram
from test_block_map import EXACT, CONSERVATIVE, captures_of, states_of

results = {}
def poisoned(make):
    def run(*args, **kwargs):
        t = make(*args, **kwargs)
        return t if t.device.type == "meta" else t.fill_(float("nan") if t.is_floating_point() else 99)
    return run
torch.empty = poisoned(torch.empty)
for name in ("new_empty", "new_empty_strided"):
    setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))

# What a kernel reads and writes lies within the memory of the tensors that it was given.
spans = []
def tensors_in(given):
    for x in given:
        if isinstance(x, tuple):
            yield from tensors_in(x)
        elif isinstance(x, torch.Tensor):
            yield x
def bounded(run):
    def launch(what, *tensors):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(tensors)}
        spans[:] = sorted((at, at + size) for at, size in storages.items())
        try:
            return run(what, *tensors)
        finally:
            spans.clear()
    return launch
launch.launch = bounded(launch.launch)
def checked(access, pointers, mask):
    def run(self, *args, **named):
        addresses, allowed = args[pointers].data, args[mask].data
        starts = addresses.astype(np.int64)[np.broadcast_to(allowed, addresses.shape)]
        size = np.dtype(interpreter._get_np_dtype(args[pointers].get_element_ty())).itemsize
        for start, end in spans:
            starts = starts[(starts < start) | (starts + size > end)]
        assert not spans or not starts.size, f"{starts.size} accesses out of bounds"
        return access(self, *args, **named)
    return run
Builder = interpreter.InterpreterBuilder
for name, *places in (("masked_load", 0, 1), ("masked_store", 0, 2), ("atomic_rmw", 1, 3)):
    setattr(Builder, f"create_{name}", checked(getattr(Builder, f"create_{name}"), *places))

def attempt(name, run):
    try:
        run()
        results[name] = ""
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"

PART
print("RESULTS" + json.dumps(results))
"""

# Each in a process of its own: part, how many results it has at least.
PARTS = {
    "sites": ("""
for case in [CASES]:
    draws = case.pop("draws", 1)
    case = Case(**case)
    attempt(str(case), lambda: run_case(triton_attention, case, "cpu", draws=draws))
""", 25),
    # Sums of integers, in two passes.
    "deterministic": ("""
torch.use_deterministic_algorithms(True)
def table(b, h, sq, skv):
    return [torch.randn(h, sq + skv - 1)]
for case in [
    dict(program="s*0.158 + t[h, kv - q + Sq - 1] where kv <= q", sizes=(2, 2, 33, 33), captures=table),
    dict(program="s*0.158 + slope[h]*(kv - q)", sizes=(2, 2, 20, 33), captures=sinks),
    dict(program="s*0.158 + t[h, kv - q + Sq - 1] where kv <= q and pad[b, kv] else uniform",
         sizes=(2, 2, 20, 20), captures=lambda *n: [*table(*n), *left_pad(*n)]),
    dict(program="s*0.158 + t[where(i[q, kv] < 0, i[q, kv] + 9, i[q, kv]), h]", sizes=(3, 2, 20, 33),
         captures=looked_up),
]:
    case = Case(**case, grads=(0,), dims=(16, 16))
    attempt(str(case), lambda: run_case(triton_attention, case, "cpu"))
""", 4),
    # What dk and dv are computed with: out, being rounded, is not enough for it.
    "delta": ("""
def exact_delta(case):
    (q, k, v, do), site, _ = site_of(triton_attention, case, "cpu", 0)
    out, lse = triton_attention.forward(q, k, v, *site)
    run_launch, deltas = launch.launch, []
    def recorded(what, *tensors):
        if what.kernel.fn.__name__ == "backward_dkdv":
            deltas.append(tensors[6][..., 1].double())
        return run_launch(what, *tensors)
    launch.launch = recorded
    triton_attention.backward(do, q, k, v, out, lse, *site, ())
    launch.launch = run_launch
    exact, _ = attention_reference(*(t.double() for t in (q, k, v)), site[0], site[1], site[4], 0.0, None)
    expected = (exact * do.double()).sum(-1)
    error, of_out = ((x - expected).abs().max() for x in (deltas[0], (out.double() * do.double()).sum(-1)))
    assert error < of_out / 20, (error, of_out)
for text in ("s*0.25", "s*0.25 where kv <= q", "tanh(s*0.05)*4.0 + e[h]"):
    case = Case(text, sizes=(1, 2, 70, 150), kv_heads=2, dims=(16, 16), dtype=torch.float16,
                captures=lambda *n: [torch.randn(n[1])] if "e[" in text else [])
    attempt(text, lambda: exact_delta(case))
""", 3),
    # A table that is one number in front and behind: tiles that lie there read one.
    "ends": ("""
triton_site.SHORTEST_WITH_ENDS = 100
expected = torch.tensor([[2, 5], [7, 0], [0, 2], [3, 4], [-1, 8]], dtype=torch.int32)
nan = float("nan")
rows = torch.tensor([[1, 1, 1, 2, 3, 4, 4, 4], [5] * 8, [1, 2, 3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1],
                     [nan] * 8])
ends = torch.empty(5, 2, dtype=torch.int32)
from flashfuse.kernels.tables import table_ends
table_ends[(5,)](rows, None, ends, 8, 1, 8, 0, 0, 4)
results["ends"] = "" if torch.equal(ends, expected) else str(ends)
# Of indices: what they stand for says whether it is a moderate number.
values = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, nan], [1e6, 1.0, 2.0]])
table_ends[(3,)](torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]), values, ends, 0, 1, 8, 3, 1, 4)
expected = torch.tensor([[1, 4], [1, 8], [-1, 4]], dtype=torch.int32)
results["ends of indices"] = "" if torch.equal(ends[:3], expected) else str(ends)

def buckets(b, h, sq, skv):
    distance = torch.arange(1 - sq, skv)
    return [torch.randn(h, 41)[:, distance.clamp(-20, 20) + 20]]
def of_indices(b, h, sq, skv):
    return [torch.randn(41, h), torch.arange(1 - sq, skv).clamp(-20, 20) + 20]
def slopes(b, h, sq, skv):
    return [torch.tensor([0.5, -0.1, 6e4])[:h]]
def of_row(b, h, sq, skv):
    return [torch.randn(41)[torch.arange(1 - sq, skv).clamp(-20, 20) + 20]]
for case in [
    dict(program="s*0.158 + t[h, kv - q + Sq - 1] where kv <= q", sizes=(1, 1, 300, 300), captures=buckets,
         dtype=torch.float16),
    dict(program="s*0.158 + t[h, kv - q + Sq - 1]", sizes=(1, 2, 90, 270), captures=buckets, kv_heads=2,
         dtype=torch.float16),
    dict(program="s*0.1 + 2.0*t[kv - q + Sq - 1] where pad[b, kv] else uniform", dtype=torch.float16,
         sizes=(1, 1, 140, 270), captures=lambda *n: [*of_row(*n), *left_pad(*n)], dropout_p=0.2),
    # What else is added may absorb the scores, or forbid a sequence.
    *(dict(program=f"s*0.5 + {t} + m[b] else zero", sizes=(3, 1, 40, kv_len), dtype=torch.float16,
           captures=lambda *n, of_head=of_head: [*of_head(*n), torch.tensor([0.0, -torch.inf, -65504.0])])
      for t, of_head, kv_len in (
          ("t[h, kv - q + Sq - 1]", buckets, 270), ("slope[h]*(kv - q)", slopes, 140))),
    dict(program="s*0.158 + slope[h]*kv", sizes=(1, 1, 40, 300), captures=lambda *n: [torch.tensor([50.0])],
         dtype=torch.float16),
    dict(program="s*0.158 + t[h, kv - q + Sq - 1] where kv >= q - 3 sink x[h]", sizes=(1, 1, 140, 290),
         captures=lambda *n: [*buckets(*n), *sinks(*n)], dtype=torch.float16),
    dict(program="s*0.158 + w[i[kv - q + Sq - 1], h]", sizes=(2, 1, 40, 290), captures=of_indices,
         dtype=torch.float16),
    dict(program="s*0.158 + 2.0*w[i[kv - q + Sq - 1], h] where kv <= q", sizes=(1, 1, 300, 310),
         captures=of_indices, dtype=torch.float16, dropout_p=0.2),
    # Lines: one slope is too steep to be taken apart.
    dict(program="s*0.158 + slope[h]*(kv - q) where kv <= q", sizes=(1, 3, 140, 150), captures=slopes,
         dtype=torch.float16),
    dict(program="s*0.1 + slope[h]*kv/3 - 2*q where pad[b, kv] else uniform", sizes=(2, 2, 40, 150),
         captures=lambda *n: [*slopes(*n), *left_pad(*n)], dtype=torch.float16, dropout_p=0.2),
    dict(program="s*0.158 + w[i[kv - q + Sq - 1], h] where pad[b, kv] else uniform", sizes=(2, 1, 40, 300),
         captures=lambda *n: [*of_indices(*n), *right_pad(*n)], dtype=torch.float16),
]:
    case = Case(**case, grads=(0,), dims=(16, 16))
    attempt(str(case), lambda: run_case(triton_attention, case, "cpu"))
""", 14),
    # What all batch entries load for each pair, in rows.
    "gathered": ("""
triton_site.FEWEST_SCORES_GATHERED = triton_site.FEWEST_ENTRIES_GATHERED = 0
run_launch, launched = launch.launch, []
def recorded(what, *tensors):
    launched.extend(f.fn.__name__ for f in (what.kernel, *what.numbers) if hasattr(f, "fn"))
    return run_launch(what, *tensors)
launch.launch = recorded

def gathered(case, writes=False):
    launched.clear()
    triton_attention._SITES.clear()
    run_case(triton_attention, case, "cpu")
    arrays = len(case.captures(*case.sizes)) - case.program.count("pad[") - ("i[" in case.program)
    assert launched.count("gather_pairs") == 2 * arrays
    assert launched.count("backward_table") == (len(case.grads) if case.sizes[0] > 1 else 0)
    assert ("table_write_0" in launched) == writes

def of_pairs(*sizes):
    def make(b, h, sq, skv):
        named = {"h": h, "q": sq, "kv": skv}
        return [torch.randn([named[n] for n in names]) for names in sizes]
    return make
PLACE = "where(i[q, kv] < 0, i[q, kv] + 9, i[q, kv])"
BIAS = of_pairs(("h", "q", "kv"))
for case in [
    dict(program=f"s*0.158 + t[{PLACE}, h] else nan", sizes=(3, 4, 37, 45), captures=looked_up, grads=(0,),
         kv_heads=2),
    dict(program=f"s*0.158 + t[{PLACE}, h] + where(b % 2*20 >= kv, -9.0, 0.0)", sizes=(3, 2, 70, 45),
         captures=looked_up, grads=(0,), dtype=torch.float16, dropout_p=0.2),
    dict(program="s*0.158 + e[h, q, kv]", sizes=(2, 2, 33, 70), captures=BIAS, grads=(0,)),
    dict(program="s*0.158 + e[h, q, kv]", sizes=(1, 2, 33, 41), captures=BIAS, grads=(0,)),
    # No rows of keys beside each other, though keys are the last axis.
    dict(program="s*0.158 + e[q + kv, kv]", sizes=(2, 2, 10, 13), grads=(0,),
         captures=lambda b, h, sq, skv: [torch.randn(sq + skv - 1, skv)]),
    # Of more queries and keys than there are.
    dict(program="s*0.158 + e[h, q, kv]", sizes=(2, 2, 33, 41), grads=(0,),
         captures=lambda b, h, sq, skv: [torch.randn(h, sq + 2, skv + 11)], dtype=torch.float16),
    dict(program="tanh(s*0.05 + e[q, kv]*f[h, kv, q])*4.0 where kv <= q", sizes=(2, 2, 40, 33), grads=(0, 1),
         captures=of_pairs(("q", "kv"), ("h", "kv", "q")), aux=True),
    dict(program="s*0.158 + bias[0, 0, q, kv] else nan_all", sizes=(2, 2, 33, 40), grads=(0,),
         captures=lambda b, *n: hostile_bias(1, *n)),
    dict(program="s*0.158 + e[h, q, kv] where kv <= q and pad[b, kv] else uniform", sizes=(2, 2, 33, 40),
         grads=(0,), captures=lambda *n: [*BIAS(*n), *left_pad(*n)]),
]:
    case = Case(**case)
    attempt(str(case), lambda: gathered(case))
    if "e[h, q, kv]" in case.program and case.sizes[0] > 1:
        # One program for all of the batch writes its sums.
        triton_site.processors, processors = lambda device: 1, triton_site.processors
        attempt(f"{case}, one part", lambda: gathered(case, writes=True))
        triton_site.processors = processors
# Of one query or one key nothing is gathered.
LAST = "where kv <= q + Skv - Sq else nan_all"
for sizes, mask in (((2, 1, 1, 9), ""), ((2, 1, 1, 1), ""), ((2, 1, 33, 1), LAST)):
    case = Case(f"s*0.158 + e[h, q, kv] {mask}", sizes=sizes, captures=BIAS, grads=(0,), dtype=torch.float16)
    for count in (1, 132):
        triton_attention._SITES.clear()
        triton_site.processors = lambda device, count=count: count
        attempt(f"{case}, {count} processors", lambda: run_case(triton_attention, case, "cpu"))
""", 18),
    # As in long sequences on capability 9: tiles by descriptors; dk and dv of wide heads one by one.
    "described": ("""
triton_site.FEWEST_SCORES_DESCRIBED = 0
triton_site.SHORTEST_WITH_ENDS = 100
run_launch, launched = launch.launch, {}
def recorded(what, *tensors):
    launched.setdefault(what.kernel.fn.__name__, []).append(what.descriptors)
    assert all(tensors[place].data_ptr() % 16 == 0 for place, _ in what.descriptors)
    return run_launch(what, *tensors)
launch.launch = recorded

def described(case):
    launched.clear()
    run_case(triton_attention, case, "cpu")
    assert all(launched[name][0] for name in ("attention_forward", "backward_dq", "backward_dkdv"))
    assert len(launched["backward_dkdv"]) == (2 if case.dims[0] > 128 or "uniform" in case.program else 1)

def line(b, h, sq, skv):
    return [torch.tensor([0.5, -0.1])[:h]]
for case in [
    dict(program="s*0.158 where kv <= q", sizes=(1, 6, 140, 133), kv_heads=2, dims=(40, 24)),
    dict(program="s*0.158", sizes=(2, 2, 37, 150), kv_heads=2, layout="packed"),
    dict(program="s*0.158 where kv <= q", sizes=(1, 2, 37, 50), kv_heads=2, layout="offset"),
    dict(program="s*0.158 where kv <= q and pad[b, kv] else uniform", sizes=(2, 2, 33, 65), kv_heads=1,
         captures=left_pad, dropout_p=0.2),
    dict(program="s*0.1 where kv <= q + 30", sizes=(1, 2, 70, 150), dims=(136, 136), aux=True),
    dict(program="s*0.1 + slope[h]*(kv - q)", sizes=(1, 2, 70, 150), dims=(136, 16), captures=line,
         grads=(0,)),
    dict(program="s*0.158 + slope[h]*(kv - q) where kv <= q", sizes=(1, 2, 140, 150), captures=line,
         grads=(0,), dropout_p=0.2),
    *(dict(program=f"s*0.158 + t[h, kv - q + Sq - 1]{mask}", sizes=(1, 2, 33, 140), grads=(0,),
           captures=lambda b, h, sq, skv: [torch.randn(h, sq + skv - 1)]) for mask in ("", " where kv <= q")),
]:
    case = Case(**{"dtype": torch.float16, **case})
    attempt(str(case), lambda: described(case))
""", 9),
    "few queries": ("""
run_launch, launched = launch.launch, []
def recorded(what, *tensors):
    launched.append(what.kernel)
    return run_launch(what, *tensors)
launch.launch = recorded

def few_queries(case):
    launched.clear()
    run_case(triton_attention, case, "cpu", forward_only=True)
    assert launched == [decode.decode_split, decode.decode_combine], launched

for case in [FEW_QUERIES]:
    case = Case(**case)
    attempt(str(case), lambda: few_queries(case))
""", 20),
    "maps": ("""
def same_map(text, sizes):
    program = ScoreProgram.parse(f"s where {text}").mask_program
    captures, ints = captures_of(program, sizes), [200] * len(program.ints)
    lead = block_map.leading_sizes(program, sizes)
    ours = block_map_triton.build_on_device(captures, ints, torch.device("cpu"), lead, sizes, program)
    expected = block_map.build(captures, ints, torch.device("cpu"), sizes, program)
    for a, b in zip(ours, expected):
        columns = a.shape[-1] - 2
        assert torch.equal(states_of(a, columns), states_of(b, columns)), (text, a, b)

for text in EXACT + CONSERVATIVE:
    attempt(f"map {text}", lambda: same_map(text, (2, 4, 300, 513)))
for text in EXACT[8:13] + CONSERVATIVE[3:6]:
    attempt(f"map {text} of one query", lambda: same_map(text, (1, 4, 1, 700)))
""", 10),
}  # fmt: skip


def run(part):
    script = SCRIPT.replace("PART", part).replace("[CASES]", f"[{CASES}]")
    script = script.replace("[FEW_QUERIES]", f"[{FEW_QUERIES}]")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(TESTS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULTS")[2])


@pytest.mark.parametrize("part", PARTS)
def test_every_case_is_equal_under_the_rule(part):
    script, fewest = PARTS[part]
    results = run(script)
    failed = {name: error for name, error in results.items() if error}
    assert not failed, "\n".join(f"{name}: {error[:300]}" for name, error in failed.items())
    assert len(results) >= fewest


def test_kernels_are_not_imported_with_the_package():
    """The package works where triton is missing: nothing imports it before a kernel runs."""
    assert importlib.util.find_spec("flashfuse.kernels.triton_attention") is not None
    code = "import sys, flashfuse.kernels.ops, flashfuse.kernels.block_map; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
