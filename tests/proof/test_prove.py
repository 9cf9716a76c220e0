"""Certificates: what they say of sites of any size, dtype and dialect, and when there is none."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
import zoo_papers  # noqa: F401  (registers its specimens)
from torch import Tensor, fx
from torch.nn import functional as F

from flashfuse import pipeline
from flashfuse.passes import nodes
from flashfuse.passes.find import find_regions
from flashfuse.passes.plan import Fuse, plan
from flashfuse.passes.rewrite import copy_graph_module
from flashfuse.proof.certificate import NotProvable
from flashfuse.proof.key import site_nodes
from flashfuse.proof.prove import emitted, prove_replacement, prove_site
from flashfuse.proof.shrink import shrink

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(run: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Fuse:
    """The one site of ``run``, captured by Dynamo."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def collect(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    torch.compile(run, backend=collect, fullgraph=True, dynamic=dynamic)(*inputs)
    new = copy_graph_module(graphs[0])
    nodes.name_in_place_results(new.graph)
    (found,) = plan(find_regions(new.graph))
    assert isinstance(found, Fuse), found
    return found


def qkv(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*sizes, dtype=dtype) for _ in range(3)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, torch.finfo(scores.dtype).min).softmax(-1) @ v


def heads_split(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (t.view(2, 300, 12, 64).transpose(1, 2) for t in (x @ w).split(768, -1))
    i = torch.arange(300)
    near = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 100)
    scores = q @ k.transpose(-1, -2) * 0.125
    out = scores.masked_fill(~near, -1e9).softmax(-1) @ v
    return out.transpose(1, 2).reshape(2, 300, 768)


def relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i = torch.arange(80)
    bias = table[:, i[None, :] - i[:, None] + 79]
    return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


def cached(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    return (q @ torch.cat([past, k], 2).mT * 0.3).softmax(-1) @ torch.cat([past, v], 2)


def shrunk(site: Fuse) -> str:
    return prove_site(site).sizes


def test_sizes_shrink_and_keep_their_structure():
    x, w = torch.randn(2, 300, 32), torch.randn(32, 3 * 768)
    certificate = prove_site(planned(heads_split, x, w))
    assert certificate.ok
    assert certificate.sizes == "B2 H3 Sq13 Skv13 D3 standing for B2 H12 Sq300 Skv300 D64 float32"
    assert certificate.masks == ("-1e+09",)
    assert any("-1e+09" in text for text in certificate.assumptions)


def test_relative_positions_and_caches_shrink():
    sizes = (2, 4, 80, 16)
    assert prove_site(planned(relative, *qkv(*sizes), torch.randn(4, 159))).ok
    certificate = prove_site(planned(cached, *qkv(2, 4, 20, 16), torch.randn(2, 4, 60, 16)))
    assert certificate.ok
    assert "Sq10 Skv23" in certificate.sizes


def test_a_stored_index_fits_the_smaller_table():
    """The table has as many rows as there are keys, and is made smaller with them."""

    def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + table[:, index]).softmax(-1) @ v

    index = torch.randint(196, (196, 196))
    assert prove_site(planned(biased, *qkv(2, 4, 196, 16), torch.randn(4, 196), index)).ok


def windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As in Swin: every image has the masks of its windows."""
    n, heads, length = q.shape[0], q.shape[1], q.shape[2]
    scores = (q @ k.mT * 0.25).view(n // 16, 16, heads, length, length) + mask[None, :, None]
    return scores.view(-1, heads, length, length).softmax(-1) @ v


def windows_with_copies(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As in Swin of later versions: the masks are repeated for every image."""
    copies = mask[None].expand(q.shape[0] // 16, -1, -1, -1).reshape(-1, 1, *mask.shape[1:])
    return (q @ k.mT * 0.25 + copies).softmax(-1) @ v


@pytest.mark.parametrize("images", [32, 16])
@pytest.mark.parametrize("attention", [windows, windows_with_copies])
def test_the_images_of_a_batch_of_windows_become_fewer(attention, images):
    """Also where there are as many as each has windows."""
    certificate = prove_site(planned(attention, *qkv(images * 16, 2, 9, 16), torch.randn(16, 9, 9)))
    assert certificate.ok and certificate.sizes.startswith("B32 ")


@pytest.mark.parametrize("tokens", [16, 17, 32])
def test_as_many_images_as_windows_beside_other_numbers(tokens):
    """As many tokens, a sum of the two; whatever is made of them, there is an end to it."""
    certificate = prove_site(planned(windows, *qkv(256, 2, tokens, 16), torch.randn(16, tokens, tokens)))
    assert certificate.ok


@pytest.mark.parametrize("attention", [windows, windows_with_copies])
def test_the_mask_of_the_image_is_not_that_of_the_window(attention):
    site = planned(attention, *qkv(256, 2, 9, 16), torch.randn(16, 9, 9))
    replacement = emitted(site)
    (call,) = (n for n in replacement.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    assert "b % 16" in call.args[7]
    call.args = (*call.args[:7], call.args[7].replace("b % 16", "b//16"), *call.args[8:])
    assert not prove_replacement(site.region, replacement).ok


def test_images_that_do_not_come_first_stay():
    def of_windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.25).view(16, 16, 2, 9, 9) + mask[:, None, None]
        return scores.view(-1, 2, 9, 9).softmax(-1) @ v

    certificate = prove_site(planned(of_windows, *qkv(256, 2, 9, 16), torch.randn(16, 9, 9)))
    assert certificate.ok and certificate.sizes.startswith("B256 ")


def test_a_batch_that_a_range_indexes_becomes_smaller():
    """As in every mask that transformers makes."""

    def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, j = torch.arange(300), torch.arange(40)
        seen = mask[b[:, None, None, None], j[None, None, None, :]]
        return (q @ k.mT * 0.25).masked_fill(~seen, -math.inf).softmax(-1) @ v

    certificate = prove_site(planned(padded, *qkv(300, 2, 40, 16), torch.ones(300, 40, dtype=torch.bool)))
    assert certificate.ok and certificate.sizes.startswith("B2 ")


def test_numbers_just_below_a_kept_one_are_kept():
    """LongT5 with as many features as keys of a block: 128 is a product then, and distances end at 127."""
    config = transformers.LongT5Config(
        d_model=384, d_kv=64, num_heads=6, num_layers=1, d_ff=64, vocab_size=50, use_cache=False
    )  # fmt: skip
    model = transformers.LongT5EncoderModel(config).eval()
    model.set_attn_implementation("eager")
    ids, mask = torch.randint(50, (2, 128)), torch.ones(2, 128, dtype=torch.long)
    assert prove_site(planned(lambda *x: model(*x)[0], ids, mask)).ok


def test_the_batch_may_be_as_large_as_a_table():
    def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        i = torch.arange(100)
        bias = F.embedding((i[None, :] - i[:, None]).clamp(-15, 15) + 16, table)
        return (q @ k.mT * 0.25 + bias.permute(2, 0, 1)).softmax(-1) @ v

    assert prove_site(planned(biased, *qkv(32, 4, 100, 16), torch.randn(32, 4))).ok


@pytest.mark.parametrize("made", [torch.tensor, functools.partial(torch.full, ())])
def test_a_tensor_of_one_position_is_as_the_number(made):
    """As in DeBERTa-v2, whose table has as many rows as there are keys at its usual size."""

    def bucketed(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        i = torch.arange(192)
        distance = i[None, :] - i[:, None]
        near = (distance < 40) & (distance > -40)
        bucket = torch.where(near, made(30).type_as(distance), distance.abs()).clamp(0, 191)
        scores = q @ k.mT / made(16).sqrt()
        scores = scores + (q @ places.mT).gather(-1, bucket.expand(scores.shape))
        return scores.softmax(-1) @ v

    site = planned(bucketed, *qkv(2, 4, 192, 16), torch.randn(4, 192, 16))
    certificate = prove_site(site)
    assert certificate.ok and "Sq192" not in certificate.sizes.partition(" standing")[0]


def test_a_stored_mask_is_laid_out_as_it_was():
    def patches(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~seen.view(2, 1, 1, -1), -math.inf)
        return scores.softmax(-1) @ v

    assert prove_site(planned(patches, *qkv(2, 4, 16, 16), torch.ones(2, 4, 4, dtype=torch.bool))).ok


def test_products_sums_and_near_numbers_are_kept():
    site = planned(heads_split, torch.randn(2, 300, 32), torch.randn(32, 3 * 768))
    made = shrink(site.region.shape, [*dict(site_nodes(site.region)), *emitted(site).graph.nodes], 0)
    assert made(768) == made(12) * made(64)
    assert made(301) - made(300) == 1
    assert made(100) < made(300)
    assert [made(n) for n in range(8)] == [*range(8)]
    assert made(-300) == -made(300)


def test_symbolic_sizes_are_drawn():
    site = planned(causal, *qkv(3, 4, 11, 8), dynamic=True)
    one, other = prove_site(site, seed=0), prove_site(site, seed=3)
    assert one.ok and other.ok
    assert one.sizes != other.sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    assert prove_site(planned(causal, *qkv(2, 2, 9, 8, dtype=dtype))).ok


def test_autocast_is_followed():
    def f(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return causal(q, k, v)

    assert prove_site(planned(f, *qkv(2, 2, 9, 8))).ok


@pytest.mark.parametrize("causal_", [True, False])
def test_autocast_around_sdpa(causal_):
    def f(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal_)

    assert prove_site(planned(f, *qkv(2, 2, 9, 8))).ok


def narrow(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def test_a_dropped_precision_is_a_difference():
    site = planned(causal, *qkv(2, 2, 9, 8))
    replacement = emitted(site)
    (call,) = (n for n in replacement.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    with replacement.graph.inserting_before(call):
        q = replacement.graph.call_function(narrow, (call.args[0],))
    call.args = (q, *call.args[1:])
    certificate = prove_replacement(site.region, replacement)
    assert not certificate.ok
    assert certificate.difference == "q narrower: bfloat16 instead of float32"


def test_a_narrower_softmax_is_a_difference():
    def f(q, k, v):
        return (q @ k.mT).double().softmax(-1).float() @ v

    assert (
        prove_site(planned(f, *qkv(2, 2, 9, 8))).difference
        == "the softmax narrower: float32 instead of float64"
    )


def test_a_wider_dtype_is_listed():
    def f(q, k, v, bias):
        return (q @ k.mT + bias.bfloat16().float()).softmax(-1) @ v

    certificate = prove_site(planned(f, *qkv(2, 2, 9, 8), torch.randn(2, 1, 9, 9)))
    assert certificate.ok
    # Either the cast stays outside the site, or it is listed.
    assert all("bfloat16" in text for text in certificate.casts)


def test_the_first_difference_is_named():
    site = planned(causal, *qkv(2, 2, 9, 8))
    replacement = emitted(site)
    (call,) = (n for n in replacement.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    call.args = (*call.args[:7], call.args[7].replace("<=", "<"), *call.args[8:])
    certificate = prove_replacement(site.region, replacement)
    assert not certificate.ok
    assert certificate.difference.startswith("out[0, 0, 0, 0] differs, as do ")
    assert len(certificate.primes) == 1  # one draw is enough


def test_equal_sites_have_equal_certificates():
    site = planned(causal, *qkv(2, 2, 9, 8))
    one, other = (dataclasses.replace(prove_site(site), elapsed_ms=0) for _ in range(2))
    assert one == other
    assert one.elements > 0 and one.failure_bound < 1e-9 and len(one.primes) == 2


def test_rows_that_are_not_numbers_do_not_hide_gradients():
    def f(q, k, v, mask):
        return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v

    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    certificate = prove_site(planned(f, *qkv(2, 2, 9, 8), mask))
    assert certificate.ok
    assert "gradients that are NaN in the original are not compared" in certificate.assumptions


def test_a_function_outside_the_field_is_said():
    def f(q, k, v):
        return torch.tanh(q @ k.mT).softmax(-1) @ v

    assert prove_site(planned(f, *qkv(2, 2, 9, 8))).uninterpreted == ("tanh",)


def test_what_is_only_measured_is_not_part_of_the_site():
    """``view_as(x)`` reads the sizes of x: that a convolution made it does not matter to the proof."""
    specimen = next(s for s in zoo.SPECIMENS if s.name == "transformer_xl")
    site = planned(specimen.run, *specimen.inputs())
    assert not [n for n, _ in site_nodes(site.region) if n.target is F.conv2d]
    assert prove_site(site).ok


def test_no_meaning_over_a_field(monkeypatch):
    from flashfuse.proof import tensor

    site = planned(causal, *qkv(2, 2, 9, 8))
    monkeypatch.delitem(tensor.RULES, "_softmax")
    with pytest.raises(NotProvable, match="`_softmax` has no meaning over a field"):
        prove_site(site)


def test_nothing_outside_is_touched():
    site = planned(causal, *qkv(2, 2, 9, 8))
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    before = str(site.region.output.graph)
    with torch.no_grad():
        assert prove_site(site).ok
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grad
    assert str(site.region.output.graph) == before


def test_the_default_device_does_not_matter():
    site = planned(causal, *qkv(2, 2, 9, 8))
    with torch.device("meta"):
        assert prove_site(site).ok


def test_sdpa_is_taken_by_its_definition():
    site = planned(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(2, 2, 9, 64))
    assert prove_site(site).ok


def test_symbolic_trace_reads_sizes_when_it_runs():
    gm = pipeline.with_example_values(fx.symbolic_trace(scaled_by_its_width), qkv(2, 4, 20, 32))
    (found,) = plan(find_regions(gm.graph))
    assert isinstance(found, Fuse)
    assert prove_site(found).ok


def scaled_by_its_width(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.size(-1) ** -0.5).softmax(-1) @ v
