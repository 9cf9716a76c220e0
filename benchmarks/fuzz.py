"""Random attention code, by the thousand: each program comes out equal, or left alone with a reason.

    python benchmarks/fuzz.py [--examples 20000] [--seed 0] [--workers 2] [--out benchmarks/results/fuzz]

Programs are those of ``tests/fuzz_programs.py``, drawn in chunks; chunk i has the seed ``SEED * 100000 + i``
and a process of its own.  A finished chunk is kept beside the result until all are done, so that a run
that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from flashfuse.bench import machine_line

CHUNK = 250
EXAMPLES = 20
"""Programs of each kind that the record keeps; failures are all kept."""
TESTS = Path(__file__).parent.parent / "tests"
MODULES = ("fuzz_code", "fuzz_masks", "fuzz_programs", "fuzz_property")
VERSIONS = ("torch", "hypothesis", "flashfuse")


def load() -> Any:
    """The helper modules of the tests, by their own names; the folder is never on ``sys.path``."""
    for name in MODULES:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return sys.modules["fuzz_programs"], sys.modules["fuzz_property"]


def run_chunk(seed: int, examples: int) -> dict[str, Any]:
    """``examples`` programs of one seed: counts, and every failure with its program."""
    import hypothesis

    torch.set_num_threads(1)
    programs, prop = load()
    counts: Counter[str] = Counter()
    left: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    seen: dict[str, list[dict[str, str]]] = {"caught": [], "doubt": [], "nan": []}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs.programs())
    def run(program: Any) -> None:
        counts["programs"] += 1
        counts[f"captured by {program.capture}"] += 1
        try:
            found = prop.outcome(program)
        except Exception as error:
            # PyTorch itself refuses the program: a mistake of the strategy.
            counts["invalid"] += 1
            failures.append({"what": f"invalid: {type(error).__name__}: {error}", "program": str(program)})
            return
        counts["sites fused"] += found.fused
        counts["sites left"] += len(found.left)
        counts["with a fused site"] += found.fused > 0
        counts["nothing found"] += not found.fused and not found.left and not found.failure
        left.update(found.left)
        if found.failure:
            counts[found.failure.partition(":")[0]] += 1
            failures.append({"what": found.failure, "program": str(program)})
        for kind, listed in seen.items():
            what = getattr(found, kind)
            if what:
                counts[kind] += 1
                listed.append({"what": what, "program": str(program)})

    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {"counts": counts, "left": left, "failures": failures, "seen": seen, "seconds": seconds}


def chunks(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Seed and number of programs of every chunk."""
    starts = range(0, options.examples, CHUNK)
    return [
        (options.seed * 100_000 + i, min(CHUNK, options.examples - start)) for i, start in enumerate(starts)
    ]


def run_all(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The result of every chunk, from ``folder`` where it is there already."""
    done: dict[tuple[int, int], dict[str, Any]] = {}
    for chunk in chunks(options):
        path = folder / f"{chunk[0]}-{chunk[1]}.json"
        if path.exists():
            done[chunk] = json.loads(path.read_text())
    missing = [chunk for chunk in chunks(options) if chunk not in done]
    context = multiprocessing.get_context("spawn")
    # A process per chunk: what Dynamo keeps of one program slows down the next.
    with ProcessPoolExecutor(options.workers, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_chunk, *chunk): chunk for chunk in missing}
        for future in as_completed(running):
            chunk = running[future]
            done[chunk] = future.result()
            (folder / f"{chunk[0]}-{chunk[1]}.json").write_text(json.dumps(done[chunk]))
            counts = Counter[str]()
            for result in done.values():
                counts.update(result["counts"])
            failed = sum(len(result["failures"]) for result in done.values())
            print(
                f"{counts['programs']} programs, {counts['sites fused']} fused, {failed} failed", flush=True
            )
    return [done[chunk] for chunk in chunks(options)]


def summary(options: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    counts, left = Counter[str](), Counter[str]()
    for result in results:
        counts.update(result["counts"])
        left.update(result["left"])
    return {
        "seed": options.seed,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "machine": machine_line(torch.device("cpu")),
        "counts": {**dict.fromkeys(("different", "crash", "report", "invalid"), 0), **counts},
        "left": dict(left.most_common()),
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "failures": [failure for result in results for failure in result["failures"]],
        "examples": {
            kind: [example for result in results for example in result["seen"][kind]][:EXAMPLES]
            for kind in ("caught", "doubt", "nan")
        },
    }


def page(record: dict[str, Any]) -> str:
    counts = record["counts"]
    rows = {
        "programs": counts["programs"],
        "with at least one fused site": counts["with a fused site"],
        "without attention that we look for": counts["nothing found"],
        "sites fused": counts["sites fused"],
        "sites left": counts["sites left"],
        **{f"left: `{code}`": n for code, n in record["left"].items()},
        "different": counts["different"],
        "crashed": counts["crash"],
        "left without a reason, or for a fault of ours": counts["report"],
        "not valid PyTorch": counts["invalid"],
        "left by the checker, and would have been different": counts.get("caught", 0),
        "false alarms: left by the checker, or outside the rule under one draw only": counts.get("doubt", 0),
        "gradients that are NaN in the original and numbers in ours": counts.get("nan", 0),
    }
    per_program = 1e3 * record["seconds"] / max(counts["programs"], 1)
    return "\n".join(
        [
            f"Random attention code (`python benchmarks/fuzz.py`), seed {record['seed']}: every program must",
            "come out equal, in outputs and gradients, or left alone with a reason.",
            "",
            "| | |",
            "|---|---:|",
            *(f"| {name} | {n} |" for name, n in rows.items()),
            "",
            f"{record['seconds']:.0f} s of one core, {per_program:.0f} ms per program.",
            f"{record['machine']}, Hypothesis {record['versions']['hypothesis']}",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fuzz")
    options = parser.parse_args()
    folder = options.out.with_name(f".{options.out.name}-{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    record = summary(options, run_all(options, folder))
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(record))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    print(page(record))
    for failure in record["failures"]:
        print(f"--- {failure['what']}\n{failure['program']}")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
