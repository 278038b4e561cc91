"""Write the trained Pilot as a plain causal language model folder: adapters merged, ZeRO-3 shards gathered."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.prompts import serving_template


def save_merged(engine: Any, config: RunConfig, model_path: Path | str, folder: Path, *, rank: int) -> None:
    """Merge and write model and tokenizer to `folder` (collective; rank 0 writes, atomically by a rename).

    Weights are gathered parameter by parameter and merged in fp32 on a copy, so the trained model stays as it is; the
    folder has the training dtype.
    """
    import deepspeed

    model = engine.module.model
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            if rank == 0:
                state[name] = parameter.detach().float().cpu().clone()
    if rank:
        return
    from transformers import AutoTokenizer

    from tc_ray.models.pilot import load_pilot

    # with its weights: only they tell whether a T5 has a head of its own, which one made from its config never has
    merged = load_pilot(model_path, dtype=torch.float32, random_weights=config.model.random_weights)
    adapters = getattr(model, "peft_config", None)
    if adapters:
        from peft import get_peft_model

        merged = get_peft_model(merged, adapters["default"])
    unknown = merged.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"export: weights with no place in the model: {unknown[:3]}")
    if adapters:
        merged = merged.merge_and_unload()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.to(torch.bfloat16 if engine.bfloat16_enabled() else torch.float32).save_pretrained(temporary)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    # served chats must be asked as the training rows were
    tokenizer.chat_template = serving_template(config.data) or tokenizer.chat_template
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
