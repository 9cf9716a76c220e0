"""The compiled kernel called directly, and the ways in which it is not; a stub stands for Triton."""

import sys
import types

import pytest
import torch

from flashfuse.kernels import configs, launch
from flashfuse.kernels.launch import Launch, direct

WHAT = Launch(None, 7, (1, 2))


class Hooks:
    def __init__(self):
        self.calls = []


@pytest.fixture
def compiled(monkeypatch):
    """A compiled kernel that notes how it is called, and the hooks of its Triton."""
    module = types.ModuleType("stub_of_triton")
    active = types.SimpleNamespace(get_current_stream=lambda device: 1000 + device)
    runtime = types.SimpleNamespace(launch_enter_hook=Hooks(), launch_exit_hook=Hooks())
    module.driver = types.SimpleNamespace(active=active)
    module.knobs = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "stub_of_triton", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    class Compiled:
        function, packed_metadata = "function", "packed"

        def __init__(self):
            self.fast, self.slow, self.runtime = [], [], runtime

        def run(self, *arguments):
            self.fast.append(arguments)

        def __getitem__(self, grid):
            return lambda *arguments: self.slow.append((grid, arguments))

    Compiled.__module__ = "stub_of_triton"
    return Compiled()


def test_the_kernel_is_called_as_triton_calls_it(compiled):
    direct(compiled, WHAT)("q")
    assert compiled.fast == [(7, 1, 1, 1003, "function", "packed", None, None, None, "q", 1, 2)]
    assert not compiled.slow


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_served(compiled, hook):
    run = direct(compiled, WHAT)
    getattr(compiled.runtime, hook).calls.append(print)
    run("q")
    assert compiled.slow == [((7, 1, 1), ("q", 1, 2))] and not compiled.fast


def test_another_triton_is_asked_itself(compiled):
    del compiled.runtime.launch_exit_hook
    direct(compiled, WHAT)("q")
    assert compiled.slow == [((7, 1, 1), ("q", 1, 2))] and not compiled.fast


class Launcher:
    """A launcher as of Triton 3.9, or of 3.6 if ``flat``; ``done`` is what its function in C is given."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, flat):
        self.flat, self.done, self.calls = flat, [], 0
        self.launch = lambda *given: self.done.append(given)

    def __call__(self, x, y, z, stream, function, packed, *hooks_and_arguments):
        self.calls += 1
        hooks, arguments = hooks_and_arguments[:3], hooks_and_arguments[3:]
        scratch = "scratch" if self.global_scratch_size else None
        rest = (packed, *hooks, scratch)
        self.launch(x, y, z, stream, function, *rest, *(arguments if self.flat else ("types", arguments)))


@pytest.mark.parametrize("scratch", [0, 8])
@pytest.mark.parametrize("flat", [True, False])
def test_the_function_in_c_is_given_what_the_launcher_gives_it(compiled, flat, scratch):
    launcher = compiled.run = Launcher(flat)
    launcher.global_scratch_size = scratch
    run = direct(compiled, WHAT)
    assert not launcher.done, "nothing is launched ahead of time"
    run("q")
    (given,) = launcher.done
    launcher(7, 1, 1, 1003, "function", "packed", None, None, None, "q", 1, 2)
    assert given == launcher.done[1]
    assert launcher.calls == (2 if scratch else 1), "what asks for scratch memory is left to Triton"


def test_a_launcher_that_adds_to_the_arguments_is_called_itself(compiled):
    class Adding(Launcher):
        def __call__(self, *given):
            super().__call__(*given, self.calls)

    launcher = compiled.run = Adding(False)
    run = direct(compiled, WHAT)
    run("q")
    run("q")
    assert [given[-1] for given in launcher.done] == [("q", 1, 2, 0), ("q", 1, 2, 1)]


class OutOfResources(Exception):
    """Stands for Triton's, which is known by its name."""


def test_tiles_shrink_until_the_device_has_room(monkeypatch):
    tried = []

    def attempt(what, *tensors):
        tried.append(what.numbers[0])
        if what.numbers[0].stages > 1:
            raise OutOfResources
        return "compiled"

    def launch_of(config):
        def smaller():
            other = configs.smaller(config)
            return other and launch_of(other)

        return Launch(None, 1, (config,), smaller=smaller)

    monkeypatch.setattr(launch, "launch", attempt)
    compiled, what = launch.launch_what_fits(launch_of(configs.Config(128, 64, 8, 3)), ())
    assert compiled == "compiled" and what.numbers == (configs.Config(128, 64, 8, 1),)
    assert [config.stages for config in tried] == [3, 2, 1]
    assert what.smaller is None, "it holds the tensors of the call"
    with pytest.raises(OutOfResources):
        launch.launch_what_fits(Launch(None, 1, (configs.Config(64, 64, 4, 2),)), ())


def test_nothing_else_is_tried_again(monkeypatch):
    def attempt(what, *tensors):
        raise ValueError("wrong")

    monkeypatch.setattr(launch, "launch", attempt)
    with pytest.raises(ValueError, match="wrong"):
        launch.launch_what_fits(Launch(None, 1, (), smaller=lambda: pytest.fail("tried")), ())


def test_the_smallest_tile_is_the_last():
    config, seen = configs.Config(128, 128, 8, 3), []
    while config is not None:
        seen.append(config[:4])
        config = configs.smaller(config)
    assert seen[2:5] == [(128, 128, 8, 1), (128, 64, 4, 1), (64, 64, 4, 1)] and seen[-1] == (32, 32, 4, 1)
