"""The checker: what it asks of a site, what it does about the answer, and that it leaves no trace."""

import dataclasses
import runpy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import fx, nn

import flashfuse
from flashfuse import checker, pipeline
from flashfuse.inputs import input_sets
from flashfuse.kernels import cpu
from flashfuse.options import Options
from flashfuse.passes.find import find_regions
from flashfuse.passes.plan import plan
from flashfuse.proof import prove
from flashfuse.proof.certificate import Certificate, NotProvable
from flashfuse.proof.key import site_key
from flashfuse.site import extract

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = Certificate(True, ("out", "dq", "dk", "dv"), ((23, 11),), (0,), 10, 0.1, "B1 H1 Sq3 Skv3 D2")
BAD = dataclasses.replace(GOOD, ok=False, difference="out[0, 0, 1, 0]: 5 instead of 7")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def plain(q, k, v):
    return (q @ k.mT / 4).softmax(-1) @ v


def times(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def masked(q, k, v, mask, bias):
    scores = (q @ k.mT * 0.25 + bias).masked_fill(~mask, -torch.inf)
    return torch.dropout(scores.softmax(-1), 0.3, True) @ v


def two_layers(q, k, v):
    return plain(plain(q, k, v), k, v)


def qkv():
    return [torch.randn(2, 3, 7, 16) for _ in "qkv"]


def traced(run, inputs=None):
    return pipeline.with_example_values(fx.symbolic_trace(run), inputs or qkv())


def planned(run, inputs=None):
    return plan(find_regions(traced(run, inputs).graph))


def rewritten(run, **options):
    return flashfuse.rewrite(traced(run), options=options)[1]


def answer(monkeypatch, what):
    """Puts ``what`` in the place of the proof; returns the list of the sites asked for."""
    asked = []

    def prove_site(plan):
        asked.append(plan.region.name)
        if isinstance(what, Exception):
            raise what
        return what

    monkeypatch.setattr(prove, "prove_site", prove_site)
    return asked


def break_the_kernel(monkeypatch):
    forward = cpu.forward

    def wrong(*args):
        out, lse = forward(*args)
        return out * 1.01, lse

    monkeypatch.setattr(cpu, "forward", wrong)


# --- which sites are the same -------------------------------------------------------------------


def test_originals_of_one_program_are_not_one_site():
    (a,), (b,) = planned(plain), planned(times)
    assert a.region.program == b.region.program
    assert site_key(a) != site_key(b)
    assert site_key(a) == site_key(planned(plain)[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:, :, :6],
        lambda t: t.double(),
        lambda t: t.mT.contiguous().mT,
    ],
)
def test_layout_and_dtype_are_part_of_a_site(change):
    (a,), (b,) = planned(plain), planned(plain, [change(t) for t in qkv()])
    assert site_key(a) != site_key(b)


def test_identical_layers_are_asked_for_once(monkeypatch):
    asked = answer(monkeypatch, dataclasses.replace(GOOD, elapsed_ms=5.0))
    report = rewritten(two_layers, verify="proof")
    assert report.num_proved == 2 and len(asked) == 1
    assert [site.check.proof.elapsed_ms for site in report.sites] == [5.0, 0.0]
    assert "×2" in str(report) and "2 fused, 2 proved, 0 left" in str(report)


def test_captures_keep_their_own_names(monkeypatch):
    def layers(q, k, v, first, second):
        inner = (q @ k.mT + first).softmax(-1) @ v
        return (inner @ k.mT + second).softmax(-1) @ v

    answer(monkeypatch, dataclasses.replace(GOOD, compared=("out", "dq", "dfirst")))
    bias = [torch.randn(2, 3, 7, 7) for _ in range(2)]
    _, report = pipeline.run(traced(layers, [*qkv(), *bias]), Options(verify="proof"))
    assert [site.check.proof.compared[-1] for site in report.sites] == ["dfirst", "dsecond"]


# --- policy -------------------------------------------------------------------------------------


def test_off_asks_for_nothing(monkeypatch):
    asked = answer(monkeypatch, BAD)
    report = rewritten(plain, verify="off")
    assert report.num_fused == 1 and not asked and report.sites[0].check is None
    assert "proved" not in str(report)


