"""Any architecture of Transformers at a size that takes seconds: random weights, and inputs made for it.

Configs differ in what they call their sizes and in how sizes depend on each other, so a few ways to make
them small are tried in turn, and for each a few ways to feed the model, until one runs.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel

from flashfuse import hf

BATCH, LENGTH, LAYERS = 2, 16, 2
MAX_PARAMETERS = 30_000_000

_HEADS_KEPT = {
    name: size
    for name, size in hf._TINY.items()
    if "dim" not in name and "rank" not in name and name not in ("hidden_size", "d_model", "n_embd")
} | {"num_attention_heads": 2, "num_key_value_heads": 1, "num_heads": 2}
_ALL = {**hf._TINY, "num_frames": 4, "num_mel_bins": 16, "max_source_positions": 32}
SIZES: tuple[Mapping[str, int], ...] = (
    _ALL,
    _HEADS_KEPT,
    {**_ALL, "hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    {"vocab_size": 199, **hf._EXPERTS},
)
"""Ways to be small: all widths cut; width of the heads kept; heads of 128, which models have whose rotary
embedding has parts of fixed sizes; widths kept."""
_UNSET = {"vocab_size": 199, "num_key_value_heads": 2, "n_routed_experts": 2, "n_shared_experts": 1}
"""Sizes that some configs leave open though their models need them."""


class Unbuildable(Exception):
    """This architecture could not be made or run here, with the reason."""


def model_types() -> list[str]:
    return hf.model_types()


def build(kind: str, attention: str, dropout: float) -> tuple[nn.Module, dict[str, Any]]:
    """A model of this type that runs, and the arguments it runs with.

    Args:
        attention: ``eager`` or ``sdpa``.
        dropout: of attention, and of everything else that the config has a rate for.

    Raises:
        Unbuildable: no way of building and feeding it worked; the message is what the first one said.
    """
    errors: list[str] = []
    for sizes in SIZES:
        try:
            model = _model(kind, attention, dropout, sizes)
            for inputs in _inputs(kind, model):
                try:
                    with torch.no_grad():
                        model(**inputs)
                except Exception as error:
                    errors.append(_line(error))
                else:
                    return model, inputs
        except Exception as error:
            errors.append(_line(error))
    raise Unbuildable(errors[0])


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _model(kind: str, attention: str, dropout: float, sizes: Mapping[str, int]) -> nn.Module:
    config = AutoConfig.for_model(kind)
    hf._shrink(config, sizes)
    hf._set_layers(config, LAYERS)
    for part in hf._configs(config):
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                # Whole layers left out at random are another model each time.
                rate = 0.0 if "layer" in name or "path" in name else dropout
                with contextlib.suppress(StrictDataclassError):
                    setattr(part, name, rate)
        for name, value in _UNSET.items():
            if vars(part).get(name, value) is None and sizes is not _ALL:
                setattr(part, name, value)
        for name, value in _NEEDED.items():
            if getattr(part, name, value) != value or (name == "prediction_length" and hasattr(part, name)):
                setattr(part, name, value)
    with torch.device("meta"):
        size = sum(
            p.numel() for p in AutoModel.from_config(config, attn_implementation=attention).parameters()
        )
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters are too many")
    return hf._build(kind, config, None, attention, torch.float32, "cpu")


_NEEDED = {"apply_spec_augment": False, "use_cache": False, "prediction_length": 4}
"""Settings without which a model is random, keeps what it need not, or is not complete."""


# --- inputs -------------------------------------------------------------------------------------


def _inputs(kind: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments to try, the likeliest first."""
    config = model.config
    length = min(LENGTH, hf._max_seq(config, model) or LENGTH)
    try:
        plain = hf.LoadedModel(kind, model, "", None).inputs(BATCH, length)
    except (ValueError, AttributeError, TypeError) as error:
        plain, problem = {}, error
    else:
        problem = None
    names = inspect.signature(model.forward).parameters
    makers = {name: maker for name, maker in _MAKERS.items() if name in names}
    torch.manual_seed(0)
    made = {name: maker(config, plain) for name, maker in makers.items()}
    required = {name: made[name] for name in hf._required(names) if name in made}
    if problem is None:
        yield required | plain
    for other in _reshaped(plain):
        yield required | other
    for name in made:
        yield required | plain | {name: made[name]}
    yield made | plain
    if problem is not None:
        raise problem


