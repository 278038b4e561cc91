"""Join a Copilot with a Pilot it was not trained beside (table 3): the work behind `tc-ray fuse`.

Invariant: whatever can be known from configs, tokenizers and the weight files is checked before a weight is copied; no model is
loaded. The fused folder appears whole, by a rename, and never in place of another.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import tc_ray
from tc_ray.config.redact import redact_command
from tc_ray.config.section import check_lam
from tc_ray.files import FOLDER_MARKER, mark_whole, read_json, sync, write_json
from tc_ray.models.copilot import Copilot, CopilotConfig
from tc_ray.models.finite import NotFiniteError
from tc_ray.models.folder import FEEDBACKS, FUSION_FILE, SPACES, FusionSettings
from tc_ray.models.fusion.core import check_fit
from tc_ray.models.hub import model_identity, resolve_model, vocabulary_hash
from tc_ray.models.pilot.load import load_pilot
from tc_ray.models.weights import WeightsError, check_files
from tc_ray.text import first_line

DEFAULT = FusionSettings(lam=0.5, space="probability", feedback="own")
OTHER_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite")
"""What a model folder may hold besides the safetensors that are read; left behind when it is copied."""
_Read = TypeVar("_Read")


class FuseError(ValueError):
    """These two cannot be fused as asked; the message is one line that says why."""


@dataclass(frozen=True)
class Fusion:
    """A fused folder. `lam_from`: where its lambda comes from, None when it was given."""

    folder: Path
    pilot: Path
    copilot: Path
    beside: dict[str, Any]
    settings: FusionSettings
    lam_from: str | None

    def lines(self) -> list[str]:
        """What was made of what, and what is left to do, for a terminal."""
        known = {"run": "run {}", "pilot": "of {}"}
        trained = " ".join(text.format(self.beside[key]) for key, text in known.items() if key in self.beside)
        told = [
            f"pilot     {self.pilot}",
            f"copilot   {self.copilot}, trained beside {trained or 'a Pilot that is not told'}",
            f"lambda    {self.settings.lam:g} in {self.settings.space} space, {self.settings.feedback} feedback",
        ]
        if self.settings.lam == 0:
            told.append(
                "          0 is the Pilot alone: the Copilot does nothing until a request or the file says otherwise."
            )
        if self.lam_from is not None:
            told += [
                f"          {self.lam_from}: not chosen on validation data of this Pilot, and `tc-ray eval` is for runs only.",
                '          Compare a few values on rows of your own ("lambda" in a request to the server, lam= of generate) and',
                f"          write the best into {self.folder / FUSION_FILE}.",
            ]
        return [*told, f"fused     {self.folder}", f"serve     tc-ray serve {self.folder}"]


@dataclass(frozen=True)
class _Copilot:
    """folder: config and weights. settings: of its export, if it is part of one. own_pilot: the Pilot it was trained
    beside, if that is at hand. beside: what is known of that Pilot's run."""

    folder: Path
    settings: FusionSettings | None
    own_pilot: Path | None
    beside: dict[str, Any]


