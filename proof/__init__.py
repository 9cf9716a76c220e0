"""Proof: a site and its replacement compared exactly, in finite fields.

``prove_site`` (``prove.py``) runs the user's own nodes and the emitted replacement, forward and
backward, on tensors whose elements are field elements (``field_tensor.py``), at sizes shrunk by
``shrink.py``.  The fused operator is run there as ``tiled.py``, a plain model of the blockwise kernels.
"""
