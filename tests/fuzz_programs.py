"""A Hypothesis strategy of attention as anybody might write it, and as nobody should.

A program is one to three sites in a row.  Each site makes q, k and v in some layout, multiplies q by
k in some spelling, takes some steps on the scores (``fuzz_masks``), a softmax, steps on the weights,
and the product with v.  Most sites are attention; some have a mistake in them that keeps the shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz_code import ONE, Program, Value, Writer, broadcast, without
from fuzz_masks import STEPS, condition, strange
from hypothesis import strategies as st


@dataclass(frozen=True)
class Operands:
    """q, k and v over ``lead`` dimensions that all three have, or broadcast to."""

    q: Value
    k: Value
    v: Value


@st.composite
def programs(draw: Callable[[Any], Any]) -> Program:
    """Programs that run: whatever is drawn is valid by construction."""
    # Dynamo and export take most of the time.
    w = Writer(draw, draw(st.sampled_from(["symbolic"] * 5 + ["dynamo"] * 4 + ["export"])))
    # The reference of float64 is no more exact than the original: little can be said of it.
    dtype = w.pick(*[torch.float32] * 28, *[torch.bfloat16, torch.float16] * 4, torch.float64)
    _draw_sizes(w)
    out, extra = site(w, operands(w, dtype))
    for _ in range(w.pick(0, 0, 0, 1, 2)):
        more = operands_from(w, out)
        out, others = site(w, more)
        extra += others
    returned = [finished(w, out), *extra]
    w.line(f"return {', '.join(returned)}")
    return Program(tuple(w.lines), tuple(w.inputs), w.capture)


def _draw_sizes(w: Writer) -> None:
    """Small and odd; lengths agree more often than not, so that mistakes have the right shapes."""
    q = w.integer(1, 9)
    k = q if w.chance(65) else w.integer(1, 9)
    d = w.pick(4, q, w.integer(1, 9))
    e = d if w.chance(70) else w.integer(1, 9)
    heads = w.integer(1, 3)
    group = w.pick(1, 1, 1, 2, 3)
    h = heads * group if w.chance(80) or group > 1 else q
    w.sizes |= {
        "a": 2,
        "b": w.integer(1, 3),
        "j": h // group,
        "g": group,
        "h": h,
        "q": q,
        "k": k,
        "d": d,
        "e": e,
    }


# --- q, k and v ---------------------------------------------------------------------------------


def operands(w: Writer, dtype: torch.dtype) -> Operands:
    lead = w.pick("bh", "bh", "bh", "bh", "b", "", "abh")
    heads = lead.replace("h", "j") if w.sizes["g"] > 1 else lead
    sizes = w.sizes
    alike = sizes["q"] == sizes["k"] and sizes["d"] == sizes["e"]
    if lead == "bh" and heads == lead and alike and w.chance(25):
        return projected_together(w, dtype)
    q = tensor(w, "q", lead + "qd", dtype)
    if alike and heads == lead and w.chance(5):
        k = replace(q, axes=lead + "kd")
    else:
        k = tensor(w, "k", heads + "kd", dtype)
    v = (
        replace(k, axes=heads + "ke")
        if sizes["d"] == sizes["e"] and w.chance(8)
        else tensor(w, "v", heads + "ke", dtype)
    )
    return Operands(q, k, v)


def tensor(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """An argument, and the views that bring it into the order ``axes``."""
    made = w.pick(_plain, _permuted, _heads_last, _folded, _sliced, _cached, _shared, _rotated)
    return made(w, stem, axes, dtype)


def _plain(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    return w.normal(stem, axes, dtype)


def _permuted(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    stored = "b" + axes[2] + axes[1] + axes[3] if len(axes) == 4 and w.chance(60) else w.shuffled(axes)
    return w.ordered(w.normal(stem, stored, dtype), axes)


def _heads_last(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """[B, S, H·D], perhaps out of a projection."""
    if len(axes) != 4:
        return _permuted(w, stem, axes, dtype)
    batch, heads, rows, column = axes
    split, flat = batch + rows + heads + column, batch + rows + "x"
    w.sizes["x"] = w.size(heads + column)
    if w.chance(30):
        w.sizes["w"] = w.integer(1, 6)
        x = w.normal("x", batch + rows + "w", dtype)
        weight = w.normal("weight", "xw", dtype)
        x = w.let("projected", w.pick(f"F.linear({x}, {weight})", f"{x} @ {weight}.t()"), flat, dtype)
    else:
        x = replace(w.argument(stem, f"torch.randn({w.shape(flat)}){w.cast(dtype)}", flat, dtype))
    text = w.pick(
        f"{x}.view({w.shape(split)})",
        f"{x}.reshape({w.sizes[batch]}, -1, {w.shape(heads + column)})",
        f"{x}.unflatten(-1, ({w.shape(heads + column)}))",
    )
    return w.let(stem, text + w.permutation(split, axes), axes, dtype)


def _folded(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """Batch and heads in one dimension, unfolded here."""
    if len(axes) != 4:
        return _plain(w, stem, axes, dtype)
    w.sizes["n"] = w.size(axes[:2])
    flat = w.argument(stem, f"torch.randn({w.shape('n' + axes[2:])}){w.cast(dtype)}", "n" + axes[2:], dtype)
    return w.let(stem, f"{flat}.view({w.shape(axes)})", axes, dtype)


def _sliced(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """Some rows of a longer tensor, or some columns of a wider one."""
    at = w.pick(-2, -1)
    n = w.sizes[axes[at]]
    before, after = w.integer(0, 2), w.integer(0, 2)
    w.sizes["x"] = n + before + after
    longer = axes[:at] + "x" + (axes[at + 1 :] if at != -1 else "")
    x = w.normal(stem, longer, dtype)
    stop = before + n if after else ""
    piece = f"{before or ''}:{stop}"
    text = w.pick(
        f"{x}[..., {piece}]" if at == -1 else f"{x}[..., {piece}, :]",
        f"{x}.narrow({at}, {before}, {n})",
        f"{x}.split([{before}, {n}, {after}], dim={at})[1]",
    )
    return w.let(stem, text, axes, dtype)


def _cached(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """The rows before, and the new ones."""
    n = w.sizes[axes[-2]]
    if n < 2:
        return _plain(w, stem, axes, dtype)
    w.sizes["x"] = new = w.integer(1, n - 1)
    w.sizes["y"] = n - new
    past = w.normal(f"past_{stem}", axes[:-2] + "y" + axes[-1], dtype)
    x = w.normal(stem, axes[:-2] + "x" + axes[-1], dtype)
    return w.let(stem, f"torch.cat({w.pick('[{}, {}]', '({}, {})').format(past, x)}, dim=-2)", axes, dtype)


def _shared(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """One for all of the batch, or for all heads."""
    if len(axes) < 3:
        return _plain(w, stem, axes, dtype)
    at = w.integer(0, len(axes) - 3)
    x = w.normal(stem, axes[:at] + ONE + axes[at + 1 :], dtype)
    return w.let(stem, f"{x}.{w.pick('expand', 'expand', 'broadcast_to')}({w.shape(axes)})", axes, dtype)


def _rotated(w: Writer, stem: str, axes: str, dtype: torch.dtype) -> Value:
    """What is computed of an argument: scaled, rotated, normalised."""
    x = w.normal(stem, axes, dtype)
    text = w.pick(
        "{0} * 0.5", "{0} / 2.0", "{0} * torch.cos({0}) + {0}.roll(1, -1)", "F.normalize({0}, dim=-1)",
        "{0} + 1", "{0}.clone().mul_(0.7)",
    )  # fmt: skip
    return w.let(stem, text.format(x), axes, dtype)


def projected_together(w: Writer, dtype: torch.dtype) -> Operands:
    """q, k and v out of one tensor."""
    b, h, s, d = (w.sizes[a] for a in "bhqd")
    w.sizes["x"] = 3 * h * d
    x = w.argument("x", f"torch.randn({b}, {s}, {3 * h * d}){w.cast(dtype)}", "bqx", dtype)
    names = [w.fresh(stem) for stem in "qkv"]
    pieces = (
        f"{x}.view({b}, {s}, 3, {h}, {d}).permute(2, 0, 3, 1, 4).unbind(0)",
        f"{x}.view({b}, {s}, {h}, {3 * d}).transpose(1, 2).split({d}, dim=-1)",
    )
    views = (
        f"(t.view({b}, {s}, {h}, {d}).transpose(1, 2) for t in {x}.chunk(3, dim=-1))",
        f"(t.reshape({b}, {s}, {h}, {d}).permute(0, 2, 1, 3) for t in {x}.split({h * d}, dim=2))",
        f"(t[:, 0] for t in {x}.view({b}, {s}, 3, 1, {h}, {d}).permute(0, 3, 4, 1, 2, 5).unbind(4))",
    )
    # fx.symbolic_trace can take results apart, and not loop over them.
    text = w.pick(*pieces, *(() if w.capture == "symbolic" else views))
    w.line(f"{', '.join(names)} = {text}")
    return Operands(*(Value(n, axes, dtype) for n, axes in zip(names, ("bhqd", "bhkd", "bhke"), strict=True)))


def operands_from(w: Writer, x: Value) -> Operands:
    """Operands of the next site, at least one of which is the output ``x`` of the last."""
    lead = x.axes[:-2]
    w.sizes |= {"d": w.sizes["e"], "g": 1}
    if "h" in w.sizes:
        w.sizes["j"] = w.sizes["h"]
    q = replace(x, axes=lead + "qd")
    if w.chance(50):
        w.sizes["k"] = w.sizes["q"]
        k = replace(x, axes=lead + "kd")
        return Operands(
            q, k, replace(x, axes=lead + "ke") if w.chance(50) else tensor(w, "v", lead + "ke", x.dtype)
        )
    k = tensor(w, "k", lead + "kd", x.dtype)
    return Operands(
        q, k, replace(k, axes=lead + "ke") if w.chance(30) else tensor(w, "v", lead + "ke", x.dtype)
    )


# --- one site -----------------------------------------------------------------------------------


def site(w: Writer, given: Operands) -> tuple[Value, list[str]]:
    """The output, in the order batch, heads, queries, columns; and what else is returned."""
    lead = given.q.axes[:-2]
    if w.chance(15):
        return library_call(w, given), []
    given = shared_heads(w, given)
    if given.q.axes[:-2] == "bh" == given.k.axes[:-2] == given.v.axes[:-2] and w.chance(20):
        given = Operands(*(fold(w, x) for x in (given.q, given.k, given.v)))
    scores = product(w, scaled_operands(w, given))
    first = scores
    for _ in range(w.pick(1, 2, 3, 0, 4)):
        scores = w.pick(*STEPS)(w, scores)
    if w.chance(6):
        scores = strange(w, scores)
    weights = after_softmax(w, softmax(w, scores))
    out = weighted_sum(w, weights, given.v)
    returned = [x.name for x in (weights, first) if w.chance(2)]
    return w.ordered(unfold(w, out, lead), lead + "qe"), returned


def shared_heads(w: Writer, given: Operands) -> Operands:
    """k and v with the heads of q, or q with a dimension for the group."""
    if "j" not in given.k.axes:
        return given
    group = w.sizes["g"]
    if given.q.axes == "bhqd" and w.chance(30):
        q = w.let(
            "q",
            w.pick(
                f"{given.q}.unflatten(1, ({w.sizes['j']}, {group}))", f"{given.q}.reshape({w.shape('bjgqd')})"
            ),
            "bjgqd",
            given.q.dtype,
        )
        k, v = (replace(w.same(x, f"{x}.unsqueeze(2)"), axes="bj1" + x.axes[2:]) for x in (given.k, given.v))
        return Operands(q, k, v)
    if w.sizes["j"] == 1 and w.chance(30):
        return replace(
            given,
            **{n: replace(x, axes=x.axes.replace("j", ONE)) for n, x in (("k", given.k), ("v", given.v))},
        )
    return replace(given, k=repeated(w, given.k), v=repeated(w, given.v))


def repeated(w: Writer, x: Value) -> Value:
    at = x.axes.index("j")
    axes = x.axes.replace("j", "h")
    group, inserted = w.sizes["g"], x.axes.replace("j", "jg")
    text = w.pick(
        f"{x}.repeat_interleave({w.sizes['g']}, dim={at})",
        f"torch.repeat_interleave({x}, {group}, {at - len(axes)})",
        f"{x}.unsqueeze({at + 1}).expand({w.shape(inserted)}).reshape({w.shape(axes)})",
        f"{x}[{':, ' * (at + 1)}None].expand({w.shape(inserted)}).flatten({at}, {at + 1})",
        f"{x}.repeat({', '.join(str(group) if i == at else '1' for i in range(len(axes)))})",
    )
    return replace(w.same(x, text), axes=axes)


def fold(w: Writer, x: Value) -> Value:
    """Batch and heads in one dimension."""
    w.sizes["n"] = w.size("bh")
    axes = "n" + x.axes[2:]
    text = w.pick(
        f"{x}.reshape({w.shape(axes)})", f"{x}.flatten(0, 1)", f"{x}.contiguous().view({w.shape(axes)})"
    )
    return replace(w.same(x, text), axes=axes)


def unfold(w: Writer, x: Value, lead: str) -> Value:
    """The dimensions of ``lead`` back from a folded or grouped one."""
    if "n" in x.axes:
        axes = x.axes.replace("n", "bh")
    elif "jg" in x.axes:
        axes = x.axes.replace("jg", "h")
    elif "g" in x.axes:
        return unfold(w, w.ordered(x, "bjg" + without(x.axes, "bjg")), lead)
    else:
        return x
    return replace(w.same(x, f"{x}.reshape({w.shape(axes)})"), axes=axes)


def scaled_operands(w: Writer, given: Operands) -> Operands:
    how = w.pick("", "", "", "q", "k", "both")
    q, k = given.q, given.k
    if how in ("q", "both"):
        q = w.same(q, w.pick(f"{q} * {w.sizes['d']} ** -0.25", f"{q} / 1.5", f"0.5 * {q}"))
    if how in ("k", "both"):
        k = w.same(k, w.pick(f"{k} * {w.sizes['d']} ** -0.25", f"{k}.mul(0.5)"))
    if w.chance(10) and q.dtype != torch.float64:
        q, k = w.to(q, torch.float32), w.to(k, torch.float32)
    return replace(given, q=q, k=k)


# --- products -----------------------------------------------------------------------------------


def product(w: Writer, given: Operands) -> Value:
    q, k = given.q, given.k
    if w.chance(4):
        k = mistaken(w, k)
    ways = [_matmul, _matmul, _matmul, _einsum, _keys_times_queries]
    if len(q.axes) == 3 and q.axes[0] == k.axes[0]:
        ways += [_bmm, _bmm, _baddbmm, _baddbmm]
    return w.pick(*ways)(w, q, k)


def mistaken(w: Writer, k: Value) -> Value:
    """k with two of its dimensions swapped where their sizes are the same: a mistake that runs."""
    pairs = [(i, j) for i in range(len(k.axes)) for j in range(i) if w.sizes[k.axes[i]] == w.sizes[k.axes[j]]]
    if not pairs:
        return k
    i, j = w.pick(*pairs)
    return w.same(k, f"{k}.transpose({i}, {j})")


def transposed(w: Writer, x: Value) -> str:
    n = len(x.axes)
    order = [*range(n - 2), n - 1, n - 2]
    return w.pick(
        f"{x}.transpose(-2, -1)", f"{x}.transpose(-1, -2)", f"{x}.mT",
        f"{x}.permute({', '.join(map(str, order))})",
        f"torch.transpose({x}, {n - 2}, {n - 1})", f"{x}.swapaxes(-1, -2)", f"{x}.movedim(-1, -2)",
    )  # fmt: skip


def _multiplied(w: Writer, stem: str, a: str, b: str, axes: str, dtype: torch.dtype) -> Value:
    return w.let(stem, w.pick(f"{a} @ {b}", f"torch.matmul({a}, {b})", f"{a}.matmul({b})"), axes, dtype)


def _matmul(w: Writer, q: Value, k: Value) -> Value:
    axes = broadcast(q.axes[:-2], k.axes[:-2]) + "qk"
    return _multiplied(w, "scores", f"{q}", transposed(w, k), axes, q.dtype)


def _keys_times_queries(w: Writer, q: Value, k: Value) -> Value:
    axes = broadcast(q.axes[:-2], k.axes[:-2]) + "kq"
    return _multiplied(w, "scores", f"{k}", transposed(w, q), axes, q.dtype)


def _einsum(w: Writer, q: Value, k: Value) -> Value:
    """The dimensions of operands and result in any order."""
    if ONE in q.axes or ONE in k.axes:
        return _matmul(w, q, k)
    if w.chance(30):
        q, k = w.ordered(q, w.shuffled(q.axes)), w.ordered(k, w.shuffled(k.axes))
    lead = without(q.axes, "qd")
    axes = w.shuffled(lead + "qk") if w.chance(30) else lead + "qk"
    if w.chance(20) and q.axes[-2:] == "qd" and k.axes[-2:] == "kd" and axes == lead + "qk":
        equation = "...qd,...kd->...qk"
    else:
        equation = f"{q.axes},{k.axes}->{axes}"
    text = f"torch.einsum({equation!r}, {q}, {k})"
    return w.let("scores", text, axes, q.dtype)


def _bmm(w: Writer, q: Value, k: Value) -> Value:
    return w.let("scores", f"torch.bmm({q}, {transposed(w, k)})", q.axes[0] + "qk", q.dtype)


def _baddbmm(w: Writer, q: Value, k: Value) -> Value:
    axes = q.axes[0] + "qk"
    kept = "".join(a if a == "k" or w.chance(60) else ONE for a in axes)
    added = w.normal("bias", kept, q.dtype)
    beta, alpha = w.pick("1", "0.5", "0", "1.0"), w.pick("1", "0.25", "0.5")
    factors = w.pick(f", beta={beta}, alpha={alpha}", "")
    return w.let("scores", f"torch.baddbmm({added}, {q}, {transposed(w, k)}{factors})", axes, q.dtype)


def weighted_sum(w: Writer, weights: Value, v: Value) -> Value:
    if weights.dtype != v.dtype:
        if w.chance(70):
            weights = w.to(weights, v.dtype)
        else:
            v = w.to(v, weights.dtype)
    if "n" in weights.axes and "n" not in v.axes:
        v = fold(w, v) if v.axes[:2] == "bh" else v
    if "n" in v.axes and "n" not in weights.axes:
        v = unfold(w, v, "bh")
    lead = without(v.axes, "ke")
    if "n" in weights.axes and "n" not in v.axes:
        weights = unfold(w, weights, "bh")
    if set(weights.axes) != set(lead + "qk") or w.chance(65):
        return _matmul_with_v(w, weights, v, broadcast(lead, _in_order(weights)))
    if w.chance(40):
        weights = w.ordered(weights, w.shuffled(weights.axes))
    wanted = w.shuffled(lead + "qe") if w.chance(30) else lead + "qe"
    return w.let("out", f"torch.einsum('{weights.axes},{v.axes}->{wanted}', {weights}, {v})", wanted, v.dtype)


def _in_order(weights: Value) -> str:
    """The batch dimensions of the weights, in the order in which v has them."""
    own = without(weights.axes, "qk")
    known = "abnhjg"
    return "".join(sorted(own, key=known.index)) if ONE not in own else own


def _matmul_with_v(w: Writer, weights: Value, v: Value, lead: str) -> Value:
    own = _in_order(weights)
    if w.chance(15):
        weights = w.ordered(weights, own + "kq")
        return _multiplied(w, "out", transposed(w, v), f"{weights}", lead + "eq", v.dtype)
    weights = w.ordered(weights, own + "qk")
    if len(own) == 1 and len(v.axes) == 3 and own in v.axes and w.chance(50):
        return w.let("out", f"torch.bmm({weights}, {v})", lead + "qe", v.dtype)
    return _multiplied(w, "out", f"{weights}", f"{v}", lead + "qe", v.dtype)


# --- softmax and weights ------------------------------------------------------------------------


def softmax(w: Writer, scores: Value) -> Value:
    axis = scores.axes.index("k")
    biased = any(name.startswith(("bias", "slopes", "table")) for name, _ in w.inputs)
    if not biased and w.chance(8):
        # Along another axis a bias of the keys may have no gradient but rounding errors.
        axis = w.integer(0, len(scores.axes) - 1)
    dim = w.pick(axis - len(scores.axes), axis)
    if scores.dtype in (torch.bfloat16, torch.float16) and w.chance(50):
        text = w.pick(
            f"F.softmax({scores}, dim={dim}, dtype=torch.float32)", f"{scores}.softmax({dim}, torch.float32)"
        )
        return w.let("weights", text, scores.axes, torch.float32)
    text = w.pick(
        "torch.softmax({x}, dim={d})", "F.softmax({x}, dim={d})", "{x}.softmax({d})", "{x}.softmax(dim={d})",
        "torch.special.softmax({x}, {d})", "torch.exp(F.log_softmax({x}, dim={d}))",
        "{x}.log_softmax({d}).exp()", "torch.ops.aten._safe_softmax.default({x}, {d})",
        "torch.exp({x} - torch.logsumexp({x}, {d}, keepdim=True))",
        "",
    )  # fmt: skip
    if text:
        return w.let("weights", text.format(x=scores, d=dim), scores.axes, scores.dtype)
    return by_hand(w, scores, dim)


def by_hand(w: Writer, scores: Value, dim: int) -> Value:
    peak = w.pick(
        "", f" - {scores}.amax({dim}, keepdim=True)", f" - {scores}.max(dim={dim}, keepdim=True)[0]",
        f" - {scores}.detach().amax(dim={dim}, keepdim=True)",
        f" - torch.amax({scores}, {dim}).unsqueeze({dim})",
    )  # fmt: skip
    e = w.let("e", w.pick(f"torch.exp({scores}{peak})", f"({scores}{peak}).exp()"), scores.axes, scores.dtype)
    total = w.pick(f"{e}.sum({dim}, keepdim=True)", f"torch.sum({e}, dim={dim}).unsqueeze({dim})")
    near = " + 1e-3" if w.chance(3) else ""
    return w.let("weights", f"{e} / ({total}{near})" if near else f"{e} / {total}", scores.axes, scores.dtype)


def after_softmax(w: Writer, weights: Value) -> Value:
    if _dropout_is_comparable(weights) and w.chance(25):
        rate = w.pick("0.1", "0.5", "0.25", "0.0", "0.9")
        weights = w.same(
            weights,
            w.pick(
                f"F.dropout({weights}, p={rate})", f"F.dropout({weights}, {rate}, True)",
                f"torch.dropout({weights}, {rate}, True)", f"F.dropout({weights}, p={rate}, training=False)",
                f"torch.native_dropout({weights}, {rate}, True)[0]",
                f"F.dropout({weights}, {rate}, inplace=True)",
            ),
        )  # fmt: skip
    if w.chance(10):
        weights = w.same(
            weights, f"{weights}{w.pick('.contiguous()', '.clone()', '.unsqueeze(-1).squeeze(-1)')}"
        )
    if w.chance(6):
        at = weights.axes.index(w.pick(*weights.axes))
        weights = w.same(
            weights,
            w.pick(
                f"{weights} * 0.5", f"{weights}.tril()", f"{weights}.flip({at})", f"{weights} + 0.1",
                f"{weights}.softmax({at})", f"{weights} / {weights}.sum({at}, keepdim=True)",
                f"{weights}.roll(1, {at})", f"{weights}.detach()", f"{weights}.clamp(min=0.1)",
            ),
        )  # fmt: skip
    square = [a for a in weights.axes if a != "k" and w.sizes[a] == w.sizes["k"]]
    if square and w.chance(3):
        weights = w.same(
            weights, f"{weights}.transpose({weights.axes.index('k')}, {weights.axes.index(square[0])})"
        )
    return weights


def _dropout_is_comparable(weights: Value) -> bool:
    """The check of a site lays its keep mask out as batch, heads, rows, keys; and overflows float16."""
    return weights.axes == _in_order(weights) + "qk" and weights.dtype != torch.float16


# --- a call of the library, and the end -----------------------------------------------------------


def library_call(w: Writer, given: Operands) -> Value:
    grouped = "j" in given.k.axes
    if grouped and w.chance(40):
        given, grouped = replace(given, k=repeated(w, given.k), v=repeated(w, given.v)), False
    q, k, v = given.q, given.k, given.v
    scores = Value("scores", q.axes[:-1] + "k", q.dtype)
    arguments = [f"{q}", f"{k}", f"{v}"]
    mask = w.pick("", "bool", "float", "causal")
    if mask == "bool":
        allowed = w.let("allowed", condition(w, scores), "", torch.bool)
        # A mask of one dimension is broadcast everywhere but here.
        rows = f"torch.full(({w.sizes['q']}, 1), True)"
        mask = w.pick(f"{allowed}.expand({w.shape(scores.axes)})", f"{allowed} & {rows}")
        arguments.append(w.pick(f"attn_mask={mask}", mask))
    elif mask == "float":
        kept = "".join(a if w.chance(60) else ONE for a in scores.axes[:-2]) + "qk"
        arguments.append(f"attn_mask={w.normal('bias', kept, q.dtype)}")
    elif mask == "causal":
        arguments.append("is_causal=True")
    if w.chance(30):
        arguments.append(f"scale={w.pick('0.3', '1.0', '0.125')}")
    if q.dtype != torch.float16 and w.chance(10):
        arguments.append(f"dropout_p={w.pick('0.1', '0.5')}")
    if grouped:
        arguments.append("enable_gqa=True")
    text = f"F.scaled_dot_product_attention({', '.join(arguments)})"
    return w.let("attended", text, q.axes[:-1] + "e", q.dtype)


def finished(w: Writer, out: Value) -> str:
    """What the function returns of the last output."""
    how = w.pick("plain", "merged", "updated", "projected", "viewed")
    if how == "merged" and out.axes == "bhqe":
        merged = f"{w.sizes['b']}, {w.sizes['q']}, {w.size('he')}"
        return w.pick(
            f"{out}.transpose(1, 2).reshape({merged})",
            f"{out}.transpose(1, 2).contiguous().view({merged})",
            f"{out}.permute(0, 2, 1, 3).flatten(2)",
        )
    if how == "updated":
        # What the library's kernels return is theirs: autograd lets nobody write to it.
        own = "attended" not in out.name and w.chance(50)
        w.line(f"{out}.{w.pick('mul_(2.0)', 'add_(1.0)')}" if own else f"{out} = {out} * 2 + 1")
    if how == "projected":
        w.sizes["w"] = w.integer(1, 4)
        return f"F.linear({out}, {w.normal('weight', 'we', out.dtype)})"
    if how == "viewed":
        return w.pick(
            f"{out}.flatten()", f"{out}.reshape(-1, {w.sizes['e']})", f"{out}.mT", f"{out}[..., :1, :]"
        )
    return out.name
