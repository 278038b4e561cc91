"""One exported run in a replica: its Pilot, loaded once, and an engine for each Copilot that is loaded beside it.

Invariant: an engine is returned only after its Copilot has given plausible predictions on made-up rows and the engine has
generated tokens from finite logits. So what replaces a Copilot works.
Used by deploy/replica.py at the start and by swap.py for a newer Copilot.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tc_ray.config.serving import ServingSection
from tc_ray.export.check import ExportError, check_tokenizer, copilot_version, pilot_version
from tc_ray.models.copilot import Copilot
from tc_ray.models.copilot.probe import check_answers
from tc_ray.models.folder import FusionSettings
from tc_ray.models.fusion import FusedModel
from tc_ray.models.identity import vocabulary_hash
from tc_ray.models.pilot.load import load_pilot
from tc_ray.serving.engine.engine import Engine, Turns
from tc_ray.serving.errors import ServingError
from tc_ray.serving.models.registry import ServedModel
from tc_ray.serving.text.prompt import PromptEncoder
from tc_ray.text import first_line


class LoadedRun:
    """The Pilot of an exported run, which makes engines with Copilots.

    turns: lock of all engines of the process; those of one Pilot must never run at once. Raises ServingError where the
    Pilot cannot be loaded.
    """

    def __init__(self, name: str, export: Path, serving: ServingSection, turns: Turns) -> None:
        self.name, self.export = name, export
        self._serving, self._turns = serving, turns
        self._device = "cuda" if serving.gpu else "cpu"
        folder = self.export / "pilot"
        try:
            self._pilot: Any = _in_memory(load_pilot(folder, dtype=torch.float32, safetensors=True)).to(self._device)
            # Never used itself: fast tokenizers may not be used by two threads at once, so each engine gets a copy.
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise ServingError(f"{folder} cannot be loaded: {first_line(error)}") from error
        self._encoder = PromptEncoder(copy.deepcopy(self._tokenizer), self._pilot.config.vocab_size)
        self._vocabulary = vocabulary_hash(self._tokenizer)
        self._pilot_version = pilot_version(self.export)

    def load_copilot(self, source: Path) -> ServedModel:
        """An engine for this Pilot and the Copilot of the export folder `source`.

        Raises:
            ServingError, ExportError: it cannot be read, does not fit, or generates nothing.
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
                Copilot.from_pretrained(source / "copilot", dtype=torch.float32, use_safetensors=True)
            ).to(self._device)
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


def _in_memory(model: Any) -> Any:
    """The model with weights of its own. As loaded they may be pages of the file, and a process that writes into the file in
    place would change what is served, or crash the server."""
    copied: dict[tuple[int, Any], Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        place = (tensor.data_ptr(), tensor.shape)
        if place not in copied:  # tied weights stay tied
            copied[place] = tensor.data.clone()
        tensor.data = copied[place]
    return model