def fuse_models(
    pilot: str, copilot: Path, out: Path, *, lam: float | None, space: str | None, feedback: str | None
) -> Fusion:
    """Write the fused folder `out` of a Pilot and a Copilot.

    Args:
        pilot: model folder, exported run (its Pilot is taken) or builtin name.
        copilot: exported run (its Copilot is taken), or a Copilot's folder such as `copilot/final` of a run.
        lam, space, feedback: of equation 8; None takes the exported run's, else 0.5, probability, own.

    Raises:
        FuseError: a part is missing, the tokenizers differ, or `out` exists. FusionError: other hidden states, another
        architecture or width. UnknownFamilyError, ModelSourceError: the Pilot is no model that can be used.
    """
    _check_choices(lam, space, feedback)
    out = out.expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise FuseError(f"--out {out} exists; name a folder that does not")
    pilot_folder, source = _find_pilot(pilot), _find_copilot(copilot)
    files = {"pilot": _model_files(pilot_folder), "copilot": _model_files(source.folder)}
    config = _check(pilot_folder, source)
    _check_weights(pilot_folder, source.folder, files)
    base = source.settings or DEFAULT
    settings = FusionSettings(
        base.lam if lam is None else lam, base.space if space is None else space, feedback or base.feedback
    )
    lam_from = None if lam is not None else "the default" if source.settings is None else f"the {FUSION_FILE} it had"
    provenance = {
        "tc_ray": tc_ray.__version__,
        "pilot": {"from": str(pilot_folder), "identity": model_identity(pilot_folder), **_run_of(pilot_folder)},
        "copilot": {
            "from": str(source.folder),
            "identity": model_identity(source.folder),
            "initialised_from": config.source,
            "trained_beside": source.beside,
        },
        "fusion": asdict(settings) | {"lam_from": lam_from or "--lam"},
        "python": platform.python_version(),
        "packages": {"transformers": version("transformers")},
        "command": redact_command(sys.argv),
    }
    _write(out, files, settings, provenance)
    return Fusion(out, pilot_folder, source.folder, source.beside, settings, lam_from)


def _check_choices(lam: float | None, space: str | None, feedback: str | None) -> None:
    if lam is not None:
        try:
            check_lam(lam, "--lam")
        except ValueError as error:
            raise FuseError(str(error)) from None
    for option, value, choices in (("space", space, SPACES), ("feedback", feedback, tuple(FEEDBACKS))):
        if value is not None and value not in choices:
            raise FuseError(f"--{option} {value!r} is not one of {', '.join(choices)}")


# -- what was named ---------------------------------------------------------------------------------------------------


def _find_pilot(name: str) -> Path:
    export = _export_in(Path(name).expanduser().absolute())
    if export is not None:
        return export / "pilot"
    folder = resolve_model(name)
    if not isinstance(folder, Path):
        raise FuseError(f"--pilot {name} is no folder on this machine; download the model first and name its folder")
    return folder


def _find_copilot(given: Path) -> _Copilot:
    given = given.expanduser().absolute()
    export = _export_in(given) or (_export_in(given.parent) if given.name == "copilot" else None)
    if export is not None:
        settings = _read(FusionSettings.read, export, "cannot be read as an exported run")
        own = export / "pilot"
        fused = _provenance(export).get("copilot")  # of a folder made here: its Pilot is not the one of the training
        beside = {"identity": model_identity(own), **_run_of(own)} if fused is None else fused["trained_beside"]
        return _Copilot(export / "copilot", settings, own, beside)
    if not given.is_dir():
        raise FuseError(f"--copilot {given} is no folder; give an exported run, or copilot/final of a run")
    if not (given / "config.json").is_file() or _json(given / "config.json").get("model_type") != (
        CopilotConfig.model_type
    ):
        raise FuseError(f"--copilot {given} holds no Copilot; give an exported run, or copilot/final of a run")
    own = given.parents[2] / "pilot" / "final"
    if given.parts[-2:] == ("copilot", "final") and (own / "config.json").is_file():
        return _Copilot(given, None, own, {"identity": model_identity(own), **_run_of(own)})
    return _Copilot(given, None, None, {})


def _export_in(folder: Path) -> Path | None:
    """The export of a run folder, or `folder` itself when it is one."""
    return next((place for place in (folder / "export", folder) if (place / FUSION_FILE).is_file()), None)


def _run_of(pilot: Path) -> dict[str, Any]:
    """What is known of the run that made a Pilot: from its export, else from the run folder around `pilot/final`."""
    told = _provenance(pilot.parent)
    told = told["pilot"] if isinstance(told.get("pilot"), dict) else told  # of a folder made here
    if told:
        return {key: told[key] for key in ("run", "pilot", "rounds", "verdict") if key in told}
    run_config = pilot.parents[2] / "config.yaml"
    if pilot.parts[-2:] == ("pilot", "final") and run_config.is_file():
        from tc_ray.config.load import load_saved_config

        config = load_saved_config(run_config)
        return {"run": config.run.name, "pilot": config.model.pilot}
    return {}


