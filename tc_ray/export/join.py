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

from tc_ray.export.check import PROVENANCE_FILE, ExportError, export_in, read_part, tokenizer_of
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
    """A fused folder. run: that the Copilot was trained in, as far as it is known. `lam_from`: where its lambda comes from, None
    if it was given."""

    folder: Path
    pilot: Path
    copilot: Path
    run: str
    settings: FusionSettings
    lam_from: str | None

    def lines(self) -> list[str]:
        """What was made of what, and what to do next, for a terminal."""
        lines = [
            f"pilot     {self.pilot}",
            f"copilot   {self.copilot}, trained in {self.run}",
            f"lambda    {self.settings.lam:g} in {self.settings.space} space, {self.settings.feedback} feedback",
        ]
        if self.lam_from is not None:
            lines += [
                f"          {self.lam_from}: not chosen on validation data of this Pilot. Compare a few values on rows of your own",
                f'          ("lambda" in a request, lam= of generate) and write the best into {self.folder / FUSION_FILE}.',
            ]
        return [*lines, f"fused     {self.folder}", f"serve     tc-ray serve {self.folder}"]


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
    pilot_folder, copilot_folder = _find_pilot(pilot), _find_copilot(copilot)
    files = {"pilot": _model_files(pilot_folder), "copilot": _model_files(copilot_folder)}
    config = _check(pilot_folder, copilot_folder)
    load_pilot(pilot_folder, dtype=torch.float32, safetensors=True, names_only=True)
    Copilot.from_pretrained(copilot_folder, use_safetensors=True, device_map="meta")
    check_files(path for paths in files.values() for path in paths if path.suffix == ".safetensors")
    export = export_in(copilot_folder.parent)
    if export is not None:
        settings = replace(FusionSettings.read(export), **asked)
    lam_from = None if lam is not None else "the default" if export is None else f"the {FUSION_FILE} it had"
    made_of = {
        "pilot": _origin(pilot_folder),
        "copilot": _origin(copilot_folder) | {"initialised_from": config.source},
        "fusion": asdict(settings) | {"lam_from": lam_from or "--lam"},
    }
    _write(out, files, settings, made_of)
    known = _provenance(copilot_folder)
    run = f"run {known['run']} beside {known['pilot']}" if "run" in known else "an unknown run"
    return Fusion(out, pilot_folder, copilot_folder, run, settings, lam_from)


def _find_pilot(name: str) -> Path:
    export = export_in(Path(name).expanduser().absolute())
    if export is not None:
        return export / "pilot"
    folder = resolve_model(name)
    if not isinstance(folder, Path):
        raise ExportError(f"--pilot {name} is no folder on this machine; download the model first and name its folder")
    return folder


def _find_copilot(given: Path) -> Path:
    given = given.expanduser().absolute()
    export = export_in(given)
    if export is not None:
        check_parts(export)
        return export / "copilot"
    config = given / "config.json"
    if not config.is_file() or read_part(config).get("model_type") != CopilotConfig.model_type:
        raise ExportError(f"--copilot {given} holds no Copilot; give an exported run, or copilot/final of a run")
    return given


def _provenance(model: Path) -> dict[str, Any]:
    file = model.parent / PROVENANCE_FILE
    return read_part(file) if file.is_file() else {}


def _origin(model: Path) -> dict[str, Any]:
    return {"from": str(model), "identity": model_identity(model), "provenance": _provenance(model)}


def _check(pilot: Path, copilot: Path) -> CopilotConfig:
    """Architecture, states, width, then tokenizers; returns the Copilot's config."""
    from transformers import AutoConfig

    config: CopilotConfig = _read_config(CopilotConfig, copilot)
    check_fit(_read_config(AutoConfig, pilot), config)
    own = tokenizer_of(pilot)
    if own != config.tokenizer:
        raise ExportError(
            f"the tokenizer of {pilot} ({own}) is not the one that the Copilot was trained with "
            f"({config.tokenizer or 'not named in its config.json'}): the same ids would mean other tokens"
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
    try:
        return kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ExportError(f"{path} has no readable config: {first_line(error)}") from error


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
