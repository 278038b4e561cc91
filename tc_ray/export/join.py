"""Join a Copilot with a Pilot it was not trained beside (table 3): the work behind `tc-ray fuse`.

Invariant: configs, tokenizers and weight files are checked before a weight is copied; no model is loaded. The fused folder
appears whole, by a rename, and never replaces another.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tc_ray.export.check import (
    PROVENANCE_FILE,
    TOKENIZER_FILE,
    ExportError,
    export_in,
    read_part,
    tokenizer_of,
)
from tc_ray.export.write import write_provenance
from tc_ray.files import FOLDER_MARKER, mark_whole, sync
from tc_ray.models.copilot import Copilot, CopilotConfig
from tc_ray.models.folder import FUSION_FILE, FusionSettings, check_parts
from tc_ray.models.fusion.core import check_fit
from tc_ray.models.hub import resolve_model
from tc_ray.models.identity import model_identity, tensor_shapes
from tc_ray.models.pilot.load import load_pilot
from tc_ray.models.weights import check_files
from tc_ray.text import first_line

DEFAULT = FusionSettings(lam=0.5, space="probability", feedback="own")
OTHER_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite")
"""Weights that a model folder may hold besides the safetensors that are read; they are not copied."""


@dataclass(frozen=True)
class Fusion:
    """A fused folder. `lam_from`: where its lambda comes from, None if it was given."""

    folder: Path
    pilot: Path
    copilot: Path
    beside: dict[str, Any]
    settings: FusionSettings
    lam_from: str | None

    def lines(self) -> list[str]:
        """What was made of what, and what to do next, for a terminal."""
        known = {"run": "run {}", "pilot": "of {}"}
        trained = " ".join(text.format(self.beside[key]) for key, text in known.items() if key in self.beside)
        lines = [
            f"pilot     {self.pilot}",
            f"copilot   {self.copilot}, trained beside {trained or 'an unknown Pilot'}",
            f"lambda    {self.settings.lam:g} in {self.settings.space} space, {self.settings.feedback} feedback",
        ]
        if self.settings.lam == 0:
            lines.append(
                "          0 is the Pilot alone: the Copilot does nothing until a request or the file says otherwise."
            )
        if self.lam_from is not None:
            lines += [
                f"          {self.lam_from}: not chosen on validation data of this Pilot, and `tc-ray eval` is for runs only.",
                '          Compare a few values on rows of your own ("lambda" in a request to the server, lam= of generate) and',
                f"          write the best into {self.folder / FUSION_FILE}.",
            ]
        return [*lines, f"fused     {self.folder}", f"serve     tc-ray serve {self.folder}"]


@dataclass(frozen=True)
class _Copilot:
    """folder: config and weights. settings: of its export, if it is part of one. own_pilot: folder of the Pilot it was
    trained beside, if there is one. beside: what is known of that Pilot's run."""

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
        ExportError: a part is missing or damaged, the tokenizers differ, or `out` exists. FusionError: other hidden
        states, another architecture or width. UnknownFamilyError, ModelSourceError: the Pilot is no usable model.
        WeightsError, NotFiniteError: a tensor is missing or not finite. ValueError: lam, space or feedback.
    """
    given = {"lam": lam, "space": space, "feedback": feedback}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = replace(DEFAULT, **asked)  # before anything is read: a bad option is refused at once
    out = out.expanduser().absolute()
    if out.exists() or out.is_symlink():
        raise ExportError(f"--out {out} exists; name a folder that does not")
    pilot_folder, source = _find_pilot(pilot), _find_copilot(copilot)
    files = {"pilot": _model_files(pilot_folder), "copilot": _model_files(source.folder)}
    config = _check(pilot_folder, source)
    load_pilot(pilot_folder, dtype=torch.float32, safetensors=True, names_only=True)
    Copilot.from_pretrained(source.folder, use_safetensors=True, device_map="meta")
    check_files(path for paths in files.values() for path in paths if path.suffix == ".safetensors")
    if source.settings is not None:
        settings = replace(source.settings, **asked)
    lam_from = None if lam is not None else "the default" if source.settings is None else f"the {FUSION_FILE} it had"
    made_of = {
        "pilot": {"from": str(pilot_folder), "identity": model_identity(pilot_folder), **_run_of(pilot_folder)},
        "copilot": {
            "from": str(source.folder),
            "identity": model_identity(source.folder),
            "initialised_from": config.source,
            "trained_beside": source.beside,
        },
        "fusion": asdict(settings) | {"lam_from": lam_from or "--lam"},
    }
    _write(out, files, settings, made_of)
    return Fusion(out, pilot_folder, source.folder, source.beside, settings, lam_from)


# -- the two models ---------------------------------------------------------------------------------------------------


def _find_pilot(name: str) -> Path:
    export = export_in(Path(name).expanduser().absolute())
    if export is not None:
        return export / "pilot"
    folder = resolve_model(name)
    if not isinstance(folder, Path):
        raise ExportError(f"--pilot {name} is no folder on this machine; download the model first and name its folder")
    return folder


def _find_copilot(given: Path) -> _Copilot:
    given = given.expanduser().absolute()
    export = export_in(given) or (export_in(given.parent) if given.name == "copilot" else None)
    if export is not None:
        check_parts(export)
        settings, own = FusionSettings.read(export), export / "pilot"
        fused = _provenance(export).get("copilot")  # of a folder made here: its Pilot is not the one of the training
        beside = {"identity": model_identity(own), **_run_of(own)} if fused is None else fused["trained_beside"]
        return _Copilot(export / "copilot", settings, own, beside)
    if not given.is_dir():
        raise ExportError(f"--copilot {given} is no folder; give an exported run, or copilot/final of a run")
    if not (given / "config.json").is_file() or read_part(given / "config.json").get("model_type") != (
        CopilotConfig.model_type
    ):
        raise ExportError(f"--copilot {given} holds no Copilot; give an exported run, or copilot/final of a run")
    own = given.parents[1] / "pilot" / "final"
    if given.parts[-2:] == ("copilot", "final") and (own / "config.json").is_file():
        return _Copilot(given, None, own, {"identity": model_identity(own), **_run_of(own)})
    return _Copilot(given, None, None, {})


def _run_of(pilot: Path) -> dict[str, Any]:
    """What is known of the run that made a Pilot: from its export, else from the run folder around `pilot/final`."""
    known = _provenance(pilot.parent)
    known = known["pilot"] if isinstance(known.get("pilot"), dict) else known  # of a folder made here
    if known:
        return {key: known[key] for key in ("run", "pilot", "rounds", "verdict") if key in known}
    run_config = pilot.parents[1] / "config.yaml"
    if pilot.parts[-2:] == ("pilot", "final") and run_config.is_file():
        from tc_ray.config.load import load_saved_config

        config = load_saved_config(run_config)
        return {"run": config.run.name, "pilot": config.model.pilot}
    return {}


def _provenance(export: Path) -> dict[str, Any]:
    file = export / PROVENANCE_FILE
    return read_part(file) if file.is_file() else {}


# -- whether it fits --------------------------------------------------------------------------------------------------


def _check(pilot: Path, copilot: _Copilot) -> CopilotConfig:
    """Architecture, states, width, then tokenizers; returns the Copilot's config."""
    from transformers import AutoConfig

    config: CopilotConfig = _read_config(CopilotConfig, copilot.folder)
    check_fit(_read_config(AutoConfig, pilot), config)
    own, trained, beside = tokenizer_of(pilot), config.tokenizer, copilot.own_pilot
    if own != trained and beside is not None and (beside / TOKENIZER_FILE).is_file():
        # unknown, or recorded by a version of transformers that read the same files differently
        trained = tokenizer_of(beside)
    if not trained:
        raise ExportError(
            f"the Copilot in {copilot.folder} does not say which tokenizer it was trained with (config.json: tokenizer "
            "is empty), and no Pilot of its own is beside it to compare: name the exported run it belongs to"
        )
    if own != trained:
        raise ExportError(
            f"the tokenizer of {pilot} ({own}) is not the one that the Copilot was trained with ({trained}): the same "
            "ids would mean other tokens"
        )
    return config