def _reshaped(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Other layouts of images (videos) and of features (time first, other widths)."""
    if "pixel_values" in inputs:
        image = inputs["pixel_values"]
        for frames in (4, 8, 16):
            yield inputs | {"pixel_values": image.unsqueeze(1).repeat(1, frames, 1, 1, 1)}
    if "input_features" in inputs:
        features = inputs["input_features"]
        yield inputs | {"input_features": features.mT.contiguous()}
        yield inputs | {"input_features": torch.cat([features.mT, features.mT], -1)}
        yield inputs | {"input_features": features[:, None]}
    if "input_values" in inputs:
        yield inputs | {"input_values": inputs["input_values"][:, None]}
        yield inputs | {"input_values": torch.randn(BATCH, 64, 16)}


def _size(config: Any, *names: str, default: int) -> int:
    return hf._first_size(config, names, default)


def _boxes(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    corner = torch.randint(0, 50, (BATCH, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 50, corner.shape)], -1)


def _video(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    frames = _size(config, "num_frames", "frames_per_clip", default=4)
    return torch.randn(BATCH, frames, 3, *hf._image_size(getattr(config, "vision_config", config)))


def _image(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    return torch.randn(BATCH, 3, *hf._image_size(getattr(config, "vision_config", config)))


def _past(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    lags = max(getattr(config, "lags_sequence", [0]) or [0])
    length = _size(config, "context_length", default=32) + lags
    channels = _size(config, "num_input_channels", default=0)
    return torch.randn(BATCH, length, channels) if channels else torch.randn(BATCH, length)


def _patches(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    patch = _size(config, "patch_size", default=14)
    width = _size(config, "in_channels", "in_chans", "num_channels", default=3) * patch * patch
    return torch.randn(32, width * _size(config, "temporal_patch_size", default=1))


def _grid(config: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    return torch.tensor([[1, 4, 4], [1, 4, 4]])


_MAKERS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "bbox": _boxes,
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "past_values": _past,
    "past_observed_mask": lambda c, i: torch.ones_like(_past(c, i)),
    "past_time_features": lambda c, i: torch.randn(
        *_past(c, i).shape[:2], _size(c, "num_time_features", default=0)
    ),
    "observed_mask": lambda c, i: torch.ones_like(_past(c, i)),
    "visual_feats": lambda c, i: torch.randn(BATCH, 6, _size(c, "visual_feat_dim", default=2048)),
    "visual_pos": lambda c, i: torch.rand(BATCH, 6, 4),
    "visual_embeds": lambda c, i: torch.randn(BATCH, 6, _size(c, "visual_embedding_dim", default=512)),
    "inputs": lambda c, i: torch.randn(BATCH, LENGTH, _size(c, "d_model", default=64)),
    "query_embeds": lambda c, i: torch.randn(BATCH, 4, _size(c, "hidden_size", default=64)),
    "input_features": lambda c, i: torch.randn(BATCH, 64, _size(c, "num_mel_bins", default=80)),
    "input_values": lambda c, i: torch.randn(BATCH, 1, 1600),
    "decoder_input_ids": lambda c, i: torch.randint(3, 50, (BATCH, 5)),
    "prompt_pixel_values": _image,
    "prompt_masks": _image,
    "hidden_states": _patches,
    "grid_thw": _grid,
    "noise_embeds": lambda c, i: torch.randn(BATCH, 4, _size(c, "hidden_size", default=64)),
}
"""Arguments by name, where a config says how large they are."""
