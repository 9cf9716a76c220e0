"""The compiled kernel called directly, and the ways in which it is not; a stub stands for Triton."""

import sys
import types

import pytest
import torch

from flashfuse.kernels.launch import direct


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
    direct(compiled, 7)("q", 1)
    assert compiled.fast == [(7, 1, 1, 1003, "function", "packed", None, None, None, "q", 1)]
    assert not compiled.slow


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_served(compiled, hook):
    run = direct(compiled, 7)
    getattr(compiled.runtime, hook).calls.append(print)
    run("q", 1)
    assert compiled.slow == [((7, 1, 1), ("q", 1))] and not compiled.fast


def test_another_triton_is_asked_itself(compiled):
    del compiled.runtime.launch_exit_hook
    direct(compiled, 7)("q")
    assert compiled.slow == [((7, 1, 1), ("q",))] and not compiled.fast
