"""Whole models at real sizes: flashfuse against eager, torch.compile, sdpa and sdpa + compile.

    python benchmarks/models.py                    # the workloads for this machine
    python benchmarks/models.py gpt2-train-16x1024 # one of them
    python benchmarks/models.py --compile          # fills the compilers' caches, side by side; times nothing

Unmodified Transformers code with random weights.  Every workload first checks flashfuse's outputs
against the rewritten graph's rule (``flashfuse.verify``) at a small size of the same model, then times
all ways in interleaved rounds in this process.  Results go to ``benchmarks/results/models-*.md``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import flashfuse
from flashfuse.bench import Bench, machine_line, measure

ALL = ("eager", "torch.compile", "sdpa", "sdpa + compile", "flashfuse")


@dataclass(frozen=True)
class Workload:
    """A model, its inputs, and which ways to run it can finish."""

    name: str
    device: str
    dtype: torch.dtype
    train: bool
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.device], dict[str, Any]]
    small: Callable[[torch.device], dict[str, Any]]
    ways: tuple[str, ...] = ALL


def _ids(batch: int, length: int, vocab: int, pad: str = "") -> Callable[[torch.device], dict[str, Any]]:
    """Random tokens; ``pad`` is "", "left" or "right": entry i keeps between half and all of its tokens."""

    def make(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        made = {"input_ids": torch.randint(0, vocab, (batch, length), generator=generator)}
        if pad:
            kept = torch.linspace(length / 2, length, batch).long()[:, None]
            position = torch.arange(length)[None]
            mask = position >= length - kept if pad == "left" else position < kept
            made["attention_mask"] = mask.long()
        return {name: t.to(device) for name, t in made.items()}

    return make


def _gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=4096, use_cache=False))


def _bert() -> torch.nn.Module:
    return transformers.BertModel(transformers.BertConfig())


def _llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, vocab_size=128_256, max_position_embeddings=131_072, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def _mistral() -> torch.nn.Module:
    config = transformers.MistralConfig(
        hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        intermediate_size=8192, sliding_window=4096, max_position_embeddings=131_072, use_cache=False,
    )  # fmt: skip
    return transformers.MistralModel(config)


def _bert_large() -> torch.nn.Module:
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def _t5() -> torch.nn.Module:
    config = transformers.T5Config(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12, use_cache=False, decoder_start_token_id=0
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _gemma2() -> torch.nn.Module:
    config = transformers.Gemma2Config(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        intermediate_size=4096, vocab_size=32000, sliding_window=1024, use_cache=False,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def _bloom() -> torch.nn.Module:
    config = transformers.BloomConfig(
        hidden_size=1024, n_layer=12, n_head=16, vocab_size=32000, use_cache=False
    )  # fmt: skip
    return transformers.BloomForCausalLM(config)


def _gpt_oss() -> torch.nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=1024, num_hidden_layers=4, intermediate_size=1024, num_local_experts=4, vocab_size=32000,
        use_cache=False,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def _deberta() -> torch.nn.Module:
    config = transformers.DebertaV2Config(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=256, share_att_key=True, norm_rel_ebd="layer_norm",
        max_relative_positions=-1, vocab_size=32000,
    )  # fmt: skip
    return transformers.DebertaV2ForMaskedLM(config)


def _mpnet() -> torch.nn.Module:
    return transformers.MPNetForMaskedLM(transformers.MPNetConfig(max_position_embeddings=514))


def _swin() -> torch.nn.Module:
    return transformers.SwinForImageClassification(transformers.SwinConfig())


def _beit() -> torch.nn.Module:
    return transformers.BeitForImageClassification(transformers.BeitConfig(use_relative_position_bias=True))


def _images(batch: int) -> Callable[[torch.device], dict[str, Any]]:
    """Random images of 224 × 224 pixels and classes."""

    def make(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, 3, 224, 224, generator=generator)
        labels = torch.randint(2, (batch,), generator=generator)
        return {"pixel_values": pixels.to(device, torch.bfloat16), "labels": labels.to(device)}

    return make


def _translation(batch: int, source: int, target: int) -> Callable[[torch.device], dict[str, Any]]:
    """Inputs of an encoder-decoder: the decoder's are made from the labels."""

    def make(device: torch.device) -> dict[str, Any]:
        inputs = _ids(batch, source, 32128)(device)
        return inputs | {"labels": _ids(batch, target, 32128)(device)["input_ids"]}

    return make


