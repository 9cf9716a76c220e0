"""The ``flashfuse`` command: try FlashFuse on a Hugging Face model.

Exit codes: 0 all equal · 1 something differs · 2 wrong usage · 3 the command itself failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from flashfuse.bench import Bench
    from flashfuse.hf import LoadedModel
    from flashfuse.report import ModelCheck, Report

EQUAL, DIFFERENT, USAGE, FAILED = 0, 1, 2, 3

DTYPES = ("float32", "bfloat16", "float16", "float64")


class UsageError(Exception):
    """What the user can put right; printed as one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; the exit code."""
    debug = False
    try:
        options = _parser().parse_args(argv)
        debug = options.debug
        command = _explain if options.command == "explain" else _verify
        return command(options)
    except UsageError as error:
        print(f"flashfuse: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # The reader of the pipe has gone; keep Python from complaining again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("flashfuse: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        line = str(error).strip().partition("\n")[0]
        print(
            f"flashfuse: {type(error).__name__}: {line} (--debug shows where; please report it)",
            file=sys.stderr,
        )
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashfuse", description="Fuse the attention of unmodified PyTorch models, and check the result."
    )
    parser.add_argument("--version", action="version", version=f"flashfuse {version('flashfuse')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{explain,verify}")
    explain = commands.add_parser(
        "explain",
        help="what would be fused, what is left and why, whether the results are equal",
        description="Show what FlashFuse makes of a Hugging Face model, and check that it computes the same.",
    )
    explain.add_argument("--bench", action="store_true", help="time it against eager, torch.compile and sdpa")
    verify = commands.add_parser(
        "verify",
        help="only the check: exit code 0 if all is equal, 1 if something differs",
        description="Prove every site, and check outputs and gradients of the whole model against float64.",
    )
    verify.add_argument("--full", action="store_true", help="also run each site on hostile inputs")
    verify.add_argument(
        "--repro", metavar="FOLDER", type=Path, help="put a runnable file for each site that differs there"
    )
    for command in (explain, verify):
        _add_options(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", help="hub id, local folder, or model type (gpt2, llama, …)"
    )
    command.add_argument(
        "--train", action="store_true", help="training mode: dropout on, steps with backward"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights (default %(default)s)"
    )
    command.add_argument("--attn", choices=("eager", "sdpa"), default="eager", help="attention of the model")
    command.add_argument("--batch", type=_positive, metavar="N", help="rows (default 1, on a GPU 8)")
    command.add_argument(
        "--seq", type=_positive, metavar="N", help="tokens (default 512, or the model's limit)"
    )
    command.add_argument("--padded", action="store_true", help="rows of different lengths, with a mask")
    command.add_argument("--layers", type=_positive, metavar="N", help="keep only so many layers")
    command.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    command.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    command.add_argument("--debug", action="store_true", help="show the stack trace of an internal error")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


# --- commands ----------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> int:
    import flashfuse

    out, progress = _open(options)
    loaded, inputs = _load(options, progress)
    _show(out, loaded.description, "bold")
    _show(out, _inputs_line(inputs, options.train), "dim")
    with progress.step("looking for attention, checking sites and the whole model") as say:
        report: Report = flashfuse.explain(loaded.model, on_step=say, **inputs)
    _show(out, "")
    _show(out, report)
    bench = None
    if options.bench:
        bench = _bench(options, loaded, inputs, report, progress)
        _show(out, "")
        _show(out, bench)
    if options.json is not None:
        results = {"model": loaded.description, "inputs": _inputs_line(inputs, options.train)}
        _write_json(
            options.json, results | {"report": report.to_dict(), "bench": bench.to_dict() if bench else None}
        )
    return EQUAL if report.ok else DIFFERENT


def _verify(options: argparse.Namespace) -> int:
    import flashfuse

    out, progress = _open(options)
    loaded, inputs = _load(options, progress)
    _show(out, loaded.description, "bold")
    _show(out, _inputs_line(inputs, options.train), "dim")
    chosen = {"verify": "full" if options.full else "proof", "repro": options.repro}
    with progress.step("proving sites, checking outputs and gradients against float64") as say:
        check: ModelCheck = flashfuse.verify(
            loaded.model, backward=True, options=chosen, on_step=say, **inputs
        )
    if not check.items:
        raise RuntimeError("nothing was compared: Dynamo made no graph of this model")
    _show(out, check)
    if options.json is not None:
        results = {"model": loaded.description, "inputs": _inputs_line(inputs, options.train)}
        _write_json(options.json, results | {"check": check.to_dict()})
    return EQUAL if check.ok else DIFFERENT


def _bench(
    options: argparse.Namespace,
    loaded: LoadedModel,
    inputs: dict[str, Any],
    report: Report,
    progress: _Progress,
) -> Bench:
    from flashfuse.bench import bench_model

    what = "One training step" if options.train else "One forward call"
    with progress.step("timing") as say:
        return bench_model(loaded.model, inputs, train=options.train, equal=report.ok, what=what, on_step=say)


# --- what both need ----------------------------------------------------------------------------


def _open(options: argparse.Namespace) -> tuple[Console, _Progress]:
    """Everything that can be found wrong before the long work starts."""
    import warnings

    from rich.console import Console

    if options.json is not None:
        _check_writable(options.json)
    if getattr(options, "repro", None) is not None:
        _check_folder(options.repro)
    options.device = _device(options.device)
    # Advice of the libraries to their own developers; what concerns the user is in the report.
    warnings.filterwarnings("ignore", module=r"(torch|transformers)\.")
    return Console(highlight=False, markup=False), _Progress(Console(stderr=True))


def _show(out: Console, what: Report | Bench | ModelCheck | str, style: str | None = None) -> None:
    """Colours and the window's width on a terminal; in a file the same text wherever it is made."""
    if out.is_terminal:
        out.print(what, style=style)
    else:
        print(what, file=out.file)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use"
        )
    return device


