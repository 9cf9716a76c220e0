"""The Triton kernels on a real GPU: shapes, dtypes, programs and corner cases against float64."""

import dataclasses
import itertools

import pytest
import torch
from kernel_cases import (
    Case,
    documents,
    hostile_bias,
    hostile_sinks,
    left_pad,
    looked_up,
    mostly_padding,
    right_pad,
    run_case,
    sinks,
    window_by_head,
)
from tolerance import assert_equal_under_rule

from flashfuse.kernels import block_map
from flashfuse.kernels.spec import ScoreProgram

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def triton_attention():
    # Triton is imported where a kernel is wanted, not where tests are collected.
    from flashfuse.kernels import triton_attention

    return triton_attention


def bias(*dims):
    """A float capture of these of the sizes b, h, q, kv (1 where not named), or a table over kv − q."""

    def make(b, h, sq, skv):
        if dims == ("table",):
            return [torch.randn(h, sq + skv - 1)]
        named = {"b": b, "h": h, "q": sq, "kv": skv}
        return [torch.randn([named.get(d, 1) for d in dims])]

    return make


def dense_mask(b, h, sq, skv):
    return [torch.rand(1, sq, skv) < 0.5]


SCALE = "s*0.158"
PROGRAMS = [
    (SCALE, None, ()),
    (f"{SCALE} where kv <= q", None, ()),
    (f"{SCALE} where kv <= q and kv > q - 100", None, ()),
    (f"{SCALE} where kv <= q and pad[b, kv] else mean", left_pad, ()),
    (f"{SCALE} where kv <= q and pad[b, kv] else zero", left_pad, ()),
    (f"{SCALE} where kv <= q and pad[b, kv] else nan", left_pad, ()),
    (f"{SCALE} where pad[b, kv]", right_pad, ()),
    (f"{SCALE} where kv <= q and pad[b, kv] else uniform", left_pad, ()),
    (
        f"{SCALE} + bias[h] where kv <= q and pad[b, kv] else uniform_s",
        lambda *n: [torch.randn(n[1]), *left_pad(*n)],
        (0,),
    ),
    (f"{SCALE} where doc[b, q] == doc[b, kv] else zero", documents, ()),
    (f"{SCALE} where q // 64 == kv // 64 else zero", None, ()),
    (f"{SCALE} where allowed[0, q, kv] else zero", dense_mask, ()),
    ("tanh(s*0.02)*20.0 where kv <= q", None, ()),
    (f"{SCALE} + table[h, kv - q + Sq - 1]", bias("table"), (0,)),
    (f"{SCALE} + slope[h]*(kv - q) where kv <= q", bias("h"), (0,)),
    (f"{SCALE} + bias[0, h, q, kv]", bias("1", "h", "q", "kv"), (0,)),
    (f"{SCALE} + bias[b, 0, 0, kv] where kv <= q", bias("b", "1", "1", "kv"), (0,)),
    ("(s + gate[q])*sigmoid(gate[q])*0.1", bias("q"), (0,)),
    (f"{SCALE} + bias[b, 0, q, kv]", hostile_bias, ()),
    (f"{SCALE} sink 0.0", None, ()),
    (f"{SCALE} where kv <= q and kv > q - 100 sink sinks[h]", sinks, (0,)),
    *(
        (
            f"{SCALE} where kv <= q and pad[b, kv] sink sinks[h] else {tail}",
            lambda *n: [*left_pad(*n), *hostile_sinks(*n)],
            (1,),
        )
        for tail in ("mean", "uniform", "nan", "zero")
    ),
    (f"{SCALE} + t[h]*(kv - q) where kv <= q sink t[h]*2.0", sinks, (0,)),
    (f"{SCALE} + t[where(i[q, kv] < 0, i[q, kv] + 9, i[q, kv]), h] else nan", looked_up, (0,)),
]
CAUSAL = PROGRAMS[1]
ALIBI, DENSE = (next(p for p in PROGRAMS if name in p[0]) for name in ("slope", "bias[0, h"))
SINKS = [p for p in PROGRAMS if " sink sinks" in p[0]]


def NONE(b, h, sq, skv):
    return ()


def make(program, captures, grads, **kwargs):
    return Case(program, captures=captures or NONE, grads=grads, **kwargs)