def _prefill(batch: int, length: int, vocab: int, pad: str = "") -> dict[str, Any]:
    """Inputs of an inference workload; the equality check runs at a short, odd length."""
    return {
        "train": False,
        "inputs": _ids(batch, length, vocab, pad),
        "small": _ids(2, 111, vocab, pad),
    }


def _training(batch: int, length: int, vocab: int, pad: str = "") -> dict[str, Any]:
    return {"train": True, "inputs": _ids(batch, length, vocab, pad), "small": _ids(2, 111, vocab, pad)}


_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
_GPU: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
OWN = ("eager", "torch.compile", "flashfuse")
"""Of models whose attention has a bias, a sink or a table of its own, in eager code alone."""
WITH_FLEX = (*ALL[:-1], "flex + compile", "flashfuse")
SINKS = ("eager", "torch.compile", "flex + compile", "flashfuse")
LONG = ("sdpa", "sdpa + compile", "flex + compile", "flashfuse")

WORKLOADS = (
    Workload("gpt2-inference-4x512", build=_gpt2, **_CPU, **_prefill(4, 512, 50257, "right")),
    Workload("bert-inference-4x512", build=_bert, **_CPU, **_prefill(4, 512, 30522, "right")),
    Workload("gpt2-train-2x512", build=_gpt2, **_CPU, **_training(2, 512, 50257)),
    Workload("gpt2-inference-1x2048", build=_gpt2, **_CPU, **_prefill(1, 2048, 50257)),
    Workload("gpt2-train-16x1024", build=_gpt2, **_GPU, **_training(16, 1024, 50257)),
    Workload(
        "bert-large-train-32x512-padded", build=_bert_large, **_GPU, **_training(32, 512, 30522, "right")
    ),
    Workload(
        "t5-base-train-8x1024-256",
        build=_t5,
        **_GPU,
        train=True,
        inputs=_translation(8, 1024, 256),
        small=_translation(2, 111, 33),
    ),
    Workload("gemma2-train-4x4096", build=_gemma2, ways=WITH_FLEX, **_GPU, **_training(4, 4096, 32000)),
    Workload(
        "llama-prefill-2x8192-left-padded",
        build=_llama,
        ways=WITH_FLEX,
        **_GPU,
        **_prefill(2, 8192, 128_256, "left"),
    ),
    Workload(
        "mistral-prefill-1x32768-window-4096",
        build=_mistral,
        ways=LONG,
        **_GPU,
        **_prefill(1, 32768, 32000),
    ),
    Workload("bloom-train-4x2048", build=_bloom, ways=OWN, **_GPU, **_training(4, 2048, 32000)),
    Workload("gpt-oss-train-4x2048", build=_gpt_oss, ways=SINKS, **_GPU, **_training(4, 2048, 32000)),
    Workload("deberta-v2-train-16x512", build=_deberta, ways=OWN, **_GPU, **_training(16, 512, 32000)),
    Workload("mpnet-train-32x512", build=_mpnet, ways=OWN, **_GPU, **_training(32, 512, 30527)),
    Workload("swin-train-64", build=_swin, **_GPU, train=True, inputs=_images(64), small=_images(2)),
    Workload("beit-train-64", build=_beit, **_GPU, train=True, inputs=_images(64), small=_images(2)),
)


