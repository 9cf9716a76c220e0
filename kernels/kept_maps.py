"""Block maps that are kept from call to call.

A mask that reads no tensors has the same map whenever sizes and integers are the same.  A graph that Inductor
compiles must not be given such tensors, since it takes results of operators for memory of its own; a function
that is called eagerly may.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

import flashfuse.kernels.ops  # noqa: F401  (defines the operator)
from flashfuse.kernels.autograd import is_plain

Maps = tuple[Tensor, Tensor]

_kept: dict[Hashable, Maps] = {}
_MOST_KEPT = 64


def block_map(
    captures: Sequence[Tensor],
    ints: Sequence[int],
    like: Tensor,
    B: int,
    H: int,
    Sq: int,
    Skv: int,
    mask: str,
) -> Maps:
    """``flashfuse::block_map``, built once for a mask that reads no tensors.

    Not under a mode or a transform, whose tensors are its own, and not while a CUDA graph is captured, whose
    memory is its own and which must not read what may be freed by the time it is replayed.
    """
    cuda = like.device.type == "cuda"
    if captures or not is_plain(like) or (cuda and torch.cuda.is_current_stream_capturing()):
        maps: Maps = torch.ops.flashfuse.block_map.default(captures, ints, like, B, H, Sq, Skv, mask)
        return maps
    # What is made on a stream is complete, and after its end given to others, in the order of that stream.
    stream = torch.cuda.current_stream(like.device).cuda_stream if cuda else None
    key = (like.device, stream, tuple(ints), B, H, Sq, Skv, mask)
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        # Tensors made in inference mode could not be saved for a backward.
        with torch.inference_mode(False):
            made = torch.ops.flashfuse.block_map.default(captures, ints, like, B, H, Sq, Skv, mask)
        found = _kept[key] = made
    return found
