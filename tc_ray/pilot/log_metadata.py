"""The metadata of a run's Mistake Log, from the run's settings and the Pilot's config. Called by the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.models.families import family_of
from tc_ray.models.identity import tokenizer_hash
from tc_ray.models.pilot.taps import UNPOOLED, log_pooling, tap_definition, tapped_layers


def log_metadata(
    config: RunConfig, pilot_config: Any, tokenizer: Any, inputs: Mapping[str, str] | None = None
) -> LogMetadata:
    """Metadata of the log that a run of `config` writes; ValueError: see `check_log`.

    pilot_config: the Pilot's transformers config. inputs: hashes of what the run starts from, by the metadata's names.
    """
    log, family = config.log, family_of(pilot_config)
    layers, count = check_log(config, pilot_config), family.layer_count(pilot_config)
    pooling = log_pooling(log.rationale, log.pooling)
    most = pilot_config.vocab_size - 1
    top_k = most if log.error == "dense" else min(log.top_k, most)
    hashes: dict[str, Any] = dict(inputs or {})
    return LogMetadata(
        run=config.run.name,
        pilot=config.model.pilot,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=pilot_config.vocab_size,
        rationale_dim=pilot_config.hidden_size,
        rationale_layers=1 if pooling != UNPOOLED else count if layers is None else len(layers),
        pooling=pooling,
        tap=tap_definition(pooling, layers),
        positions=log.positions,
        top_k=top_k,
        question="states" if family.encoder_decoder else "ids",
        layers="all" if layers is None else ",".join(map(str, layers)),
        error=log.error,
        **hashes,
    )


def check_log(config: RunConfig, pilot_config: Any) -> list[int] | None:
    """The Pilot's decoder layers that `log` taps, from 0; None: all.

    Raises:
        ValueError: it has no such layers, or it is an encoder-decoder (states of target positions only) and `log.positions` is all.
    """
    log, family = config.log, family_of(pilot_config)
    if family.encoder_decoder and log.positions != "target":
        raise ValueError(
            f"log.positions is {log.positions!r}, but {config.model.pilot} is an encoder-decoder: its decoder has states of "
            "target positions only; set log.positions=target"
        )
    return tapped_layers(log.rationale, family.layer_count(pilot_config))