def run(work: Workload, rounds: int, ways: tuple[str, ...]) -> Bench:
    """Check, then time, one workload."""
    device = torch.device(work.device)
    model = _model(work)
    equal = _equal(model, work, device)
    inputs = work.inputs(device)
    steps = {way: _step(model, way, inputs, work.train) for way in ways}
    flashfuse.clear_reports()
    budget = 240.0 if device.type == "cpu" else 60.0
    rows = measure(
        steps, device, rounds=rounds, budget_s=budget, on_step=lambda s: print(f"  {s}", file=sys.stderr)
    )
    reports = flashfuse.reports()
    fused = sum(r.num_fused for r in reports)
    notes = [f"{fused} of {sum(r.num_sites for r in reports)} sites fused; {_variants(reports)}"]
    notes += [w for r in reports for w in r.warnings]
    return Bench(
        f"{work.name} ({str(work.dtype)[6:]}, {_parameters(model)})",
        machine_line(device),
        rows,
        equal,
        tuple(notes),
    )


def compile_only(work: Workload) -> None:
    """One step of every way that compiles something."""
    model, inputs = _model(work), work.inputs(torch.device(work.device))
    for way in work.ways:
        if way not in ("eager", "sdpa"):
            _step(model, way, inputs, work.train)()
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()


def _model(work: Workload) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(work.device):
        model = work.build()
    return model.to(work.dtype).train(work.train)


def _variants(reports: tuple[flashfuse.Report, ...]) -> str:
    return ", ".join(sorted({s.variant for r in reports for s in r.sites if s.variant}))


def _parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"


def _equal(model: torch.nn.Module, work: Workload, device: torch.device) -> bool:
    """The rule at a small size: outputs, and gradients where the workload trains."""
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(work.train):
        check = flashfuse.verify(twin, backward=work.train, **work.small(device))
    if not check.ok:
        print(check, file=sys.stderr)
    del twin
    gc.collect()
    torch._dynamo.reset()
    return check.ok


def _twin(model: torch.nn.Module, attention: str) -> torch.nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(t): t for t in tensors})
    twin.set_attn_implementation(attention)  # type: ignore[operator]
    return twin


def _step(model: torch.nn.Module, way: str, inputs: Mapping[str, Any], train: bool) -> Callable[[], object]:
    model = _twin(model, {"sdpa": "sdpa", "flex": "flex_attention"}.get(way.split()[0], "eager"))
    backend = "flashfuse" if way == "flashfuse" else "inductor" if "compile" in way else None
    if not train:
        compiled = torch.compile(model, backend=backend) if backend else model

        def infer() -> object:
            with torch.no_grad():
                return compiled(**inputs)

        return infer

    def loss_of(**kwargs: Any) -> torch.Tensor:
        return model(**{"labels": kwargs.get("input_ids"), **kwargs}).loss

    compiled_loss = torch.compile(loss_of, backend=backend) if backend else loss_of

    def train_step() -> object:
        compiled_loss(**inputs).backward()
        # Freed inside the step: the ways share their weights.
        model.zero_grad(set_to_none=True)
        return None

    return train_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("workloads", nargs="*", help="default: those of this machine's device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", help="comma-separated, default all")
    parser.add_argument("--compile", action="store_true", help="fill the compilers' caches only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [w for w in WORKLOADS if (w.name in args.workloads if args.workloads else w.device == device)]
    unknown = set(args.workloads) - {w.name for w in WORKLOADS}
    if unknown or not chosen:
        parser.error(f"unknown workload {', '.join(unknown)}; known: {', '.join(w.name for w in WORKLOADS)}")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if args.compile and len(chosen) > 1:
        command = [sys.executable, __file__, "--compile"]
        return max(p.wait() for p in [subprocess.Popen([*command, work.name]) for work in chosen])
    if args.compile:
        compile_only(chosen[0])
        return 0
    for work in chosen:
        ways = tuple(args.ways.split(",")) if args.ways else work.ways
        print(f"{work.name}", file=sys.stderr, flush=True)
        bench = run(work, args.rounds, ways)
        print(bench, flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"models-{work.name}.md").write_text(f"```\n{bench}\n```\n")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()
    return 0


if __name__ == "__main__":
    sys.exit(main())
