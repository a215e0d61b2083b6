"""Sampling from a model.

B sequences, S tokens so far, V vocabulary.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from moe_net.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens_BS: Tensor,
    *,
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt followed by `new_tokens` sampled tokens, int64 [B, S + new_tokens].

    Every token runs the whole window again (the last `seq_len` tokens): there is no key/value cache, which at these
    sizes costs less than its bookkeeping. The model is put into evaluation mode and back.

    Args:
        tokens_BS: int64 prompt, S at least 1.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens; None: all.
        generator: of the sampling; needed unless `temperature` is 0.

    Raises:
        ValueError: an argument out of range, or sampling without a generator.
    """
    if tokens_BS.shape[1] < 1 or new_tokens < 0 or temperature < 0:
        raise ValueError("the prompt needs a token; new_tokens and temperature must not be negative")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k={top_k} is not in 1..vocab_size={model.config.vocab_size}")
    if temperature > 0 and generator is None:
        raise ValueError("sampling needs an explicit generator (or temperature=0)")
    was_training = model.training
    model.eval()
    try:
        for _ in range(new_tokens):
            logits_BV = model(tokens_BS[:, -model.config.seq_len :]).logits_BSV[:, -1].float()
            tokens_BS = torch.cat((tokens_BS, _sample(logits_BV, temperature, top_k, generator)), 1)
    finally:
        model.train(was_training)
    return tokens_BS


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per sequence, [B, 1]."""
    if temperature == 0 or generator is None:
        return logits_BV.argmax(1, keepdim=True)
    if top_k is not None:
        kth_B1 = logits_BV.topk(top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probs_BV = (logits_BV / temperature).softmax(1).to(generator.device)
    return torch.multinomial(probs_BV, 1, generator=generator).to(logits_BV.device)
