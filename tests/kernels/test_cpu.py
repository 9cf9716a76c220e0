"""The CPU variant against the oracle: results, gradients, corner cases, and what it must not cost."""

import pytest
import torch
from tolerance import assert_equal_under_rule, holds

from flashfuse.kernels import cpu, cpu_reach, cpu_score
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

EXTRA = {
    "pad": lambda g, b, h, q, kv: torch.arange(kv) < torch.randint(1, kv + 1, (b, 1), generator=g),
    "left": lambda g, b, h, q, kv: torch.arange(kv) >= torch.randint(0, kv, (b, 1), generator=g),
    "doc": lambda g, b, h, q, kv: torch.randint(0, 2, (b, max(q, kv)), generator=g).cumsum(-1) // 20,
    "prefix": lambda g, b, h, q, kv: torch.randint(0, kv + 1, (b,), generator=g),
    "allowed": lambda g, b, h, q, kv: torch.rand(b, q, kv, generator=g) < 0.7,
    "bias": lambda g, b, h, q, kv: torch.randn(h, q, kv, generator=g, dtype=torch.float64),
    "table": lambda g, b, h, q, kv: torch.randn(h, q + kv, generator=g, dtype=torch.float64),
    "slopes": lambda g, b, h, q, kv: torch.rand(h, generator=g, dtype=torch.float64) / 8,
    "temperature": lambda g, b, h, q, kv: 0.1 + torch.rand(h, generator=g, dtype=torch.float64) / 4,
}


