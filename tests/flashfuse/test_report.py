"""Reports: the public names, JSON that any reader takes, a page that says what happened."""

import dataclasses
import json
import math

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from flashfuse.report import (
    AttentionShape,
    Certificate,
    CheckItem,
    Cost,
    ModelCheck,
    Reason,
    Report,
    SiteCheck,
    SiteReport,
)

SHAPE = AttentionShape(4, 12, 4, 512, 512, 64, 64, torch.bfloat16)
FUSED = SiteReport(
    name="layers.0.attn",
    status="fused",
    program="s*0.125 where kv <= q and pad[b, kv] else mean",
    mask="kv <= q and pad[b, kv]",
    dead_rows="mean",
    shape=SHAPE,
    dropout_p=0.1,
    gqa_group=3,
    source="/home/me/lib/site-packages/transformers/models/x/modeling_x.py:69 in forward",
    cost=Cost(flops=10, hbm_bytes_before=50_000_000, hbm_bytes_after=10_000_000, density=0.5),
    variant="triton",
    notes=("the constant -1e9 is taken as a mask",),
)
LEFT = SiteReport(
    name="head.attn",
    status="left",
    reasons=(Reason("weights_escape", "the weights are returned", "model.py:7", "do not return them"),),
    source="model.py:5",
)
PROOF = Certificate(
    ok=True,
    compared=("out", "dq", "dk", "dv", "dbias"),
    primes=((2147483579, 1073741789), (2147483579, 1073741789)),
    seeds=(0, 1),
    elements=5184,
    failure_bound=3e-16,
    sizes="B2 H4 Sq17 D8 standing for B8 H32 Sq4096 D128",
    uninterpreted=("tanh",),
    masks=("-3.4e+38",),
    casts=("the weights stay float32 instead of bfloat16",),
    assumptions=("`bias` is finite",),
    elapsed_ms=80.0,
)
GOOD = CheckItem("out", 1e-7, 1e-7, 2e-7, True)
BAD = CheckItem("dq", 3e-7, 1e-7, 2e-7, False)


def layers(count):
    return tuple(dataclasses.replace(FUSED, name=f"layers.{i}.attn") for i in range(count))


def test_public_names():
    report = Report((FUSED, LEFT))
    assert (report.num_sites, report.num_fused) == (2, 1)
    assert {"sites", "num_sites", "num_fused"} <= set(report.to_dict())
    names = (
        "name",
        "status",
        "reasons",
        "program",
        "mask",
        "shape",
        "dropout_p",
        "gqa_group",
        "source",
        "cost",
    )
    for site in report.to_dict()["sites"]:
        assert set(names) <= set(site)
    reason = report.to_dict()["sites"][1]["reasons"][0]
    assert reason == {
        "code": "weights_escape",
        "message": "the weights are returned",
        "where": "model.py:7",
        "hint": "do not return them",
    }


def proved(count, **changes):
    """Layers with the certificate of the first; it took time only there."""
    return tuple(
        dataclasses.replace(
            site,
            check=SiteCheck(True, proof=dataclasses.replace(PROOF, elapsed_ms=0.0 if i else 80.0, **changes)),
        )
        for i, site in enumerate(layers(count))
    )


def test_a_certificate_is_a_line_for_all_layers():
    report = Report(proved(12), proof_ms=80.4)
    text = " ".join(str(report).split())
    assert "12 attention sites, 12 fused, 12 proved, 0 left" in text and "proofs took 80 ms" in text
    assert "layers.0…11.attn ×12" in text and text.count("chance of a miss") == 1
    assert (
        "proved out, dq, dk, dv, dbias · 2 draws, 5,184 elements, p = 2147483579, chance of a miss < 1e-15 · "
        "at B2 H4 Sq17 D8 standing for B8 H32 Sq4096 D128" in text
    )
    for said in ("tanh uninterpreted", "-3.4e+38 is a mask", "`bias` is finite", "wider the weights stay"):
        assert said in text
    assert "Checked against float64" not in text, "no numbers, no section of numbers"
    check = report.to_dict()["sites"][0]["check"]
    assert check["proof"]["primes"][0] == [2147483579, 1073741789] and report.to_dict()["num_proved"] == 12
    model = ModelCheck(True, (GOOD,), proved(12), ("without dropout",), peak_bytes=5_000_000, proof_ms=80.4)
    text = str(model)
    assert "Proof: 12 of 12 sites, 80 ms" in text and text.count("chance of a miss") == 1
    assert "whole model: equal, 1 tensor, largest error 0.50 of its limit (out); without dropout" in text
    assert "peak memory of the verification: 5.0 MB" in text


