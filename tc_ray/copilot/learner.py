"""The Copilot's learner: steps on its loss (equation 7) with AdamW and a cosine schedule. Plain torch, no Ray.

Invariant: with W workers each rank sees its slice of the same draw; the loss's sums, token counts and gradients are added
over ranks before the loss makes its value of them, so W workers do exactly what one does on the whole batch.
"""

from __future__ import annotations

import itertools
import math
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tc_ray.config.schema import CopilotSection
from tc_ray.files import publish_folder
from tc_ray.models.copilot import Copilot, CopilotBatch
from tc_ray.models.copilot.model import NEW_MODULES
from tc_ray.models.copilot.probe import answers, check_export
from tc_ray.models.families import family_of
from tc_ray.models.finite import LeftOut, check_finite
from tc_ray.models.losses import make_loss


@dataclass(frozen=True)
class StepResult:
    """One step: loss is that of `copilot.loss`; error_size the root mean square of the logged errors (rmse of f = 0).

    taken: False: loss or gradient was not finite on some rank; weights and optimizer stayed as they were."""

    loss: float
    error_size: float
    tokens: int
    learning_rate: float
    taken: bool = True


class Learner:
    """Trains a Copilot on batches.

    Args:
        copilot: the model, fp32. config: the run's copilot section. total_steps: length of the cosine schedule.
        world_size: ranks that step together through torch.distributed; 1 needs no process group.
    """

    def __init__(
        self, copilot: Copilot, config: CopilotSection, *, total_steps: int, device: str = "cpu", world_size: int = 1
    ) -> None:
        self.config, self.world_size, self.device = config, world_size, torch.device(device)
        self.copilot = copilot
        self.model: Any = with_adapters(copilot, config).to(self.device).train()
        self.loss = make_loss(config.loss, copilot.config.vocab_size)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        warmup = max(1, round(config.warmup_ratio * total_steps))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: (
                (i + 1) / warmup
                if i < warmup
                else 0.5 * (1 + math.cos(math.pi * min(1.0, (i - warmup) / max(1, total_steps - warmup))))
            ),
        )
        self.step_count = 0
        self.left_out = LeftOut(
            "the Copilot",
            "its weights are spoilt, or learning cannot go on with these settings: set a lower copilot.learning_rate or "
            "copilot.max_grad_norm, or copilot.dtype=fp32",
        )

    def step(self, batch: CopilotBatch) -> StepResult:
        """One optimizer step on this rank's part of the batch (collective over ranks).

        A step whose loss or gradient is not finite is counted and left out, on all ranks: all see the same sums.

        Raises:
            NotFiniteError: too many in a row were left out.
        """
        batch = batch.to(self.device)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.zero_grad()
        rows = batch.row_mask
        ids, values = batch.error_ids[rows], batch.error_values[rows]
        bf16 = self.config.dtype == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            total = self.loss.total(
                self.copilot.states(batch), self.copilot.output.weight, self.copilot.output_places(ids), values
            )
        total.backward()
        sums = torch.stack(
            [
                total.detach(),
                values.double().square().sum(),
                torch.tensor(float(len(ids)), device=self.device).double(),
            ]
        )
        self._add_over_ranks(sums)
        added, size, tokens = (float(x) for x in sums)
        # of the sums over all ranks; clipping joins the same pass over the gradients
        factor = self.loss.gradient_factor(added, tokens) if math.isfinite(added) else math.nan
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

    def _add_over_ranks(self, sums: torch.Tensor) -> None:
        if self.world_size == 1:
            return
        dist.all_reduce(sums)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()

    def save(self, folder: Path) -> None:
        """Write trainable weights (safetensors), optimizer and schedule; the caller makes it atomic.

        Raises:
            NotFiniteError: a weight is not finite; nothing was written.
        """
        check_finite(self.parameters.items(), f"the Copilot after step {self.step_count}")
        save_file({n: p.detach().contiguous() for n, p in self.parameters.items()}, folder / "trainable.safetensors")
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step_count,
        }
        torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Its pickle is read as numbers only: no code in it runs.

        Raises:
            ValueError: other weights than the configured Copilot has. NotFiniteError: a number is not finite.
        """
        weights = load_file(folder / "trainable.safetensors", device=str(self.device))
        other = weights.keys() ^ self.parameters.keys()
        other |= {n for n in weights.keys() - other if weights[n].shape != self.parameters[n].shape}
        if other:
            raise ValueError(
                f"{folder} holds other trainable weights than the configured Copilot ({min(other)}); use a new run.folder"
            )
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        averages = (
            (f"{name} {number}", value)
            for number, kept in state["optimizer"]["state"].items()
            for name, value in kept.items()
            if torch.is_tensor(value)
        )
        check_finite(itertools.chain(weights.items(), averages), f"the Copilot's checkpoint {folder}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step_count = state["step"]

    def export(self, folder: Path) -> None:
        """Publish the trained Copilot, adapters merged, as a plain PreTrainedModel folder. The learner is of no use after.

        Raises:
            ExportMismatchError: the folder, loaded anew, does not answer as the trained Copilot; nothing was published.
            NotFiniteError: a weight is not finite.
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


def with_adapters(copilot: Copilot, config: CopilotSection) -> Any:
    """The Copilot with LoRA in its decoder layers when configured; what no pretrained decoder brings stays trainable."""
    copilot.freeze_embeddings()
    if config.method == "full":
        return copilot
    from peft import LoraConfig, get_peft_model

    lora, family = config.lora, family_of(copilot.config.decoder_config())
    model = get_peft_model(
        copilot,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules or list(family.lora_targets),
            layers_to_transform=list(range(lora.first_layer, len(copilot.layers))),
            layers_pattern=family.layers_pattern,
        ),
    )
    # what no pretrained decoder brings must be trained in full
    for name in NEW_MODULES:
        module = getattr(copilot, name)
        if module is not None:
            module.requires_grad_(True)
    return model