def _load(options: argparse.Namespace, progress: _Progress) -> tuple[LoadedModel, dict[str, Any]]:
    import torch

    from flashfuse import hf

    with progress.step(f"loading {options.model}"):
        try:
            loaded = hf.load(
                options.model,
                attn_implementation=options.attn,
                layers=options.layers,
                dtype=getattr(torch, options.dtype),
                device=options.device,
            )
            batch = options.batch or (8 if options.device.type == "cuda" else 1)
            inputs = loaded.inputs(batch, options.seq, padded=options.padded)
        except (ValueError, ImportError) as error:
            raise UsageError(str(error)) from error
    loaded.model.train(options.train)
    return loaded, inputs


def _inputs_line(inputs: dict[str, Any], train: bool) -> str:
    shapes = [f"{name} {'×'.join(map(str, v.shape))}" for name, v in inputs.items() if hasattr(v, "shape")]
    return f"{', '.join(shapes)}, {'training' if train else 'inference'}"


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"--json {path}: this is a folder, give the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise UsageError(
            f"--json {path}: cannot be written ({error.strerror}), choose another place"
        ) from error


def _check_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"--repro {path}: no files can be put there ({error.strerror}), choose another folder"
        ) from error


def _write_json(path: Path, results: dict[str, Any]) -> None:
    """All or nothing: a reader never meets half a file."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Progress:
    """Says on stderr what takes long: a spinner on a terminal, else a line for each step."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[Any]:
        start = time.monotonic()
        if not self.console.is_terminal:

            def say(detail: str) -> None:
                self.console.print(
                    f"[{time.monotonic() - start:4.0f} s] {detail}", markup=False, highlight=False
                )

            say(text)
            yield say
            return
        with self.console.status(text) as status:

            def update(detail: str) -> None:
                status.update(f"{text}: {detail} ({time.monotonic() - start:.0f} s)")

            yield update


if __name__ == "__main__":
    sys.exit(main())
