"""The model registry: the models of a server by name.

Invariant: a name that a client sends is looked up here and nowhere else; it never becomes part of a path. A model can be
replaced while requests run: a request keeps the one that it looked up. Made by the replica, read by the app.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tc_ray.serving.engine import Engine
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
    """Served models by name, in the order they were added. Safe to use from several threads."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._models = {served.name: served for served in models}
        self._changing = threading.Lock()

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

    def replace(self, served: ServedModel) -> ServedModel | None:
        """Serve this model under its name from now on. Returns the one before, which the caller closes."""
        with self._changing:
            before = self._models.get(served.name)
            self._models = {**self._models, served.name: served}
        return before

    @property
    def full(self) -> bool:
        """Whether no model's engine has a free place."""
        return len(self) > 0 and not any(served.engine.free_places() for served in self)
