"""The block map against a brute-force classification, and interval arithmetic on hostile masks."""

import pytest
import torch

from flashfuse.kernels import block_map
from flashfuse.kernels.block_map import BLOCK, EMPTY, FULL, PARTIAL
from flashfuse.kernels.reference import environment, evaluate
from flashfuse.kernels.spec import ScoreProgram

CPU = torch.device("cpu")


def truth(program, captures, ints, sizes, blocks=(BLOCK, BLOCK)):
    """EMPTY, PARTIAL or FULL of every block by looking at every element."""
    lead = block_map.leading_sizes(program, sizes)
    env = environment(program, captures, ints, (*lead, *sizes[2:]), CPU)
    allowed = torch.as_tensor(evaluate(program.mask, env)) != 0
    allowed = allowed.expand(*lead, *sizes[2:])
    (bq, bkv), nq = blocks, block_map.block_count(sizes[2], blocks[0])
    nkv = block_map.block_count(sizes[3], bkv)
    states = torch.zeros(*lead, nq, nkv, dtype=torch.int8)
    for i in range(nq):
        for j in range(nkv):
            tile = allowed[..., i * bq : (i + 1) * bq, j * bkv : (j + 1) * bkv]
            full = tile.flatten(-2).all(-1) & ((j + 1) * bkv <= sizes[3])
            states[..., i, j] = torch.where(
                full, FULL, torch.where(tile.flatten(-2).any(-1), PARTIAL, EMPTY)
            ).char()
    return states


def states_of(rows, columns):
    """The states that a map [.., rows, 2 + columns] describes."""
    states = torch.zeros(*rows.shape[:-1], columns, dtype=torch.int8)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in rows.shape[:-1])):
        row = rows[tuple(at)].tolist()
        partial, full = row[2 : 2 + row[0]], row[2 + row[0] : 2 + row[0] + row[1]]
        assert partial == sorted(set(partial)) and full == sorted(set(full)) and not set(partial) & set(full)
        for state, blocks in ((PARTIAL, partial), (FULL, full)):
            for block in blocks:
                states[(*at, block)] = state
    return states


