"""Derivatives, printing of expressions, and the sharing of generated code."""

import itertools

import pytest
import torch
from tolerance import assert_equal_under_rule

from flashfuse.kernels import codegen
from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import ONE, ZERO, S, const, load, parse, var
from flashfuse.kernels.printer import (
    CaptureType,
    Names,
    Printer,
    capture_type,
    kind_of,
    literal,
)
from flashfuse.kernels.reference import evaluate
from flashfuse.kernels.spec import ScoreProgram

DIFFERENTIABLE = [
    "s*0.125",
    "s*s + 3.0*s",
    "tanh(s*0.02)*50.0",
    "1.0 / (s*s + 1.0)",
    "exp(-s) + log(s*s + 2.0)",
    "sqrt(s*s + 1.0)*sigmoid(s)",
    "abs(s - 0.3)",
    "where(s > 0.2, s*2.0, s*s)",
    "min(s, 0.4) + max(s*s, 0.1)",
    "s % 0.7",
    "s*bias[h] + bias[h]*bias[h]",
]


@pytest.mark.parametrize("text", DIFFERENTIABLE)
def test_derivative_is_that_of_autograd(text):
    e = parse(text)
    s = torch.linspace(-2, 2, 41, dtype=torch.float64)[None].requires_grad_()
    bias = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    env = {"s": s, "bias": bias, "h": torch.zeros(1, 1, dtype=torch.long)}
    value = evaluate(e, env)
    leaves = {S: s, load("bias", [var("h")]): bias}
    for leaf, tensor in leaves.items():
        (expected,) = torch.autograd.grad(
            value.sum(), tensor, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        ours = torch.as_tensor(evaluate(derivative(e, leaf), env), dtype=torch.float64).expand(value.shape)
        ours = ours if leaf == S else ours.sum().view(1)
        assert_equal_under_rule(ours, expected, expected)


def test_ties_share_the_gradient_as_in_pytorch():
    e = parse("min(s, x[h]) + max(s, x[h])*3.0")
    s = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    env = {"s": s, "x": torch.ones(1, dtype=torch.float64), "h": torch.zeros(1, dtype=torch.long)}
    (expected,) = torch.autograd.grad(evaluate(e, env).sum(), s)
    assert evaluate(derivative(e, S), env).item() == expected.item() == 2.0


def test_derivative_simplifies():
    assert derivative(parse("s*0.125 + bias[h, kv - q]"), S) == const(0.125)
    assert derivative(parse("s*0.125 + bias[h]"), load("bias", [var("h")])) == ONE
    assert derivative(parse("bias[h] + kv"), S) == ZERO


def test_kinds():
    kinds = {"f": "float", "i": "int", "m": "bool"}
    for text, kind in {
        "kv - q": "int",
        "kv / q": "float",
        "f[h] + kv": "float",
        "i[b]*2": "int",
        "kv <= q": "bool",
        "m[b, kv] + m[b, q]": "int",
        "where(kv <= q, 1, 2.0)": "float",
        "abs(kv - q)": "int",
        "exp(kv)": "float",
    }.items():
        assert kind_of(parse(text), kinds) == kind, text


def test_literals_stay_float32():
    assert literal(-1e300) == "float('-inf')"
    assert literal(1e-60) == "0.0"
    assert literal(-3) == "(-3)"
    assert literal(True) == "True"


def test_capture_types():
    assert capture_type(torch.zeros(4, 16, 8)) == (CaptureType("float", "881", False), (16, 1))
    assert capture_type(torch.zeros(4, 3, dtype=torch.int64).expand(4, 3)) == (
        CaptureType("int", "n1", False),
        (3,),
    )
    assert capture_type(torch.zeros(1, 5, dtype=torch.bool).expand(7, 5)) == (
        CaptureType("bool", "01", False),
        (),
    )
    assert capture_type(torch.empty(2**16, 2**16, device="meta"))[0].wide


def test_equal_structure_shares_the_code_whatever_the_names():
    pytest.importorskip("triton")
    first = ScoreProgram.parse("s*0.125 + alpha[h, kv - q + Sq - 1] where pad_0[b, kv] and kv <= q + window")
    second = ScoreProgram.parse("s*0.125 + beta[h, kv - q + Sq - 1] where pad_9[b, kv] and kv <= q + other")
    types = (CaptureType("float", "n1", False), CaptureType("bool", "n1", False))
    a, b = codegen.generate(first, types), codegen.generate(second, types)
    assert a.score is b.score and a.mask is b.mask
    wide = codegen.generate(first, (CaptureType("float", "n1", True), types[1]))
    assert wide.score is not a.score


@pytest.mark.parametrize(
    ("text", "scale", "dscale", "folded"),
    [
        ("s*0.125", 0.125, 0.125, True),
        ("s", 1.0, 1.0, True),
        ("-s", None, -1.0, True),
        ("tanh(s*0.02)*50.0", None, None, True),
        ("s*0.125 + bias[h]", None, 0.125, False),
        ("s*0.125 + where(kv <= q, 0.0, -3.4e38)", None, 0.125, False),
        ("bias[h]", None, 0.0, False),
    ],
)
def test_what_the_kernels_need_not_compute(text, scale, dscale, folded):
    pytest.importorskip("triton")
    program = ScoreProgram.parse(text)
    code = codegen.generate(program, (CaptureType("float", "1", False),) * len(program.captures))
    assert (code.scale, code.dscale, code.folded) == (scale, dscale, folded)
    assert (code.dscore is None) == (dscale is not None)


def test_every_operation_is_printed():
    """Text of the generated code for the operations that have a rule of their own."""
    names = Names(
        ScoreProgram.parse("x[h] + i[b] + n"),
        (CaptureType("float", "1", False), CaptureType("int", "1", True)),
    )
    for text, expected in {
        "kv // n": "floordiv_int(kv, nums[0])",
        "x[h] % 2.0": "mod_float(t0, 2.0)",
        "q*kv": "kv.to(tl.int64) * q",
        "min(x[h], 1.0)": "tl.minimum(t0, 1.0, propagate_nan=tl.PropagateNan.ALL)",
        "not (x[h] <= 1.0)": "t1 == 0",
        "i[b]": "widened(tl.load(ptrs[1] + (b.to(tl.int64))))",
    }.items():
        printer = Printer(names)
        printer.text(parse(text))
        assert any(line.endswith(f" = {expected}") for line in printer.lines), (text, printer.lines)


def test_modules_are_kept_by_their_source():
    pytest.importorskip("triton")
    sources = [codegen.render("f", "x", [f"return x + {i}"]) for i in (1, 2, 1)]
    modules = [codegen.load_module(source) for source in sources]
    assert modules[0] is modules[2] and modules[0] is not modules[1]
    for a, b in itertools.combinations(modules[:2], 2):
        assert a.__name__ != b.__name__


def test_conditions_count_as_numbers_in_sums():
    program = ScoreProgram.parse("s + ((kv <= q) + (q < 3) + kv)*0.5")
    printer = Printer(Names(program, ()))
    printer.text(program.score)
    (total,) = [line for line in printer.lines if "(kv)" in line]
    assert total.count(".to(tl.int32)") == 2


def site_of(text, batch, length, q_len=None, **captures):
    pytest.importorskip("triton")
    from flashfuse.kernels.triton_site import Site

    program = ScoreProgram.parse(text)
    qkv = [torch.empty(batch, 4, n, 16, device="meta") for n in (q_len or length, length, length)]
    kinds = {"i": torch.long, "m": torch.bool, "d": torch.long}
    tensors = [
        torch.empty(captures[n], dtype=kinds.get(n, torch.float32), device="meta") for n in program.captures
    ]
    wanted = tuple(i for i, t in enumerate(tensors) if t.is_floating_point())
    return Site(qkv, tensors, (), program, 0.0, wanted, with_dlse=False, tune=False)


TABLES = [
    ("t[i[q, kv], h]", {"t": (9, 4), "i": (20, 20)}, ["pairs"]),
    ("t[where(i[q, kv] < 0, i[q, kv] + 9, i[q, kv])]", {"t": (9,), "i": (20, 20)}, ["pairs"]),
    ("t[h, q, i[q, kv]]", {"t": (4, 20, 9), "i": (20, 20)}, ["pairs"]),
    ("t[0, h, q, kv]", {"t": (1, 4, 20, 20)}, ["pairs"]),
    ("t[h, kv - q + 19]", {"t": (4, 39)}, ["distances"]),
    ("t[i[kv - q + 19], h]", {"t": (9, 4), "i": (39,)}, ["distances"]),
    (
        "t[h, kv - q + 19] + u[kv - q + 19] + e[h, q]",
        {"t": (4, 39), "u": (39,), "e": (4, 20)},
        ["distances"] * 2,
    ),
    ("t[b, i[q, kv]]", {"t": (2, 9), "i": (20, 20)}, []),
    ("t[i[b, q, kv], h]", {"t": (9, 4), "i": (2, 20, 20)}, []),
    ("t[h, kv] + u[h]", {"t": (4, 20), "u": (4,)}, []),
]


@pytest.mark.parametrize(("bias", "captures", "expected"), TABLES)
def test_tables_are_what_many_tiles_load_alike(bias, captures, expected):
    def tables(text, batch):
        code = site_of(text, batch, 20, **captures, m=(20, 20), d=(2, 20)).code
        assert (code.others is None) == (len(code.tables) == bias.count("[") - bias.count("i["))
        return ["distances" if table.by_distance else "pairs" for table in code.tables]

    assert tables(f"s + {bias}", 2) == tables(f"s + {bias} where kv <= q", 2) == expected
    assert tables(f"s + {bias} where kv - q < 9 and d[b, kv] > 0 and d[b, q] > 0", 2) == expected
    # Of one entry the tiles are all different; of blocks that a mask leaves out the kernel is not told.
    of_distances = [kind for kind in expected if kind == "distances"]
    for text, batch in (("", 1), (" where m[q, kv]", 2), (" where kv <= q and d[b, q] == d[b, kv]", 2)):
        assert tables(f"s + {bias}{text}", batch) == of_distances


def test_what_all_batch_entries_load_is_gathered_in_rows(monkeypatch):
    pytest.importorskip("triton")
    from flashfuse.kernels import triton_site

    def arrays(text, batch=64, length=250, **rest):
        return [shape for shape, *_ in site_of(text, batch, length, **rest).layouts_of_arrays]

    index, bias = {"t": (9, 4), "i": (250, 250)}, {"t": (4, 250, 250)}
    assert arrays("s + t[i[q, kv], h]", **index) == arrays("s + t[h, q, kv]", **bias) == [(4, 250, 256)]
    assert arrays("s + t[i[q, kv], 2] + t[i[q, kv], h]", **index) == [(1, 250, 256), (4, 250, 256)]
    # Entries of the batch differ, there are few of them or of distances, or a step decodes.
    assert arrays("s + t[b, q, kv]", t=(64, 250, 250)) == []
    assert arrays("s + t[i[b, q, kv], h]", t=(9, 4), i=(64, 250, 250)) == []
    assert arrays("s + t[i[q, kv], h]", batch=3, **index) == []
    assert arrays("s + t[h, q, kv]", batch=2**14, length=15, t=(4, 15, 15)) == [(4, 15, 16)]
    assert arrays("s + t[h, q, kv]", batch=128, length=300, q_len=15, t=(4, 15, 300)) == []
    # A row or a column of numbers.
    assert arrays("s + t[h, q, kv]", t=(4, 1, 250)) == arrays("s + t[h, q, kv]", t=(4, 250, 1)) == []
    assert arrays("s + t[h, kv - q + 249]", t=(4, 499)) == []
    # Where no tile is cut off, rows whose addresses are multiples of 8 elements are read as they lie.
    assert arrays("s + t[h, q, kv]", length=256, t=(4, 256, 256)) == []
    assert arrays("s + t[h, kv, q]", length=256, t=(4, 256, 256)) == [(4, 256, 256)]
    monkeypatch.setattr(triton_site, "MOST_PAIRS_GATHERED", 4 * 250 * 256 - 1)
    assert arrays("s + t[h, q, kv]", **bias) == []
