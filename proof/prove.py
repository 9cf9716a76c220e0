"""Original against replacement, element by element, over finite fields."""

from __future__ import annotations

from flashfuse.passes.plan import Fuse
from flashfuse.proof.certificate import Certificate, NotProvable


def prove_site(plan: Fuse) -> Certificate:
    """The certificate of one planned site.

    Raises:
        NotProvable: an operation of the site has no meaning over a field.
    """
    raise NotProvable("proofs are not implemented")
