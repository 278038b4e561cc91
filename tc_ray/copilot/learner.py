"""The Copilot's learner: steps on its loss (equation 7) with AdamW. Plain torch, no Ray.

Invariant: W ranks, each with its slice of a draw (their rows may differ in number), do what one does on the whole batch:
DistributedDataParallel adds gradients over ranks, and the loss's sums and token counts are added before the loss makes its value
of them. Stepped by `training.train`.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tc_ray.config.schema import RunConfig
from tc_ray.config.training import CopilotSection
from tc_ray.files import publish_folder
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.copilot.probe import answers, check_export
from tc_ray.models.families import family_of
from tc_ray.models.identity import vocabulary_hash
from tc_ray.models.losses import LOSSES, TokenLoss, inner_products
from tc_ray.models.pilot.load import load_pilot, lora_config
from tc_ray.models.pilot.taps import tapped_layers
from tc_ray.models.schedule import rate_factor
from tc_ray.models.weights import LeftOut, check_finite


@dataclass(frozen=True)
class StepResult:
    """One step: loss is that of `copilot.loss`; error_size the root mean square of the logged errors (rmse of f = 0).

    taken: False: loss or gradient was not finite on some rank; weights and optimizer stayed as they were. seconds: of the
    processor (on a GPU: of time) that this rank used, with the draw of its batch and the measurement before. wall_seconds: of time,
    with the look at the log's position and the reading of new records too."""

    loss: float
    error_size: float
    tokens: int
    learning_rate: float
    taken: bool = True
    seconds: float = 0.0
    wall_seconds: float = 0.0


