"""The one rule for "equal": no test states a tolerance of its own."""

import torch
from torch import Tensor


def assert_equal_under_rule(ours: Tensor, original: Tensor, exact: Tensor, name: str = "") -> None:
    """Ours is as good as the original: ``|ours - exact| <= 2 |original - exact| + eps max|exact|``.

    Args:
        ours: the result under test.
        original: the result of the original computation in the dtype of ``ours``.
        exact: the result of the original computation in float64.
        name: what is compared, for the message.

    Errors are the greatest over the tensor; ``eps`` is that of the dtype of ``ours``, for the
    rounding of the output.  NaN and infinities must stand in the same places as in ``original``.

    Raises:
        AssertionError: ours differs in shape, dtype or pattern, or its error exceeds the rule.
    """
    assert ours.shape == original.shape == exact.shape, f"{name}: {ours.shape} {original.shape} {exact.shape}"
    assert ours.dtype == original.dtype, f"{name}: {ours.dtype}, expected {original.dtype}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (kind(ours) != kind(original)).sum().item()
        assert not wrong, f"{name}: {kind.__name__} differs in {wrong} of {ours.numel()} places"
    finite = torch.isfinite(original) & torch.isfinite(exact)
    exact = exact.double()[finite]
    if exact.numel() == 0:
        return
    error, allowed = ((t.double()[finite] - exact).abs().max().item() for t in (ours, original))
    limit = 2 * allowed + torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= limit, f"{name}: error {error:.3g}, the rule allows {limit:.3g} (original {allowed:.3g})"
