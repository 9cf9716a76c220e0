"""Tuning without a GPU: what is chosen, kept, refused and undone; kernels and clock are stubs."""

import itertools
import json
import logging
import multiprocessing
import os
import stat
import types

import pytest
import torch

from flashfuse.kernels import autotune, configs, dispatch, launch
from flashfuse.kernels.autotune import Sizes, Trial, best, candidates, fits
from flashfuse.kernels.configs import Config
from flashfuse.kernels.spec import AttentionShape, ScoreProgram
from flashfuse.options import Options

KERNELS = ("forward", "dkdv", "dk", "dv", "dq", "table")
HOPPER = 227 * 1024
STATIC, SMALL, LARGE = Config(64, 64, 4, 3), Config(32, 64, 4, 2), Config(128, 128, 8, 3)
CHOICES = [STATIC, SMALL, LARGE]
DEVICE = torch.device("cuda")
KEY = {"kernel": "forward", "code": "0123", "sizes": {"lengths": [512, 512]}}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """A process that knows nothing, its own cache, and a device that is not capturing."""
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_environment", lambda device: {"format": 1, "device": "stub"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("FLASHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    autotune._warn.cache_clear()


class Device:
    """Candidates with the times that it is given; notes which are launched and how often one is timed."""

    def __init__(self, monkeypatch, times, spills=None, results=None):
        self.times, self.spills, self.results = times, spills or {}, results or {}
        self.launched, self.timed = [], 0
        monkeypatch.setattr(autotune, "elapsed_ms", self.elapsed_ms)

    def __call__(self, config):
        self.launched.append(config)
        if isinstance(self.times[config], Exception):
            raise self.times[config]
        result = self.results.get(config, torch.ones(4))
        return Trial(self.spills.get(config, 0), [result], lambda: config)

    def elapsed_ms(self, run):
        self.timed += 1
        return self.times[run()]


def files(tmp_path):
    folder = tmp_path / "cache"
    return sorted(folder.iterdir()) if folder.exists() else []


# --- candidates --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_candidates_are_measured_configs_that_fit_and_the_tables_choice_comes_first(kernel, itemsize, dim):
    for capability, dropout, loads in ((9, False, ""), (8, True, ""), (10, False, "tiles")):
        of_site = (dropout, False, True, False, False, loads)
        kind = configs.Kind(dim, itemsize, capability, capability == 9, *of_site)
        if kernel in ("dk", "dv") and not configs.are_apart(kind):
            continue
        static = configs.choose(kernel, kind)
        sizes = Sizes(dim, dim, itemsize, HOPPER, dropout)
        found = candidates(kernel, static, sizes)
        assert found[0] == static and len(found) == len(set(found)) <= 6
        for config in found[1:]:
            assert config in configs.measured(kernel, itemsize)
            assert 128 % config.bm == 0 == 128 % config.bn and config.bn % 32 == 0
            assert fits(kernel, config, sizes)


def test_every_choice_of_the_tables_is_among_what_was_measured():
    flags = itertools.product((False, True), repeat=6)
    loads = ("", "tiles", "scattered", "distances", "buckets", "line")
    for kernel, size, dim, capability, of, load in itertools.product(
        KERNELS, (2, 4), (64, 128, 256), (8, 9, 10), flags, loads
    ):
        kind = configs.Kind(dim, size, capability, of[0] and capability == 9, *of[1:], load)
        if kernel not in ("dk", "dv") or configs.are_apart(kind):
            assert configs.choose(kernel, kind) in configs.measured(kernel, size)


