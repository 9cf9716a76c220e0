"""The Triton variant with tiles that are timed at the first call: see ``autotune``."""

from __future__ import annotations

import functools

from flashfuse.kernels import triton_attention

forward = functools.partial(triton_attention.forward, tune=True)
backward = functools.partial(triton_attention.backward, tune=True)
dropout_mask = triton_attention.dropout_mask
