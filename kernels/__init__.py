"""Request to tensors: score programs and the fused attention kernels that run them.

Knows nothing of torch.fx.  ``expr`` and ``spec`` say what is to be computed, ``reference``
computes it eagerly, ``ops`` is the operator that graphs call, ``dispatch`` chooses who runs it.
"""
