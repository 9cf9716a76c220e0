"""Reach: every architecture that Transformers can build offline, tiny, with random weights.

    python benchmarks/architectures.py                     # everything; resumes where it stopped
    python benchmarks/architectures.py --only bert,t5      # some of them
    python benchmarks/architectures.py --subset            # the two dozen that the tests run

Each model is captured by Dynamo with eager and with sdpa attention, in inference and in training with
attention dropout.  Of each captured graph: its attention sites, found without the passes
(``independent.py``); how many of them PyTorch Inductor's own patterns fuse in the same graph; how many
FlashFuse fuses and proves; the reason of each site that is left; whether the rewritten graph gives the
same outputs and gradients (the rule of ``flashfuse.numbers``, dropout taken out; ``stability.py`` names the
tensors that the original itself leaves to a rounding); and whether AOTAutograd takes it.  A model runs in a
process of its own with limits on time and memory.

One JSON file a model and mode goes to ``--out``, tables to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import stability
import torch
import transformers
from independent import attention_sites
from tiny import Unbuildable, build, model_types
from torch import fx

from flashfuse import pipeline
from flashfuse.api import _each_graph
from flashfuse.bench import machine_line
from flashfuse.options import Options

MODES = ("eager-inference", "eager-training", "sdpa-inference", "sdpa-training")
SUBSET = (
    "albert", "bart", "beit", "bert", "bloom", "deberta-v2", "distilbert", "falcon", "gemma2", "gpt2",
    "gpt_neo", "gpt_neox", "gpt_oss", "llama", "mistral", "mpnet", "mpt", "olmo2", "opt", "roberta",
    "sam_vision_model", "t5", "vit", "wav2vec2-conformer", "whisper",
)  # fmt: skip
DROPOUT = 0.1
MEMORY_GIB = 10
NOT_BUILT = "not built"


# --- one model ----------------------------------------------------------------------------------


WITH_INDUCTOR = True


def examine(kind: str, mode: str) -> dict[str, Any]:
    """What became of one model in one mode."""
    attention, _, phase = mode.partition("-")
    training = phase == "training"
    torch.manual_seed(0)
    model, inputs = build(kind, attention, DROPOUT if training else 0.0)
    model.train(training)
    graphs: list[dict[str, Any]] = []
    with torch.set_grad_enabled(training):
        _each_graph(model, (), inputs, lambda gm, given: graphs.append(_examine_graph(gm, given, training)))
    result: dict[str, Any] = {
        key: sum(g[key] or 0 for g in graphs) for key in ("sites", "inductor", "fused", "proved", "full_rank")
    }
    result["left"] = [left for g in graphs for left in g["left"]]
    for key in ("wrong", "unstable"):
        result[key] = [tensor for g in graphs for tensor in g[key]]
    result["programs"] = dict(Counter(p for g in graphs for p in g["programs"]))
    result["graphs"] = len(graphs)
    result["not_lowered"] = sum(1 for g in graphs if g["inductor"] is None)
    result["pass_ms"] = sum(g["pass_ms"] for g in graphs)
    result["proof_ms"] = sum(g["proof_ms"] for g in graphs)
    return result


def _examine_graph(gm: fx.GraphModule, inputs: Sequence[Any], training: bool) -> dict[str, Any]:
    new, report = pipeline.run(gm, Options())
    fused = [site for site in report.sites if site.status == "fused"]
    left = [
        {"code": r.code, "message": r.message, "where": r.where}
        for site in report.sites
        for r in site.reasons[:1]
    ]
    result = {
        # Weights that several products use are one site of the independent count, and several of ours.
        "sites": max(len(attention_sites(gm)), len(report.sites)),
        "fused": len(fused),
        "proved": sum(1 for s in fused if s.check is not None and s.check.proof is not None),
        "full_rank": sum(1 for s in fused if getattr(s, "loads_full", False)),
        "left": left,
        "programs": [s.program for s in fused],
        "pass_ms": report.pass_ms,
        "proof_ms": report.proof_ms,
        "inductor": _fused_by_inductor(gm, inputs),
        "wrong": [],
        "unstable": [],
    }
    if new is not gm:
        result["wrong"], result["unstable"] = stability.differences(gm, new, inputs, training)
        if result["inductor"] is not None:
            _lower(new, inputs)
    return result


def _lower(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Through AOTAutograd and Inductor's graph passes, without generating code."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def stop(graph: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        return graph.forward

    # Data-dependent sizes have names, all others are what they are.
    shapes = ShapeEnv(assume_static_by_default=True)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    without_cache = torch._inductor.config.patch(fx_graph_cache=False)
    with unset_fake_temporarily(), without_cache, tracing(TracingContext(mode)):
        compile_fx(pipeline.copy_graph_module(gm), list(inputs), inner_compile=stop)  # type: ignore[arg-type]


def _fused_by_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> int | None:
    """How many sites Inductor's own patterns match; ``None`` where it does not take the graph.

    Its counter goes up once a match in inference and twice in training.  Calls of SDPA need no match.
    """
    from torch._dynamo.utils import counters

    if not WITH_INDUCTOR:
        return None
    before = counters["inductor"]["fuse_attention"]
    try:
        _lower(gm, inputs)
    except Exception:
        # Not to be compiled without us either.
        return None
    return (counters["inductor"]["fuse_attention"] - before) // (2 if torch.is_grad_enabled() else 1)


# --- every model, each in a process --------------------------------------------------------------


def _child(kind: str, mode: str, seconds: int, pipe: int, log: Path) -> None:
    signal.alarm(seconds)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + (MEMORY_GIB << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdout = sys.stderr = log.open("w")
    os.dup2(sys.stderr.fileno(), 2)
    # The pool of the parent is of no use here, and autograd's threads must not find that out all at once.
    torch.set_num_threads(torch.get_num_threads())
    started = time.perf_counter()
    try:
        result = examine(kind, mode)
    except Unbuildable as error:
        result = {"error": f"{NOT_BUILT}: {error}"}
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        result = {
            "error": f"{type(error).__name__}: {str(error)[:2000]}",
            "at": [f"{f.filename.rpartition('site-packages/')[2]}:{f.lineno} {f.name}" for f in frames[-12:]],
        }
    result["seconds"] = round(time.perf_counter() - started, 1)
    with os.fdopen(pipe, "w") as out:
        json.dump(result, out)
    os._exit(0)


def run_all(jobs: Sequence[tuple[str, str]], out: Path, workers: int, seconds: int) -> None:
    """Examine each of ``jobs`` that has no result in ``out`` yet."""
    pending = [job for job in jobs if not _file(out, *job).is_file()][::-1]
    total, done = len(pending), 0
    unbuilt: dict[tuple[str, str], dict[str, Any]] = {}
    running: dict[int, tuple[str, str, int, list[bytes]]] = {}
    again: set[tuple[str, str]] = set()
    while pending or running:
        while pending and len(running) < workers:
            kind, mode = pending.pop()
            known = unbuilt.get(_built_as(kind, mode))
            if known is not None:
                done += 1
                _write(out, kind, mode, known)
                continue
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                _child(kind, mode, seconds, write, out / f"{kind}.{mode}.log")
            os.close(write)
            running[read] = (kind, mode, pid, [])
        ready, _, _ = select.select(list(running), [], [])
        for pipe in ready:
            chunk = os.read(pipe, 1 << 16)
            kind, mode, pid, chunks = running[pipe]
            if chunk:
                chunks.append(chunk)
                continue
            os.close(pipe)
            del running[pipe]
            status = os.waitpid(pid, 0)[1]
            text = b"".join(chunks).decode()
            result = json.loads(text) if text else {"error": _died(status, seconds)}
            if not text and os.WTERMSIG(status) == signal.SIGABRT and (kind, mode) not in again:
                # Threads of the parent at the moment of the fork: not the model's fault.
                again.add((kind, mode))
                pending.append((kind, mode))
                continue
            _write(out, kind, mode, result)
            if result.get("error", "").startswith(NOT_BUILT):
                unbuilt[_built_as(kind, mode)] = result
            done += 1
            print(f"[{done}/{total}] {kind} {mode}: {_in_a_line(result)}", flush=True)


def _built_as(kind: str, mode: str) -> tuple[str, str]:
    """Kind and attention: what has no SDPA may well have eager attention."""
    return kind, mode.partition("-")[0]


def _write(out: Path, kind: str, mode: str, result: dict[str, Any]) -> None:
    _file(out, kind, mode).write_text(json.dumps({"model": kind, "mode": mode, **result}, indent=1))


def _file(out: Path, kind: str, mode: str) -> Path:
    return out / f"{kind}.{mode}.json"


def _died(status: int, seconds: int) -> str:
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return f"took more than {seconds} s" if by == signal.SIGALRM else f"died of signal {by}"


def _in_a_line(result: dict[str, Any]) -> str:
    if "error" in result:
        return str(result["error"]).partition("\n")[0][:160]
    codes = Counter(left["code"] for left in result["left"])
    return (
        f"{result['sites']} sites, {result['inductor']} by Inductor, {result['fused']} fused, "
        f"{result['proved']} proved, {len(result['wrong'])} wrong, {len(result['unstable'])} unstable"
        + "".join(f", {code} ×{n}" for code, n in codes.items())
        + f" ({result['seconds']} s)"
    )


# --- tables -------------------------------------------------------------------------------------


def summary(results: Sequence[dict[str, Any]], mode: str) -> list[str]:
    """The table of one mode in Markdown: totals, one line a model, and what did not run."""
    own = [r for r in results if r["mode"] == mode]
    ran = [r for r in own if "error" not in r and r["sites"]]
    failed = [r for r in own if "error" in r]
    keys = ("sites", "inductor", "fused", "proved")
    totals = {key: sum(r[key] for r in ran) for key in keys}
    wrong, unstable = (sum(len(r.get(key, ())) for r in ran) for key in ("wrong", "unstable"))
    full = sum(r["full_rank"] for r in ran)
    reasons = Counter(left["code"] for r in ran for left in r["left"])
    share = 100 / max(1, totals["sites"])
    without_inductor = all(r["not_lowered"] == r["graphs"] for r in ran)
    inductor = f"fuse {totals['inductor']} ({totals['inductor'] * share:.1f} %)"
    lines = [
        f"## {mode}",
        "",
        f"{len(ran)} architectures with attention: {totals['sites']} sites; Inductor's patterns "
        f"{'were not run' if without_inductor else inductor}, FlashFuse fuses {totals['fused']} "
        f"({totals['fused'] * share:.1f} %), {totals['proved']} proved; {wrong} wrong, {unstable} unstable. "
        f"{full} of the fused sites load a tensor of [Sq, Skv].",
        "",
        "Left: " + (", ".join(f"{code} {n}" for code, n in reasons.most_common()) or "none") + ".",
        "",
        "| architecture | sites | Inductor | FlashFuse | proved | wrong | unstable | left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(ran, key=lambda r: r["model"]):
        left = Counter(f"{x['code']}: {x['message']}" for x in r["left"])
        text = "; ".join(f"{n} × {what}" for what, n in left.items()).replace("|", "\\|")
        lines.append(
            f"| {r['model']} | {r['sites']} | {'' if without_inductor else r['inductor']} | {r['fused']} "
            f"| {r['proved']} "
            f"| {len(r['wrong'])} | {len(r.get('unstable', ()))} | {text} |"
        )
    without = [r["model"] for r in own if "error" not in r and not r["sites"]]
    if without:
        lines += ["", f"No attention in {len(without)}: {', '.join(sorted(without))}."]
    if failed:
        lines += ["", f"Did not run ({len(failed)}):", ""]
        lines += [f"- {r['model']}: {r['error'].partition(chr(10))[0][:200]}" for r in failed]
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--subset", action="store_true", help=f"{len(SUBSET)} architectures")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument(
        "--out", type=Path, default=Path("build/architectures"), help="folder of the JSON files"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--seconds", type=int, default=240, help="limit for one model in one mode")
    parser.add_argument("--without-inductor", action="store_true", help="leave Inductor out: twice as fast")
    parser.add_argument("--table", type=Path, help="where the tables go")
    chosen = parser.parse_args(arguments)
    kinds = chosen.only.split(",") if chosen.only else SUBSET if chosen.subset else model_types()
    modes = chosen.modes.split(",")
    global WITH_INDUCTOR
    WITH_INDUCTOR = not chosen.without_inductor
    unknown = [m for m in modes if m not in MODES]
    if unknown:
        parser.error(f"expected modes of {', '.join(MODES)}, got {', '.join(unknown)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    _warm_up()
    run_all([(kind, mode) for mode in modes for kind in kinds], chosen.out, chosen.jobs, chosen.seconds)
    results = [
        json.loads(f.read_text()) for kind in kinds for mode in modes for f in [_file(chosen.out, kind, mode)]
    ]
    lines = [f"Transformers {transformers.__version__}. {machine_line(torch.device('cpu'))}", ""]
    for mode in modes:
        lines += summary(results, mode)
    if chosen.table is not None:
        chosen.table.write_text("\n".join(lines))
    print("\n".join(line for line in lines if not line.startswith(("|", "-"))))
    return int(any(r.get("wrong") for r in results))


def _warm_up() -> None:
    """What every child needs: imports, and Inductor's patterns.  A backward pass would forbid to fork."""
    from torch._inductor.fx_passes.joint_graph import lazy_init

    def attention(q: torch.Tensor) -> torch.Tensor:
        return (q @ q.mT).softmax(-1) @ q

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        pipeline.run(gm, Options(verify="off"))
        _lower(gm, inputs)

    lazy_init(torch.device("cpu"))
    with torch.no_grad():
        _each_graph(attention, (torch.randn(1, 2, 4, 8),), {}, look)


if __name__ == "__main__":
    sys.exit(main())