def test_what_cannot_fit_is_not_compiled():
    sizes = Sizes(128, 128, 2, HOPPER, False)
    assert fits("forward", LARGE, sizes)
    assert not fits("forward", LARGE, sizes._replace(shared=100 * 1024)), "shared memory"
    assert not fits("forward", LARGE, sizes._replace(dim=256, v_dim=256))
    assert not fits("dq", Config(128, 64, 4, 3), sizes), "registers"
    assert not fits("forward", Config(128, 64, 4, 3), sizes._replace(dropout=True)), "the draws' registers"
    for wrong in (Config(96, 64, 4, 3), Config(64, 48, 4, 3), Config(64, 16, 4, 3), Config(16, 32, 8, 1)):
        assert not fits("forward", wrong, sizes)


# --- the choice --------------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_one_line_is_logged(monkeypatch, caplog):
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 2.0})
    with caplog.at_level(logging.INFO, "flashfuse"):
        assert best(KEY, DEVICE, CHOICES, device) == SMALL
    (record,) = caplog.records
    assert (
        "forward, lengths [512, 512]" in record.getMessage()
        and "(32, 64, 4, 2) 0.5 ms" in record.getMessage()
    )


@pytest.mark.parametrize("of_small", [1.0, 0.99, RuntimeError("out of shared memory")])
def test_the_tables_choice_stays_unless_another_is_clearly_faster(monkeypatch, of_small):
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: of_small, LARGE: ValueError("does not compile")})
    assert best(KEY, DEVICE, CHOICES, device) == STATIC


def test_what_spills_or_computes_something_else_is_dropped(monkeypatch):
    times = {STATIC: 1.0, SMALL: 0.1, LARGE: 0.1}
    wrong = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    device = Device(monkeypatch, times, spills={SMALL: 100}, results={LARGE: wrong})
    assert best(KEY, DEVICE, CHOICES, device) == STATIC
    device = Device(monkeypatch, times, spills={STATIC: 100, SMALL: 100}, results={LARGE: torch.zeros(4)})
    assert best({**KEY, "code": "4567"}, DEVICE, CHOICES, device) == SMALL


def test_results_may_differ_by_roundings():
    exact = torch.tensor([1.0, -2.0, float("nan"), float("inf")])
    assert autotune._alike([exact * 1.01], [exact])
    assert not autotune._alike([exact * 1.2], [exact])
    assert not autotune._alike([exact.nan_to_num()], [exact])
    assert autotune._alike([torch.empty(0)], [torch.empty(0)])


def test_nothing_that_goes_wrong_is_an_error(monkeypatch, tmp_path):
    device = Device(monkeypatch, {STATIC: torch.OutOfMemoryError(), SMALL: 0.5, LARGE: 0.5})
    assert best(KEY, DEVICE, CHOICES, device) == STATIC
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 0.5})

    def fails(run):
        raise RuntimeError("no clock")

    monkeypatch.setattr(autotune, "elapsed_ms", fails)
    assert best(KEY, DEVICE, CHOICES, device) == STATIC
    assert files(tmp_path) == [] and autotune._known == {}, "the next call tries again"


def test_one_choice_needs_no_trial(monkeypatch, tmp_path):
    device = Device(monkeypatch, {STATIC: 1.0})
    assert best(KEY, DEVICE, [STATIC], device) == STATIC
    assert device.launched == [] and files(tmp_path) == []


def test_nothing_is_launched_while_a_graph_is_captured(monkeypatch, tmp_path):
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 2.0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best(KEY, DEVICE, CHOICES, device) == STATIC
    assert device.launched == [] and files(tmp_path) == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert best(KEY, DEVICE, CHOICES, device) == SMALL
    launched = len(device.launched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best(KEY, DEVICE, CHOICES, device) == SMALL and len(device.launched) == launched


# --- on disk -----------------------------------------------------------------------------------


def tuned_then_forgotten(monkeypatch, tmp_path):
    """The file of a tuned kernel, for a process that has not tuned it."""
    assert best(KEY, DEVICE, CHOICES, Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 2.0})) == SMALL
    autotune._known.clear()
    (path,) = files(tmp_path)
    return path


