"""Hugging Face models: found by folder, type or id, small enough to try, with inputs they take."""

import time

import pytest
import torch

from flashfuse import hf

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(hf, "_hub_answers", lambda: False)


TYPES = [
    "gpt2",
    "llama",
    "bert",
    "mistral",
    "vit",
    "t5",
    "bart",
    "clip",
    "whisper",
    "roberta",
    "gemma2",
    "deepseek_v3",
]


@pytest.mark.parametrize("kind", TYPES)
def test_types_run_on_the_inputs_made_for_them(kind):
    loaded = hf.load(kind, tiny=True)
    assert not loaded.model.training
    inputs = loaded.inputs(3, 16, padded=True)
    with torch.no_grad():
        out = loaded.model(**inputs)[0]
    assert out.shape[0] == 3 and out.isfinite().all()
    assert "random weights" in loaded.description and kind in loaded.description
    assert sum(p.numel() for p in loaded.model.parameters()) < 1_000_000


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(attention):
    loaded = hf.load("bert", tiny=True, attn_implementation=attention)
    assert loaded.model.config._attn_implementation == attention
    assert attention in loaded.description


def test_padding_is_on_the_side_the_model_expects():
    for kind, side in (("llama", 0), ("bert", -1)):
        mask = hf.load(kind, tiny=True).inputs(4, 20, padded=True)["attention_mask"]
        assert mask.sum(1).tolist() == [20, 16, 13, 10]
        assert mask[-1, side] == 0 and mask[-1, -1 - side] == 1
    assert "attention_mask" not in hf.load("gpt2", tiny=True).inputs(2, 8)


def test_nothing_is_cached_for_a_next_token():
    loaded = hf.load("gpt2", tiny=True)
    assert loaded.model(**loaded.inputs(1, 8)).past_key_values is None


def test_decoder_is_shorter_than_the_encoder():
    inputs = hf.load("t5", tiny=True).inputs(2, 16)
    assert inputs["input_ids"].shape == (2, 16) and inputs["decoder_input_ids"].shape == (2, 8)


def test_lengths():
    loaded = hf.load("gpt2", tiny=True)
    assert loaded.inputs()["input_ids"].shape == (1, 256)
    with pytest.raises(ValueError, match="at most 256 positions, not 300"):
        loaded.inputs(1, 300)
    # Positions of RoBERTa start after the padding index, so the last ones of the table are out of reach.
    longest = hf.load("roberta", tiny=True)
    longest.model(**longest.inputs(1, longest.max_seq))
    with pytest.raises(ValueError, match="at most"):
        longest.inputs(1, longest.max_seq + 1)


def test_same_weights_every_time_and_random_state_untouched():
    state = torch.random.get_rng_state()
    first, second = (hf.load("gpt2", tiny=True) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.inputs(2, 8)["input_ids"], second.inputs(2, 8)["input_ids"])


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "gpt_oss", "deepseek_v3"])
def test_large_defaults_are_cut_down_and_it_is_said(kind):
    config, weights, _ = hf._find(kind)
    full = hf._num_layers(config)
    notes = hf._fit(config, 600_000_000)
    assert weights is None and notes[0].startswith("reduced from ")
    assert hf._num_layers(config) < full
    assert hf._num_parameters(config) <= 600_000_000


def test_small_defaults_stay_whole():
    config, _, _ = hf._find("gpt2")
    assert hf._fit(config, 600_000_000) == []
    assert hf._num_layers(config) == 12


def test_layers_keep_per_layer_lists_in_step():
    loaded = hf.load("gemma2", tiny=True, layers=3)
    assert len(loaded.model.config.layer_types) == loaded.model.config.num_hidden_layers == 3
    assert "3 of 26 layers" in loaded.description
    with pytest.raises(ValueError, match="at least 1 layer"):
        hf.load("gpt2", layers=0)


def test_folder_with_weights_and_without(tmp_path):
    original = hf.load("gpt2", tiny=True).model
    with torch.no_grad():
        original.wte.weight.fill_(0.25)
    original.save_pretrained(tmp_path / "full")
    original.config.save_pretrained(tmp_path / "bare")
    full = hf.load(str(tmp_path / "full"))
    assert "weights of" in full.description
    assert torch.equal(full.model.wte.weight, original.wte.weight)
    bare = hf.load(str(tmp_path / "bare"))
    assert "random weights" in bare.description
    assert not torch.equal(bare.model.wte.weight, original.wte.weight)
    assert len(hf.load(str(tmp_path / "full"), layers=1).model.h) == 1


def test_unknown_names_say_what_is_close(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'gtp2': the hub cannot be reached.*closest: gpt2"):
        hf.load("gtp2")
    with pytest.raises(ValueError, match=r"closest: bert$"):
        hf.load("bert-base-uncased")
    with pytest.raises(ValueError, match="try gpt2, bert"):
        hf.load("qqqqqqqq")
    with pytest.raises(ValueError, match="there is no folder"):
        hf.load(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        hf.load(str(tmp_path))


def test_type_falls_back_to_its_default_config_and_it_is_said(monkeypatch):
    assert "the hub cannot be reached: default config of the type" in hf.load("gpt2", tiny=True).description

    def no_such_model(*args, **kwargs):
        raise OSError("404")

    monkeypatch.setattr(hf, "_hub_answers", lambda: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_such_model)
    assert "no such model open to you: default config" in hf.load("llama", tiny=True).description
    with pytest.raises(ValueError, match="no such model open to you"):
        hf.load("someone/something")


def test_a_silent_network_does_not_hang(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hf, "HUB_TIMEOUT_S", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: time.sleep(3))
    start = time.monotonic()
    assert not hf._hub_answers()
    assert time.monotonic() - start < 1.5