def test_a_proof_needs_no_numbers(monkeypatch):
    answer(monkeypatch, GOOD)
    monkeypatch.setattr(checker, "extract", None)
    check = rewritten(plain, verify="proof").sites[0].check
    assert check.ok and check.proof == GOOD and check.items == ()


def test_full_asks_for_both(monkeypatch):
    answer(monkeypatch, GOOD)
    check = rewritten(plain, verify="full").sites[0].check
    assert check.ok and check.proof == GOOD and len(check.items) > 4


@pytest.mark.parametrize(
    ("error", "why"), [(NotProvable("sort has no meaning"), "sort has no"), (KeyError("x"), "KeyError: 'x'")]
)
def test_numbers_stand_in_for_a_proof(monkeypatch, error, why):
    answer(monkeypatch, error)
    report = rewritten(plain, verify="proof")
    (site,) = report.sites
    assert site.status == "fused" and site.check.items and why in site.check.not_proved
    assert "not proved" in str(report) and "; compared numerically" in str(report)
    assert report.num_proved == 0


def test_neither_proof_nor_numbers(monkeypatch):
    answer(monkeypatch, NotProvable("sort has no meaning"))
    monkeypatch.setattr(checker, "MAX_SITE_BYTES", 0)
    report = rewritten(plain, verify="proof")
    (reason,) = report.sites[0].reasons
    assert reason.code == "not_proved" and "sort" in reason.message and "GiB" in reason.message
    assert 'options={"verify": "off"}' in reason.hint
    answer(monkeypatch, GOOD)
    report = rewritten(plain, verify="full")
    assert report.num_proved == 1 and "would take" in report.sites[0].check.not_compared


def test_a_failed_proof_leaves_the_site(monkeypatch, tmp_path):
    answer(monkeypatch, BAD)
    new, report = flashfuse.rewrite(gm := traced(plain), options={"verify": "proof"})
    (reason,) = report.sites[0].reasons
    assert new is gm and reason.code == "proof_failed" and BAD.difference in reason.message
    assert not report.ok and report.num_proved == 0 and '"repro"' in reason.hint
    report = rewritten(plain, verify="proof", repro=str(tmp_path / "new"))
    (path,) = (tmp_path / "new").iterdir()
    assert str(path) in report.sites[0].reasons[0].hint


def test_a_wrong_kernel_is_found_and_reproduced(monkeypatch, tmp_path):
    def attend(q, k, v, mask, bias):
        return masked(q, k, v, mask, bias)

    mask = torch.tensor([True] + [False] * 6).expand(2, 1, 7, 7)
    inputs = [*qkv(), mask, torch.randn(3, 7, 7)]
    with monkeypatch.context() as patch:
        break_the_kernel(patch)
        options = {"verify": "full", "repro": tmp_path}
        check = flashfuse.verify(attend, *inputs, options=options)
        (path,) = tmp_path.iterdir()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(path), run_name="__main__")
        assert exit.value.code == 1
    (site,) = check.sites
    assert not check.ok and site.reasons[0].code == "check_failed" and str(path) in site.reasons[0].hint
    text = path.read_text()
    assert "masked_fill" in text and "torch.bool" in text and "(2, 1, 7, 7), (0, 0, 0, 1)" in text
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