def test_what_is_on_disk_is_not_timed_again(monkeypatch, tmp_path):
    tuned_then_forgotten(monkeypatch, tmp_path)
    device = Device(monkeypatch, {STATIC: 0.1, SMALL: 0.5, LARGE: 0.1})
    for _ in range(3):
        assert best(KEY, DEVICE, CHOICES, device) == SMALL
    assert device.timed == 0 and device.launched == [SMALL], "tried once before it is used"


def test_what_is_on_disk_and_fails_here_is_not_used(monkeypatch, tmp_path):
    tuned_then_forgotten(monkeypatch, tmp_path)
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: RuntimeError("no"), LARGE: 0.1})
    assert best(KEY, DEVICE, CHOICES, device) == STATIC


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: "[1, 2]",
        lambda text: text.replace('"bm": 32', '"bm": 96'),
        lambda text: text.replace('"bm": 32', '"bm": "32"'),
        lambda text: text.replace('"bn": 64', '"bn": 128'),
        lambda text: text.replace('"code": "0123"', '"code": "4567"'),
    ],
)
def test_a_damaged_or_foreign_file_is_written_anew(monkeypatch, tmp_path, damage):
    path = tuned_then_forgotten(monkeypatch, tmp_path)
    whole = path.read_text()
    assert damage(whole) != whole
    path.write_text(damage(whole))
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 2.0})
    assert best(KEY, DEVICE, CHOICES, device) == SMALL
    assert device.timed and path.read_text() == whole and files(tmp_path) == [path]


def test_bytes_that_are_no_text_are_written_over(monkeypatch, tmp_path):
    path = tuned_then_forgotten(monkeypatch, tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    assert best(KEY, DEVICE, CHOICES, Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 2.0})) == SMALL
    assert json.loads(path.read_text())["config"] == SMALL._asdict()


@pytest.mark.parametrize("changed", ["device", "triton", "sources", "format"])
def test_a_result_holds_for_its_version_and_device(monkeypatch, tmp_path, changed):
    tuned_then_forgotten(monkeypatch, tmp_path)
    monkeypatch.setattr(autotune, "_environment", lambda device: {"format": 1, "device": "stub", changed: 2})
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 1.0, LARGE: 0.5})
    assert best(KEY, DEVICE, CHOICES, device) == LARGE and len(files(tmp_path)) == 2


def test_the_key_names_device_triton_and_sources(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton")
    found = autotune._environment(DEVICE)
    assert set(found) == {"format", "sources", "triton", "device"} and found["device"] == "NVIDIA H100 sm_90"
    assert len(found["sources"]) == 16


def test_folder_and_files_are_private(monkeypatch, tmp_path):
    before = os.umask(0)
    try:
        path = tuned_then_forgotten(monkeypatch, tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_where_the_folder_is(monkeypatch, tmp_path):
    assert autotune.folder() == tmp_path / "cache"
    monkeypatch.delenv("FLASHFUSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert autotune.folder() == tmp_path / "xdg" / "flashfuse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert autotune.folder() == tmp_path / "home" / ".cache" / "flashfuse"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch, tmp_path, mode):
    path = tuned_then_forgotten(monkeypatch, tmp_path)
    path.parent.chmod(mode)
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 1.0, LARGE: 0.5})
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        assert best(KEY, DEVICE, CHOICES, device) == LARGE
    assert json.loads(path.read_text())["config"] == SMALL._asdict()


def test_a_folder_of_somebody_else_is_not_used(monkeypatch, tmp_path):
    tuned_then_forgotten(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "cache").stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="belongs to somebody else"):
        assert autotune.folder() is None


@pytest.mark.parametrize("obstacle", ["file", "full"])
def test_a_disk_that_takes_nothing_is_done_without(monkeypatch, tmp_path, obstacle):
    if obstacle == "file":
        (tmp_path / "cache").write_text("")
    else:

        def full(*args, **kwargs):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "replace", full)
    device = Device(monkeypatch, {STATIC: 1.0, SMALL: 0.5, LARGE: 2.0})
    assert best(KEY, DEVICE, CHOICES, device) == SMALL
    timed = device.timed
    assert best(KEY, DEVICE, CHOICES, device) == SMALL and device.timed == timed, "known in this process"
    if obstacle == "full":
        assert files(tmp_path) == []


