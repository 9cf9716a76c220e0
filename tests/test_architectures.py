"""The sweep over architectures, on two dozen of them: what reach means, seen in every run of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SWEEP = Path(__file__).parents[1] / "benchmarks" / "architectures.py"
MODE = "eager-inference"


def test_subset(tmp_path):
    """Every site is fused and proved, and nothing is wrong."""
    command = [sys.executable, str(SWEEP), "--subset", "--modes", MODE, "--without-inductor"]
    command += ["--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(results) == 25, run.stderr[-2000:]
    for result in results:
        name = f"{result['model']} {result['mode']}"
        assert "error" not in result, f"{name}: {result['error']}"
        assert result["sites"] > 0, name
        assert not result["wrong"], name
        assert result["fused"] == result["proved"] == result["sites"], f"{name}: {result['left']}"