def test_what_is_not_proved_is_told():
    check = SiteCheck(True, (GOOD,), not_proved="`sort` has no meaning")
    report = Report((dataclasses.replace(FUSED, check=check),))
    assert "1 fused, 0 proved, 0 left" in str(report)
    assert "not proved (`sort` has no meaning); compared numerically" in str(report)
    failed = dataclasses.replace(PROOF, ok=False, difference="dq[0, 1]: 3 instead of 4")
    report = Report((dataclasses.replace(LEFT, check=SiteCheck(False, proof=failed)),))
    assert not report.ok and "dq[0, 1]: 3 instead of 4" in str(report)
    split = (*proved(2), dataclasses.replace(layers(3)[2], check=check))
    assert str(Report(split)).count("s*0.125") == 2, "what is proved is not folded with what is not"


@pytest.mark.parametrize("rule", ["uniform", "uniform_s", "mean"])
def test_averaging_dead_rows_are_told(rule):
    site = dataclasses.replace(FUSED, dead_rows=rule)
    assert "a row without keys gives the mean of v" in str(Report((site,)))


def test_identical_layers_are_one_entry():
    text = str(Report(layers(12)))
    assert "layers.0…11.attn ×12" in text
    assert text.count("s*0.125") == 1
    other = dataclasses.replace(FUSED, name="layers.12.attn", dropout_p=0.2)
    text = str(Report((*layers(12), other)))
    assert "×12" in text and "layers.12.attn" in text
    assert text.count("s*0.125") == 2


def test_page_says_what_was_fused_and_what_was_left():
    text = str(Report((FUSED, LEFT), num_nodes_before=90, num_nodes_after=70, warnings=("look out",)))
    assert "2 attention sites, 1 fused, 1 left · 90 → 70 graph nodes" in text
    assert "kv <= q and pad[b, kv]; leaves 50% of the scores; a row without keys gives the mean of v" in text
    assert "transformers/models/x/modeling_x.py:69" in text and "/home/me" not in text
    assert "3 query heads share a key head" in text
    for said in ("weights_escape: the weights are returned (model.py:7)", "do not return them", "model.py:5"):
        assert said in text
    assert "warning: look out" in text
    assert "50.0 MB before, 10.0 MB after (5.0× less)" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_no_attention():
    assert "no attention found" in str(Report(num_nodes_before=3, num_nodes_after=3))


def test_totals_need_every_cost():
    assert Report((FUSED, LEFT)).hbm_bytes == (50_000_000, 10_000_000)
    assert Report((FUSED, dataclasses.replace(FUSED, cost=None))).hbm_bytes is None
    assert Report((LEFT,)).hbm_bytes is None


def test_failed_checks_are_named():
    sites = layers(3)
    sites = (*sites[:2], dataclasses.replace(sites[2], check=SiteCheck(False, (GOOD, BAD))))
    report = Report(sites, check=ModelCheck(True, (GOOD,)))
    assert not report.ok
    text = str(report)
    assert "×3" in text, "the outcome of a check does not split layers"
    assert "DIFFERENT, 1 of 2 tensors outside the limit" in text
    assert "layers.2.attn.dq: error 3e-07, limit 2e-07" in text
    assert "whole model: equal, 1 tensor, largest error 0.50 of its limit" in text
    assert Report(layers(3), check=ModelCheck(True, (GOOD,))).ok


@pytest.mark.parametrize(
    ("item", "share"),
    [
        (GOOD, 0.5),
        (BAD, 1.5),
        (CheckItem("same NaN", math.nan, math.nan, math.nan, True), 0.0),
        (CheckItem("NaN of ours alone", math.nan, 0.0, 1.0, False), math.inf),
        (CheckItem("another pattern", 0.0, 0.0, 1.0, False, "isnan differs"), math.inf),
    ],
)
def test_share_of_the_limit(item, share):
    assert item.share == pytest.approx(share)


def test_json_is_strict():
    check = SiteCheck(False, (CheckItem("out", math.nan, math.inf, 0.0, False),))
    report = Report((dataclasses.replace(FUSED, check=check),))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(report.to_json(), parse_constant=refuse)
    assert read == report.to_dict()
    item = read["sites"][0]["check"]["items"][0]
    assert math.isnan(float(item["error_ours"])) and math.isinf(float(item["error_original"]))
    assert read["sites"][0]["shape"]["dtype"] == "bfloat16"


def test_symbolic_sizes_are_told_and_not_guarded_on():
    # Comparing an unbacked size raises, so whatever does not raise adds no guard either.
    env = ShapeEnv()
    length = env.create_unbacked_symint()
    shape = dataclasses.replace(SHAPE, q_len=length, kv_len=length)
    cost = Cost(length * 4, length * 100, length * 10)
    site = dataclasses.replace(FUSED, shape=shape, cost=cost, gqa_group=length)
    report = Report((site, dataclasses.replace(site, name="layers.1.attn")))
    assert report.hbm_bytes is None
    assert f"Sq{length}" in str(report) and "×2" in str(report)
    assert report.to_dict()["sites"][0]["shape"]["q_len"] == str(length)
    assert json.loads(report.to_json())["sites"][1]["cost"]["hbm_bytes_before"] == str(length * 100)