def _write_and_read(worker, started):
    started.wait()
    whole = 0
    for i in range(200):
        autotune._write("name", '{"code": 1}', CHOICES[(worker + i) % 3])
        whole += autotune._read("name", '{"code": 1}', CHOICES) is not None
    os._exit(0 if whole == 200 else 1)


def test_processes_that_write_at_once_leave_whole_files(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    workers = [context.Process(target=_write_and_read, args=(i, started)) for i in range(3)]
    for worker in workers:
        worker.start()
    started.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [path.name for path in files(tmp_path)] == ["name.json"]


# --- a site ------------------------------------------------------------------------------------

TABLE = "s*0.125 + table[h, kv - q + Sq - 1] where kv <= q"


@pytest.fixture
def stubs(monkeypatch):
    """``triton_attention`` on stubs of kernels, which add 1 to the captures' gradients at each launch.

    That of dq adds 1 to the rows' statistics, which are noted as that of dk and dv has them.

    What is noted is the kernel's name and tiles, of launches in trials and of others.
    """
    pytest.importorskip("triton")
    from flashfuse.kernels import triton_attention

    noted = types.SimpleNamespace(module=triton_attention, trials=[], others=[], timed=0, fastest=SMALL)

    def launcher(calls):
        def run(what, *tensors):
            given = dict(zip(what.kernel.arg_names, (*tensors, *what.numbers), strict=True))
            tiles = tuple(given.get(name) for name in ("BM", "BN", "TILE")), what.num_warps, what.num_stages
            calls.append((what.kernel.fn.__name__, tiles))
            for name in ("Out", "Lse", "DK", "DV_", "DQ"):
                if isinstance(given.get(name), torch.Tensor):
                    given[name].fill_(1)
            for buffer in {id(t): t for t in given.get("gptrs", ())}.values():
                buffer.add_(1)
            name = what.kernel.fn.__name__
            if name == "backward_rows":
                given["Stats"].zero_()
            elif name == "backward_dq":
                given["Stats"].add_(1)
            elif name == "backward_dkdv":
                noted.stats = given["Stats"].clone()
            return types.SimpleNamespace(n_spills=0, what=what, run=run)

        return run

    def direct(compiled, what):
        def again(*tensors):
            compiled.run(what, *tensors)

        again.what = what
        return again

    def elapsed_ms(run):
        noted.timed += 1
        run()
        what = run.func.what
        return 0.5 if (what.num_warps, what.num_stages) == noted.fastest[2:4] else 1.0

    for module, calls in ((autotune, noted.trials), (launch, noted.others)):
        monkeypatch.setattr(module, "launch", launcher(calls))
        monkeypatch.setattr(module, "direct", direct)
    monkeypatch.setattr(autotune, "elapsed_ms", elapsed_ms)
    monkeypatch.setattr(autotune, "shared_memory", lambda device: HOPPER)
    monkeypatch.setattr(triton_attention, "_may_tune", lambda device: True)
    monkeypatch.setattr(triton_attention, "_SITES", {})
    return noted


def run_site(
    noted, tune, length=300, text=TABLE, dim=64, kv_heads=4, dropout_p=0.0, wants=True, captures=None
):
    program = ScoreProgram.parse(text)
    q, do = (torch.zeros(1, 4, length, dim, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.zeros(1, kv_heads, length, dim, dtype=torch.bfloat16) for _ in range(2))
    if captures is None:
        captures = [torch.zeros(4, 2 * length - 1)] if program.captures else []
    seed = torch.tensor([1]) if dropout_p else None
    site = (captures, (), (), seed, program, dropout_p)
    options = {"tune": True} if tune else {}
    out, lse = noted.module.forward(q, k, v, *site, **options)
    wanted = tuple(i for i, c in enumerate(captures) if wants and c.is_floating_point())
    return noted.module.backward(do, q, k, v, out, lse, *site, wanted, **options)


def test_a_site_is_tuned_at_its_first_call_and_its_buffers_hold_one_call(stubs):
    gradients = run_site(stubs, tune=True)
    assert {name for name, _ in stubs.trials} == {
        "attention_forward", "backward_dkdv", "backward_dq", "backward_table",
    }  # fmt: skip
    # dq and the table's kernel added 1 each, whatever the trials added elsewhere.
    assert torch.equal(gradients[3], torch.full_like(gradients[3], 2.0))
    assert torch.equal(stubs.stats, torch.ones_like(stubs.stats))
    chosen = dict(stubs.others)
    assert len(chosen) == len(stubs.others), "each of the site's kernels ran once"
    assert chosen["attention_forward"] == ((64, 32, None), 4, 2), "not the tables' choice, but the fastest"
    trials = len(stubs.trials)
    gradients = run_site(stubs, tune=True)
    assert torch.equal(gradients[3], torch.full_like(gradients[3], 2.0))
    run_site(stubs, tune=True, length=310)
    assert len(stubs.trials) == trials, "lengths up to the next power of two are alike"
    run_site(stubs, tune=True, length=513)
    assert len(stubs.trials) > trials


def test_what_a_kernel_is_compiled_for_is_in_the_key(stubs, monkeypatch):
    keys = []

    def best(key, device, choices, attempt):
        keys.append(json.dumps(key, sort_keys=True))
        return choices[0]

    monkeypatch.setattr(autotune, "best", best)

    def of(**how):
        keys.clear()
        stubs.module._SITES.clear()
        run_site(stubs, tune=True, **how)
        return tuple(keys)

    usual = of()
    assert of(length=310) == usual and of(text=TABLE.replace("table", "bias")) == usual
    others = [
        of(**how)
        for how in (
            {"text": TABLE.replace(" where kv <= q", "")},
            {"text": TABLE.replace("0.125", "0.25")},
            {"text": "s*0.125 where kv <= q"},
            {"length": 384},
            {"length": 512},
            {"length": 600},
            {"dim": 128},
            {"dim": 56},
            {"kv_heads": 2},
            {"dropout_p": 0.1},
        )
    ]
    assert len({usual, *others}) == 1 + len(others)
    unwanted = of(wants=False)
    assert unwanted[:1] == usual[:1] and not set(unwanted[1:]) & set(usual[1:])


@pytest.mark.parametrize(
    ("kernel", "text", "sizes"),
    [
        ("backward_dkdv", "s*0.125 + slope[h]*(kv - q) where kv <= q", [(4,)]),
        ("backward_table", "s*0.125 + w[i[kv - q + Sq - 1], h] where kv <= q", [(32, 4), (1199,)]),
    ],
)
def test_tiles_that_another_kernel_has_worked_with_stay(stubs, kernel, text, sizes):
    captures = [torch.zeros(size, dtype=torch.int32 if i else torch.float32) for i, size in enumerate(sizes)]
    run_site(stubs, tune=True, length=600, text=text, captures=captures)
    tiles = {tiles[0][0] or tiles[0][2] for name, tiles in stubs.trials if name == kernel}
    others = {tiles[0][0] for name, tiles in stubs.trials if name == "attention_forward"}
    assert len(tiles) == 1 and len(others) > 1


def test_another_process_reads_what_was_found(stubs):
    run_site(stubs, tune=True)
    first, timed = dict(stubs.others), stubs.timed
    autotune._known.clear()
    stubs.module._SITES.clear()
    stubs.others.clear()
    run_site(stubs, tune=True)
    assert dict(stubs.others) == first and stubs.timed == timed


def test_off_by_default(stubs, tmp_path):
    run_site(stubs, tune=False)
    assert stubs.trials == [] and stubs.timed == 0 and files(tmp_path) == []
    untuned = dict(stubs.others)
    stubs.others.clear()
    stubs.fastest = STATIC
    run_site(stubs, tune=True)
    assert dict(stubs.others) != untuned, "a tuned site is a site of its own"


def test_the_written_parameters_are_the_kernels():
    pytest.importorskip("triton")
    from flashfuse.kernels import backward, forward, tables

    kernels = {
        "forward": forward.attention_forward,
        **dict.fromkeys(("dkdv", "dk", "dv"), backward.backward_dkdv),
        "dq": backward.backward_dq,
        "table": tables.backward_table,
    }
    assert set(kernels) == set(autotune.WRITTEN)
    for name, kernel in kernels.items():
        assert set(autotune.WRITTEN[name]) <= set(kernel.arg_names)
        assert ("gptrs" in kernel.arg_names) == (name in ("dq", "table"))


def test_where_tuning_is_possible(monkeypatch):
    pytest.importorskip("triton")
    from flashfuse.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "is_interpreted", lambda: False)
    assert triton_attention._may_tune(DEVICE) and not triton_attention._may_tune(torch.device("cpu"))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert not triton_attention._may_tune(DEVICE)
    finally:
        torch.use_deterministic_algorithms(before)
    monkeypatch.setattr(triton_attention, "is_interpreted", lambda: True)
    assert not triton_attention._may_tune(DEVICE)


# --- how it is asked for -----------------------------------------------------------------------


def test_the_option_and_the_environment(monkeypatch):
    monkeypatch.delenv("FLASHFUSE_AUTOTUNE", raising=False)
    assert not Options().autotune and not Options.read({}).autotune
    assert Options.read({"autotune": True}).autotune
    monkeypatch.setenv("FLASHFUSE_AUTOTUNE", "1")
    assert Options().autotune and Options.read({}).autotune
    assert not Options.read({"autotune": False}).autotune
    with pytest.raises(ValueError, match="expected autotune to be True or False, got 'yes'"):
        Options.read({"autotune": "yes"})


def test_the_graph_says_which_sites_are_tuned():
    program = ScoreProgram.parse("s*0.125")
    shape = AttentionShape(1, 4, 4, 300, 300, 64, 64, torch.float32)
    chosen = dispatch.select(shape, program, 0.0, torch.device("cuda"), "triton")
    assert dispatch.tuned(chosen).variant.name == "triton_tuned"
    assert dispatch.tuned(chosen).refused == chosen.refused
    on_cpu = dispatch.select(shape, program, 0.0, torch.device("cpu"))
    assert dispatch.tuned(on_cpu) == on_cpu
    pytest.importorskip("triton")
    from flashfuse.kernels import triton_attention

    tuned = dispatch.implementation("triton_tuned")
    assert tuned.forward.func is triton_attention.forward and tuned.forward.keywords == {"tune": True}
    assert tuned.backward.func is triton_attention.backward and tuned.backward.keywords == {"tune": True}


def test_the_rewrite_carries_the_option(monkeypatch):
    from flashfuse import pipeline

    def attention(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1) @ v

    # Without a GPU no graph on one can be emitted; the choice is made as if there was one.
    triton = next(variant for variant in dispatch.VARIANTS if variant.name == "triton")
    monkeypatch.setattr(dispatch, "select", lambda *site: dispatch.Selection(triton, ()))
    graph = torch.fx.symbolic_trace(attention)
    graph = pipeline.with_example_values(graph, [torch.empty(1, 4, 300, 64)] * 3)
    for asked, variant in ((False, "triton"), (True, "triton_tuned")):
        new, report = pipeline.run(graph, Options(verify="off", autotune=asked))
        (node,) = (n for n in new.graph.nodes if "flashfuse.attention" in str(n.target))
        assert variant in node.args and report.sites[0].variant == variant
