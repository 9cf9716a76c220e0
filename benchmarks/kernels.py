"""Attention kernels side by side on a GPU: ours, FlashAttention-2 and cuDNN through SDPA, FlexAttention.

    python benchmarks/kernels.py [--no-flex] [--only SECTION ...] [--jobs 12] [--compile] [--out FILE]

Everything in one run, bfloat16, rounds interleaved, medians.  TFLOP/s counts 4·B·H·N²·D operations of what
the mask leaves (half of them under a causal mask) forward, and 2.5 times as many backward.  A row whose
results are not equal to float64 within twice the error of eager attention gets no figure.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_ways import ROUNDS, Measured, Problem, Way, elapsed_ms, measure, warm_flex, warm_ours
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashfuse.kernels import block_map
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

TOKENS, WIDTH = 16384, 2048
LONG = (1, 16, 16384, 128)
"""The shape of the sparse rows."""
PROGRAMS = (4, 32, 4096, 64)
"""The shape of the rows with programs."""
DECODE = (8, 32, 8, 32768, 128)
"""B, H, H_kv, Skv, D."""

# --- the problems --------------------------------------------------------------------------------


def _dense(head_dim: int, causal: bool, length: int) -> Problem:
    shape = (TOKENS // length, WIDTH // head_dim, length, head_dim)
    text = f"s*{head_dim**-0.5}" + (" where kv <= q" if causal else "")
    name = f"d{head_dim} {'causal' if causal else 'full'} {length}"
    return Problem(name, shape, text, causal=causal, flex=lambda _: (None, _causal if causal else None))


def _causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv <= q


def _window(width: int) -> Problem:
    def flex(_: Sequence[Tensor]) -> tuple[Any, Any]:
        return None, lambda b, h, q, kv: (kv <= q) & (kv > q - width)

    text = f"s*{LONG[3] ** -0.5} where kv <= q and kv > q - {width}"
    return Problem(f"window {width}", LONG, text, flex=flex)


def _random(density: float, name: str = "") -> Problem:
    """Blocks of 128 at random, the diagonal always."""

    def keep(length: int) -> list[Tensor]:
        blocks = block_map.block_count(length)
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(blocks, blocks, generator=generator).fill_diagonal_(-1.0).argsort(-1)
        kept = torch.zeros(blocks, blocks, dtype=torch.bool)
        kept.scatter_(1, order[:, : max(1, round(density * blocks))], True)
        return [kept.cuda()]

    def flex(captures: Sequence[Tensor]) -> tuple[Any, Any]:
        kept = captures[0]
        return None, lambda b, h, q, kv: kept[q // 128, kv // 128]

    text = f"s*{LONG[3] ** -0.5} where keep[q // 128, kv // 128]"
    return Problem(name or f"random 128-blocks, {density:.3f}", LONG, text, keep, flex=flex)


def _documents(shape: tuple[int, int, int, int]) -> Problem:
    """Packed sequences of 128 to 4096 tokens, causal within each."""

    def ids(length: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        ends = torch.randint(128, 4096, (length // 128,), generator=generator).cumsum(0)
        return [torch.bucketize(torch.arange(length), ends, right=True)[None].to(torch.int32).cuda()]

    def flex(captures: Sequence[Tensor]) -> tuple[Any, Any]:
        doc = captures[0]
        return None, lambda b, h, q, kv: (doc[b, q] == doc[b, kv]) & (kv <= q)

    text = f"s*{shape[3] ** -0.5} where kv <= q and doc[b, q] == doc[b, kv]"
    return Problem(f"packed d{shape[3]}", shape, text, ids, flex=flex, varlen=True)


def _program(
    name: str,
    score: str,
    tail: str = "",
    capture: Callable[[int], Tensor | list[Tensor]] | None = None,
    has_grad: bool = False,
    dropout_p: float = 0.0,
    score_mod: Callable[[Sequence[Tensor]], Any] | None = None,
) -> Problem:
    """A program under a causal mask; of the captures the first may have a gradient."""

    def captures(length: int) -> list[Tensor]:
        found = [] if capture is None else capture(length)
        return found if isinstance(found, list) else [found]

    return Problem(
        name,
        PROGRAMS,
        f"{score} where kv <= q{tail}",
        captures=captures,
        grads=(0,) if has_grad else (),
        dropout_p=dropout_p,
        causal=True if name in ("plain", "dropout 0.1") else None,
        flex=None if score_mod is None else lambda captures: (score_mod(captures), _causal),
    )


def _programs() -> list[Problem]:
    scaled = f"s*{PROGRAMS[3] ** -0.5}"
    heads = PROGRAMS[1]

    def slopes(_: int) -> Tensor:
        return torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)

    def buckets(length: int) -> list[Tensor]:
        """T5's: 32 buckets of distances to the keys before a query, one each up to 16, then wider, to 128."""
        distance = torch.arange(length - 1, -length, -1, device="cuda").clamp(min=0)
        wide = 16 + ((distance.clamp(min=1) / 16).log() / math.log(128 / 16) * 16).long()
        places = torch.where(distance < 16, distance, wide.clamp(max=31))
        return [torch.randn(32, heads, device="cuda"), places.int()]

    def distances(length: int) -> Tensor:
        return torch.randn(heads, 2 * length - 1, device="cuda")

    def logits(_: int) -> Tensor:
        return torch.randn(heads, device="cuda")

    def softcap(_: Sequence[Tensor]) -> Any:
        return lambda s, b, h, q, kv: torch.tanh(s / 20.0) * 20.0

    def alibi(captures: Sequence[Tensor]) -> Any:
        return lambda s, b, h, q, kv: s + captures[0][h] * (kv - q)

    def relative(captures: Sequence[Tensor]) -> Any:
        return lambda s, b, h, q, kv: s + captures[0][h, kv - q + PROGRAMS[2] - 1]

    of_buckets = f"{scaled} + weight[bucket[kv - q + Sq - 1], h]"
    return [
        _program("plain", scaled, score_mod=lambda _: None),
        _program("softcap", f"tanh({scaled}*0.05)*20.0", score_mod=softcap),
        _program("sinks", scaled, " sink sinks[h]", logits, True),
        _program("ALiBi", f"{scaled} + slope[h]*(kv - q)", "", slopes, score_mod=alibi),
        _program("T5 table", of_buckets, "", buckets, True),
        _program("dropout 0.1", scaled, dropout_p=0.1),
        _program("T5 table, dropout 0.1", of_buckets, "", buckets, True, 0.1),
        _program(
            "table of distances",
            f"{scaled} + table[h, kv - q + Sq - 1]",
            "",
            distances,
            True,
            score_mod=relative,
        ),
    ]


