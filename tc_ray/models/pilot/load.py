"""The Pilot: a pretrained language model, loaded and given its adapters.

Invariant: what a worker would refuse when it loads the run's models, the driver and the plan can refuse before, without
reading a weight (`check_folders`). Called by the driver, the workers, export and serving.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tc_ray.config.schema import RunConfig
from tc_ray.config.training import LoraSection, PilotSection
from tc_ray.models.families import Family, family_of
from tc_ray.models.weights import HEADS, load_whole
from tc_ray.text import first_line

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_pilot(
    path: Path | str,
    *,
    dtype: torch.dtype | None,
    random_weights: bool = False,
    safetensors: bool | None = None,
    names_only: bool = False,
    attention: str | None = None,
    nf4: bool = False,
) -> Any:
    """Load a language model from a folder or hub id. Code that comes with it is never run.

    dtype: None: mapped (`load_whole`): for those who need some of its tensors, or one at a time. Not with random_weights.
    random_weights: read only its config. safetensors: True: weights in no other format.
    names_only: on the meta device, without reading a weight: to check the folder or the model's shape.
    attention: transformers' name of how attention is computed; None: its choice.
    nf4: linear layers but the head in 4 bits, by bitsandbytes; they are computed in `dtype`.
    Raises UnknownFamilyError: a family without an adapter, refused before any weight is read.
    OSError: no weights of the format. WeightsError, NotFiniteError: see `load_whole`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    auto = AutoModelForSeq2SeqLM if family_of(config).encoder_decoder else AutoModelForCausalLM
    how: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if nf4:
        from transformers import BitsAndBytesConfig

        kind: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)
    if random_weights:
        return auto.from_config(config, dtype=dtype, **how)
    how |= {"device_map": "meta"} if names_only else {}
    how |= {"mapped": True} if dtype is None else {"dtype": dtype}
    return load_whole(auto, path, use_safetensors=safetensors, **how)


def whole_weight(parameter: torch.Tensor) -> torch.Tensor:
    """A weight, detached; of one in 4 bits the numbers that it is computed with, in the type of computing."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.detach(), state)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """A weight's shape, also while ZeRO-3 has split it (its tensor is empty then) and where it is packed in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape)


def add_adapters(model: Any, config: PilotSection) -> Any:
    """Wrap with LoRA if `config.method` is lora. ValueError: `lora` does not fit the model."""
    if config.method == "full":
        return model
    from peft import get_peft_model

    family, lora = family_of(model), config.lora
    count = len(family.layers(model))
    if lora.first_layer >= count:
        raise ValueError(f"pilot.lora.first_layer {lora.first_layer} leaves no layer: the model has {count}")
    if lora.first_layer and family.encoder_decoder:
        raise ValueError("pilot.lora.first_layer must be 0 for an encoder-decoder: it would name layers of both stacks")
    task = "SEQ_2_SEQ_LM" if family.encoder_decoder else "CAUSAL_LM"
    try:
        adapted = get_peft_model(model, lora_config(lora, family, count if lora.first_layer else None, task_type=task))
    except ValueError as error:  # modules that are not there, or of a kind that peft cannot adapt
        raise ValueError(f"pilot.lora.target_modules: {first_line(error)}") from None
    if shared := shared_adapted(adapted.get_base_model()):
        raise ValueError(
            f"pilot.lora.target_modules: {shared} are one matrix of this model, so adapters cannot be merged into one of them "
            "alone; leave them out"
        )
    return adapted


def shared_adapted(model: Any) -> str:
    """Names of an adapted matrix that another module uses as well (a tied head), joined by "and"; "" if there is none."""
    from peft.tuners.lora import LoraLayer

    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    shared = (names for names in places.values() if len(names) > 1 and any(name.startswith(adapted) for name in names))
    return " and ".join(next(shared, []))


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


def check_attention(config: RunConfig) -> None:
    """Raise ValueError if transformers knows no such `model.attn_implementation`, or it needs GPUs that the run does not use."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config.model.attn_implementation
    if name is None:
        return
    known = sorted({"eager", *(one for one in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in one)})
    if name not in known:
        raise ValueError(f"model.attn_implementation {name} is unknown; transformers has {', '.join(known)}")
    if name.startswith("flash") and not config.resources.pilot_gpus:
        raise ValueError(f"model.attn_implementation {name} computes on GPUs: set resources.pilot_gpus=1, or use sdpa")


def check_packing(config: RunConfig, pilot_config: Any) -> None:
    """Raise ValueError if `pilot.packing` is set for a model that it does not fit."""
    if config.pilot.packing and family_of(pilot_config).encoder_decoder:
        raise ValueError(
            f"pilot.packing is for decoder-only Pilots, and {config.model.pilot} is an encoder-decoder: leave it out, and "
            "set data.group_by_length=true for less padding"
        )


def check_quantization(config: RunConfig) -> None:
    """Raise ValueError if `pilot.quantization` is set and its package is not installed."""
    if config.pilot.quantization and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"pilot.quantization {config.pilot.quantization} needs the package bitsandbytes, on every node: "
            "pip install tc-ray[qlora]"
        )


def check_folders(config: RunConfig, pilot: Path | str, base: Path | str) -> None:
    """Refuse, before a worker starts, folders that the workers would refuse to load. Reads no weight; hub ids are left to them.

    Raises WeightsError: missing or unexpected tensors, or of another shape. OSError: a folder has no weights at all.
    ValueError: `model.attn_implementation` is unknown, or the model cannot be computed so; bitsandbytes is absent; adapters
    that the model cannot have.
    """
    from transformers import AutoModel

    check_attention(config)
    check_quantization(config)
    if config.model.random_weights or not isinstance(pilot, Path):
        return
    attention = config.model.attn_implementation
    try:
        # whether a flash implementation is installed is for the workers' machines to say
        own = None if attention is None or attention.startswith("flash") else attention
        model = load_pilot(pilot, dtype=torch.float32, names_only=True, attention=own)
    except (ValueError, ImportError) as error:
        if own is None or type(error).__module__.startswith("tc_ray."):
            raise
        raise ValueError(f"model.attn_implementation {own}: {first_line(error)}") from None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about shared matrices too: refused below, by name
        add_adapters(model, config.pilot)
    if config.log.enabled and isinstance(base, Path) and base != pilot:
        load_whole(AutoModel, base, leave_out=HEADS, device_map="meta")
