"""DeepSpeed engine of the Pilot: ZeRO stage 0 to 3, precision, clipping, schedule of the learning rate.

Called by the loop on every worker, once per attempt. The optimizer is torch's AdamW, which runs on any device: DeepSpeed's own
would have to be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.conversations import EARLIER
from tc_ray.data.prepared.packing import packed
from tc_ray.models.families import family_of
from tc_ray.models.pilot.load import DTYPES, add_adapters, load_pilot
from tc_ray.models.pilot.step import Packed, PilotStep
from tc_ray.models.pilot.taps import log_pooling, tapped_layers
from tc_ray.models.schedule import rate_factor
from tc_ray.pilot.split import split_over_ranks


def step_inputs(
    batch: Mapping[str, np.ndarray], device: torch.device, *, row_tokens: int | None = None
) -> dict[str, Any]:
    """A batch of `TrainTable` as the arguments of `PilotStep`, all but `loss_scale`, int64 on the device.

    row_tokens: sequences share rows of so many tokens; None: each has its own.
    """
    names = {"input_ids": "input_ids", "lengths": "lengths", "target_start": "target_start", EARLIER: "earlier"}
    made: dict[str, Any] = {
        name: torch.from_numpy(batch[key]).to(device, torch.int64) for key, name in names.items() if key in batch
    }
    if row_tokens is not None:
        made["packed"] = Packed(*(torch.from_numpy(array).to(device) for array in packed(batch, row_tokens)))
    return made


def build_engine(config: RunConfig, model_path: Path | str, rounds: int) -> Any:
    """Load the Pilot and wrap its training forward (`PilotStep`) in a DeepSpeed engine; the same weights on every rank."""
    import deepspeed

    torch.manual_seed(config.run.seed)
    dtype, split = DTYPES[config.pilot.dtype], config.pilot.zero_stage == 3 and not config.model.random_weights
    model = load_pilot(
        model_path,
        dtype=None if split else dtype,
        random_weights=config.model.random_weights,
        attention=config.model.attn_implementation,
        nf4=config.pilot.quantization == "nf4",
    )
    model.config.use_cache = False
    if config.pilot.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = add_adapters(model, config.pilot)
    step = pilot_step(model, config).train()
    # On CPUs its collectives in shared memory would be compiled at first use, for minutes; gloo does without.
    deepspeed.ops.__compatible_ops__ = {}
    if split:
        split_over_ranks(step, deepspeed_config(config), dtype, str(model_path))
    trainable = [p for p in step.parameters() if p.requires_grad]
    optimizer = AdamW(
        trainable, lr=config.pilot.learning_rate, weight_decay=config.pilot.weight_decay, betas=(0.9, 0.999)
    )
    form: dict[str, Any] = {"warmup_ratio": config.pilot.warmup_ratio, "schedule": config.pilot.lr_schedule}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda index: rate_factor(index, steps=rounds, **form))
    engine, *_ = deepspeed.initialize(
        model=step,
        model_parameters=trainable,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    return engine


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """What DeepSpeed reads of the run's config."""
    return {
        # no train_batch_size: it would have to be their product, and a round need not divide
        "train_micro_batch_size_per_gpu": config.pilot.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.pilot.max_grad_norm,
        "zero_optimization": {"stage": config.pilot.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.pilot.dtype == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class AdamW(torch.optim.AdamW):
    """torch's AdamW; `held` makes its steps do nothing, whatever DeepSpeed wraps around it."""

    held = False

    def step(self, closure: Any = None) -> Any:
        """A step, or nothing while `held`."""
        return None if self.held else super().step(closure)


def take_step(engine: Any, finite: bool) -> bool:
    """The optimizer step of a round (collective), left out if a number is not finite: weights and optimizer stay.

    The learning rate changes in any case: it belongs to the round, not to the steps taken.
    finite: whether the round's loss over all ranks is. Returns whether the step was taken, the same on every rank.
    """
    if finite and not engine.zero_optimization() and not engine.bfloat16_enabled():
        # gradients are whole here, and the same on every rank; the other optimizers of DeepSpeed check by themselves
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
    engine.basic_optimizer.held = not finite
    engine.step()
    engine.basic_optimizer.held = False
    if getattr(engine.optimizer, "overflow", False):  # then DeepSpeed has not stepped the schedule either
        engine.lr_scheduler.step()
        return False
    return finite


def pilot_step(model: Any, config: RunConfig) -> PilotStep:
    """The training forward that leaves what `log` asks for; ValueError for layers that the model does not have."""
    log, family = config.log, family_of(model)
    return PilotStep(
        model,
        top_k=log.top_k,
        record=log.enabled,
        pooling=log_pooling(log.rationale, log.pooling),
        layers=tapped_layers(log.rationale, len(family.layers(model))),
        dense=log.error == "dense",
        question=log.question == "states",
    )