def cases():
    for program, captures, grads in PROGRAMS:
        yield make(program, captures, grads, sizes=(2, 6, 200, 333), kv_heads=2, dims=(64, 64), dtype=BF16)
        yield make(program, captures, grads, sizes=(2, 2, 256, 256), kv_heads=2, dims=(64, 64), dtype=BF16)
        yield make(program, captures, grads, sizes=(2, 3, 150, 129), kv_heads=1, dims=(40, 40), dtype=F32)
    for program, captures, grads in [CAUSAL, *PROGRAMS[3:6], *PROGRAMS[7:9], ALIBI, DENSE, *SINKS]:
        for p in (0.1, 0.5):
            yield make(
                program,
                captures,
                grads,
                sizes=(2, 4, 300, 300),
                kv_heads=4,
                dims=(64, 64),
                dtype=BF16,
                dropout_p=p,
            )
        yield make(
            program,
            captures,
            grads,
            sizes=(1, 4, 257, 257),
            kv_heads=2,
            dims=(128, 128),
            dtype=F16,
            dropout_p=0.2,
        )
    for program, captures, grads in (p for p in PROGRAMS if "bias[0, h" in p[0] or "i[q, kv]" in p[0]):
        for dims, dtype, dropout_p in [((32, 32), BF16, 0.0), ((128, 64), F16, 0.1), ((40, 40), F32, 0.0)]:
            for length in (49, 200, 256):
                yield make(
                    *(program, captures, grads),
                    sizes=(128, 6, length, length),
                    kv_heads=2,
                    dims=dims,
                    dtype=dtype,
                    dropout_p=dropout_p,
                )
    for dims in [(8, 8), (40, 40), (96, 96), (128, 128), (192, 128), (256, 256), (64, 128), (80, 24)]:
        for dtype in (BF16, F16, F32):
            yield make(*CAUSAL, sizes=(1, 2, 300, 300), kv_heads=1, dims=dims, dtype=dtype)
        yield make(*ALIBI, sizes=(1, 2, 256, 256), kv_heads=1, dims=dims, dtype=BF16, dropout_p=0.1)
    for sq, skv in itertools.product((1, 63, 111, 1000), (1, 64, 111, 1000)):
        yield make(SCALE, None, (), sizes=(1, 3, sq, skv), kv_heads=1, dims=(64, 64), dtype=BF16)
        yield make(f"{SCALE} where kv <= q + Skv - Sq else zero", None, (), sizes=(1, 3, sq, skv), kv_heads=1,
                   dims=(64, 64), dtype=BF16)  # fmt: skip
    for layout in ("packed", "bhsd"):
        yield make(*CAUSAL, sizes=(2, 4, 200, 200), kv_heads=4, dims=(64, 64), dtype=BF16, layout=layout)
    yield make(SCALE, None, (), sizes=(2, 4, 0, 5), kv_heads=4, dtype=BF16)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_equal_under_rule(case):
    run_case(triton_attention(), case, "cuda")


def with_results_of_rows():
    for program, captures, grads in PROGRAMS:
        # Where a row is all finite minima the gradient of its logsumexp has lost the logarithm.
        if captures is not hostile_bias:
            yield make(
                program, captures, grads, sizes=(2, 6, 200, 333), kv_heads=2, dims=(64, 64), dtype=BF16
            )
            yield make(program, captures, grads, sizes=(2, 3, 150, 129), kv_heads=1, dims=(40, 40), dtype=F32)
    for program, captures, grads in [CAUSAL, *PROGRAMS[3:6], PROGRAMS[7], ALIBI, *SINKS]:
        yield make(
            program,
            captures,
            grads,
            sizes=(1, 4, 257, 257),
            kv_heads=2,
            dims=(128, 128),
            dtype=F16,
            dropout_p=0.2,
        )
    yield make(SCALE, None, (), sizes=(1, 3, 64, 1), dims=(64, 64), dtype=BF16)
    yield make(SCALE, None, (), sizes=(2, 4, 0, 5), kv_heads=4, dtype=BF16)


@pytest.mark.parametrize("case", list(with_results_of_rows()), ids=str)
def test_lse_has_a_gradient_and_the_maximum_is_told(case):
    run_case(triton_attention(), dataclasses.replace(case, aux=True), "cuda")


LAST = f"{SCALE} where kv <= q + Skv - Sq"
FEW_QUERIES = [
    *PROGRAMS,
    (LAST, None, ()),
    (f"{LAST} and kv > q + Skv - Sq - 300", None, ()),
    *(
        (f"{LAST} and pad[b, kv] else {tail}", mostly_padding, ())
        for tail in ("mean", "uniform", "nan", "zero")
    ),
    (f"{LAST} and kv >= first[h] else zero", window_by_head, ()),
]


