"""Masks with holes on the CPU: right under the rule, and no column visited in which nothing is allowed."""

import pytest
import torch
from tolerance import assert_equal_under_rule

from flashfuse.kernels import cpu, cpu_reach, cpu_score
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

SIZES = (2, 4, 397, 901)
"""Odd lengths of more than one block, and more keys than queries."""


def blocks(length: int) -> int:
    return -(-length // 128)


def random_blocks(*lead: int) -> torch.Tensor:
    """Some [lead.., query blocks, key blocks], with a row of blocks that has none."""
    g = torch.Generator().manual_seed(1)
    keep = torch.rand(*lead, blocks(SIZES[2]), blocks(SIZES[3]), generator=g) < 0.3
    keep[..., 3, :] = False
    return keep


def spread_over(keep: torch.Tensor) -> torch.Tensor:
    wide = keep.repeat_interleave(128, -1).repeat_interleave(128, -2)
    return wide[..., : SIZES[2], : SIZES[3]]


EXTRA = {
    "keep": lambda: random_blocks(),
    "of_head": lambda: random_blocks(4),
    "of_entry": lambda: random_blocks(2),
    "stored": lambda: spread_over(random_blocks(2))[:, None],
    "some": lambda: (
        (torch.arange(1291) // 200 % 3 != 1) & (torch.arange(1291) < torch.tensor([[1291], [900]]))
    ),
    "slopes": lambda: torch.rand(4, dtype=torch.float64) / 64,
    "bias": lambda: torch.randn(4, 397, 901, dtype=torch.float64),
    "table": lambda: torch.randn(4, 1300, dtype=torch.float64),
    "of_key": lambda: torch.randn(2, 901, dtype=torch.float64),
    "far": lambda: torch.randn(901, dtype=torch.float64),
    "sinks": lambda: torch.randn(4, dtype=torch.float64),
}

NEAR = "abs(kv//128 - q//128) <= 1"
MASKS = {
    "near and strided": f"({NEAR} or kv//128 % 4 == 0) and kv <= q + Skv - Sq",
    "keys with holes": "some[b, kv]",
    "keys with holes, causal": "some[b, kv] and kv <= q + 300",
    "far apart": "abs(kv - q) < 90 or kv > q + 600",
    "random": "keep[q//128, kv//128]",
    "random by head": "of_head[h, q//128, kv//128]",
    "random by entry": "of_entry[b, q//128, kv//128] and kv <= q + 500",
    "stored": "stored[b, 0, q, kv]",
    "strided by head": "(kv//128 + h//2) % 4 == 0 and q % 97 > 0",
}


class Case:
    def __init__(self, text, group=1, dropout_p=0.0, dtype=torch.float32, sizes=SIZES, seed=0):
        torch.manual_seed(seed)
        self.program, self.dropout_p, self.dtype = ScoreProgram.parse(text), dropout_p, dtype
        batch, heads, q_len, kv_len = self.sizes = sizes
        shapes = (heads, q_len, 16), (heads // group, kv_len, 16), (heads // group, kv_len, 24)
        self.tensors = [
            torch.randn(batch, s, h, d, dtype=torch.float64).transpose(1, 2) for h, s, d in shapes
        ]
        self.do = torch.randn(batch, heads, q_len, 24, dtype=torch.float64)
        self.captures = [EXTRA[name]() for name in self.program.captures]
        self.seed = torch.tensor([5])
        self.keep = cpu.dropout_mask(self.seed, dropout_p, sizes) if dropout_p else None
        for some in (self.tensors, self.captures):
            some[:] = [t.to(dtype) if t.is_floating_point() else t for t in some]

    def ours(self, q, k, v, captures):
        return torch.ops.flashfuse.attention(
            q, k, v, captures, [], [], self.seed, self.program.text, self.dropout_p, "cpu"
        )

    def reference(self, q, k, v, captures):
        return attention_reference(q, k, v, captures, [], self.program, self.dropout_p, self.keep)

    def run(self, function, dtype):
        def leaf(t):
            return t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t

        tensors, captures = [leaf(t) for t in self.tensors], [leaf(c) for c in self.captures]
        out, lse = function(*tensors, captures)
        leaves = tensors + [c for c in captures if c.requires_grad]
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, self.do.to(dtype))

    def results(self):
        """Ours, the original, and the original in float64."""
        return [
            self.run(self.ours, self.dtype),
            self.run(self.reference, self.dtype),
            self.run(self.reference, torch.float64),
        ]

    def check(self):
        check(self)

    def tiles(self, cut):
        named = dict(zip(self.program.captures, self.captures, strict=True))
        return named, cpu_reach.tiles(self.program, named, (), self.sizes, cut, self.dtype)


def check(*cases):
    """The rule over all cases at once: less hangs on which of two results is the lucky one."""
    names = ["out", "lse", "dq", "dk", "dv", *cases[0].program.captures]
    results = [case.results() for case in cases]
    for i in range(len(results[0][0])):
        ours, original, exact = (torch.stack([r[who][i] for r in results]) for who in range(3))
        assert_equal_under_rule(ours, original.to(ours.dtype), exact, f"{cases[0].program}: {names[i]}")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask):
    Case(f"s*0.25 where {mask} else zero").check()
    Case(f"s*0.25 where {mask} else nan", group=4).check()
    Case(f"tanh(s) where {mask} else uniform", group=2, dropout_p=0.2).check()


@pytest.mark.parametrize("dead", ["zero", "nan", "nan_all", "nan_s", "mean", "uniform", "uniform_s"])
def test_dead_rows(dead):
    for mask in (MASKS["random by head"], MASKS["stored"]):
        Case(f"s*0.25 + slopes[h]*(kv - q) where {mask} else {dead}", group=2).check()


@pytest.mark.parametrize("mask", ["near and strided", "random by head", "random by entry"])
def test_gradients_of_captures(mask):
    for score in (
        "s*0.25 + bias[h, q, kv]",
        "s*0.25 + table[h, kv - q + Sq]",
        "s*0.25 + of_key[b, kv]",
        "s*0.25*slopes[h] + far[abs(kv - q)]",
    ):
        text = f"{score} where {MASKS[mask]} else zero"
        check(*(Case(text, group=2, seed=seed) for seed in range(1, 4)))


@pytest.mark.parametrize("mask", ["near and strided", "random", "strided by head"])
def test_sinks(mask):
    Case(f"s*0.25 where {MASKS[mask]} sink sinks[h] else zero", group=2).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    # Their backward, too, runs in the fused kernel.
    for mask in (MASKS["near and strided"], MASKS["random by head"]):
        Case(f"s*0.25 where {mask} else zero", group=2, dtype=dtype).check()


# --- what is visited ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [cpu_reach.Cut(256, True, 2), cpu_reach.Cut(128, True, 1, 1 << 17)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_nothing_outside_a_tile_is_allowed(mask, cut):
    case = Case(f"s where {mask} else zero")
    named, tiles = case.tiles(cut)
    form = cpu_score.form_of(case.program)
    seen = torch.zeros(case.sizes, dtype=torch.int32)
    rows = torch.zeros(case.sizes[:3], dtype=torch.int32)
    for tile in tiles:
        tile.rows_of(rows).add_(1)
        if tile.is_empty:
            continue
        values = cpu_score.TileValues(form, named, (), case.sizes, tile, torch.float32)
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        for condition in tile.conditions:
            allowed = allowed & values.tensor(condition)
        part = tile.rows_of(seen)
        tile.add_to(part, 3, allowed.expand(*part.shape[:3], tile.columns).int())
    assert (rows == 1).all()
    q, k, v = (torch.zeros(*case.sizes[:2], n, 1) for n in (*case.sizes[2:], case.sizes[3]))
    expected = attention_reference(q, k, v, case.captures, [], case.program)[1].exp().round()
    assert seen.max() <= 1 and torch.equal(seen.sum(-1).float(), expected)


@pytest.mark.parametrize("by", ["keep", "of_head", "of_entry", "stored"])
def test_blocks_without_a_key_are_not_visited(by):
    """A row visits its blocks and no others, each head and entry its own; whole blocks need no mask."""
    index = {"keep": "", "of_head": "h, ", "of_entry": "b, "}
    text = "stored[b, 0, q, kv]" if by == "stored" else f"{by}[{index[by]}q//128, kv//128]"
    case = Case(f"s where {text} else zero")
    _, tiles = case.tiles(cpu_reach.Cut(256, True))
    keep = {"of_head": lambda: random_blocks(4)[None], "keep": lambda: random_blocks()[None, None]}.get(
        by, lambda: random_blocks(2)[:, None]
    )()
    allowed = spread_over(keep).expand(case.sizes)
    visited = sum(tile.scores for tile in tiles)
    # The last key block is a short one; holes of one block between two others are left out as well.
    assert int(allowed.sum()) <= visited <= int(allowed.sum()) * 1.3
    assert any(not tile.conditions for tile in tiles if not tile.is_empty)


def test_time_follows_density():
    """Neighbours, a global block and a stride over 8192 tokens: 8 % of the blocks are what is visited."""
    text = "s where (abs(q//128 - kv//128) <= 2 or kv < 128 or kv//128 % 16 == 0) and kv <= q"
    tiles = cpu_reach.tiles(ScoreProgram.parse(text), {}, (), (1, 4, 8192, 8192), cpu_reach.Cut(256))
    row, column = torch.arange(64)[:, None], torch.arange(64)
    near = (row - column).abs() <= 2
    wanted = int(((near | (column % 16 == 0)) & (column <= row)).sum()) * 128 * 128 * 4
    # Where there are no holes yet, in the first rows, two blocks of rows are one tile.
    assert wanted <= sum(tile.scores for tile in tiles) <= wanted * 1.01
    assert {str(c) for tile in tiles for c in tile.conditions} == {"kv <= q"}


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_calls_take_the_columns_of_their_tiles(dropout_p, monkeypatch):
    """Scores that forward and backward really compute, counted at their products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        columns = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "bmm" in name or "flash_attention" in name:
                sizes = [max(t.shape[-2:]) for t in args if isinstance(t, torch.Tensor) and t.dim() > 2]
                self.columns = max(self.columns, *sizes)
            return function(*args, **(kwargs or {}))

    case = Case(
        "s*0.25 where abs(kv//128 - q//128) <= 1 or kv//128 == 0",
        dropout_p=dropout_p,
        sizes=(1, 2, 2048, 2048),
    )
    args = (case.captures, [], [], case.seed, case.program, dropout_p)
    do = case.do.float()
    with Largest() as largest:
        out, lse = cpu.forward(*case.tensors, *args)
        cpu.backward(do, *case.tensors, out, lse, *args, [])
    # Two blocks of rows are one tile where their columns have no hole.
    assert largest.columns <= 5 * 128