def _provenance(export: Path) -> dict[str, Any]:
    file = export / "provenance.json"
    return _json(file) if file.is_file() else {}


# -- whether it fits --------------------------------------------------------------------------------------------------


def _check(pilot: Path, copilot: _Copilot) -> CopilotConfig:
    """Architecture, states, width, then tokenizers; returns the Copilot's config."""
    from transformers import AutoConfig

    config: CopilotConfig = _read(CopilotConfig.from_pretrained, copilot.folder, "has no readable config")
    check_fit(
        _read(partial(AutoConfig.from_pretrained, trust_remote_code=False), pilot, "has no readable config"), config
    )
    own, trained, beside = _tokenizer_hash(pilot), config.tokenizer, copilot.own_pilot
    if own != trained and beside is not None and _has_tokenizer(beside):
        # not told, or told by a version of transformers that read the same files otherwise
        trained = _tokenizer_hash(beside)
    if not trained:
        raise FuseError(
            f"the Copilot in {copilot.folder} does not say which tokenizer it was trained with (config.json: tokenizer "
            "is empty), and no Pilot of its own is beside it to compare: name the exported run it belongs to"
        )
    if own != trained:
        raise FuseError(
            f"the tokenizer of {pilot} ({own}) is not the one that the Copilot was trained with ({trained}): the same "
            "ids would mean other tokens"
        )
    return config


def _check_weights(pilot: Path, copilot: Path, files: dict[str, list[Path]]) -> None:
    """Every tensor of both models is there, and every number is finite."""
    try:
        load_pilot(pilot, dtype=torch.float32, safetensors=True, names_only=True)
        Copilot.from_pretrained(copilot, use_safetensors=True, device_map="meta")
        for paths in files.values():
            check_files(path for path in paths if path.suffix == ".safetensors")
    except (WeightsError, NotFiniteError) as error:
        raise FuseError(str(error)) from None


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _tokenizer_hash(folder: Path) -> str:
    from transformers import AutoTokenizer

    if not _has_tokenizer(folder):
        raise FuseError(f"{folder} has no tokenizer (tokenizer_config.json is missing)")
    return vocabulary_hash(
        _read(partial(AutoTokenizer.from_pretrained, trust_remote_code=False), folder, "has no readable tokenizer")
    )


def _model_files(folder: Path) -> list[Path]:
    """The files of a model folder that make it up, its weights complete: config, tokenizer, licence, safetensors."""
    if not (folder / "config.json").is_file():
        raise FuseError(f"{folder} holds no model: config.json is missing")
    index = folder / "model.safetensors.index.json"
    shards = set(_json(index).get("weight_map", {}).values()) if index.is_file() else ()
    names = sorted(shards) or ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FuseError(f"{folder} is not whole: {name} is missing")
        _read(_open_weights, folder / name, "is damaged or not whole")
    others = (
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix not in OTHER_WEIGHTS
        # the marker names the files of a whole folder: the new one gets its own
        if path.name != FOLDER_MARKER
    )
    return [*(folder / name for name in names), *others]


def _open_weights(path: Path) -> None:
    """Reads the header, which tells how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _json(path: Path) -> dict[str, Any]:
    return _read(read_json, path, "cannot be read")


def _read(reader: Callable[[Path], _Read], path: Path, problem: str) -> _Read:
    """`reader(path)`; what it cannot read is one line."""
    try:
        return reader(path)
    except Exception as error:
        raise FuseError(f"{path} {problem}: {first_line(error)}") from error


# -- the folder -------------------------------------------------------------------------------------------------------


def _write(out: Path, files: dict[str, list[Path]], settings: FusionSettings, provenance: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for part, paths in files.items():
            (temporary / part).mkdir(parents=True)
            for path in paths:
                shutil.copyfile(path, temporary / part / path.name)
        settings.write(temporary)
        write_json(temporary / "provenance.json", provenance)
        mark_whole(temporary)
        os.rename(temporary, out)  # never in place of another: unlike `publish_folder`
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
