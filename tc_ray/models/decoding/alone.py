"""A language model without a Copilot, as a batch decodes it: the part of a fused model's face that lambda 0 needs."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache

from tc_ray.models.families import family_of


class PilotAlone:
    """A decoder-only language model in a batch. Its prompts have lam 0."""

    copilot = None
    tap = None

    def __init__(self, pilot: Any) -> None:
        self.pilot, self.family = pilot, family_of(pilot)

    def get_input_embeddings(self) -> nn.Module:
        """The model's own."""
        embedding: nn.Module = self.pilot.get_input_embeddings()
        return embedding

    def new_cache(self) -> DynamicCache:
        """An empty cache of one sequence."""
        return DynamicCache(config=self.family.decoder(self.pilot).config)
