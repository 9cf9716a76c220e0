"""Hugging Face models to try FlashFuse on: by hub id, by local folder, or by model type.

Models come without a task head: attention lives in the body, and the head's logits would drown
the memory figures.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HUB_TIMEOUT_S = 4.0
MAX_PARAMETERS = {"cpu": 600_000_000, "cuda": 2_000_000_000}
"""Random weights beyond this are of no use: the check alone holds the model three times, once in float64."""

DEFAULT_SEQ = 512
REDUCED_VOCABULARY = 32_000

_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers_per_stack",
)

_EXPERTS: Mapping[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group"), 1),
}

_TINY: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "projection_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "moe_intermediate_size", "hidden_dim"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **_EXPERTS,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "rotary_dim": 16,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model and what to feed it."""

    name: str
    model: torch.nn.Module
    description: str
    max_seq: int | None

    def inputs(
        self, batch: int = 1, seq: int | None = None, *, padded: bool = False, seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of one forward call, made from the config.

        Args:
            seq: length of text; by default 512, or what the model takes if that is less.  The
                decoder of an encoder–decoder gets half of it; images have their own size.
            padded: rows of different lengths with an attention mask, padded on the left for causal
                models (as for generation) and on the right for others.

        Raises:
            ValueError: a sequence longer than the model takes, or a model whose inputs are of a
                kind that cannot be made from a config.
        """
        if self.max_seq is not None and seq is not None and seq > self.max_seq:
            raise ValueError(f"{self.name} takes at most {self.max_seq} positions, not {seq}")
        length = seq or min(DEFAULT_SEQ, self.max_seq or DEFAULT_SEQ)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = _make_inputs(self.name, self.model, batch, length, padded)
        parameter = next(self.model.parameters())
        return {
            key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in made.items()
        }


def load(
    model: str,
    *,
    attn_implementation: str = "eager",
    layers: int | None = None,
    tiny: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """The model ``model``, unmodified, in evaluation mode.

    Args:
        model: a local folder, a hub id, or a Transformers model type such as ``gpt2`` or ``llama``.
            A type means random weights from its default config, with fewer layers where the default
            is too large to try out (the description says so).  A hub id that cannot be reached but
            is also a type falls back to that.
        attn_implementation: ``eager`` or ``sdpa``.
        layers: keep this many layers (of each stack).
        tiny: a few small layers, for tests.

    Raises:
        ValueError: an unknown name (the message lists the closest ones), or a model that does not
            exist in the wanted form.
        ImportError: Transformers is not installed.
    """
    _quiet_transformers()
    if layers is not None and layers < 1:
        raise ValueError(f"expected at least 1 layer, got {layers}")
    config, weights, remark = _find(model)
    notes = [remark] if remark else []
    default_layers = _num_layers(config)
    if tiny:
        weights = None
        _shrink(config, _TINY)
        _set_layers(config, layers or 2)
    elif layers is not None:
        _set_layers(config, layers)
    elif weights is None:
        notes += _fit(config, MAX_PARAMETERS[torch.device(device).type])
    if _num_layers(config) != default_layers:
        notes.append(f"{_num_layers(config)} of {default_layers} layers")
    built = _build(model, config, weights, attn_implementation, dtype, device)
    where = f"weights of {weights}" if weights is not None else "random weights"
    size = sum(p.numel() for p in built.parameters()) / 1e6
    description = (
        f"{model}: {type(built).__name__}, {attn_implementation} attention, {size:.1f} M parameters, "
        f"{str(dtype).removeprefix('torch.')}, {where}" + (f" ({'; '.join(notes)})" if notes else "")
    )
    return LoadedModel(model, built, description, _max_seq(config, built))


# --- finding -----------------------------------------------------------------------------------


def model_types() -> list[str]:
    """The model types that Transformers can make without a checkpoint."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(set(CONFIG_MAPPING_NAMES) & set(MODEL_MAPPING_NAMES))


def _find(model: str) -> tuple[Any, str | None, str]:
    """Its config, where its weights are (``None``: random), and a remark for the user."""
    from transformers import AutoConfig

    folder = Path(model).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        return _read_config(model, str(folder), local=True), str(folder) if has_weights else None, ""
    if folder.is_dir() and model not in model_types():
        raise ValueError(f"{model} has no config.json: give the folder that save_pretrained wrote")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"there is no folder {model}")

    online = _hub_answers()
    if online or _is_cached(model):
        try:
            return _read_config(model, model, local=not online), model, ""
        except OSError:
            pass
    failure = "the hub has no such model open to you" if online else "the hub cannot be reached"
    if model in model_types():
        return AutoConfig.for_model(model), None, f"{failure}: default config of the type"
    raise ValueError(f"unknown model {model!r}: {failure}, and it is no model type{_closest(model)}")


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    try:
        found = [isinstance(try_to_load_from_cache(model, name), str) for name in ("config.json", *weights)]
    except HFValidationError:
        return False
    return found[0] and any(found[1:])


