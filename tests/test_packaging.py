"""The package as it installs: one-way imports, light imports, the entry points."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("flashfuse", "passes", "proof", "kernels")
UPPER = tuple(
    f"flashfuse.{path.stem}" for path in (ROOT / "flashfuse").glob("*.py") if path.stem != "__init__"
)


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the direction, write the full name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def uses(path: Path, *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for name in sorted(imported(path))
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) >= len(folders)
    return files


def test_kernels_know_nothing_above_them():
    wrong = [
        line
        for path in sources("kernels")
        for line in uses(path, "flashfuse.passes", "flashfuse.proof", "torch.fx", *UPPER)
    ]
    assert wrong == []


def test_passes_know_nothing_above_them_and_no_kernel():
    kernels = [f"flashfuse.kernels.{path.stem}" for path in sources("kernels") if uses(path, "triton")]
    assert kernels
    forbidden = ("triton", "transformers", *UPPER, *kernels)
    assert [line for path in sources("passes", "proof") for line in uses(path, *forbidden)] == []
    assert [line for path in sources("passes") for line in uses(path, "flashfuse.proof")] == []


def test_only_files_that_define_kernels_import_triton():
    for path in sources(*FOLDERS):
        if uses(path, "triton"):
            assert path.is_relative_to(ROOT / "kernels") and "triton.jit" in path.read_text(), path


def test_nobody_imports_the_folders_by_their_bare_names():
    # ``kernels`` is also the name of a package by Hugging Face.
    everywhere = sources(*FOLDERS, "tests", "examples")
    assert [line for path in everywhere for line in uses(path, "kernels", "passes", "proof")] == []


def test_repository_root_is_not_importable():
    roots = [entry for entry in sys.path if Path(entry or ".").resolve() == ROOT]
    assert not roots, "start the tests as `pytest`, not as `python -m pytest`"


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.split())


def test_importing_the_package_costs_nothing():
    loaded = loaded_by("import flashfuse")
    assert "flashfuse" in loaded
    assert not loaded & {"torch", "triton", "transformers", "flashfuse.api", "flashfuse.backend"}


@pytest.mark.parametrize("module", ["flashfuse.passes.find", "flashfuse.kernels.ops", "flashfuse.cli"])
def test_kernels_load_at_the_first_call(module):
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert not loaded & {"triton", "transformers", "flashfuse.kernels.triton_attention"}


def test_entry_points():
    backend = importlib.metadata.entry_points(group="torch_dynamo_backends", name="flashfuse")["flashfuse"]
    assert callable(backend.load())
    script = importlib.metadata.entry_points(group="console_scripts", name="flashfuse")["flashfuse"]
    assert callable(script.load())


def test_dynamo_finds_the_backend_without_an_import():
    program = "import torch._dynamo as d; print(*d.list_backends())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert "flashfuse" in run.stdout.split()


def test_one_version():
    import flashfuse

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flashfuse.__version__ == project["version"] == importlib.metadata.version("flashfuse")
    assert f"## {flashfuse.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_python_folder_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {Path(folder) for folder in setuptools["package-dir"].values()}
    assert {path.parent.relative_to(ROOT) for path in sources(*FOLDERS)} == mapped
    assert set(setuptools["package-dir"]) == set(setuptools["packages"])


def test_constraints_pin_every_requirement():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "flashfuse":
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} excludes the tested {version}"
