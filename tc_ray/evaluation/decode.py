"""Greedy completions of held-out prompts by the fused model, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tc_ray.evaluation.heldout import HeldOut
from tc_ray.models.fusion import FusedModel


def complete(
    fused: FusedModel,
    tokenizer: Any,
    examples: Sequence[HeldOut],
    *,
    lam: float,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Completion texts in the order of `examples`; `on_batch` hears how many are done."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: list[str] = [""] * len(examples)
    # batches of equal lengths waste the least padding
    order = sorted(range(len(examples)), key=lambda i: examples[i].target_start)
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        width = max(examples[i].target_start for i in part)
        ids = torch.full((len(part), width), pad, dtype=torch.long, device=fused.pilot.device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            prompt = examples[i].prompt_ids
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = fused.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            lam=lam,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for row, i in enumerate(part):
            texts[i] = tokenizer.decode(out[row, width:], skip_special_tokens=True)
        on_batch(at + len(part))
    return texts
