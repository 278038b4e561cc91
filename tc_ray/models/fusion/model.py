"""The fused model: Pilot and Copilot as one language model of the Pilot's architecture, made by `join` or read from a folder.

It is transformers' GenerationMixin: greedy, sampling, beams, streamers and stopping criteria are the library's own. Used by
evaluation, serving and users.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tc_ray.models import folder as layout
from tc_ray.models.copilot import Copilot
from tc_ray.models.families import family_of
from tc_ray.models.fusion.causal import CausalForward
from tc_ray.models.fusion.generation import FusedGeneration
from tc_ray.models.fusion.seq2seq import Seq2SeqForward
from tc_ray.models.pilot.load import load_pilot

_DECODER_ONLY_ARGUMENTS = ("lam", "logits_to_keep")


class FusedModel(FusedGeneration):
    """Pilot + Copilot as one language model; make one with `join` or `from_pretrained`."""

    @staticmethod
    def join(
        pilot: Any, copilot: Copilot, *, lam: float = 1.0, space: str = "probability", feedback: str = "own"
    ) -> FusedModel:
        """The fused model of the Pilot's architecture. Arguments and errors: those of `FusedCore`."""
        kind = FusedSeq2SeqLM if family_of(pilot).encoder_decoder else FusedCausalLM
        return kind(pilot, copilot, lam=lam, space=space, feedback=feedback)

    def save_pretrained(self, folder: Path | str, *_: Any, **__: Any) -> None:
        """Write `pilot/`, `copilot/` (safetensors) and fusion.json; `pilot/` loads with plain AutoModel."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.pilot.save_pretrained(folder / layout.PILOT)
        self.copilot.save_pretrained(folder / layout.COPILOT)
        layout.FusionSettings(self.default_lam, self.space, self.feedback).write(folder)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> FusedModel:
        """Load a folder written by `save_pretrained` or by the export of a run.

        Raises:
            NoFusedModelError: a part is missing; the message names it. ValueError: an unknown format.
            FusionError: Pilot and Copilot do not fit each other. WeightsError, NotFiniteError: see `load_whole`.
        """
        folder = Path(folder)
        layout.check_parts(folder)
        settings = layout.FusionSettings.read(folder)
        pilot = load_pilot(folder / layout.PILOT, dtype=dtype, safetensors=True)
        copilot = Copilot.from_pretrained(folder / layout.COPILOT, dtype=dtype, use_safetensors=True)
        fused = cls.join(pilot, copilot, lam=settings.lam, space=settings.space, feedback=settings.feedback)
        return fused.to(device)


class FusedCausalLM(CausalForward, FusedModel):
    """Decoder-only Pilot + Copilot as one causal language model."""


class FusedSeq2SeqLM(Seq2SeqForward, FusedModel):
    """Encoder-decoder Pilot + Copilot as one sequence-to-sequence model."""

    def _prepare_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Any, model_kwargs: dict[str, Any], *arguments: Any
    ) -> dict[str, Any]:
        """Arguments of the decoder only are kept from the encoder."""
        kept = {name: model_kwargs.pop(name) for name in _DECODER_ONLY_ARGUMENTS if name in model_kwargs}
        prepared: dict[str, Any] = super()._prepare_encoder_decoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, *arguments
        )
        return prepared | kept