def test_modules_of_a_reproducer(monkeypatch, tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.softmax, self.dropout = nn.Softmax(-1), nn.Dropout(0.2)

        def forward(self, q, k, v):
            return self.dropout(self.softmax(q @ k.mT)) @ v

    answer(monkeypatch, BAD)
    rewritten(Layer(), verify="proof", repro=tmp_path)
    (path,) = tmp_path.iterdir()
    assert "torch.nn.Softmax(dim=-1)" in path.read_text() and "Dropout(p=0.2" in path.read_text()


# --- numbers ------------------------------------------------------------------------------------


def test_input_sets():
    mask, bias = torch.ones(2, 1, 1, 7, dtype=torch.bool), torch.randn(3, 7, 7)
    (site,) = planned(masked, [*qkv(), mask, bias])
    items = extract(site).check()
    assert all(item.ok for item in items), [item for item in items if not item.ok]
    assert [item.name for item in items if item.name.startswith("out")] == [
        "out",
        *(
            f"out ({name})"
            for name in (
                "scores of 1e4",
                "ties",
                "subnormal",
                "other strides",
                "rows without a key",
                "one key only",
                "-inf in added tensors",
                "-inf at all keys but one",
            )
        ),
    ]
    assert items[-1].name == "same bits in a second run (out, dq, dk, dv)"


@pytest.mark.parametrize("sizes", [(1, 3, 7, 16), (1, 1, 7, 16)])
def test_keys_are_never_all_alike(sizes):
    """An eager softmax cancels the gradients of such rows to 0, which no fused backward does."""
    inputs = [
        *(torch.randn(sizes) for _ in "qkv"),
        torch.ones(1, 1, 1, 7, dtype=torch.bool),
        torch.randn(1, 7, 7),
    ]
    site = extract(*planned(masked, inputs))
    for kind in input_sets(site):
        if not kind.cancels and kind.name != "ties":
            _, k, v = site.arguments(kind.inputs)[:3]
            assert not any(bool((x == x[:, :, :1]).all()) for x in (k, v)), kind.name


def test_runs_that_differ_are_told(monkeypatch):
    forward, calls = cpu.forward, []

    def restless(*args):
        calls.append(1)
        out, lse = forward(*args)
        return out * (1 + 1e-7 * len(calls)), lse

    monkeypatch.setattr(cpu, "forward", restless)
    (site,) = planned(plain)
    last = extract(site).check()[-1]
    assert not last.ok and last.note == "out differs from run to run"


def test_a_kernel_that_raises_is_a_difference(monkeypatch):
    answer(monkeypatch, GOOD)

    def broken(*args):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(cpu, "forward", broken)
    (reason,) = rewritten(plain, verify="full").sites[0].reasons
    assert reason.code == "check_failed" and "RuntimeError: no such tile" in reason.message


def test_a_site_in_an_autocast_region_is_run_there():
    def attend(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(q, k, v)

    check = flashfuse.verify(attend, *qkv(), options={"verify": "full"})
    assert check.ok and check.sites[0].check.items, check


def test_dropout_of_the_whole_model_is_told():
    inputs = [*qkv(), torch.ones(2, 1, 1, 7, dtype=torch.bool), torch.randn(3, 7, 7)]
    check = flashfuse.verify(masked, *inputs)
    assert check.ok and "without dropout" in str(check) and check.peak_bytes is not None
    assert "without dropout" not in str(flashfuse.verify(plain, *qkv()))


# --- nothing is left behind ---------------------------------------------------------------------


class Model(nn.Module):
    """Attention with everything that a run could disturb."""

    def __init__(self):
        super().__init__()
        self.project, self.norm = nn.Linear(16, 48), nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = self.norm(x.mT).mT
        q, k, v = self.project(x + 0.01 * torch.randn_like(x)).unsqueeze(1).chunk(3, -1)
        return self.dropout((q @ k.mT).softmax(-1)) @ v


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in tensors.items()}


def compile_only(verify):
    def run(model, x):
        # Compiling is what the checks are part of; the step itself may draw and update.
        graphs = []

        def keep(gm, inputs):
            graphs.append(
                flashfuse.backend.flashfuse(gm, inputs, options={"inner": "eager", "verify": verify})
            )
            return lambda *given: [torch.zeros_like(x)[:, None]]

        with torch.random.fork_rng():
            torch.compile(model, backend=keep)(x)
        assert graphs

    return run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "look",
    [
        flashfuse.explain,
        flashfuse.verify,
        lambda model, x: flashfuse.verify(model, x, options={"verify": "full"}),
        compile_only("proof"),
        compile_only("full"),
    ],
    ids=["explain", "verify", "verify full", "backend proof", "backend full"],
)
def test_no_trace(look, training):
    model, x = Model().train(training), torch.randn(3, 9, 16, requires_grad=True)
    model.dropout.eval()
    before, random = state(model), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    kept = x.detach().clone()
    look(model, x)
    after = state(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    assert torch.equal(x, kept) and [m.training for m in model.modules()] == modes


def test_experts_are_multiplied_in_float64_too():
    """PyTorch's ``grouped_mm``, which compiled mixtures of experts call in bfloat16, does not take it."""
    config = transformers.GptOssConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_local_experts=4, vocab_size=50,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssModel(config).to(torch.bfloat16).train()
    check = flashfuse.verify(model, backward=True, input_ids=torch.randint(0, 50, (2, 11)))
    assert check.ok, str(check)
