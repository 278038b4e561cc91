"""The Pilot: a pretrained language model, loaded and given its adapters.

Invariant: what a worker would refuse when it loads the run's models, the driver and the plan can refuse before, without
reading a weight (`check_folders`). Called by the driver, the workers, export and serving.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tc_ray.config.schema import RunConfig
from tc_ray.config.training import LoraSection, PilotSection
from tc_ray.models.families import Family, family_of
from tc_ray.models.weights import HEADS, load_whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_pilot(
    path: Path | str,
    *,
    dtype: torch.dtype,
    random_weights: bool = False,
    safetensors: bool | None = None,
    names_only: bool = False,
) -> Any:
    """Load a language model from a folder or hub id. Code that comes with it is never run.

    random_weights: read only its config. safetensors: True: weights in no other format.
    names_only: on the meta device, without reading a weight: to check the folder or the model's shape.
    Raises UnknownFamilyError: a family without an adapter, refused before any weight is read.
    OSError: no weights of the format. WeightsError, NotFiniteError: see `load_whole`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    auto = AutoModelForSeq2SeqLM if family_of(config).encoder_decoder else AutoModelForCausalLM
    if random_weights:
        return auto.from_config(config, dtype=dtype)
    place = {"device_map": "meta"} if names_only else {}
    return load_whole(auto, path, dtype=dtype, use_safetensors=safetensors, **place)


def add_adapters(model: Any, config: PilotSection) -> Any:
    """Wrap with LoRA if `config.method` is lora. ValueError: `lora.first_layer` does not fit, or see `check_adapters`."""
    if config.method == "full":
        return model
    check_adapters(model, config)
    from peft import get_peft_model

    family, lora = family_of(model), config.lora
    count = len(family.layers(model))
    if lora.first_layer >= count:
        raise ValueError(f"pilot.lora.first_layer {lora.first_layer} leaves no layer: the model has {count}")
    if lora.first_layer and family.encoder_decoder:
        raise ValueError("pilot.lora.first_layer must be 0 for an encoder-decoder: it would name layers of both stacks")
    task = "SEQ_2_SEQ_LM" if family.encoder_decoder else "CAUSAL_LM"
    return get_peft_model(model, lora_config(lora, family, count if lora.first_layer else None, task_type=task))


def lora_config(lora: LoraSection, family: Family, layers: int | None, **more: Any) -> Any:
    """peft's configuration of adapters; layers: adapt those from `lora.first_layer` to this one (None: all that match)."""
    from peft import LoraConfig

    if layers is not None:
        chosen = list(range(lora.first_layer, layers))
        more |= {"layers_to_transform": chosen, "layers_pattern": family.layers_pattern}
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or list(family.lora_targets),
        **more,
    )


def check_folders(config: RunConfig, pilot: Path | str, base: Path | str) -> None:
    """Refuse, before a worker starts, what the workers would refuse when they load the run's models. Reads no weight.

    pilot, base: as `resolve_model` gives them; a hub id is left to the workers, which download it.
    Raises WeightsError: missing or unexpected tensors, or of another shape. ValueError: see `check_adapters`.
    OSError: a folder has no weights at all.
    """
    from transformers import AutoModel

    if not isinstance(pilot, Path):
        return
    random_weights = config.model.random_weights
    with torch.device("meta") if random_weights else nullcontext():
        model = load_pilot(pilot, dtype=torch.float32, random_weights=random_weights, names_only=True)
    check_adapters(model, config.pilot)
    if config.log.enabled and isinstance(base, Path) and base != pilot and not random_weights:
        load_whole(AutoModel, base, leave_out=HEADS, device_map="meta")


def check_adapters(model: nn.Module, pilot: PilotSection) -> None:
    """Raise ValueError for adapters on a matrix that two modules share (tied embedding and head): a merge would change both."""
    asked = (pilot.lora.target_modules or []) if pilot.method == "lora" else []
    users: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(name.rpartition(".")[0])
    for modules in users.values():
        hit = [target for target in asked if any(f".{module}".endswith(f".{target}") for module in modules)]
        if len(modules) > 1 and hit:
            raise ValueError(
                f"pilot.lora.target_modules names {', '.join(hit)}, but {' and '.join(modules)} are one and the same matrix in "
                "this model, and an adapter of one would change the other: leave it out"
            )