def few_queries():
    for program, captures, floats in FEW_QUERIES:
        for q_len, dtype in ((1, BF16), (5, BF16), (16, F32)):
            yield make(
                program, captures, floats, sizes=(2, 6, q_len, 1333), kv_heads=2, dims=(64, 64), dtype=dtype
            )
    for dims in [(8, 8), (40, 40), (128, 128), (192, 128), (256, 256), (64, 128), (80, 24)]:
        for (q_len, kv_heads), dtype in itertools.product(((1, 8), (3, 1)), (BF16, F16, F32)):
            yield make(LAST, None, (), sizes=(1, 8, q_len, 2500), kv_heads=kv_heads, dims=dims, dtype=dtype)
    for sq, skv, layout in itertools.product((1, 16), (256, 257, 4096, 100_001), ("bshd", "bhsd", "packed")):
        for program in (SCALE, f"{LAST} else zero"):
            yield make(program, None, (), sizes=(1, 12, sq, skv), kv_heads=1, dims=(128, 128), dtype=BF16,
                       layout=layout)  # fmt: skip
    yield make(SCALE, None, (), sizes=(40, 16, 1, 2000), kv_heads=16, dims=(64, 64), dtype=BF16)
    yield make(SCALE, None, (), sizes=(1, 71, 4, 2000), kv_heads=1, dims=(64, 64), dtype=BF16)


@pytest.mark.parametrize("case", list(few_queries()), ids=lambda case: f"{case}|{case.layout}")
def test_few_queries_are_equal_under_rule(case):
    run_case(triton_attention(), case, "cuda", draws=3, forward_only=True)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("program", FEW_QUERIES, ids=lambda program: program[0])
def test_few_queries_tell_the_maximum(program, dtype):
    if program[1] is not hostile_bias:
        case = make(*program, sizes=(2, 6, 5, 1333), kv_heads=2, dims=(64, 64), dtype=dtype, aux=True)
        run_case(triton_attention(), case, "cuda", draws=3)


def test_few_queries_run_in_splits_of_the_keys():
    from flashfuse.kernels import decode

    assert decode.split_count(64, 256, 132) == 4  # 256 programs: two for each of 128 processors
    assert decode.split_count(8, 256, 132) * 8 <= 2 * 132
    assert decode.split_count(8, 3, 132) == 3 and decode.split_count(5000, 256, 132) == 1
    implementation = triton_attention()
    implementation._SITES.clear()
    q, k = (torch.randn(1, 8, n, 64, device="cuda", dtype=BF16) for n in (1, 4000))
    implementation.forward(q, k, k, (), (), (), None, ScoreProgram.parse("s*0.125"), 0.0)
    (site,) = implementation._SITES.values()
    assert site.splits > 1


def test_a_growing_cache_does_not_recompile():
    from flashfuse.kernels import decode

    implementation = triton_attention()
    program = ScoreProgram.parse(f"{SCALE} where kv <= q + Skv - Sq")
    kernels = (decode.decode_split, decode.decode_combine)

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def run(length):
        q, k = (torch.randn(1, 4, n, 64, device="cuda", dtype=BF16) for n in (1, length))
        implementation.forward(q, k, k, (), (), (), None, program, 0.0)

    run(1000)
    before = compiled()
    for length in (1001, 1024, 1152, 5000):
        run(length)
    assert compiled() == before


def test_a_cuda_graph_records_few_queries():
    torch.manual_seed(0)
    implementation = triton_attention()
    program = ScoreProgram.parse("s*0.125 where kv <= last[q] and pad[b, kv] else mean")
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=BF16)
    k, v = (torch.randn(2, 2, 3000, 64, device="cuda", dtype=BF16) for _ in range(2))
    pad = torch.ones(2, 3000, dtype=torch.bool, device="cuda")
    last = torch.full((1,), 200, device="cuda")

    def run():
        return implementation.forward(q, k, v, [last, pad], (), (), None, program, 0.0)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for position in (0, 200, 2999):
        last.fill_(position)
        q.normal_()
        pad[1] = position == 200  # a sequence without a key now and then
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(run(), recorded, strict=True))


