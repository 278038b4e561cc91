"""The models of a server: the registry, and exported runs that are loaded into it.

Invariants: a name that a client sends is looked up in the registry and nowhere else; it never becomes part of a path. A model
can be replaced while requests run: a request keeps the one that it looked up. An engine is returned only after its Copilot has
given plausible predictions on made-up rows and the engine has generated tokens from finite logits.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tc_ray.config.serving import ServingSection
from tc_ray.export.check import ExportError, check_tokenizer, copilot_version, pilot_version
from tc_ray.models.copilot import Copilot
from tc_ray.models.copilot.probe import check_answers
from tc_ray.models.folder import FusionSettings
from tc_ray.models.fusion import FusedModel
from tc_ray.models.identity import vocabulary_hash
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.serving.engine.engine import Engine, Turns
from tc_ray.serving.errors import RequestError, ServingError
from tc_ray.serving.text.prompt import PromptEncoder
from tc_ray.text import first_line


@dataclass(frozen=True)
class ServedModel:
    """One model of the API. default_lam: lambda of requests that name none. created: Unix time, s."""

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
        return iter(list(self._models.values()))

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
        return bool(self._models) and not any(served.engine.free_places() for served in self)


class LoadedRun:
    """The Pilot of an exported run, which makes engines with Copilots.

    turns: lock of all engines of the process; those of one Pilot must never run at once. Raises ServingError where the
    Pilot cannot be loaded.
    """

    def __init__(self, name: str, export: Path, serving: ServingSection, turns: Turns) -> None:
        self.name, self.export = name, export
        self._serving, self._turns = serving, turns
        self._device, self._dtype = "cuda" if serving.gpu else "cpu", DTYPES[serving.dtype]
        folder = self.export / "pilot"
        try:
            self._pilot: Any = _in_memory(load_pilot(folder, dtype=self._dtype, safetensors=True), self._device)
            # Never used itself: fast tokenizers may not be used by two threads at once, so each engine gets a copy.
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise ServingError(f"{folder} cannot be loaded: {first_line(error)}") from error
        config = self._pilot.config
        self._encoder = PromptEncoder(
            copy.deepcopy(self._tokenizer), config.vocab_size, bool(config.is_encoder_decoder)
        )
        self._vocabulary = vocabulary_hash(self._tokenizer)
        self._pilot_version = pilot_version(self.export)

    def load_copilot(self, source: Path) -> ServedModel:
        """An engine for this Pilot and the Copilot of the export folder `source`.

        Raises ServingError or ExportError where it cannot be read, does not fit, or generates nothing.
        """
        version = copilot_version(source)
        model = self._read(source)
        engine = Engine(model, copy.deepcopy(self._tokenizer), self._serving, turn=self._turns)
        try:
            reason = engine.unhealthy()
            if reason:
                raise ServingError(f"{source}: the model was loaded but does not generate: {reason}")
        except BaseException:
            self.release(engine)
            raise
        return ServedModel(self.name, engine, self._encoder, model.default_lam, copilot_version=version)

    def _read(self, source: Path) -> FusedModel:
        try:
            if pilot_version(source) != self._pilot_version:
                raise ServingError(
                    f"{source} has another Pilot than the one that is loaded; a running server replaces Copilots only: "
                    "start the server again"
                )
            check_tokenizer(source, self._vocabulary)
            fusion = FusionSettings.read(source)
            copilot = _in_memory(
                Copilot.from_pretrained(source / "copilot", dtype=self._dtype, use_safetensors=True), self._device
            )
            check_answers(copilot.eval(), f"{source / 'copilot'}")
            with self._turns:  # the tap's hooks are put on the Pilot's layers: not while a forward pass walks over them
                return FusedModel.join(
                    self._pilot, copilot, lam=fusion.lam, space=fusion.space, feedback=fusion.feedback
                )
        except (ServingError, ExportError):
            raise
        except Exception as error:
            raise ServingError(f"{source} cannot be loaded: {first_line(error)}") from error

    def release(self, engine: Engine, drain_s: float = 0.0) -> None:
        """Close an engine, whose requests may go on for `drain_s`, and take its model off the Pilot."""
        engine.close(drain_s)
        with self._turns:
            engine.model.release()


def _in_memory(model: Any, device: str) -> Any:
    """The model on its device, with weights of its own. As loaded they may be pages of the file, and a process that writes into
    the file in place would change what is served, or crash the server."""
    if device != "cpu":  # copied there: a copy in RAM would be a second one
        return model.to(device)
    copied: dict[tuple[int, Any], Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        place = (tensor.data_ptr(), tensor.shape)
        if place not in copied:  # tied weights stay tied
            copied[place] = tensor.data.clone()
        tensor.data = copied[place]
    return model
