"""Makes the helper modules beside this file importable by their own names.

Neither the repository root nor this folder may be on ``sys.path``: both hold folders named like
installed packages (``kernels``, ``flashfuse``).
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

for _path in sorted(Path(__file__).parent.glob("*.py")):
    if _path.stem not in sys.modules and _path.stem != "conftest" and not _path.stem.startswith("test_"):
        _spec = importlib.util.spec_from_file_location(_path.stem, _path)
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_path.stem] = _module
        _spec.loader.exec_module(_module)


@pytest.fixture(scope="module")
def one_thread():
    """Many tiny products: starting threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mutation_score(request):
    """Told (mutant, rejected, computes the same all the same), which the summary counts."""
    return lambda *mutant: request.node.user_properties.append(("mutant", mutant))


def pytest_terminal_summary(terminalreporter):
    reports = [
        r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"
    ]
    scores = [value for r in reports for name, value in r.user_properties if name == "mutant"]
    if scores:
        rejected = sum(killed for _, killed, _ in scores)
        harmless = sum(same for _, _, same in scores)
        wrong = len(scores) - harmless
        terminalreporter.write_line(
            f"mutation score: {rejected} / {wrong} wrong rewrites rejected by the proof "
            f"({harmless} more mutants compute the same function)"
        )
