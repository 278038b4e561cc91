"""A model that is evaluated: where its parts are, what they are known by, and how it is loaded.

A run folder and an exported or fused folder give two models, the fused one NAME and its Pilot NAME/pilot. Anything without a
Copilot gives one, NAME: a Hugging Face folder or id, or a run whose Copilot failed. Called by `run.evaluate`; the workers load.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.config.data import DataSection
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.training import fast_dtype
from tc_ray.models.folder import COPILOT, FUSION_FILE, PILOT, FusionSettings, check_parts, missing_parts
from tc_ray.models.hub import resolve_model
from tc_ray.models.identity import tokenizer_hash, weights_hash

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


class NotFinishedError(RuntimeError):
    """The folder holds no model that can be evaluated; the message says what is missing."""


@dataclass(frozen=True)
class ModelSource:
    """A Pilot and, if there is one, its Copilot.

    data: form of its prompts; None: it has none of its own. settings: lambda, space and feedback of an exported folder; None: to
    be chosen. run: run folder, whose validation rows choose. no_copilot: why a run has none. weights: hash of both, and of the tokenizer.
    """

    name: str
    pilot: str
    copilot: str | None
    dtype: str
    weights: str
    data: DataSection | None = None
    settings: FusionSettings | None = None
    run: Path | None = None
    no_copilot: str | None = None

    @property
    def memory_bytes(self) -> int:
        """About what a process with this model needs: twice its files, which may hold half the precision, and a GB."""
        parts = [Path(part) for part in (self.pilot, self.copilot) if part is not None]
        return 10**9 + 2 * sum(file.stat().st_size for part in parts for file in part.glob("*.safetensors"))

    @property
    def models(self) -> tuple[str, ...]:
        """Names in results: of the Pilot, then of the fused model."""
        return (self.name,) if self.copilot is None else (f"{self.name}/pilot", self.name)


def find_source(given: str) -> ModelSource:
    """The model that NAME=PLACE or PLACE names: a run folder, an exported or fused folder, a model folder or a hub id.

    Raises NotFinishedError: a run that has not ended. NoFusedModelError: an export lacks parts. ModelSourceError: no such model.
    """
    match = _NAMED.fullmatch(given)
    name, place = match.groups() if match and not Path(given).exists() else (None, given)
    folder = Path(place).expanduser().absolute()
    name = name or plain_name(folder.name if folder.is_dir() else place)
    if (folder / "config.yaml").is_file() and (folder / PILOT).is_dir() and not (folder / FUSION_FILE).is_file():
        failed = _alone(folder / "export") and not (folder / "copilot" / "final").exists()
        config = load_saved_config(folder / "config.yaml")
        return run_source(folder, config, name, no_copilot="the run's Copilot failed" if failed else None)
    export = next((at for at in (folder, folder / "export") if (at / FUSION_FILE).is_file()), None)
    if export is not None:
        return _exported(name, export)
    if (folder / "log").is_dir() or (folder / "status.json").is_file():
        raise NotFinishedError(f"{folder} cannot be evaluated: it holds no finished Pilot (has `tc-ray train` ended?)")
    model = str(resolve_model(place))
    return ModelSource(name, model, None, fast_dtype(), _hash(Path(model), None))


def run_source(folder: Path, config: RunConfig, name: str, *, no_copilot: str | None = None) -> ModelSource:
    """The models of a run's folder. no_copilot: why there is no Copilot; its Pilot is then measured alone."""
    pilot, copilot = folder / "pilot" / "final", folder / "copilot" / "final"
    needed = ["pilot/final/config.json"]
    if config.log.enabled and no_copilot is None:
        needed += ["copilot/final/config.json", "data/validation.parquet"]
    missing = [part for part in needed if not (folder / part).is_file()]
    if missing:
        raise NotFinishedError(
            f"{folder} cannot be evaluated: {', '.join(missing)} missing (has `tc-ray train` ended?)"
        )
    fused = config.log.enabled and no_copilot is None
    return ModelSource(
        name,
        str(pilot),
        str(copilot) if fused else None,
        config.pilot.dtype,  # the Copilot learned from states of this precision
        _hash(pilot, copilot if fused else None),
        data=config.data,
        run=folder,
        no_copilot=no_copilot if config.log.enabled else None,
    )


def _exported(name: str, export: Path) -> ModelSource:
    alone = _alone(export)
    if not alone:
        check_parts(export)
    saved = export / "config.yaml"
    config = load_saved_config(saved) if saved.is_file() else None
    pilot, copilot = export / PILOT, None if alone else export / COPILOT
    return ModelSource(
        name,
        str(pilot),
        None if copilot is None else str(copilot),
        fast_dtype() if config is None else config.pilot.dtype,
        _hash(pilot, copilot),
        data=None if config is None else config.data,
        settings=FusionSettings.read(export),
    )


def _alone(export: Path) -> bool:
    """Whether it is the export of a run whose Copilot failed."""
    return missing_parts(export) == [f"{COPILOT}/config.json"] and not (export / COPILOT).exists()


def _hash(pilot: Path, copilot: Path | None) -> str:
    from transformers import AutoTokenizer

    parts = [weights_hash(part) for part in (pilot, copilot) if part is not None]
    # it says what options are made of, where an answer ends and what its tokens spell
    parts.append(tokenizer_hash(AutoTokenizer.from_pretrained(pilot, trust_remote_code=False)))
    return hashlib.sha256("-".join(parts).encode()).hexdigest()[:16]


def plain_name(name: str) -> str:
    """The last part of a path or hub id, as a name in results."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name.split("/")[-1]) or "model"


def own_form(tokenizer: Any) -> DataSection:
    """Prompt form of a model that brings none: its chat template, else the text as it is. No prompt is too long for it."""
    longest = min(int(tokenizer.model_max_length or 10**6), 10**6)
    if tokenizer.chat_template:
        return DataSection(template="chat", cutoff_tokens=longest)
    return DataSection(template="plain", plain_template="{prompt}", cutoff_tokens=longest)


def load_source(source: ModelSource, feedback: str, device: str) -> tuple[Any, Any]:
    """The model on its device (a FusedModel, or the Pilot if there is no Copilot), and its tokenizer."""
    from transformers import AutoTokenizer

    from tc_ray.models.copilot import Copilot
    from tc_ray.models.fusion import FusedModel
    from tc_ray.models.pilot.load import DTYPES, load_pilot

    dtype = DTYPES[source.dtype]
    pilot = load_pilot(source.pilot, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.pilot, trust_remote_code=False)
    if source.copilot is None:
        return pilot.to(device), tokenizer
    copilot = Copilot.from_pretrained(source.copilot, dtype=dtype)
    return FusedModel.join(pilot, copilot, feedback=feedback).to(device), tokenizer
