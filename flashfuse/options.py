"""The options of the backend, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from flashfuse.kernels.dispatch import Kernels
from flashfuse.passes.patterns import Pattern, Sparsity, read

Verify = Literal["proof", "full", "off"]
_OWN = ("inner", "verify", "kernels", "autotune", "repro", "sparsity")


def _autotune_by_default() -> bool:
    return os.environ.get("FLASHFUSE_AUTOTUNE") == "1"


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="flashfuse", options=..., mode=...)`` takes.

    Attributes:
        inner: the backend that compiles the rewritten graph: ``inductor``, ``aot_eager``, ``eager``,
            or any name that ``torch._dynamo.list_backends`` knows.
        verify: what is asked of a site before it is rewritten.  ``proof``: a proof over finite fields,
            and numbers on the real kernels only where there is none; ``full``: both; ``off``: nothing.
            A site that does not pass is left as it was.
        repro: a folder that gets a runnable file for each site that differs from the original.
        kernels: what runs a site on cuda.  ``auto``: our own kernels, and PyTorch's (cuDNN) for plain dense
            sites where those were measured to be faster; ``triton``: our own only; ``native``: PyTorch's
            wherever they can, our own for all other sites.
        sparsity: a pattern that makes the fused sites approximate, or what chooses one for each site;
            ``None``: attention is exact.
        autotune: our kernels on cuda time a few tile sizes at their first call and keep the fastest; off
            unless the environment has ``FLASHFUSE_AUTOTUNE=1``.
        mode: Inductor's ``mode``.
        inductor: options passed on to Inductor.
    """

    inner: Any = "inductor"
    verify: Verify = "proof"
    repro: Path | None = None
    kernels: Kernels = "auto"
    sparsity: Sparsity | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    autotune: bool = field(default_factory=_autotune_by_default)

    @staticmethod
    def read(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check the user's ``options``.

        Raises:
            ValueError: an unknown option or value; the message lists what is known.
        """
        rest = dict(options or {})
        inner = rest.pop("inner", "inductor")
        verify = rest.pop("verify", Options.verify)
        repro = rest.pop("repro", None)
        kernels = rest.pop("kernels", Options.kernels)
        autotune = rest.pop("autotune", None)
        sparsity = _sparsity(rest.pop("sparsity", None))
        if verify not in get_args(Verify):
            raise ValueError(f"expected verify to be one of {', '.join(get_args(Verify))}, got {verify!r}")
        if kernels not in get_args(Kernels):
            raise ValueError(f"expected kernels to be one of {', '.join(get_args(Kernels))}, got {kernels!r}")
        if autotune not in (None, True, False):
            raise ValueError(f"expected autotune to be True or False, got {autotune!r}")
        if repro is not None and not isinstance(repro, (str, os.PathLike)):
            raise ValueError(f"expected repro to be the path of a folder, got {repro!r}")
        if isinstance(inner, str):
            import torch._dynamo

            known = sorted(set(torch._dynamo.list_backends(exclude_tags=())) - {"flashfuse"})
            if inner not in known:
                raise ValueError(f"expected inner to be one of {', '.join(known)}, got {inner!r}")
        elif not callable(inner):
            raise ValueError(f"expected inner to be the name of a backend or a callable, got {inner!r}")
        if rest and inner != "inductor":
            raise ValueError(f"unknown option {next(iter(rest))!r}; expected {', '.join(_OWN)}")
        if rest:
            from torch._inductor import config

            unknown = [name for name in rest if name.replace("-", "_") not in config.shallow_copy_dict()]
            if unknown:
                raise ValueError(
                    f"unknown option {unknown[0]!r}; expected {', '.join(_OWN)}, or an option of Inductor"
                )
        if mode is not None and inner != "inductor":
            raise ValueError(f"mode={mode!r} is Inductor's; the inner compiler is {inner!r}")
        chosen = Options(inner, verify, None if repro is None else Path(repro), kernels, sparsity, mode, rest)
        return chosen if autotune is None else replace(chosen, autotune=bool(autotune))


def _sparsity(value: object) -> Sparsity | None:
    if value is None or (callable(value) and not isinstance(value, (type, Pattern))):
        return value
    try:
        return read(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sparsity: {error}") from error
