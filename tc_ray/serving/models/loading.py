"""One exported run in a replica: its Pilot, loaded once, and engines for the Copilots that come and go beside it.

Invariant: an engine is handed out only after its Copilot has made sense on a trial and it has generated tokens with it, from
logits that are finite, so what is put in its predecessor's place works.
Used by replica.py at the start and by reload.py for a newer Copilot.
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.export.check import copilot_version, pilot_version
from tc_ray.serving.errors import ServingError
from tc_ray.serving.models.exports import (
    Signature,
    check_config,
    check_tokenizer,
    copilot_signature,
)
from tc_ray.serving.settings import ModelSettings, ReplicaSettings
from tc_ray.text import first_line

if TYPE_CHECKING:
    from tc_ray.models.fusion import FusedModel
    from tc_ray.serving.engine import Turns
    from tc_ray.serving.models.registry import ServedModel


SETTLE_TRIES, SETTLE_PAUSE_S = 10, 1.0


class ExportChanged(Exception):
    """The files changed while they were read: look again later."""


def still_written(source: Path) -> ServingError:
    """What to raise when they go on changing."""
    return ServingError(f"{source} is still being written; start again when it is complete")


@dataclass(frozen=True)
class LoadedCopilot:
    """A served model, the fused model behind it, and the folder and files it was read from."""

    served: ServedModel
    model: FusedModel
    source: Path
    signature: Signature
    seconds: float


class LoadedRun:
    """The Pilot of an exported run, and the way to make engines with it.

    turns: of all engines of the process; those of one Pilot must never run at once. Raises ServingError when it cannot be
    loaded.
    """

    def __init__(self, model: ModelSettings, settings: ReplicaSettings, turns: Turns) -> None:
        import torch
        from transformers import AutoTokenizer

        from tc_ray.models.identity import vocabulary_hash
        from tc_ray.models.pilot.load import load_pilot
        from tc_ray.serving.text.prompt import PromptEncoder

        self.name, self.export = model.name, Path(model.export)
        self._settings = settings
        self._device = "cuda" if settings.gpu else "cpu"
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
        self._turns = turns

    def load_copilot_settled(self, source: Path) -> LoadedCopilot:
        """As `load_copilot`, for one that must be had now: waits a while for whoever is writing it. Raises ServingError."""
        for _ in range(SETTLE_TRIES):
            try:
                return self.load_copilot(source)
            except ExportChanged:
                time.sleep(SETTLE_PAUSE_S)
        raise still_written(source)

    def load_copilot(self, source: Path) -> LoadedCopilot:
        """An engine for this Pilot and the Copilot of the export folder `source`.

        Raises:
            ServingError: it cannot be read, does not fit, or generates nothing. ExportChanged: it was written meanwhile.
        """
        from tc_ray.serving.engine import Engine
        from tc_ray.serving.models.registry import ServedModel

        begun = time.monotonic()
        model, version, signature = self._read(source)
        engine = Engine(model, copy.deepcopy(self._tokenizer), self._settings.engine, turn=self._turns)
        try:
            reason = engine.unhealthy()
            if reason:
                raise ServingError(f"{source}: the model was loaded but does not generate: {reason}")
        except BaseException:
            engine.close()
            self.release(model)
            raise
        served = ServedModel(
            name=self.name,
            engine=engine,
            encoder=self._encoder,
            default_lam=model.default_lam,
            copilot_version=version,
        )
        return LoadedCopilot(served, model, source, signature, time.monotonic() - begun)

    def _read(self, source: Path) -> tuple[FusedModel, str, Signature]:
        import torch

        from tc_ray.models.copilot import Copilot
        from tc_ray.models.copilot.probe import check_answers
        from tc_ray.models.folder import FusionSettings
        from tc_ray.models.fusion import FusedModel

        try:
            signature, version = copilot_signature(source), copilot_version(source)
            check_config(source)
            if pilot_version(source) != self._pilot_version:
                raise ServingError(
                    f"{source} has another Pilot than the one that is loaded; only Copilots are replaced in a running "
                    "server: start it anew, or deploy it again"
                )
            check_tokenizer(source, self._vocabulary)
            fusion = FusionSettings.read(source)
            copilot = _in_memory(
                Copilot.from_pretrained(source / "copilot", dtype=torch.float32, use_safetensors=True)
            ).to(self._device)
            check_answers(copilot.eval(), f"{source / 'copilot'}")
            if copilot_signature(source) != signature:
                raise ExportChanged
            with self._turns:  # the tap's hooks are put on the Pilot's layers: not while a forward pass walks over them
                model = FusedModel.join(
                    self._pilot, copilot, lam=fusion.lam, space=fusion.space, feedback=fusion.feedback
                )
        except (ServingError, ExportChanged):
            raise
        except Exception as error:
            raise ServingError(f"{source} cannot be loaded: {first_line(error)}") from error
        return model, version, signature

    def release(self, model: FusedModel) -> None:
        """Take a fused model off the Pilot, when its engine has been closed."""
        with self._turns:
            model.release()


def _in_memory(model: Any) -> Any:
    """The model with weights of its own: as loaded they may be the file's pages, and whoever writes into the file in place
    would change what is served, or end the process."""
    copied: dict[tuple[int, Any], Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        place = (tensor.data_ptr(), tensor.shape)
        if place not in copied:  # weights that share their numbers go on sharing them
            copied[place] = tensor.data.clone()
        tensor.data = copied[place]
    return model
