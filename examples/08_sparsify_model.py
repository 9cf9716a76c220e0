"""Train an unmodified model with block-sparse attention: an approximation, because it is asked for.

Each block of 128 queries sees the blocks a power of two away, a butterfly, and the first block.  Sites are
found and proved as ever; then the pattern is added to their masks, and the report says so.  The task is only
to learn which words occur.
"""

import time

import torch
import transformers

import flashfuse

LENGTH, WORDS = 4096, 16


def main() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    pattern = flashfuse.Butterfly(block=128) | flashfuse.LocalGlobal(local=0, global_=1, block=128)
    sparse = flashfuse.sparsify(model, pattern, inner="aot_eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    started = time.perf_counter()
    for _ in range(8):
        tokens = torch.randint(WORDS // 2, (1, LENGTH))  # half of the words never occur
        loss = torch.nn.functional.cross_entropy(sparse(tokens).logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report = flashfuse.last_report()
    assert report is not None and report.num_approximate == report.num_fused == 1
    print(report)
    (site,) = report.sites
    assert site.approximation is not None and site.approximation.density is not None
    exact = site.approximation.exact_density
    print(f"\nscores kept: {site.approximation.density:.1%}, by the causal mask alone {exact:.1%}")
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {time.perf_counter() - started:.0f} s")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