def _windows(name: str, shape: tuple[int, int, int, int], entries: int) -> Problem:
    """Swin's and BEiT's: a weight for each head and entry of a table, by an index for each pair."""

    def captures(length: int) -> list[Tensor]:
        places = torch.randint(entries, (length, length), device="cuda")
        return [torch.randn(entries, shape[1], device="cuda"), places]

    def bias(given: Sequence[Tensor]) -> Tensor:
        weights, places = given
        return weights[places.view(-1)].view(*places.shape, -1).permute(2, 0, 1)[None]

    def flex(given: Sequence[Tensor]) -> tuple[Any, Any]:
        weights, places = given
        return lambda s, b, h, q, kv: s + weights[places[q, kv], h], None

    text = f"s*{shape[3] ** -0.5} + weight[place[q, kv], h]"
    return Problem(name, shape, text, captures, (0,), flex=flex, bias=bias)


def _dense_bias(shape: tuple[int, int, int, int]) -> Problem:
    """A trained bias for each head and pair."""

    def flex(given: Sequence[Tensor]) -> tuple[Any, Any]:
        return lambda s, b, h, q, kv: s + given[0][h, q, kv], None

    return Problem(
        "bias of each pair",
        shape,
        f"s*{shape[3] ** -0.5} + bias[h, q, kv]",
        lambda length: [torch.randn(shape[1], length, length, device="cuda")],
        (0,),
        flex=flex,
        bias=lambda given: given[0][None],
    )