def captures_of(program, sizes, seed=0):
    b, h, sq, skv = sizes
    g = torch.Generator().manual_seed(seed)
    made = {
        "pad": torch.arange(skv)[None] < torch.tensor([[skv], [skv - 200]])[:b],
        "left": torch.arange(skv)[None] >= torch.tensor([[0], [150]])[:b],
        "doc": (torch.arange(max(sq, skv))[None] // torch.tensor([[200], [97]])[:b]),
        "dense": torch.rand(h, sq, skv, generator=g) < torch.tensor([0.0, 0.5, 1.0, 0.0])[:h, None, None],
        "start": torch.randint(0, skv, (b,), generator=g),
        "weight": torch.rand(b, skv, generator=g) - 0.5,
        "span": torch.tensor([0.0, 40.5, 300.0, 1e9])[:h],
        "last": torch.arange(sq) * 2 + 70,
        "nan": torch.full((skv,), float("nan")),
        "keep": torch.rand(h, 5, 7, generator=g) < 0.4,
        "fine": torch.rand(12, 12, generator=g).repeat_interleave(2, 0) < 0.6,
        "tiny": torch.rand(44, 44, generator=g) < 0.9,
        "level": torch.randint(-300, 300, (5, 6), generator=g),
        "real": torch.randn(5, 6, generator=g).masked_fill(torch.rand(5, 6, generator=g) < 0.3, torch.nan),
    }
    return [made[name] for name in program.captures]


EXACT = [
    "kv <= q",
    "kv <= q + Skv - Sq",
    "kv <= q and kv > q - 130",
    "kv <= q and kv > q - window",
    "pad[b, kv]",
    "kv <= q and left[b, kv]",
    "q // 64 == kv // 64",
    "q // 256 == kv // 256",
    "doc[b, q] == doc[b, kv]",
    "dense[h, q, kv]",
    "dense[h, q, kv] and kv <= q",
    "kv >= start[b]",
    "kv <= last[q] and pad[b, kv]",
    "kv <= q or kv < 5",
    "abs(kv - q) < span[h]",
    "h == 1",
    "not (kv <= q)",
    "where(h == 0, kv <= q, kv >= q)",
    "max(kv, q) - min(kv, q) <= 100",
    "keep[h, q//128, kv//128]",
    "keep[h, q//128, kv//128] and kv <= q",
    "keep[h, q//256, (kv + 128)//128] or kv < 128",
    "fine[q//64, kv//64]",
    "tiny[q//16, kv//16]",
    "not keep[0, q//128, kv//128] and pad[b, kv]",
    "level[q//128, kv//128] > 2 and doc[b, 0] == 0",
    "real[q//128, kv//128] < 0.5",
    "not (real[q//128, kv//128] < 0.5)",
    "(q//128 - kv//128) % 3 == 0",
    "1024 % max(abs(q//128 - kv//128), 1) == 0",
    "min(q//64, kv//64)//max(abs(q//64 - kv//64), 1) % 2 == 0",
    "q//256 == kv//256 and q//64 % 2 == kv//64 % 2",
]
CONSERVATIVE = [
    "level[q//128, kv//128] <= q - kv",
    "fine[q//64, kv//64] and kv <= q",
    "real[q//128, kv//128] > (q - kv)*0.01",
    "keep[h, min((q + Skv - Sq)//128, 4), kv//128]",
    "fine[min(q, 383)//32, min(kv + 30, 383)//32] and kv > 3",
    "kv % 3 == 0",
    "kv % 512 < 128",
    "(kv - q)*(kv - q) < 10000",
    "doc[b, q] == doc[b, kv] and kv <= q",
    "weight[b, kv] > 0.0",
    "weight[b, kv]*3.0 + 0.1 > weight[b, min(q % 40, Skv - 1)]",
    "(kv - q)*0.01 + weight[b, kv] < 0.3",
    "weight[b, kv]*2.0 == 0.25",
    "exp(weight[b, kv]) > 1.5",
    "sqrt(weight[b, kv]) < 0.5",
    "kv // (q + 3) < 3",
    "q / 7 > kv / 5",
    "nan[kv] < 1.0 or kv == 3",
    "not (nan[kv] < 1.0)",
    "nan[kv] != 0.0",
    "min(weight[b, kv], 0.1) + max(kv, q) > 300",
    "tanh(weight[b, kv])*2 + sigmoid(weight[b, kv]) > 0.3",
    "weight[b, min(q, Skv - 1)] and kv",
    "(kv <= q) == pad[b, kv]",
    "(kv <= q) + pad[b, kv] > 1",
]
SIZES = [(2, 4, 512, 512), (2, 4, 300, 513), (2, 4, 129, 1), (1, 4, 1, 700)]


def run(text, sizes):
    program = ScoreProgram.parse(f"s where {text}").mask_program
    captures = captures_of(program, sizes)
    ints = [200] * len(program.ints)
    kv_map, q_map = block_map.build(captures, ints, CPU, sizes, program)
    nq, nkv = block_map.block_count(sizes[2]), block_map.block_count(sizes[3])
    assert kv_map.dtype == q_map.dtype == torch.int32
    assert kv_map.shape[2:] == (nq, 2 + nkv) and q_map.shape[2:] == (nkv, 2 + nq)
    ours = states_of(kv_map, nkv)
    assert torch.equal(ours, states_of(q_map, nq).transpose(-1, -2))
    return ours, truth(program, captures, ints, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("text", EXACT)
def test_exact(text, sizes):
    ours, expected = run(text, sizes)
    assert torch.equal(ours, expected), (ours, expected)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("text", EXACT + CONSERVATIVE)
def test_never_wrong(text, sizes):
    ours, expected = run(text, sizes)
    assert not ((ours == EMPTY) & (expected != EMPTY)).any(), "an allowed element lies in an empty block"
    assert not ((ours == FULL) & (expected != FULL)).any(), "a masked element lies in a full block"


@pytest.mark.parametrize("blocks", [(64, 32), (6, 4), (3, 200), (256, 128)], ids=str)
@pytest.mark.parametrize(
    "text", ["fine[q//64, kv//64]", "keep[h, q//128, kv//128] and kv <= q", "q//6 % 2 == kv//4"]
)
def test_blocks_of_other_sizes(text, blocks):
    sizes = (1, 4, 300, 333)
    program = ScoreProgram.parse(f"s where {text}").mask_program
    captures = captures_of(program, sizes)
    ours = block_map.block_states(captures, (), CPU, sizes, program, blocks)
    expected = truth(program, captures, (), sizes, blocks)
    assert (
        not ((ours == EMPTY) & (expected != EMPTY)).any() and not ((ours == FULL) & (expected != FULL)).any()
    )
    if " and " not in text:
        assert torch.equal(ours, expected)


def test_causal_and_window_visit_what_they_must():
    program = ScoreProgram.parse("s where kv <= q and kv > q - 4096").mask_program
    kv_map, _ = block_map.build((), (), CPU, (1, 1, 16384, 16384), program)
    assert kv_map.shape == (1, 1, 128, 130)
    assert kv_map[0, 0, -1, :2].tolist() == [2, 31]
    assert kv_map[0, 0, 0, :2].tolist() == [1, 0]


def test_axes_of_a_map_are_those_of_the_mask():
    sizes = (2, 4, 300, 300)
    for text, lead in {"kv <= q": (1, 1), "pad[b, kv]": (2, 1), "dense[h, q, kv]": (1, 4)}.items():
        program = ScoreProgram.parse(f"s where {text}").mask_program
        kv_map, q_map = block_map.build(captures_of(program, sizes), (), CPU, sizes, program)
        assert kv_map.shape[:2] == q_map.shape[:2] == lead


def test_no_rows_or_columns():
    program = ScoreProgram.parse("s where kv <= q").mask_program
    kv_map, q_map = block_map.build((), (), CPU, (1, 1, 0, 300), program)
    assert kv_map.shape == (1, 1, 0, 5) and q_map.shape == (1, 1, 3, 2)
    assert not q_map.any()


def test_a_program_without_mask_is_refused():
    with pytest.raises(ValueError, match="expected a program with a mask"):
        block_map.build((), (), CPU, (1, 1, 8, 8), ScoreProgram.parse("s"))