def test_results_are_bitwise_repeatable():
    torch.manual_seed(0)
    implementation = triton_attention()
    program = ScoreProgram.parse("s*0.125 where kv <= q")
    q, k, v, do = (torch.randn(2, 8, 1024, 64, device="cuda", dtype=BF16) for _ in range(4))
    seed = torch.tensor([7], device="cuda")

    def run():
        out, lse = implementation.forward(q, k, v, (), (), (), seed, program, 0.1)
        return [out, lse, *implementation.backward(do, q, k, v, out, lse, (), (), (), seed, program, 0.1, ())]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("q_len", [2, 17])
def test_offsets_beyond_32_bits(q_len):
    """The last head lies more than 2^31 elements from the first."""
    torch.manual_seed(0)
    implementation = triton_attention()
    program = ScoreProgram.parse("s*0.125")
    heads, length = 80, 2**19
    k = torch.empty(1, heads, length, 64, device="cuda", dtype=BF16)
    k[:, -1] = torch.randn(length, 64, device="cuda")
    k[:, :-1] = 0
    q = torch.randn(1, heads, q_len, 64, device="cuda", dtype=BF16)
    out, _ = implementation.forward(q, k, k, (), (), (), None, program, 0.0)
    exact = torch.nn.functional.scaled_dot_product_attention(q[:, -1:].double(), *[k[:, -1:].double()] * 2)
    eager = torch.nn.functional.scaled_dot_product_attention(q[:, -1:], *[k[:, -1:]] * 2)
    assert_equal_under_rule(out[:, -1:], eager, exact)


def test_tf32_follows_the_precision_setting():
    torch.manual_seed(0)
    implementation = triton_attention()
    program = ScoreProgram.parse("s*0.125")
    q, k, v = (torch.randn(1, 2, 256, 64, device="cuda") for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            out, _ = implementation.forward(q, k, v, (), (), (), None, program, 0.0)
            errors[precision] = (out - exact).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-5 < errors["high"] < 1e-2


def test_dropout_rate_and_independence_of_launch():
    seed = torch.tensor([123], device="cuda")
    keep = triton_attention().dropout_mask(seed, 0.1, (4, 8, 512, 512))
    rate = 1 - keep.double().mean().item()
    deviation = (0.1 * 0.9 / keep.numel()) ** 0.5
    assert abs(rate - 0.1) < 5 * deviation
    part = triton_attention().dropout_mask(seed, 0.1, (1, 3, 100, 70))
    assert torch.equal(part[0, :3], keep[0, :3, :100, :70])


@pytest.mark.parametrize("lengths", [(256, 256), (300, 300)])
def test_lengths_do_not_recompile(lengths):
    from flashfuse.kernels import forward

    implementation = triton_attention()
    program = ScoreProgram.parse("s*0.125 where kv <= q")

    def run(length):
        q = torch.randn(1, 2, length, 64, device="cuda", dtype=BF16)
        out, lse = implementation.forward(q, q, q, (), (), (), None, program, 0.0)
        implementation.backward(out, q, q, q, out, lse, (), (), (), None, program, 0.0, ())

    def compiled():
        return sum(len(caches[0]) for caches in forward.attention_forward.device_caches.values())

    run(lengths[0])
    before = compiled()
    for extra in (128, 256, 1280) if lengths[0] % 128 == 0 else (1, 7, 64, 1001):
        run(lengths[1] + extra)
    assert compiled() == before


def test_a_cuda_graph_records_forward_and_backward_with_sinks():
    torch.manual_seed(0)
    implementation = triton_attention()
    program = ScoreProgram.parse("s*0.125 where kv <= q sink sinks[0, h, 0, 0]*1.5")
    q, k, v, do = (torch.randn(1, 4, 256, 64, device="cuda", dtype=BF16) for _ in range(4))
    maps = block_map.build((), (), q.device, (1, 4, 256, 256), program.mask_program)
    site = ([torch.randn(1, 4, 1, 1, device="cuda")], (), maps, None, program, 0.0)

    def run():
        out, lse = implementation.forward(q, k, v, *site)
        return [out, lse, *implementation.backward(do, q, k, v, out, lse, *site, (0,))]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, recorded, strict=True))


def test_gradients_through_the_operator():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 128, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))
    table = torch.randn(4, 255, device="cuda", requires_grad=True)
    text = "s*0.125 + table[h, kv - q + Sq - 1] where kv <= q"
    out, _ = torch.ops.flashfuse.attention(q, k, v, [table], [], [], None, text, 0.0, "triton")
    out.sum().backward()
    for t in (q, k, v, table):
        assert t.grad is not None and t.grad.shape == t.shape and t.grad.abs().sum() > 0