SECTIONS: dict[str, list[Problem]] = {
    "dense": [_dense(d, c, n) for d in (64, 128) for n in (1024, 4096, 16384) for c in (False, True)],
    "sparse": [
        Problem(
            "causal", LONG, f"s*{LONG[3] ** -0.5} where kv <= q", causal=True, flex=lambda _: (None, _causal)
        ),
        *(_window(w) for w in (4096, 1024, 256)),
        *(_random(d) for d in (0.251, 0.057)),
    ],
    "density": [_random(d, f"density {d}") for d in (1.0, 0.6, 0.3, 0.15, 0.05)],
    "programs": _programs(),
    "tables of pairs": [
        _windows("Swin-tiny, first layers", (4096, 3, 49, 32), 169),
        _windows("Swin-tiny, third stage", (256, 12, 49, 32), 169),
        _windows("BEiT-base", (64, 12, 197, 64), 732),
        _dense_bias((64, 12, 200, 64)),
        _dense_bias((4, 16, 2048, 64)),
    ],
    "packed": [_documents((1, WIDTH // d, TOKENS, d)) for d in (64, 128)],
    "training": [
        Problem("gpt2 dropout 0.1", (16, 12, 1024, 64), "s*0.125 where kv <= q", dropout_p=0.1, causal=True)
    ],
}


# --- decoding ------------------------------------------------------------------------------------


def copy_gb_s() -> float:
    """GB/s, read and written, of a copy within the device's memory."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / elapsed_ms(lambda: target.copy_(source)) / 1e6


def measure_decode() -> dict[str, float]:
    """Way → ms of one query against a cache, forward alone."""
    b, h, kv_heads, length, d = DECODE
    q, k, v = (
        torch.randn(b, n, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n, heads in ((1, h), (length, kv_heads), (length, kv_heads))
    )
    program = ScoreProgram.parse(f"s*{d**-0.5}")
    padded = ScoreProgram.parse(f"s*{d**-0.5} where kv <= last[q] and pad[b, kv] else uniform")
    captures = [torch.tensor([length - 1], device="cuda"), torch.ones(b, length, device="cuda").bool()]
    maps = list(block_map.build(captures, (), q.device, (b, h, 1, length), padded.mask_program))

    def backend(which: SDPBackend) -> Way:
        def run(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(*qkv, enable_gqa=True)

        return run

    def own(program: ScoreProgram, captures: Sequence[Tensor], maps: Sequence[Tensor]) -> Way:
        def run(*qkv: Tensor) -> Tensor:
            out: Tensor = torch.ops.flashfuse.attention(
                *qkv, list(captures), [], list(maps), None, program.text, 0.0, "triton"
            )[0]
            return out

        return run

    ways: dict[str, Way] = {
        "ours, no mask": own(program, [], []),
        "ours, keys masked by padding": own(padded, captures, maps),
        "FlashAttention-2 (SDPA)": backend(SDPBackend.FLASH_ATTENTION),
        "cuDNN (SDPA)": backend(SDPBackend.CUDNN_ATTENTION),
    }
    exact, eager = (
        attention_reference(q[:1].to(t), k[:1].to(t), v[:1].to(t), (), (), program)[0]
        for t in (torch.float64, torch.bfloat16)
    )
    bound = 2 * (eager - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    for name in [name for name in ways if name.startswith("ours")]:
        if not bool((ways[name](q, k, v)[:1] - exact).abs().max() <= bound):
            print(f"# {name}: not equal", file=sys.stderr)
            del ways[name]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            times[name].append(elapsed_ms(functools.partial(run, q, k, v)))
    return {name: statistics.median(t) for name, t in times.items()}


# --- the tables ----------------------------------------------------------------------------------

WAYS = {
    "flex": "FlexAttention",
    "flash": "FlashAttention-2",
    "cudnn": "cuDNN",
    "varlen": "FlashAttention-2 packed",
    "bias": "SDPA with a bias",
}


def _pair(pair: tuple[float, float] | None, digits: int) -> str:
    return "–" if pair is None else f"{pair[0]:.{digits}f}/{pair[1]:.{digits}f}"


def _rates(row: Measured, way: str) -> tuple[float, float] | None:
    """TFLOP/s forward and backward."""
    if way not in row.ms:
        return None
    b, h, n, d = row.problem.shape
    flops = 4 * b * h * n * n * d / (2 if row.problem.causal else 1)
    forward, backward = row.ms[way]
    return flops / forward / 1e9, 2.5 * flops / backward / 1e9


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _times(
    rows: Sequence[Measured], extra: Callable[[Measured], Sequence[str]], head: Sequence[str]
) -> list[str]:
    """ms forward/backward of every way that ran, the map, and peak memory of ours and of the others."""
    others = [way for way in WAYS if any(way in row.ms for row in rows)]
    return _table(
        ["row", *head, "ours", "block map", "ours, peak MB", *(WAYS[w] for w in others)],
        [
            [
                row.problem.name if row.equal else f"{row.problem.name} (NOT EQUAL)",
                *extra(row),
                _pair(row.ms.get("ours"), 3),
                f"{row.map_ms:.3f}" if row.map_ms else "–",
                f"{row.peak['ours'] / 1e6:.0f}" if "ours" in row.peak else "–",
                *(
                    f"{_pair(row.ms.get(w), 3)} ({row.peak[w] / 1e6:.0f} MB)" if w in row.ms else "–"
                    for w in others
                ),
            ]
            for row in rows
        ],
    )


def _against_ideal(base: tuple[float, float] | None) -> Callable[[Measured], Sequence[str]]:
    """Density, and our time over density × the time of cuDNN without a mask."""

    def cells(row: Measured) -> Sequence[str]:
        if base is None or "ours" not in row.ms:
            return f"{row.density:.3f}", "–"
        ratio = tuple(t / (row.density * b) for t, b in zip(row.ms["ours"], base, strict=True))
        return f"{row.density:.3f}", f"{ratio[0]:.2f}/{ratio[1]:.2f}"

    return cells


def _against_plain(rows: Sequence[Measured]) -> Callable[[Measured], Sequence[str]]:
    """Forward and backward together, as a share of the speed of the first row."""

    def cells(row: Measured) -> Sequence[str]:
        if "ours" not in row.ms or "ours" not in rows[0].ms:
            return ("–",)
        return (f"{sum(rows[0].ms['ours']) / sum(row.ms['ours']):.0%}",)

    return cells


def tables(
    found: dict[str, list[Measured]], dense: Measured | None, decode: dict[str, float], copied: float
) -> list[str]:
    """The markdown of a run; ``copied`` is what ``copy_gb_s`` found."""
    base = None if dense is None else dense.ms.get("cudnn")
    lines: list[str] = []
    for section, rows in found.items():
        shape = "B {} H {} N {} D {}".format(*rows[0].problem.shape)
        if section == "dense":
            others = [way for way in ("flex", "flash", "cudnn") if any(way in row.ms for row in rows)]
            lines += [
                "## Dense, TFLOP/s forward/backward",
                "",
                f"Batch × length {TOKENS}, heads × D {WIDTH}.",
                "",
            ]
            body = [
                [
                    row.problem.name if row.equal else f"{row.problem.name} (NOT EQUAL)",
                    _pair(_rates(row, "ours"), 0),
                    *(_pair(_rates(row, way), 0) for way in others),
                ]
                for row in rows
            ]
            lines += _table(["row", "ours", *(WAYS[w] for w in others)], body)
        elif section in ("sparse", "density"):
            lines += [f"## {section.title()}, ms forward/backward", ""]
            lines += [
                f"{shape}. × ideal: over density × cuDNN without a mask in this run ({_pair(base, 2)} ms).",
                "",
            ]
            lines += _times(rows, _against_ideal(base), ["density", "× ideal"])
        elif section == "programs":
            lines += ["## Programs, ms forward/backward", "", f"{shape}, causal.", ""]
            lines += _times(rows, _against_plain(rows), ["of plain speed"])
        elif section == "tables of pairs":
            lines += ["## Tables of pairs, ms forward/backward", ""]
            lines += ["B × H × N × D; each with the gradient of the table, or of the bias.", ""]
            lines += _times(rows, lambda row: (" × ".join(map(str, row.problem.shape)),), ["shape"])
        else:
            lines += [f"## {section.title()}, ms forward/backward", "", f"{shape}.", ""]
            lines += _times(rows, lambda row: (f"{row.density:.3f}",), ["density"])
        lines.append("")
    if decode:
        b, h, kv_heads, length, d = DECODE
        size = 2 * b * kv_heads * length * d * 2
        lines += [
            "## Decoding",
            "",
            f"One query of {h} heads over {kv_heads} key heads, B {b}, D {d}, {length} keys: the time, how",
            f"fast k and v are read in it, and the share of what a copy reaches ({copied:.0f} GB/s).",
            "",
        ]
        body = [
            [w, f"{t:.3f}", f"{size / t / 1e6:.0f}", f"{size / t / 1e6 / copied:.0%}"]
            for w, t in decode.items()
        ]
        lines += [*_table(["way", "ms", "GB/s", "of a copy"], body), ""]
    return lines


def _warm(at: tuple[str, int, bool]) -> None:
    section, i, of_flex = at
    (warm_flex if of_flex else warm_ours)(SECTIONS[section][i])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*SECTIONS, "decode"]
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile at first")
    parser.add_argument("--compile", action="store_true", help="fill the compilers' caches only")
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="SECTION")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    import triton

    name = torch.cuda.get_device_properties(0).name
    machine = f"{name}, torch {torch.__version__}, triton {triton.__version__}"
    chosen = {name: rows for name, rows in SECTIONS.items() if name in options.only}
    rows = [(s, i, p.flex is not None) for s, problems in chosen.items() for i, p in enumerate(problems)]
    jobs = [(s, i, False) for s, i, _ in rows]
    jobs += [(s, i, True) for s, i, has_flex in rows if has_flex and not options.no_flex]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(_warm, jobs))
    if options.compile:
        return
    # What sparse rows are compared with.
    dense = None
    if {"sparse", "density"} & chosen.keys():
        dense = measure(Problem("dense", LONG, f"s*{LONG[3] ** -0.5}", causal=False), False)
    found: dict[str, list[Measured]] = {}
    for section, problems in chosen.items():
        found[section] = []
        for problem in problems:
            row = measure(problem, not options.no_flex)
            found[section].append(row)
            cells = "  ".join(f"{way} {_pair(ms, 3)}" for way, ms in row.ms.items())
            print(
                f"{section:9s} {problem.name:26s} {cells}" + ("" if row.equal else "  NOT EQUAL"),
                file=sys.stderr,
                flush=True,
            )
    decode = measure_decode() if "decode" in options.only else {}
    copied = copy_gb_s() if decode else 0.0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    head = ["# Attention kernels on a GPU", "", "`python benchmarks/kernels.py`, bfloat16, medians of"]
    head[-1] += f" {ROUNDS} interleaved rounds, all in one run;\nevery row checked against float64 first."
    text = "\n".join([*head, "", *tables(found, dense, decode, copied), machine])
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
