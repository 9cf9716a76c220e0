"""A site that differs, as a file that anyone can run: the original nodes, inputs, and the check."""

from __future__ import annotations

import builtins
import hashlib
import re
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import _custom_builtins

from flashfuse.passes.plan import Fuse
from flashfuse.site import autocast_around, original_graph

_FILE = '''"""FlashFuse {version} and the original differ here: {difference}

    site     {name}, {shape}
    source   {source}
    program  {program}
    kernels  {variant}, torch {torch_version}

Run this file: it says what differs and exits with 1, or with 0 once nothing does.
"""

{imports}


class Site(torch.nn.Module):
    """The nodes of the model, from q, k, v and what the scores read to the product with v."""

{modules}{forward}


INPUTS = (
{inputs}
)
"""Name, and a number; or name, sizes, strides, dtype and device."""


def draw(seed=0):
    """Normal numbers, and masks that are true with probability 0.7."""
    generator = torch.Generator().manual_seed(seed)
    for _, sizes, *layout in INPUTS:
        if not layout:
            yield sizes
            continue
        strides, dtype, device = layout
        own = [1 if stride == 0 else n for n, stride in zip(sizes, strides)]
        drawn = torch.randn(own, generator=generator, dtype=torch.float64)
        drawn = drawn if dtype.is_floating_point else drawn < 0.52
        yield torch.empty_strided(own, strides, dtype=dtype, device=device).copy_(drawn).expand(sizes)


if __name__ == "__main__":
{main}
    print(check)
    raise SystemExit(0 if check.ok else 1)
'''


class NotWritable(Exception):
    """The site cannot be written down as a program of its own; the message says why."""


def write(plan: Fuse, difference: str, folder: Path) -> Path:
    """Write the reproducer of ``plan`` into ``folder``, which is made if need be; returns the file.

    Raises:
        NotWritable: the site holds something that has no text.
        OSError: the folder cannot be written to.
    """
    text = program(plan, difference)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.region.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    path.write_text(text, encoding="utf-8")
    return path


def program(plan: Fuse, difference: str) -> str:
    """The text of the reproducer."""
    region = plan.region
    graph, _ = original_graph(region)
    modules = _modules(graph, region.output.graph.owning_module)
    code = graph.python_code("self")
    forward = re.sub(r"; +\w+( = \w+)* = None", "", code.src).strip()
    call = 'check = flashfuse.verify(Site(), *draw(), options={"verify": "full"})'
    for args in autocast_around(region):
        call = f"with torch.autocast({', '.join(map(repr, args))}):\n{textwrap.indent(call, '    ')}"
    return _FILE.format(
        version=version("flashfuse"),
        torch_version=torch.__version__,
        difference=difference.strip().partition("\n")[0],
        name=region.name,
        shape=region.shape,
        source=re.sub(r"^.*?([^/]+:\d+)", r"\1", region.source) or "not known",
        program=region.program.text,
        variant=plan.selection.variant.name,
        imports="\n".join(_imports(code.globals, forward)),
        modules=modules,
        forward=textwrap.indent(forward, "    "),
        inputs="\n".join(f"    {_input(node)}," for node in graph.nodes if node.op == "placeholder"),
        main=textwrap.indent(call, "    "),
    )


def _imports(known: dict[str, Any], code: str) -> list[str]:
    """Import lines for the global names that ``code`` uses."""
    lines = {"import torch", "import flashfuse"}
    for name, value in known.items():
        if not re.search(rf"(?<![\w.]){name}\b", code) or getattr(builtins, name, None) is value:
            continue
        module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if name in _custom_builtins:
            lines.add(_custom_builtins[name].import_str)
        elif module and qualified.isidentifier():
            lines.add(f"from {module} import {qualified} as {name}")
        else:
            raise NotWritable(f"{value!r} cannot be imported")
    return sorted(lines, key=lambda line: (line == "import flashfuse", not line.startswith("from"), line))


def _modules(graph: fx.Graph, owner: torch.nn.Module | None) -> str:
    """The constructor of the modules that the nodes call; gives them flat names in ``graph``."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_module":
            assert owner is not None
            module = owner.get_submodule(str(node.target))
            if not type(module).__module__.startswith("torch.nn.") or list(module.parameters()):
                raise NotWritable(f"the module {module!r} is not one of PyTorch's own without parameters")
            node.target = f"{node.name}_module"
            lines.append(f"        self.{node.target} = torch.nn.{module!r}.train({module.training})")
    if not lines:
        return ""
    return "\n".join(["    def __init__(self):", "        super().__init__()", *lines, "", ""])


def _input(node: fx.Node) -> str:
    example = node.meta["val"]
    if not isinstance(example, Tensor):
        return f'("{node.target}", {_number(example)})'
    sizes, strides = (tuple(map(_number, x)) for x in (example.shape, example.stride()))
    return f'("{node.target}", {sizes}, {strides}, {example.dtype}, "{example.device}")'


def _number(size: Any) -> int:
    """A size; of a symbolic one the value that it had when the graph was traced."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not size.node.has_hint():
        raise NotWritable(f"the size {size} depends on data")
    return int(size.node.hint)
