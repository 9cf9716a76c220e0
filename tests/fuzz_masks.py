"""What random code does to scores: scales, biases, masks, casts, and what only looks harmless.

Every step takes scores and returns scores, with their dimensions in whatever order they then have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from fuzz_code import ONE, Value, Writer, promoted, without

Step = Callable[[Writer, Value], Value]


def _with(w: Writer, scores: Value, operator: str, other: str, dtype: torch.dtype) -> Value:
    """``scores operator other``, out of place or in place."""
    methods = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
    if dtype == scores.dtype and w.chance(25):
        return _in_place(w, scores, f"{methods[operator]}_", other, operator)
    text = w.pick(
        f"{scores} {operator} {other}",
        f"torch.{methods[operator]}({scores}, {other})",
        f"{scores}.{methods[operator]}({other})",
    )
    if operator in "+*" and w.chance(20):
        text = f"{other} {operator} {scores}"
    return replace(w.same(scores, text), dtype=dtype)


def _in_place(w: Writer, scores: Value, method: str, other: str, operator: str = "") -> Value:
    """The update as a statement, as an expression, or through a view of the scores."""
    how = w.pick("expression", "statement", "operator", "view")
    if how == "expression":
        return w.same(scores, f"{scores}.{method}({other})")
    if how == "operator" and operator:
        w.line(f"{scores} {operator}= {other}")
    elif how == "view" and w.capture == "dynamo":
        w.line(f"view = {scores}{w.pick('[...]', '.unsqueeze(0)', '.detach()' if w.chance(3) else '[:]')}")
        w.line(f"view.{method}({other})")
    else:
        w.line(f"{scores}.{method}({other})")
    return scores


# --- arithmetic ---------------------------------------------------------------------------------


def scaled(w: Writer, scores: Value) -> Value:
    factor = w.pick("0.25", "0.5", "1.5", "-0.5", "2", "3.0 ** -0.5")
    if w.chance(25):
        kept = w.some(without(scores.axes, "qk")) if w.chance(60) else ""
        text = f"(torch.rand(({w.shape(kept)})) + 0.5){w.cast(scores.dtype)}"
        learned = w.argument("scale", text, kept, scores.dtype)
        placed = w.placed(learned, scores.axes) if kept else f"{learned}"
        if not kept and w.chance(30):
            placed = f"{learned}.abs().sqrt()"
        return _with(w, scores, w.pick("*", "*", "/"), placed, promoted(scores, learned))
    if w.chance(30):
        return _with(w, scores, "/", w.pick("4.0", "2", "math.sqrt(3)"), scores.dtype)
    return _with(w, scores, "*", f"({factor})" if " " in factor else factor, scores.dtype)


def softcapped(w: Writer, scores: Value) -> Value:
    cap = w.pick("5.0", "20.0", "2.0")
    return w.same(
        scores, w.pick(f"torch.tanh({scores} / {cap}) * {cap}", f"{cap} * ({scores} / {cap}).tanh()")
    )


def bent(w: Writer, scores: Value) -> Value:
    # Exponential and sigmoid keep their result for the backward; the next step may write to ours.
    text = w.pick(
        "-{0}", "{0}.abs()", "{0}.clamp(-2.0, 2.0)", "{0}.clamp(min=-1.5)", "torch.sigmoid({0}) * 3",
        "{0} ** 2", "torch.maximum({0}, {0} * 0.5)", "{0} + 0.5 * {0}", "{0} - 3", "torch.exp({0} * 0.1) - 1",
    )  # fmt: skip
    return w.same(scores, text.format(scores))


def cast(w: Writer, scores: Value) -> Value:
    return w.to(scores, w.pick(torch.float32, torch.float32, torch.bfloat16, torch.float64))


def bias(w: Writer, scores: Value) -> Value:
    made = w.pick(stored_bias, stored_bias, stored_bias, key_bias, relative_table, slopes)(w, scores)
    operator = w.pick("+", "+", "+", "-")
    factor = w.pick("", "", "", " * 0.5", " * -2")
    text, value = made
    other = f"({text}{factor})" if factor else text
    return _with(w, scores, operator, other, promoted(scores, value))


def _dtype(w: Writer, scores: Value) -> torch.dtype:
    return torch.float32 if w.chance(15) else scores.dtype


def stored_bias(w: Writer, scores: Value) -> tuple[str, Value]:
    """Of random rank: any of the scores' dimensions, the others of size 1 or not there.

    Always with the keys: the gradient of what is the same for all keys is nothing but rounding.
    """
    kept = w.some(without(scores.axes, "k")) + "k"
    axes = "".join(a if a in kept else ONE for a in scores.axes)
    value = w.normal("bias", axes.lstrip(ONE) if w.chance(60) else axes, _dtype(w, scores))
    if w.chance(10):
        return f"{value}.expand({w.shape(scores.axes)})", value
    return f"{value}", value


def key_bias(w: Writer, scores: Value) -> tuple[str, Value]:
    kept = "".join(a for a in scores.axes if a in "bk")
    value = w.normal("bias", kept, _dtype(w, scores))
    return w.placed(value, scores.axes), value


def relative_table(w: Writer, scores: Value) -> tuple[str, Value]:
    """A learned table, gathered by the distance of the two positions."""
    n, m = w.sizes["q"], w.sizes["k"]
    heads = "h" if "h" in scores.axes and w.chance(70) else ""
    w.sizes["t"] = n + m - 1
    first = heads and w.chance(50)
    table = w.normal("table", heads + "t" if first else "t" + heads, _dtype(w, scores))
    distance = w.pick(
        f"torch.arange({m})[None, :] - torch.arange({n})[:, None] + {n - 1}",
        f"(torch.arange({m}).view(1, -1) - torch.arange({n}).view(-1, 1)).clamp(min={1 - n}) + {n - 1}",
    )
    w.line(f"distance = {distance}")
    if first:
        gathered = w.let("relative", f"{table}[:, distance]", "hqk", table.dtype)
    else:
        read = w.pick(f"{table}[distance]", *([f"F.embedding(distance, {table})"] if heads else []))
        gathered = w.let("relative", read, "qk" + heads, table.dtype)
    return w.placed(gathered, scores.axes), gathered


def slopes(w: Writer, scores: Value) -> tuple[str, Value]:
    """ALiBi: a slope per head times the distance."""
    kept = "h" if "h" in scores.axes else ""
    value = w.normal("slopes", kept, _dtype(w, scores))
    positions = w.placed(_positions(w, "k"), scores.axes)
    if w.chance(60):
        positions = f"({positions} - {w.placed(_positions(w, 'q'), scores.axes)})"
    placed = w.placed(value, scores.axes) if kept else f"{value}"
    return f"{placed} * {positions}", replace(value, axes=scores.axes)


def _positions(w: Writer, axis: str) -> Value:
    return Value(f"torch.arange({w.sizes[axis]})", axis, torch.int64)


# --- conditions ---------------------------------------------------------------------------------


def condition(w: Writer, scores: Value) -> str:
    """The expression of a boolean mask, True = attend, that broadcasts to the scores."""
    text = w.pick(causal, stored_mask, padding, window, documents, strided)(w, scores)
    if w.chance(25):
        other = w.pick(padding, causal, stored_mask, prefix)(w, scores)
        text = f"({text}) {w.pick('&', '&', '|')} ({other})"
    return text


def stored_mask(w: Writer, scores: Value) -> str:
    """Handed in, of random rank; one in five has rows without a key."""
    kept = w.some(without(scores.axes, "k")) + "k"
    axes = "".join(a if a in kept else ONE for a in scores.axes).lstrip(ONE)
    text = f"torch.rand({w.shape(axes)}) < 0.6"
    if not w.chance(20):
        after = len(axes) - 1 - axes.index("k")
        first = f"(torch.arange({w.sizes['k']}) == 0)" + (f".view(-1{', 1' * after})" if after else "")
        text = f"({text}) | {first}"
    integer = w.chance(20)
    mask = w.argument("mask", f"({text}).long()" if integer else text, axes, torch.bool)
    if integer:
        return w.pick(f"{mask} != 0", f"{mask} == 1", f"{mask}.bool()")
    return f"{mask}"


def padding(w: Writer, scores: Value) -> str:
    """The first or the last keys of each sequence are padding."""
    lead = next((a for a in "bn" if a in scores.axes), "")
    n, count = w.sizes["k"], w.size(lead)
    drop = [w.integer(0, n - 1) for _ in range(count)]
    dtype = w.pick("", ".long()", ".float()")
    test = w.pick(f"< {n} -", ">=")
    lengths = f"torch.tensor({drop})[:, None]" if lead else f"{drop[0]}"
    keys = f"torch.arange({n})[None]" if lead else f"torch.arange({n})"
    pad = w.argument("pad", f"({keys} {test} {lengths}){dtype}", lead + "k", torch.bool)
    text = w.placed(pad, scores.axes)
    return text if not dtype else w.pick(f"({text}).bool()", f"{text} != 0", f"{text} > 0")


def causal(w: Writer, scores: Value) -> str:
    n, m = w.sizes["q"], w.sizes["k"]
    diagonal = w.pick(0, m - n, 1, -1) if w.chance(30) else max(0, m - n)
    how = w.pick("tril", "triu", "compare", "compare")
    if how == "compare":
        rows, keys = (w.placed(_positions(w, a), scores.axes) for a in "qk")
        return w.pick(f"{keys} <= {rows} + {diagonal}", f"{rows} >= {keys} - {diagonal}")
    ones = w.pick(f"torch.ones({n}, {m}, dtype=torch.bool)", f"torch.full(({n}, {m}), True)")
    text = f"{ones}.tril({diagonal})" if how == "tril" else f"~torch.triu({ones}, diagonal={diagonal + 1})"
    name = w.let("causal", text, "qk", torch.bool)
    return w.placed(name, scores.axes)


def window(w: Writer, scores: Value) -> str:
    rows, keys = (w.placed(_positions(w, a), scores.axes) for a in "qk")
    width = w.integer(1, 4)
    return w.pick(
        f"({keys} <= {rows}) & ({keys} > {rows} - {width})",
        f"({rows} - {keys}).abs() <= {width}",
        f"{keys} // {width} == {rows} // {width}",
    )


def documents(w: Writer, scores: Value) -> str:
    if w.sizes["q"] != w.sizes["k"]:
        return causal(w, scores)
    lead = next((a for a in "bn" if a in scores.axes), "")
    shape = f".expand({w.sizes[lead]}, {w.sizes['k']})" if lead else ""
    text = f"(torch.arange({w.sizes['k']}) // {w.integer(1, 4)}){shape}"
    ids = w.argument("ids", text, lead + "k", torch.int64)
    rows = w.placed(replace(ids, axes=lead + "q"), scores.axes)
    return f"{rows} == {w.placed(ids, scores.axes)}"


def strided(w: Writer, scores: Value) -> str:
    return f"{w.placed(_positions(w, 'k'), scores.axes)} % {w.integer(2, 3)} == 0"


def prefix(w: Writer, scores: Value) -> str:
    return f"{w.placed(_positions(w, 'k'), scores.axes)} < {w.integer(1, 3)}"


# --- masks --------------------------------------------------------------------------------------


def _fill(w: Writer, dtype: torch.dtype) -> str:
    lowest = f"torch.finfo({dtype}).min"
    wide = ["-1e9"] if dtype != torch.float16 else []
    return w.pick("float('-inf')", "-torch.inf", lowest, lowest, *wide, "-1e4")


def masked(w: Writer, scores: Value) -> Value:
    """The scores, with what the mask forbids filled or pushed down."""
    allowed = w.let("allowed", condition(w, scores), "", torch.bool)
    fill = _fill(w, scores.dtype)
    how = w.pick(_filled, _filled, _chosen, _added, _added_numbers, _filled_in_place)
    return how(w, scores, allowed.name, fill)


def _filled(w: Writer, scores: Value, allowed: str, fill: str) -> Value:
    negated = w.pick(
        f"~{allowed}", f"torch.logical_not({allowed})", f"{allowed} == 0", f"{allowed}.logical_not()"
    )
    return w.same(scores, f"{scores}.masked_fill({negated}, {fill})")


def _filled_in_place(w: Writer, scores: Value, allowed: str, fill: str) -> Value:
    return _in_place(w, scores, "masked_fill_", f"~{allowed}, {fill}")


def _chosen(w: Writer, scores: Value, allowed: str, fill: str) -> Value:
    number = w.pick(fill, f"torch.tensor({fill}, dtype={scores.dtype})", f"torch.full_like({scores}, {fill})")
    return w.same(
        scores,
        w.pick(f"torch.where({allowed}, {scores}, {number})", f"torch.where(~{allowed}, {number}, {scores})"),
    )


def _added(w: Writer, scores: Value, allowed: str, fill: str) -> Value:
    numbers = w.pick(
        f"torch.where({allowed}, 0.0, torch.tensor({fill}, dtype={scores.dtype}))",
        f"torch.zeros({allowed}.shape, dtype={scores.dtype}).masked_fill(~{allowed}, {fill})"
        if w.capture == "dynamo"
        else f"torch.zeros_like({scores}).masked_fill(~{allowed}, {fill})",
    )
    w.line(f"additive = {numbers}")
    return _with(w, scores, "+", "additive", scores.dtype)


def _added_numbers(w: Writer, scores: Value, allowed: str, fill: str) -> Value:
    """``(1 - mask) * fill``; an infinite fill would make NaN of 0 times it."""
    finite = f"torch.finfo({scores.dtype}).min" if "inf" in fill and "finfo" not in fill else fill
    w.line(f"additive = (1.0 - {allowed}.to({scores.dtype})) * {finite}")
    return _with(w, scores, "+", "additive", scores.dtype)


# --- shape only ---------------------------------------------------------------------------------


def moved(w: Writer, scores: Value) -> Value:
    """A step that only moves indices, or copies."""
    how = w.pick("clone", "permute", "fold", "unsqueeze", "split")
    if how == "permute" and len(scores.axes) < 5:
        wanted = w.shuffled(scores.axes)
        return w.ordered(scores, wanted)
    if how == "fold" and "bh" in scores.axes and "n" not in scores.axes:
        w.sizes["n"] = w.size("bh")
        axes = scores.axes.replace("bh", "n")
        return replace(w.same(scores, f"{scores}.reshape({w.shape(axes)})"), axes=axes)
    if how == "unsqueeze":
        return w.same(scores, f"{scores}.unsqueeze(0){w.pick('.squeeze(0)', '[0]')}")
    if how == "split" and "n" in scores.axes and "b" in w.sizes and "h" in w.sizes:
        axes = scores.axes.replace("n", "bh")
        return replace(w.same(scores, f"{scores}.reshape({w.shape(axes)})"), axes=axes)
    return w.same(scores, f"{scores}{w.pick('.contiguous()', '.clone()')}")


def strange(w: Writer, scores: Value) -> Value:
    """What attention code does not do: the site may be left, but must stay what it is."""
    dim = scores.axes.index(w.pick(*scores.axes))
    text = w.pick(
        f"{scores} - {scores}.mean({dim}, keepdim=True)", f"{scores}.cumsum({dim})", f"{scores}.flip({dim})",
        f"F.relu({scores}) - 1", f"{scores}.round()", f"torch.roll({scores}, 1, {dim})",
        f"{scores}.masked_fill({scores} < 0, -torch.inf)", f"torch.tril({scores})",
        f"{scores} * {scores}.detach()", f"{scores} - {scores}.amax({dim}, keepdim=True)",
        f"{scores} + {scores}.sum({dim}, keepdim=True) * 0.1", f"{scores}.softmax({dim}) * 2",
    )  # fmt: skip
    return w.same(scores, text)


STEPS: tuple[Step, ...] = (scaled, bias, masked, masked, bias, moved, softcapped, cast, bent)
