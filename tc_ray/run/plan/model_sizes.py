"""Widths and parameter counts of a run's models from their configs alone: no weight is fetched or loaded.

Invariant: modules are built on the meta device by the run's own code, so the counts are the run's. A model that cannot be
read here is no error: its sizes are unknown, and the plan says that the run would refuse. Called by `run.plan.plan`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.run.plan.data_estimate import DataEstimate
from tc_ray.text import first_line

HUB_SECONDS = 4.0
"""Longest wait for the hub's first answer."""


@dataclass(frozen=True)
class ModelConfig:
    """A model whose config can be read here. place: folder or hub id. local_only: the hub does not answer."""

    place: Path | str
    local_only: bool
    config: Any


@dataclass(frozen=True)
class ModelSizes:
    """Widths, decoder layers of the Pilot, and parameter counts. The Copilot's include the Pilot's frozen embedding.

    inner_size: of the Pilot's feed-forward layers. kv_size: numbers in the keys of a token and layer.
    None: the Copilot's base cannot be read; of its counts also: the target tokens that its output covers are unknown.
    """

    hidden_size: int
    layers: int
    vocab_size: int
    encoder_decoder: bool
    pilot: int
    pilot_trainable: int
    copilot: int | None = None
    copilot_trainable: int | None = None
    copilot_hidden_size: int | None = None
    copilot_layers: int | None = None
    inner_size: int | None = None
    kv_size: int | None = None


def find_models(
    config: RunConfig, notes: list[str], refusals: list[str]
) -> tuple[ModelConfig | None, ModelConfig | None]:
    """Pilot and Copilot's base; None for one that must be fetched first (a note) or cannot be read here (a refusal)."""
    pilot = _find(config.model.pilot, config, notes, refusals)
    if config.model.copilot in (None, config.model.pilot) or not config.log.enabled:
        return pilot, pilot
    assert config.model.copilot is not None
    return pilot, _find(config.model.copilot, config, notes, refusals)


def _find(name: str, config: RunConfig, notes: list[str], refusals: list[str]) -> ModelConfig | None:
    from transformers import AutoConfig

    from tc_ray.models.hub import BUILTIN_MODELS, default_cache, resolve_model

    folder = config.model.cache
    if name in BUILTIN_MODELS and not ((folder or default_cache()).expanduser() / name).is_dir():
        notes.append(f"{name} is not on this machine yet: the first run fetches it, then its sizes are known")
        return None
    place = resolve_model(name, folder)
    local_only = isinstance(place, str) and not _hub_answers(name)
    try:
        read = AutoConfig.from_pretrained(place, local_files_only=local_only, trust_remote_code=False)
        return ModelConfig(place, local_only, read)
    except (OSError, ValueError) as error:
        # the rest of the plan is still useful
        reason = "the hub does not answer, and the model is not in the cache" if local_only else first_line(error, 160)
        notes.append("sizes unknown")
        refusals.append(f"the config of {name} cannot be read here ({reason})")
        return None


def _hub_answers(name: str) -> bool:
    """Whether the model hub answers at all; if not, its client would ask again and again for each file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return True  # a refusal is an answer
    except Exception:  # noqa: BLE001 - no connection, no answer in time, offline mode: whatever its client raises
        return False
    return True


def model_sizes(
    config: RunConfig, found: ModelConfig, base: ModelConfig | None, data: DataEstimate | None
) -> ModelSizes:
    """Sizes of the Pilot `found` and a Copilot from `base` (None: unknown, or there is no Copilot).

    Raises UnknownFamilyError: a family without an adapter. ValueError: layers or adapters that the models cannot have.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from tc_ray.models.families import family_of
    from tc_ray.models.pilot.load import add_adapters

    pilot_config, encoder_decoder = found.config, family_of(found.config).encoder_decoder
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers warn about each other
        pilot = auto.from_config(pilot_config)
        if encoder_decoder and not config.model.random_weights and _has_own_head(found):
            pilot.lm_head.weight = torch.nn.Parameter(torch.empty_like(pilot.lm_head.weight))
        pilot = add_adapters(pilot, config.pilot)
        copilot = {} if base is None else _copilot_sizes(config, pilot_config, base.config, data)
    return ModelSizes(
        hidden_size=pilot_config.hidden_size,
        layers=family_of(pilot_config).layer_count(pilot_config),
        vocab_size=pilot_config.vocab_size,
        encoder_decoder=encoder_decoder,
        pilot=sum(p.numel() for key, p in pilot.named_parameters() if "lora_" not in key),
        pilot_trainable=sum(p.numel() for p in pilot.parameters() if p.requires_grad),
        inner_size=getattr(pilot_config, "d_ff", None) or getattr(pilot_config, "intermediate_size", None),
        kv_size=_kv_size(pilot_config),
        **copilot,
    )


def _kv_size(config: Any) -> int:
    heads = config.num_attention_heads
    head = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * head)


def _has_own_head(model: ModelConfig) -> bool:
    """Whether an encoder-decoder was saved with an untied head (T5 1.1, FLAN-T5, mT5).

    The library ties the head of a new model and sets its config so, whatever the saved config says.
    """
    from safetensors import safe_open
    from transformers import PreTrainedConfig

    weights = Path(model.place) / "model.safetensors"
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            return "lm_head.weight" in file.keys()  # noqa: SIM118 - it is no dict
    saved, _ = PreTrainedConfig.get_config_dict(model.place, local_files_only=model.local_only)
    return False in (saved.get("tie_word_embeddings"), saved.get("scale_decoder_outputs"))


def _copilot_sizes(config: RunConfig, pilot_config: Any, base_config: Any, data: DataEstimate | None) -> dict[str, int]:
    from tc_ray.copilot.learner import with_adapters
    from tc_ray.models.copilot import Copilot, CopilotConfig
    from tc_ray.models.copilot.model import check_base, choose_layers
    from tc_ray.models.families import family_of

    family = family_of(base_config)
    layers = choose_layers(config.copilot.layers, config.copilot.every, family.layer_count(base_config))
    check_base(config.model.copilot or config.model.pilot, base_config, pilot_config, layers)
    known = config.copilot.output_tokens == "all" or data is not None
    copilot = Copilot(
        CopilotConfig(
            decoder=family.with_layers(base_config, layers),
            pilot_hidden_size=pilot_config.hidden_size,
            vocab_size=pilot_config.vocab_size,
            **config.copilot.form(),
            question=config.log.question,
            output_size=0 if config.copilot.output_tokens == "all" or data is None else data.target_ids,
        )
    )
    sizes = {"copilot_hidden_size": base_config.hidden_size, "copilot_layers": len(layers)}
    if known:
        sizes["copilot"] = sum(p.numel() for p in copilot.parameters())
        adapted = with_adapters(copilot, config.copilot)
        sizes["copilot_trainable"] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return sizes