class Learner:
    """Trains a Copilot, fp32, on batches. total_steps: that the schedule of the learning rate is made for. world_size: ranks that step together."""

    def __init__(
        self, copilot: Copilot, config: CopilotSection, *, total_steps: int, device: str = "cpu", world_size: int = 1
    ) -> None:
        self.config, self.world_size, self.device = config, world_size, torch.device(device)
        self.copilot = copilot
        self.model: Any = with_adapters(copilot, config).to(self.device).train()
        self.loss = LOSSES[config.loss](copilot.config.vocab_size)
        self.batch_sums = BatchSums(copilot, self.loss, bf16=config.dtype == "bf16")
        self.forward: Any = self.batch_sums
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if world_size > 1:
            self.forward = DistributedDataParallel(
                self.batch_sums, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        form: dict[str, Any] = {"warmup_ratio": config.warmup_ratio, "schedule": config.lr_schedule}
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda index: rate_factor(index, steps=total_steps, **form)
        )
        self.step_count = 0
        self.left_out = LeftOut(
            "the Copilot",
            "its weights are spoilt, or learning cannot go on with these settings: set a lower copilot.learning_rate or "
            "copilot.max_grad_norm, or copilot.dtype=fp32",
        )

    def step(self, batch: CopilotBatch) -> StepResult:
        """One optimizer step on this rank's part of the batch (collective). A step that is not finite is left out on all ranks."""
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.zero_grad()
        sums = self.forward(batch.to(self.device))
        sums[0].backward()
        sums = sums.detach()
        if self.world_size > 1:
            dist.all_reduce(sums)
        added, size, tokens = sums.tolist()
        # DistributedDataParallel leaves the mean over ranks, the loss needs the sum; clipping shares the pass over the gradients
        factor = self.world_size * self.loss.gradient_factor(added, tokens) if math.isfinite(added) else math.nan
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = factor * float(torch.nn.utils.get_total_norm(gradients))
        loss = self.loss.value(added, tokens) if math.isfinite(added) else math.nan
        taken = all(map(math.isfinite, (loss, size, norm)))
        if taken:
            factor *= min(1.0, self.config.max_grad_norm / (norm + 1e-6))
            torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
        self.left_out.add(taken, loss)
        with warnings.catch_warnings():
            # the first step may have been left out
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step()")
            self.scheduler.step()
        self.step_count += 1
        return StepResult(loss, math.sqrt(size / tokens), int(tokens), rate, taken)

    def inner_products(self, batches: Sequence[CopilotBatch | None]) -> list[list[float]]:
        """l.l, l.f and f.f of each batch, summed over ranks; None: no records for this rank (collective). Leaves training as it is."""
        self.model.eval()
        with torch.no_grad():
            nothing = torch.zeros(3, dtype=torch.float64, device=self.device)
            found = [nothing if batch is None else self.batch_sums.products(batch.to(self.device)) for batch in batches]
        self.model.train()
        sums = torch.stack(found)
        if self.world_size > 1:
            dist.all_reduce(sums)
        products: list[list[float]] = sums.tolist()
        return products

    def save(self, folder: Path) -> None:
        """Write trainable weights, optimizer and schedule. Raises NotFiniteError before anything is written."""
        check_finite(self.parameters.items(), f"the Copilot after step {self.step_count}")
        save_file({n: p.detach().contiguous() for n, p in self.parameters.items()}, folder / "trainable.safetensors")
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step_count,
        }
        torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; no code in it runs. ValueError: other weights than the configured Copilot has."""
        weights = load_file(folder / "trainable.safetensors", device=str(self.device))
        if weights.keys() != self.parameters.keys():
            raise ValueError(
                f"{folder} holds other trainable weights than the configured Copilot; use a new run.folder"
            )
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step_count = state["step"]

    def export(self, folder: Path) -> None:
        """Publish the trained Copilot, adapters merged, as a plain PreTrainedModel folder. The learner cannot be used afterwards.

        Raises ExportMismatchError or NotFiniteError, and publishes nothing, if the folder is not the trained Copilot.
        """
        model = self.model.eval()
        trained = answers(self.copilot)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        check_finite(model.named_parameters(), "the exported Copilot")
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        check_export(trained, temporary)
        publish_folder(temporary, folder)


class BatchSums(nn.Module):
    """What a step adds over ranks, in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, copilot: Copilot, loss: TokenLoss, *, bf16: bool) -> None:
        super().__init__()
        self.copilot, self.loss, self._bf16 = copilot, loss, bf16

    def forward(self, batch: CopilotBatch) -> torch.Tensor:
        """float64 [3]: loss summed over target tokens (with gradient), sum of squared logged errors, target tokens."""
        total, values = self._of(batch, self.loss.total)
        size = values.double().square().sum()
        return torch.stack([total, size, size.new_tensor(len(values))])

    def products(self, batch: CopilotBatch) -> torch.Tensor:
        """float64 [3]: `losses.inner_products` of the batch."""
        return self._of(batch, inner_products)[0]

    def _of(self, batch: CopilotBatch, measure: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `measure` finds between f and l of the real rows, and the listed values of l."""
        rows = batch.row_mask
        ids, values = batch.error_ids[rows], batch.error_values[rows]
        with torch.autocast(ids.device.type, torch.bfloat16) if self._bf16 else nullcontext():
            states, places = self.copilot.states(batch), self.copilot.output_places(ids)
            return measure(states, self.copilot.output.weight, places, values), values


def make_learner(
    config: RunConfig,
    pilot_path: Path | str,
    base_path: Path | str,
    output_ids: torch.Tensor | None,
    *,
    total_steps: int,
    world_size: int = 1,
) -> Learner:
    """The learner of a run, on its device, with the same weights on every rank. output_ids: see `Copilot.from_decoder`."""
    from transformers import AutoConfig, AutoTokenizer

    torch.manual_seed(config.run.seed)
    made = config.model.random_weights
    pilot = load_pilot(pilot_path, dtype=torch.float32 if made else None, random_weights=made)  # for its embedding
    base_config = AutoConfig.from_pretrained(base_path, trust_remote_code=False)
    copilot = Copilot.from_decoder(
        base_path,
        choose_layers(config.copilot.layers, config.copilot.every, family_of(base_config).layer_count(base_config)),
        pilot=pilot,
        output_ids=output_ids,
        **config.copilot.form(),
        pooling=config.log.pooling,
        tap_layers=tapped_layers(config.log.rationale, len(family_of(pilot).layers(pilot))),
        positions=config.log.positions,
        question=config.log.question,
        tokenizer=vocabulary_hash(AutoTokenizer.from_pretrained(pilot_path, trust_remote_code=False)),
        random_weights=config.model.random_weights,
    )
    device = "cuda" if config.resources.copilot_gpus else "cpu"
    return Learner(copilot, config.copilot, total_steps=total_steps, device=device, world_size=world_size)


def with_adapters(copilot: Copilot, config: CopilotSection) -> Any:
    """The Copilot, with LoRA in its decoder layers if configured; its new modules are trained in full."""
    copilot.freeze_embeddings()
    if config.method == "full":
        return copilot
    from peft import get_peft_model

    family = family_of(copilot.config.decoder_config())
    model = get_peft_model(copilot, lora_config(config.lora, family, len(copilot.layers)))
    for module in copilot.new_modules:
        module.requires_grad_(True)
    return model
