"""The command line: exit codes, one-line errors, nothing half-written; and the timing table."""

import functools
import json
import os
import re

import pytest
import torch

import flashfuse
from flashfuse import backend, bench, cli, hf
from flashfuse.bench import Bench, Row
from flashfuse.kernels import dispatch
from flashfuse.report import CheckItem, ModelCheck

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(hf, "_hub_answers", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 on disk."""
    path = tmp_path_factory.mktemp("gpt2")
    hf.load("gpt2", tiny=True).model.save_pretrained(path)
    return str(path)


def one_line(capsys):
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if not line.startswith("[")]
    assert len(said) == 1 and said[0].startswith("flashfuse: "), err
    return out, said[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "arguments are required: {explain,verify}"),
        (["explain"], "required: MODEL"),
        (["explain", "gpt2", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["explain", "gpt2", "--attn", "flash"], "invalid choice: 'flash'"),
        (["explain", "gpt2", "--batch", "0"], "expected a number of at least 1, got '0'"),
        (["explain", "gpt2", "--seq", "-3"], "expected"),
        (["verify", "gpt2", "--bench"], "unrecognized arguments: --bench"),
        (["explain", "gpt2", "--device", "abacus"], "expected cpu, cuda or cuda:N, got 'abacus'"),
        (["explain", "gpt2", "--device", "mps"], "expected cpu, cuda or cuda:N, got 'mps'"),
        (["explain", "gpt2", "--device", "cuda:77"], "this machine has"),
        (
            ["explain", "gpt2", "--json", "/no/such/place/x.json"],
            "--json /no/such/place/x.json: cannot be written",
        ),
        (["explain", "gpt2", "--json", "/"], "--json /: this is a folder"),
        (["verify", "gpt2", "--repro", "/dev/null/x"], "--repro /dev/null/x: no files can be put there"),
        (["explain", "gpt2", "--full"], "unrecognized arguments: --full"),
    ],
)
def test_wrong_usage_is_told_before_any_work(argv, says, monkeypatch, capsys):
    def work(*args, **kwargs):
        raise AssertionError("the model was loaded although the usage is wrong")

    monkeypatch.setattr(hf, "load", work)
    assert cli.main(argv) == cli.USAGE
    out, error = one_line(capsys)
    assert says in error and not out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["explain", "gtp2"], "unknown model 'gtp2'"),
        (["verify", "./nowhere"], "there is no folder ./nowhere"),
        (["explain", "FOLDER", "--seq", "9999"], "at most 256 positions, not 9999"),
    ],
)
def test_wrong_models(argv, says, folder, tmp_path, capsys):
    target = tmp_path / "report.json"
    argv = [folder if word == "FOLDER" else word for word in argv]
    assert cli.main([*argv, "--json", str(target)]) == cli.USAGE
    out, error = one_line(capsys)
    assert says in error and not out
    assert os.listdir(tmp_path) == []


def test_explain(folder, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert cli.main(["explain", folder, "--seq", "40", "--batch", "2", "--json", str(target)]) == cli.EQUAL
    out, err = capsys.readouterr()
    assert "2 attention sites, 2 fused, 2 proved, 0 left" in out
    assert "kv <= q" in out and "s*0.25" in out
    assert re.search(r"whole model: equal, \d\d tensors", out) and "2 sites: equal" in out
    assert "before," in out and "modeling_gpt2.py" in out
    assert "loading" in err and "checking" in err
    results = json.loads(target.read_text())
    assert results["report"]["num_fused"] == 2 and results["bench"] is None
    assert results["inputs"] == "input_ids 2×40, inference"
    assert os.listdir(tmp_path) == ["report.json"]


def test_explain_in_training(folder, capsys):
    assert cli.main(["explain", folder, "--seq", "24", "--train"]) == cli.EQUAL
    out = capsys.readouterr().out
    assert "2 fused" in out and "dropout" in out and "training" in out


@pytest.mark.parametrize("options", [[], ["--train", "--padded", "--batch", "2"], ["--dtype", "bfloat16"]])
def test_verify_equal(folder, options, capsys):
    assert cli.main(["verify", folder, "--seq", "24", *options]) == cli.EQUAL
    assert re.search(r"whole model: equal, \d\d tensors", capsys.readouterr().out)


def test_verify_of_nothing_is_no_success(folder, monkeypatch, capsys):
    monkeypatch.setattr(flashfuse, "verify", lambda *args, **kwargs: ModelCheck(True), raising=False)
    assert cli.main(["verify", folder]) == cli.FAILED
    assert "nothing was compared" in one_line(capsys)[1]


def test_verify_different(folder, monkeypatch, capsys):
    module = dispatch.implementation("cpu")
    forward = module.forward

    def wrong(*args, **kwargs):
        out, lse = forward(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(module, "forward", wrong)
    assert cli.main(["verify", folder, "--seq", "24"]) == cli.DIFFERENT
    assert "DIFFERENT" in capsys.readouterr().out


def test_verify_full_writes_reproducers(folder, monkeypatch, tmp_path, capsys):
    module = dispatch.implementation("cpu")
    forward = module.forward
    options = ["verify", folder, "--seq", "24", "--full", "--repro", str(tmp_path / "new")]
    assert cli.main(options) == cli.EQUAL
    out, err = capsys.readouterr()
    assert "Proof: 2 of 2 sites" in out and "2 sites: equal" in out and "peak memory" in out
    assert "proving" in err and "comparing" in err
    assert os.listdir(tmp_path / "new") == []
    monkeypatch.setattr(module, "forward", lambda *args: tuple(1.01 * t for t in forward(*args)))
    assert cli.main(options) == cli.DIFFERENT
    (name,) = os.listdir(tmp_path / "new")
    said = "".join(capsys.readouterr().out.split())
    assert "check_failed" in said and f"{name}showsthedifference" in said


def test_an_error_of_our_own_is_one_line_and_writes_nothing(folder, monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("something broke\nand more")

    monkeypatch.setattr(flashfuse, "verify", fail, raising=False)
    target = tmp_path / "check.json"
    assert cli.main(["verify", folder, "--json", str(target)]) == cli.FAILED
    _, error = one_line(capsys)
    assert "RuntimeError: something broke" in error
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError):
        cli.main(["verify", folder, "--debug"])


def test_verify_writes_json(folder, monkeypatch, tmp_path):
    check = ModelCheck(False, (CheckItem("out", 3e-7, 1e-7, 2e-7, False),))
    monkeypatch.setattr(flashfuse, "verify", lambda *args, **kwargs: check, raising=False)
    target = tmp_path / "check.json"
    target.write_text("old")
    assert cli.main(["verify", folder, "--json", str(target)]) == cli.DIFFERENT
    assert json.loads(target.read_text())["check"]["items"][0]["name"] == "out"


# --- the table ---------------------------------------------------------------------------------


def test_no_speedup_is_shown_where_results_differ():
    rows = (Row("eager", (10.0, 12.0, 11.0), 100, 0.1), Row("flashfuse", (5.0, 5.5, 6.0), 50, 1.0))
    good, bad = (Bench("step", "machine", rows, equal) for equal in (True, False))
    assert good.speedup("flashfuse") == 2.0 and "2.00" in str(good)
    assert bad.speedup("flashfuse") is None and "2.00" not in str(bad)
    assert "no speed-up is shown for flashfuse: its results differ" in str(bad)
    assert bad.to_dict()["rows"][1]["speedup"] is None


def test_a_way_that_cannot_run_is_a_row():
    def fail():
        raise OSError("no compiler\ndetails")

    rows = bench.measure({"eager": lambda: None, "broken": fail}, torch.device("cpu"))
    assert len(rows[0].times_ms) == bench.MAX_ROUNDS
    assert rows[1].error == "OSError: no compiler" and rows[1].median_ms is None
    assert "broken: OSError: no compiler" in str(Bench("", "", rows, True))


def test_rounds_fit_the_budget():
    calls = []
    rows = bench.measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, torch.device("cpu"), budget_s=0
    )
    assert {len(row.times_ms) for row in rows} == {bench.MIN_ROUNDS}
    timed = calls[6 : 6 + 2 * bench.MIN_ROUNDS]
    assert timed == ["a", "b"] * bench.MIN_ROUNDS, "rounds are interleaved"


def test_peak_memory_counts_what_is_held_at_once():
    kept = torch.zeros(256, 1024)

    def step():
        first = torch.ones(256, 1024)
        second = first + kept
        del first
        third = second * 2
        return third.sum()

    assert bench.peak_bytes(step, torch.device("cpu")) == pytest.approx(2 * 2**20, abs=4096)


def test_ways_share_weights_and_not_settings(folder):
    model = hf.load(folder).model
    twin = bench._twin(model, "sdpa")
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert (model.config._attn_implementation, twin.config._attn_implementation) == ("eager", "sdpa")


@pytest.mark.parametrize("train", [False, True])
def test_bench_of_a_model(folder, train, monkeypatch):
    ways = {"eager": ("eager", None), "sdpa": ("sdpa", None), "absent": ("nonsense", None)}
    without_inductor = functools.partial(backend.flashfuse, options={"inner": "eager"})
    monkeypatch.setattr(bench, "WAYS", {**ways, "flashfuse": (None, without_inductor)})
    loaded = hf.load(folder)
    table = bench.bench_model(loaded.model, loaded.inputs(2, 32), train=train, equal=True)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["eager", "sdpa", "absent", "flashfuse"]
    assert rows["absent"].error and rows["absent"].median_ms is None
    assert rows["flashfuse"].median_ms > 0 and not rows["flashfuse"].error and table.notes == ()
    assert flashfuse.last_report().num_fused == 2
    assert all(p.grad is None for p in loaded.model.parameters())
    assert "threads" in table.machine and "torch" in table.machine
    json.dumps(table.to_dict(), allow_nan=False)