def _model_files(folder: Path) -> list[Path]:
    """The files that make up a model folder, weights complete: config, tokenizer, licence, safetensors."""
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} holds no model: config.json is missing")
    index = folder / "model.safetensors.index.json"
    shards = set(read_part(index).get("weight_map", {}).values()) if index.is_file() else ()
    names = sorted(shards) or ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ExportError(f"{folder} is not whole: {name} is missing")
        tensor_shapes(folder / name)
    others = (
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix not in OTHER_WEIGHTS
        # the marker names the files of a whole folder: the new one gets its own
        if path.name != FOLDER_MARKER
    )
    return [*(folder / name for name in names), *others]


def _read_config(kind: Any, path: Path) -> Any:
    """The config in a model folder; an error of the library becomes one line."""
    try:
        return kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ExportError(f"{path} has no readable config: {first_line(error)}") from error


# -- the folder -------------------------------------------------------------------------------------------------------


def _write(out: Path, files: dict[str, list[Path]], settings: FusionSettings, made_of: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for part, paths in files.items():
            (temporary / part).mkdir(parents=True)
            for path in paths:
                shutil.copyfile(path, temporary / part / path.name)
        settings.write(temporary)
        write_provenance(temporary, made_of, ("transformers",))
        mark_whole(temporary)
        os.rename(temporary, out)  # never replaces a folder, unlike `publish_folder`
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
