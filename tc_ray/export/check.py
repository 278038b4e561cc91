"""An exported folder found, checked and identified before anything is loaded.

Invariant: a problem ends in one ExportError that names folder and part. Importing this module loads neither torch nor
transformers. Used by serving (before Ray starts, and for each newer Copilot) and by `join`.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from tc_ray.files import DamagedFileError, read_json
from tc_ray.models.folder import (
    COPILOT,
    FUSION_FILE,
    PILOT,
    FusionSettings,
    NoFusedModelError,
    check_alone,
    missing_parts,
)
from tc_ray.models.identity import ModelSourceError, model_identity, tensor_shapes, vocabulary_hash
from tc_ray.text import first_line

PROVENANCE_FILE = "provenance.json"
TOKENIZER_FILE = "tokenizer_config.json"
_FP32_BYTES = 4


class ExportError(ValueError):
    """An exported folder is missing, not whole, or its parts do not fit; the message is one line that names the part."""


def export_in(folder: Path) -> Path | None:
    """The export of a run folder, `folder` itself if it is an export, or None."""
    return next((place for place in (folder / "export", folder) if (place / FUSION_FILE).is_file()), None)


def find_export(folder: Path | str) -> Path:
    """Absolute export folder of a run folder, or `folder` itself if it is an export. Raises ExportError: see `check_configs`."""
    given = Path(folder).expanduser().absolute()
    if not given.is_dir():
        raise ExportError(f"{given} is no folder; give a run folder or an exported model")
    export = given / "export" if (given / "export").is_dir() else given
    if not any((export / part).exists() for part in (FUSION_FILE, PILOT, COPILOT)):
        raise ExportError(f"{given} holds no exported model: the run has not ended, or it is no run folder")
    try:
        check_alone(export)
    except NoFusedModelError as error:
        raise ExportError(str(error)) from None
    missing = missing_parts(export)
    missing += [f"{part}/*.safetensors" for part in (PILOT, COPILOT) if not list((export / part).glob("*.safetensors"))]
    if not (export / PILOT / TOKENIZER_FILE).is_file():
        missing.append(f"{PILOT}/{TOKENIZER_FILE}")
    if missing:
        raise ExportError(f"{export} is incomplete: {', '.join(missing)} missing")
    check_configs(export)
    return export


def check_configs(export: Path) -> None:
    """Raise ExportError if fusion.json and the configs of Pilot and Copilot cannot be read or do not fit."""
    try:
        FusionSettings.read(export)
    except (ValueError, OSError) as error:
        raise ExportError(str(error)) from None
    pilot, copilot = read_part(export / PILOT / "config.json"), read_part(export / COPILOT / "config.json")
    # vocabularies may be padded to different sizes, widths must agree
    width = pilot.get("hidden_size", pilot.get("d_model"))  # T5's own name
    if copilot.get("pilot_hidden_size") != width:
        raise ExportError(
            f"{export}: the Copilot was made for a Pilot of width {copilot.get('pilot_hidden_size')}; "
            f"this Pilot has {width}"
        )


def check_tokenizer(export: Path, own: str | None = None) -> None:
    """Raise ExportError if the Copilot's token ids come from another tokenizer than the Pilot's.

    A Copilot that does not name its tokenizer is accepted: there is nothing to compare.

    Args:
        own: `vocabulary_hash` of the Pilot's tokenizer; None: it is loaded, with transformers.
    """
    trained = read_part(export / COPILOT / "config.json").get("tokenizer")
    if not trained:
        return
    own = tokenizer_of(export / PILOT) if own is None else own
    if own != trained:
        raise ExportError(
            f"{export}: the Copilot was trained with another tokenizer ({trained}) than this Pilot's ({own}): the same "
            "ids would mean other tokens. Serve the run it belongs to, or join the two with tc-ray fuse"
        )


def tokenizer_of(model: Path) -> str:
    """`vocabulary_hash` of the tokenizer in a model folder. Raises ExportError if it has none that can be read."""
    from transformers import AutoTokenizer

    if not (model / TOKENIZER_FILE).is_file():
        raise ExportError(f"{model} has no tokenizer ({TOKENIZER_FILE} is missing)")
    try:
        return vocabulary_hash(AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    except Exception as error:  # of other libraries, which raise anything for a torn file
        raise ExportError(f"{model} has no readable tokenizer: {first_line(error)}") from error


def weight_bytes(export: Path) -> int:
    """Bytes that the weights of Pilot and Copilot take in memory, in fp32. Raises ExportError for a damaged file."""
    try:
        files = [file for part in (PILOT, COPILOT) for file in (export / part).glob("*.safetensors")]
        return _FP32_BYTES * sum(math.prod(shape) for file in files for shape in tensor_shapes(file).values())
    except ModelSourceError as error:
        raise ExportError(str(error)) from None


def copilot_version(export: Path) -> str:
    """16 hex digits that change with the Copilot's config or weights and with fusion.json."""
    content = model_identity(export / COPILOT).encode() + (export / FUSION_FILE).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def pilot_version(export: Path) -> str:
    """16 hex digits that change with the Pilot's config or weights."""
    return model_identity(export / PILOT).partition("@")[2]


def read_part(path: Path) -> dict[str, Any]:
    """A JSON file of an export. Raises ExportError if it cannot be read."""
    try:
        return read_json(path)
    except DamagedFileError as error:
        raise ExportError(str(error)) from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {first_line(error)}") from error
