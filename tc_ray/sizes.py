"""Widths and parameter counts of a run's models from their configs alone: nothing is fetched, no weight is loaded.

Invariant: modules are built on the meta device by the code that the run uses, so the counts are the run's. A model that
cannot be read here is told in a note, not an error: the run may find it. Called by `tc_ray.plan`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.data.estimate import DataEstimate


@dataclass(frozen=True)
class ModelSizes:
    """Widths and parameter counts. The Copilot's include the Pilot's frozen embedding.

    They are None where its output covers the tokens of the completions (`copilot.output_tokens: targets`) and those are
    not known.
    """

    hidden_size: int
    vocab_size: int
    pilot: int
    pilot_trainable: int
    copilot: int | None
    copilot_trainable: int | None


def model_path(name: str, config: RunConfig, notes: list[str]) -> Path | str | None:
    """Where the model's files are, None when a builtin one has yet to be fetched."""
    from tc_ray.models.source import BUILTIN_MODELS, default_cache, resolve_model

    cache = config.model.cache
    if name in BUILTIN_MODELS and not ((cache or default_cache()).expanduser() / name).is_dir():
        notes.append(f"{name} is not on this machine yet: the first run fetches it, then its sizes are known")
        return None
    return resolve_model(name, cache)


def model_configs(
    config: RunConfig, pilot_path: Path | str, base_path: Path | str, notes: list[str]
) -> tuple[Any, Any] | None:
    """Configs of the Pilot and of the Copilot's base."""
    from transformers import AutoConfig

    name = config.model.pilot
    try:
        pilot_config = AutoConfig.from_pretrained(pilot_path)
        name = config.model.copilot or name
        return pilot_config, AutoConfig.from_pretrained(base_path)
    except (OSError, ValueError) as error:
        # a hub id without the hub is no reason to refuse a plan; the run itself will
        notes.append(f"sizes unknown: the config of {name} cannot be read here ({first_line(error)})")
        return None


def model_sizes(config: RunConfig, pilot_config: Any, base_config: Any, data: DataEstimate | None) -> ModelSizes:
    """Sizes from the models' configs alone: modules are built on the meta device, without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from tc_ray.copilot.learner import with_adapters
    from tc_ray.models.copilot import Copilot, CopilotConfig
    from tc_ray.models.copilot.decoder_only import choose_layers
    from tc_ray.models.pilot import add_adapters

    name = config.model.copilot or config.model.pilot
    layers = choose_layers(config.copilot.layers, config.copilot.every, base_config.num_hidden_layers)
    missing = [layer for layer in layers if not 0 <= layer < base_config.num_hidden_layers]
    if missing:
        raise ValueError(
            f"copilot.layers {missing} are not layers of {name}, which has {base_config.num_hidden_layers}"
        )
    fields = base_config.to_dict() | {"num_hidden_layers": len(layers)}
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][layer] for layer in layers]
    every_token = config.copilot.output_tokens == "all"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers among themselves
        pilot = add_adapters(AutoModelForCausalLM.from_config(pilot_config), config.pilot)
        copilot = Copilot(
            CopilotConfig(
                decoder=fields,
                pilot_hidden_size=pilot_config.hidden_size,
                vocab_size=pilot_config.vocab_size,
                producing_state=config.copilot.producing_state,
                output_size=0 if every_token or data is None else data.target_ids,
            )
        )
        copilot_size = sum(p.numel() for p in copilot.parameters())
        trained = with_adapters(copilot, config.copilot)
    known = every_token or data is not None
    return ModelSizes(
        hidden_size=pilot_config.hidden_size,
        vocab_size=pilot_config.vocab_size,
        pilot=sum(p.numel() for key, p in pilot.named_parameters() if "lora_" not in key),
        pilot_trainable=sum(p.numel() for p in pilot.parameters() if p.requires_grad),
        copilot=copilot_size if known else None,
        copilot_trainable=sum(p.numel() for p in trained.parameters() if p.requires_grad) if known else None,
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a note."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