def _closest(model: str) -> str:
    types = model_types()
    asked = model.rpartition("/")[2].lower()
    prefixes = [t for t in types if len(t) > 2 and asked.startswith(t)]
    close = prefixes[-1:] or difflib.get_close_matches(asked, types, n=3, cutoff=0.6)
    return f"; closest: {', '.join(close)}" if close else "; try gpt2, bert, llama, vit or t5"


def _read_config(model: str, source: str, *, local: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{model} cannot be read: {_first_line(error)}") from error


def _hub_answers() -> bool:
    """Whether the hub can be reached, found out in a bounded time: name look-ups have no timeout."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        # An answer of any status will do: it shows that the hub is there.
        with contextlib.suppress(OSError):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).close()
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answered.is_set()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _quiet_transformers() -> None:
    """Keep loading bars and advice off the terminal: what went wrong comes as an exception."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError('Transformers is not installed: pip install "flashfuse[hf]"') from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()


# --- sizes -------------------------------------------------------------------------------------


def _configs(config: Any) -> Iterator[Any]:
    """The config and those of its parts (text, vision, …)."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)


def _own_size(config: Any, name: str) -> int | None:
    """An integer that the config really stores, looked up by its common name."""
    try:
        value = getattr(config, getattr(config, "attribute_map", {}).get(name, name), None)
    except AttributeError:
        # One that each layer has for itself.
        return None
    return value if type(value) is int and value > 0 else None


def _first_size(config: Any, names: Iterable[str], default: int) -> int:
    """The first of these sizes that ``config`` or one of its parts has."""
    sizes = (_own_size(part, name) for part in _configs(config) for name in names)
    return next((size for size in sizes if size is not None), default)


def _num_layers(config: Any) -> int | None:
    sizes = (_own_size(part, name) for part in _configs(config) for name in _LAYERS)
    return next((size for size in sizes if size is not None), None)


def _set_layers(config: Any, layers: int) -> None:
    """Cut the config to so many layers, and to as many in each stage where stages have their own."""
    for part in _configs(config):
        old = {size for name in _LAYERS if (size := _own_size(part, name)) is not None}
        _shrink_one(part, dict.fromkeys(_LAYERS, layers))
        # Lists with one entry a layer (which layers slide, which are sparse) follow.
        for name, value in vars(part).copy().items():
            if isinstance(value, list) and len(value) in old and len(value) > layers:
                setattr(part, name, value[:layers])
            elif _is_by_stage(name, value) and max(value) > layers:
                setattr(part, name, type(value)(min(depth, layers) for depth in value))


def _is_by_stage(name: str, value: Any) -> bool:
    """Whether these are the numbers of layers of each stage, such as ``depths=[2, 2, 6, 2]``."""
    known = isinstance(value, (list, tuple)) and bool(value) and all(type(n) is int and n > 0 for n in value)
    return known and any(word in name for word in ("depth", "num_blocks", "attn_blocks", "blocks_per_stage"))


def _shrink(config: Any, sizes: Mapping[str, int]) -> None:
    for part in _configs(config):
        _shrink_one(part, sizes)


def _shrink_one(config: Any, sizes: Mapping[str, int]) -> None:
    heads = _own_size(config, "num_attention_heads")
    if heads == _own_size(config, "num_key_value_heads") and "num_attention_heads" in sizes:
        # One key head for each query head stays so: some attention knows no other form.
        sizes = {**sizes, "num_key_value_heads": sizes["num_attention_heads"]}
    for name, size in sizes.items():
        old = _own_size(config, name)
        if old is not None and size < old:
            # Some sizes follow from others and refuse to be set.
            with contextlib.suppress(AttributeError, NotImplementedError):
                setattr(config, getattr(config, "attribute_map", {}).get(name, name), size)
    vocabulary = _own_size(config, "vocab_size")
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old = getattr(config, token, None)
        if vocabulary is not None and max(old if isinstance(old, list) else [old or 0]) >= vocabulary:
            setattr(config, token, vocabulary - 1)


def _fit(config: Any, limit: int) -> list[str]:
    """Make the config small enough to try out; what was done, in words."""
    total = _num_parameters(config)
    layers = _num_layers(config)
    if total <= limit or layers is None:
        return []
    notes = [f"reduced from {total / 1e9:.1f} B parameters"]
    if any((_own_size(part, "vocab_size") or 0) > REDUCED_VOCABULARY for part in _configs(config)):
        _shrink(config, {"vocab_size": REDUCED_VOCABULARY})
        notes.append(f"{REDUCED_VOCABULARY} tokens")
    shallow = copy.deepcopy(config)
    _set_layers(shallow, min(2, layers))
    if _num_parameters(shallow) > limit and any(_own_size(config, name) for name in _EXPERTS):
        _shrink(config, _EXPERTS)
        notes.append("2 experts")
    while _num_parameters(config) > limit and layers > 1:
        layers = max(1, min(layers - 1, int(layers * limit / _num_parameters(config))))
        _set_layers(config, layers)
    if _num_parameters(config) > limit:
        _shrink(config, _TINY)
        notes.append("all widths cut")
    return notes


def _num_parameters(config: Any) -> int:
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(config).parameters())


def _max_seq(config: Any, model: torch.nn.Module) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    sizes = [size for name in names if (size := _own_size(text, name)) is not None]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its kin count positions from the padding index on.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            sizes.append(module.num_embeddings - skipped)
    return min(sizes, default=None)


# --- building ----------------------------------------------------------------------------------


def _build(
    name: str,
    config: Any,
    weights: str | None,
    attn_implementation: str,
    dtype: torch.dtype,
    device: str | torch.device,
) -> torch.nn.Module:
    from transformers import AutoModel

    common: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "dtype": dtype,
        "trust_remote_code": False,
    }
    try:
        if weights is not None:
            model = AutoModel.from_pretrained(weights, config=config, **common)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModel.from_config(config, **common)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"{name} cannot be built with {attn_implementation} attention: {_first_line(error)}"
        ) from error
    built: torch.nn.Module = model.to(device).eval()
    return built


def _make_inputs(name: str, model: Any, batch: int, seq: int, padded: bool) -> dict[str, Any]:
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    main = model.main_input_name
    made: dict[str, Any] = {}
    if main == "input_ids" or "input_ids" in _required(parameters):
        made["input_ids"] = _tokens(text, batch, seq)
        if padded and "attention_mask" in parameters:
            made["attention_mask"] = _padding(batch, seq, left=_is_causal(config))
    if main == "pixel_values" or ("pixel_values" in parameters and _sees_text_and_images(config)):
        vision = getattr(config, "vision_config", config)
        channels = _first_size(vision, ("num_channels", "in_channels", "in_chans"), 3)
        made["pixel_values"] = torch.randn(batch, channels, *_image_size(vision))
    if main == "input_features":
        bins = _first_size(config, ("num_mel_bins", "input_feat_per_channel", "feature_size"), 80)
        frames = 2 * _first_size(config, ("max_source_positions",), 64)
        made["input_features"] = torch.randn(batch, bins, frames)
    if main == "input_values":
        made["input_values"] = torch.randn(batch, 16_000)
    if not made:
        raise ValueError(
            f"{name} takes {main}, which cannot be made from a config: "
            "call flashfuse.explain(model, ...) from Python with your own inputs"
        )
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = _tokens(text, batch, max(1, seq // 2))
    if "use_cache" in parameters:
        # Nothing is generated, so nothing is to be kept for a next token.
        made["use_cache"] = False
    return made


def _required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    return {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}


def _tokens(config: Any, batch: int, seq: int) -> torch.Tensor:
    """Random tokens, none of them special: some models derive masks from padding or end tokens."""
    ids = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls"))
    special = {token for i in ids for token in (i if isinstance(i, list) else [i])}
    usable = [token for token in range(min(config.vocab_size, 10_000)) if token not in special]
    return torch.tensor(usable)[torch.randint(len(usable), (batch, seq))]


def _padding(batch: int, seq: int, *, left: bool) -> torch.Tensor:
    """Rows of lengths from seq down to about half of it."""
    lengths = torch.linspace(seq, seq // 2, batch).long().clamp(min=1)
    mask = torch.arange(seq) < lengths[:, None]
    return (mask.flip(1) if left else mask).long()


def _is_causal(config: Any) -> bool:
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    return (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not config.is_encoder_decoder
    )


def _sees_text_and_images(config: Any) -> bool:
    from transformers.models.auto import modeling_auto

    return config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])