class Case:
    """Inputs of one site in float64, and the three computations that the rule compares."""

    def __init__(
        self, text, sizes=(2, 4, 63, 63), dims=(40, 40), group=1, dtype=torch.float32, dropout_p=0.0, seed=0
    ):
        self.arguments = text, sizes, dims, group, dtype, dropout_p
        batch, heads, q_len, kv_len = sizes
        self.program, self.dtype, self.dropout_p = ScoreProgram.parse(text), dtype, dropout_p
        self.ints = [7] * len(self.program.ints)
        g = torch.Generator().manual_seed(seed)

        def draw(h, s, d):
            # Memory as models have it: [B, S, H, D].
            return torch.randn(batch, s, h, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)

        shapes = ((heads, q_len, dims[0]), *((heads // group, kv_len, d) for d in dims))
        self.tensors = [draw(*shape) for shape in shapes]
        self.captures = [EXTRA[name](g, *sizes) for name in self.program.captures]
        self.captures = [c.to(dtype) if c.is_floating_point() else c for c in self.captures]
        self.do = draw(heads, q_len, dims[1])
        self.seed = torch.tensor([12345])
        self.keep = cpu.dropout_mask(self.seed, dropout_p, sizes) if dropout_p else None

    def run(self, function, dtype, capture_grads):
        """out, lse, then gradients of q, k, v and the floating captures."""

        def leaf(t, wanted=True):
            return t.detach().to(dtype).requires_grad_(wanted) if t.is_floating_point() else t

        tensors = [leaf(t) for t in self.tensors]
        captures = [leaf(c, capture_grads) for c in self.captures]
        out, lse = function(*tensors, captures)
        leaves = tensors + [c for c in captures if c.requires_grad]
        named = zip(self.program.captures, captures, strict=True)
        names = ["dq", "dk", "dv"] + [f"d{name}" for name, c in named if c.requires_grad]
        grads = torch.autograd.grad(out, leaves, self.do.to(dtype))
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}

    def reference(self, q, k, v, captures):
        return attention_reference(q, k, v, captures, self.ints, self.program, self.dropout_p, self.keep)

    def ours(self, q, k, v, captures):
        return torch.ops.flashfuse.attention(
            q, k, v, captures, self.ints, [], self.seed, self.program.text, self.dropout_p, "cpu"
        )

    def as_double(self):
        double = [t.double() if t.is_floating_point() else t for t in (*self.tensors, *self.captures)]
        return self.reference(*double[:3], double[3:])[0]

    def check(self, capture_grads=True):
        holds(lambda seed: Case(*self.arguments, seed).check_once(capture_grads))

    def check_once(self, capture_grads):
        ours = self.run(self.ours, self.dtype, capture_grads)
        original = self.run(self.reference, self.dtype, capture_grads)
        exact = self.run(self.reference, torch.float64, capture_grads)
        original["lse"] = original["lse"].to(ours["lse"].dtype)
        if self.dtype == torch.float64:
            # The reference in float64 is the exact result itself.  Allow what the rule would allow in
            # float32, brought down to the spacing of float64.
            finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            single = self.run(self.reference, torch.float32, capture_grads)
            original = {
                name: torch.where(t.isfinite(), t + (single[name] - t) * finer, t)
                for name, t in exact.items()
            }
        assert ours["lse"].dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        assert ours["out"].transpose(1, 2).is_contiguous() and ours["lse"].is_contiguous()
        for name, value in ours.items():
            assert_equal_under_rule(value, original[name], exact[name], f"{self.program}: {name}")


MASKS = {
    "none": "",
    "causal": " where kv <= q",
    "causal at the end": " where kv <= q + Skv - Sq",
    "window": " where kv <= q and kv > q - 20",
    "two-sided window": " where kv <= q + n and kv >= q - n",
    "pad": " where pad[b, kv]",
    "causal and right pad": " where kv <= q and pad[b, kv]",
    "causal and left pad": " where kv <= q and left[b, kv] else zero",
    "chunk": " where kv <= q and kv // 16 == q // 16",
    "document": " where doc[b, kv] == doc[b, q] and kv <= q",
    "prefix": " where kv <= q or kv < prefix[b]",
    "dense": " where allowed[b, q, kv] else zero",
    "dilated": " where (q - kv) % 3 == 0",
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("score", ["s*0.125", "s*0.125 + table[h, kv - q + Sq]"], ids=["plain", "bias"])
def test_masks(mask, score):
    Case(score + mask).check()
    # Long enough for several tiles of rows on both paths.
    Case(score + mask, sizes=(1, 2, 300, 300)).check(capture_grads=False)


SCORES = {
    "dense bias": "s*0.125 + bias[h, q, kv]",
    "alibi": "s*0.125 + slopes[h]*(kv - q) where kv <= q",
    "softcap": "tanh(s*0.125/3)*3 where kv <= q and kv > q - 20",
    "temperature": "s*temperature[h]",
    "two terms": "(s + bias[h, q, kv])*0.125 + slopes[h]*abs(kv - q)",
    "reversed": "s*-0.125 where kv <= q",
    "index of a load": "s*0.125 + table[h, doc[b, kv]]",
    "named integer": "s*0.125 + table[h, min(abs(kv - q), n)]",
    "no product": "bias[h, q, kv]",
    "loads of the mask": "s*0.125 + bias[h, q, kv] where bias[h, q, kv] > 0 else zero",
}


@pytest.mark.parametrize("text", SCORES.values(), ids=SCORES)
def test_scores_and_gradients_of_their_captures(text):
    if text == SCORES["no product"]:
        # Nothing flows to q and k, so autograd of the oracle has no gradient to compare.
        case = Case(text)
        (out, _), (exact, _) = (f(*case.tensors, case.captures) for f in (case.ours, case.reference))
        assert_equal_under_rule(out, exact, case.as_double(), text)
        return
    Case(text).check()
    Case(text, group=2, sizes=(1, 4, 40, 150)).check()


@pytest.mark.parametrize("dead", ["zero", "nan", "nan_s", "nan_all", "mean", "uniform", "uniform_s"])
@pytest.mark.parametrize(
    "text",
    [
        "s*0.125 where kv <= q and left[b, kv]",
        "s*0.125 where kv < q - 5 and kv > q - 20",
        "tanh(s) where kv < q - 5",
        "s*0.125 + bias[h, q, kv] where allowed[b, q, kv] and q % 5 > 0",
    ],
)
def test_dead_rows(text, dead):
    for sizes in ((2, 4, 63, 63), (1, 2, 270, 270)):
        for group, dropout_p in ((1, 0.0), (2, 0.0), (1, 0.3)):
            Case(f"{text} else {dead}", sizes, group=group, dropout_p=dropout_p).check()


def test_rows_of_a_bias_that_is_minus_infinity_are_dead():
    for dead in ("zero", "nan", "mean"):
        case = Case(f"s*0.125 + bias[h, q, kv] where kv <= q + 3 else {dead}")
        case.captures[0][:, 7] = float("-inf")
        case.captures[0][1, 9, :40] = float("-inf")
        case.check(capture_grads=False)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(2, 6, 1, 1), (2, 6, 1, 63), (1, 6, 63, 257), (2, 6, 63, 31)], ids=str)
def test_shapes(group, sizes):
    for mask in ("none", "causal", "causal at the end", "window", "causal and left pad"):
        dead = " else zero" if mask == "causal at the end" else ""
        Case("s*0.125" + MASKS[mask] + dead, sizes, group=group).check()


@pytest.mark.parametrize("dims", [(40, 40), (64, 24), (24, 64), (1, 3)], ids=str)
def test_head_dims(dims):
    for text in ("s*0.125", "s*0.125 where kv <= q", "s*0.125 + bias[h, q, kv]", "tanh(s*0.125)"):
        for group in (1, 2):
            Case(text, dims=dims, group=group).check(capture_grads=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_dtypes(dtype, dropout_p):
    for text in (
        "s*0.125",
        "s*0.125 where kv <= q and pad[b, kv]",
        "s*0.125 where kv <= q and kv > q - 20",
        "s*0.125 where kv <= q and left[b, kv] else mean",
        "s*0.125 + table[h, kv - q + Sq]",
        "tanh(s*0.125)*slopes[h]",
    ):
        for group in (1, 2):
            Case(text, dtype=dtype, group=group, dropout_p=dropout_p).check()


@pytest.mark.parametrize("mask", ["none", "causal", "window", "document", "dense"])
def test_dropout_is_exactly_that_of_its_mask(mask):
    Case("s*0.125" + MASKS[mask], dropout_p=0.3).check()
    Case("s*0.125 + bias[h, q, kv]" + MASKS[mask], (1, 4, 200, 200), group=2, dropout_p=0.3).check()


def test_dropout_mask_is_random():
    """Rate, independence of neighbours in every direction and of other seeds, to 5 standard deviations."""
    sizes, p = (2, 3, 256, 512), 0.1
    first, second = (cpu.dropout_mask(torch.tensor([seed]), p, sizes).double() for seed in (1, 2))
    assert first.shape == sizes and torch.equal(first, cpu.dropout_mask(torch.tensor([1]), p, sizes).double())

    def assert_near(mean, expected, variance, count):
        assert abs(mean - expected) < 5 * (variance / count) ** 0.5

    kept, variance = 1 - p, p * (1 - p)
    assert_near(first.mean(), kept, variance, first.numel())
    # Means of rows and columns spread as those of independent draws do.
    for axis in (-1, -2):
        means = first.mean(axis)
        spread = (means - kept).square().mean() * first.shape[axis] / variance
        assert_near(spread, 1, 2, means.numel())
    centred = first - kept
    for axis in range(4):
        for shift in (1, 2, 7, 128) if axis > 1 else (1,):
            product = centred * centred.roll(shift, axis)
            assert_near(product.mean(), 0, variance**2, product.numel())
    assert_near((centred * (second - kept)).mean(), 0, variance**2, first.numel())
    # The parity of the four corners of rectangles: what a mask made of row and column words could betray.
    rows, columns = centred.roll(3, 2), centred.roll(5, 3)
    corners = centred * rows * columns * rows.roll(5, 3)
    assert_near(corners.mean(), 0, variance**4, corners.numel())


def test_dropout_rates_at_the_ends():
    sizes = (1, 2, 64, 64)
    assert cpu.dropout_mask(torch.tensor([3]), 1e-12, sizes).all()
    case = Case("s*0.125", sizes, dropout_p=0.999999)
    assert torch.equal(case.ours(*case.tensors, [])[0].isfinite(), torch.ones(1, 2, 64, 40, dtype=torch.bool))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("text", ["s", "s where kv <= q else mean", "s + slopes[h] where kv <= q else nan"])
def test_empty_axes(sizes, text):
    Case(text, sizes).check()


def test_expanded_and_transposed_inputs():
    case = Case("s*0.125 where kv <= q")
    q, k, v = case.tensors
    case.tensors = [q.contiguous(), k[:, :1].expand(-1, 4, -1, -1), v.transpose(2, 3).contiguous().mT]
    case.check()


# --- what is not computed ----------------------------------------------------------------------


def tile_list(text, captures=(), sizes=(1, 2, 1024, 1024), rows=128, by_batch=False):
    program = ScoreProgram.parse(text)
    named = dict(zip(program.captures, captures, strict=True))
    return cpu_reach.tiles(program, named, (), sizes, cpu_reach.Cut(rows, by_batch))


def test_a_window_reaches_only_its_columns():
    for tile in tile_list("s where kv <= q and kv > q - 256"):
        assert (tile.k0, tile.k1) == (max(0, tile.q0 - 255), tile.q1)


def test_tiles_that_are_full_have_no_mask():
    tiles = tile_list("s where kv // 128 == q // 128")
    assert all((t.k0, t.k1, t.conditions) == (t.q0, t.q1, ()) for t in tiles)
    ids = torch.arange(1024)[None] // 256
    tiles = tile_list("s where doc[b, kv] == doc[b, q]", [ids])
    assert all((t.k0, t.k1, t.conditions) == (t.q0 // 256 * 256, t.q0 // 256 * 256 + 256, ()) for t in tiles)


@pytest.mark.parametrize("mask", [m for m in MASKS.values() if m])
def test_nothing_outside_a_tile_is_allowed(mask):
    """Tiles against the mask itself: all it allows is inside, and what was left out of it holds."""
    case = Case("s" + mask, sizes=(2, 2, 300, 300))
    named = dict(zip(case.program.captures, case.captures, strict=True))
    ints = tuple(zip(case.program.ints, case.ints, strict=True))
    form = cpu_score.form_of(case.program)
    for by_batch in (False, True):
        seen = torch.zeros(2, 2, 300, 300, dtype=torch.bool)
        cut = cpu_reach.Cut(64, by_batch)
        for tile in cpu_reach.tiles(case.program, named, ints, (2, 2, 300, 300), cut):
            if tile.is_empty:
                continue
            values = cpu_score.TileValues(form, named, ints, (2, 2, 300, 300), tile, torch.float32)
            allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            for condition in tile.conditions:
                allowed = allowed & values.tensor(condition)
            rows = tile.rows_of(seen)
            for run, part in zip(
                tile.runs, allowed.expand(*rows.shape[:3], tile.columns).split(tile.lengths, -1), strict=True
            ):
                rows[..., slice(*run)] = part
        q, k, v = (torch.zeros(2, 2, 300, 1) for _ in range(3))
        lse = attention_reference(q, k, v, case.captures, case.ints, case.program)[1]
        assert torch.equal(seen.sum(-1).float(), lse.exp().round())


def test_no_tensor_of_all_scores_is_made():
    """The largest tensor alive in forward and backward stays below a tenth of Sq·Skv."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
            return result

    for text, dropout_p in (
        ("s*0.125 where kv <= q and kv > q - 128", 0.0),
        ("s*0.125 where kv <= q", 0.0),
        ("s*0.125 + slopes[h]*(kv - q) where kv <= q and kv > q - 128", 0.1),
    ):
        case = Case(text, (1, 2, 4096, 4096), dims=(8, 8))
        args = (case.captures, [], [], case.seed, case.program, dropout_p)
        with Largest() as largest:
            out, lse = cpu.forward(*case.tensors, *args)
            cpu.backward(case.do, *case.tensors, out, lse, *args, [0] if case.captures else [])
        assert largest.numel < 4096 * 4096 / 10


# --- as an operator ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["s*0.125 where kv <= q + n", "s*0.125 + bias[h, q, kv] where pad[b, kv]"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(text, dropout_p):
    case = Case(text, sizes=(2, 2, 9, 9), dropout_p=dropout_p)
    tensors = [t.clone().requires_grad_() for t in case.tensors]
    captures = [c.clone().requires_grad_(c.is_floating_point()) for c in case.captures]
    args = (*tensors, captures, case.ints, [], case.seed, text, dropout_p, "cpu")
    torch.library.opcheck(torch.ops.flashfuse.attention, args)


def test_under_inductor():
    case = Case("s*0.125 + bias[h, q, kv] where kv <= q", dropout_p=0.1)
    compiled = torch.compile(case.ours, fullgraph=True)
    for name, value in case.run(compiled, case.dtype, True).items():
        assert torch.equal(value, case.run(case.ours, case.dtype, True)[name]), name
