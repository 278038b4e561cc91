"""The model registry: the models of a server by name.

Invariant: a name that a client sends is looked up here and nowhere else; it never becomes part of a path. A model can be
replaced while requests run: a request keeps the one that it looked up. Made by the replica, read by the app.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tc_ray.serving.engine.engine import Engine
from tc_ray.serving.errors import RequestError
from tc_ray.serving.text.prompt import PromptEncoder


@dataclass(frozen=True)
class ServedModel:
    """One model of the API.

    name: in the API. default_lam: lambda of requests that name none. created: Unix time, s. copilot_version: of its
    Copilot, for GET /v1/models.
    """

    name: str
    engine: Engine
    encoder: PromptEncoder
    default_lam: float
    created: int = field(default_factory=lambda: int(time.time()))
    copilot_version: str | None = None


class ModelRegistry:
    """Served models by name, in the order they were added. Any thread may read, one at a time may replace."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._models = {served.name: served for served in models}

    def __iter__(self) -> Iterator[ServedModel]:
        """The models, as they are now."""
        return iter(list(self._models.values()))

    def __len__(self) -> int:
        return len(self._models)

    def find(self, name: str) -> ServedModel:
        """The model of a name. Raises RequestError 404."""
        served = self._models.get(name)
        if served is None:
            raise RequestError(
                "Field `model`: no such model here; GET /v1/models lists those that are.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return served

    def replace(self, served: ServedModel) -> None:
        """Serve this model under its name from now on. The caller closes the one before."""
        self._models = {**self._models, served.name: served}

    async def unhealthy(self) -> str | None:
        """What is wrong with the engines, None when all generate: see `Engine.unhealthy`."""
        models = list(self)
        if not models:
            return "no model is loaded"
        reasons = await asyncio.gather(*(asyncio.to_thread(served.engine.unhealthy) for served in models))
        found = [
            f"{served.name}: {reason}"
            for served, reason in zip(models, reasons, strict=True)
            # the engine of a model that was replaced meanwhile is stopped, which is no fault
            if reason and self.find(served.name) is served
        ]
        return "; ".join(found) or None

    @property
    def full(self) -> bool:
        """Whether no model's engine has a free place."""
        return len(self) > 0 and not any(served.engine.free_places() for served in self)
