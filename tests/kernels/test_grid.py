"""Pairs of all axes of the grid of sites: the CPU variant, and the kernels under Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_grid import AXES, CPU, FULL, INTERPRETER, KERNEL_AXES, check

from flashfuse.kernels import cpu

TESTS = Path(__file__).parent.parent
PARTS = 2

SCRIPT = """
import importlib.util, json, pathlib, sys
for name in ("kernel_cases", "kernel_grid", "interpreter_bf16"):
    path = pathlib.Path(sys.argv[1]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
from interpreter_bf16 import install
from kernel_grid import INTERPRETER, check
from flashfuse.kernels import configs, triton_attention

install()
# The interpreter's time goes by the number of tiles; those of the table run in test_triton_interpreter.py.
choose = configs.choose
configs.choose = lambda kernel, kind: choose(kernel, kind)._replace(bm=64, bn=64)
results = {}
for text in sys.argv[2:]:
    try:
        results[text] = check(triton_attention, INTERPRETER, INTERPRETER.parse(text), "cpu").failure
    except Exception as error:
        results[text] = f"{type(error).__name__}: {error}"
print("RESULTS" + json.dumps(results))
"""


@pytest.mark.parametrize("point", CPU.covering(2), ids=str)
def test_cpu_variant_is_equal_under_the_rule(point, one_thread):
    outcome = check(cpu, CPU, point, "cpu")
    assert not outcome.failure, f"{point}: {outcome.failure}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_are_equal_under_the_rule(part):
    points = [str(point) for point in INTERPRETER.covering(2)[part::PARTS]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(TESTS), *points],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    results = json.loads(done.stdout.rpartition("RESULTS")[2])
    failed = {name: error for name, error in results.items() if error}
    assert not failed, "\n".join(f"{name}: {error[:300]}" for name, error in failed.items())
    assert len(results) == len(points)


def test_a_covering_array_has_every_pair():
    points = INTERPRETER.covering(2)
    assert len(points) < 80 and points == INTERPRETER.covering(2)
    for i, first in enumerate(AXES):
        for second in AXES[:i]:
            met = {(getattr(p, first), getattr(p, second)) for p in points}
            assert met == {(row[first], row[second]) for row in INTERPRETER.rows((first, second))}


def test_parts_of_the_shuffled_grid_are_the_grid():
    points = list(INTERPRETER.shuffled())
    assert len(set(points)) == len(points) == len(INTERPRETER)
    parts = [p for part in range(3) for p in INTERPRETER.shuffled(part=part, parts=3)]
    assert set(parts) == set(points) and len(parts) == len(points)
    first = points[0]
    assert all(p.kernels == first.kernels for p in points[:3]) and len(first.kernels) == len(KERNEL_AXES)


def test_a_point_is_read_back_as_it_is_printed():
    for point in FULL.covering(1):
        assert FULL.parse(str(point)) == point
    with pytest.raises(ValueError, match="length"):
        FULL.parse("bf16,64,2,same,1,none,none,plain,0.0")
