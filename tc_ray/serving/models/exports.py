"""The export folders a server is given: found, checked and named before anything is loaded.

Invariant: what is wrong with a folder ends in one ServingError that names folder and part; importing this module loads
neither torch nor transformers. Used by deploy/, loading.py and swap.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tc_ray.config.section import check_lam
from tc_ray.files import DamagedFileError, read_json
from tc_ray.serving.errors import ServingError
from tc_ray.text import first_line

_FP32_BYTES = 4
_HEADER_LIMIT_BYTES = 2**27


def find_export(folder: Path | str) -> Path:
    """Absolute export folder of a run folder, or `folder` itself when it is one.

    Raises ServingError that names what is missing.
    """
    given = Path(folder).expanduser().absolute()
    if not given.is_dir():
        raise ServingError(
            f"{given} is no folder; give a run folder, an exported model, or a setting as serving.FIELD=VALUE"
        )
    export = given / "export" if (given / "export").is_dir() else given
    if not any((export / part).exists() for part in ("fusion.json", "pilot", "copilot")):
        raise ServingError(f"{given} holds no exported model: the run has not ended, or it is no run folder")
    if _file(export / "pilot/config.json") and _file(export / "fusion.json") and not (export / "copilot").exists():
        raise ServingError(
            f"{export} holds a Pilot alone, copilot/config.json is missing: there is nothing to fuse. Where the Copilot of a "
            "run failed, the run's command (`tc-ray train`) trains it anew; pilot/ is an ordinary model folder"
        )
    missing = [part for part in ("fusion.json", "pilot/config.json", "copilot/config.json") if not _file(export / part)]
    missing += [
        f"{part}/*.safetensors" for part in ("pilot", "copilot") if not list((export / part).glob("*.safetensors"))
    ]
    if not _file(export / "pilot/tokenizer_config.json"):
        missing.append("pilot/tokenizer_config.json")
    if missing:
        raise ServingError(f"{export} is incomplete: {', '.join(missing)} missing")
    check_config(export)
    return export


def check_config(export: Path) -> None:
    """Raise ServingError where fusion.json and the configs of Pilot and Copilot cannot be read or do not fit."""
    try:
        check_lam(_json(export / "fusion.json").get("lam"), f"{export / 'fusion.json'}: lam")
    except ValueError as error:
        raise ServingError(str(error)) from None
    pilot, copilot = _json(export / "pilot/config.json"), _json(export / "copilot/config.json")
    if pilot.get("is_encoder_decoder"):
        raise ServingError(
            f"{export} is an encoder-decoder; the server answers with decoder-only models. "
            "Use FusedModel.from_pretrained(folder).generate for it"
        )
    # vocabularies may be padded to different sizes, widths must agree
    if copilot.get("pilot_hidden_size") != pilot.get("hidden_size"):
        raise ServingError(
            f"{export}: the Copilot was made for a Pilot of width {copilot.get('pilot_hidden_size')}; "
            f"this Pilot has {pilot.get('hidden_size')}"
        )


def check_tokenizer(export: Path) -> None:
    """Raise ServingError when the Copilot says that its token ids come from another tokenizer. Loads transformers."""
    trained = _json(export / "copilot/config.json").get("tokenizer")
    if not trained:
        return  # an older export, or one made by hand: nothing to compare with
    from transformers import AutoTokenizer

    from tc_ray.models.hub import vocabulary_hash

    try:
        own = vocabulary_hash(AutoTokenizer.from_pretrained(export / "pilot", trust_remote_code=False))
    except Exception as error:  # of other libraries, which raise anything where a file is torn
        raise ServingError(f"{export}/pilot has no readable tokenizer: {first_line(error)}") from error
    if own != trained:
        raise ServingError(
            f"{export}: the Copilot was trained with another tokenizer ({trained}) than this Pilot's ({own}): the same "
            "ids would mean other tokens. Serve the run it belongs to, or join them by tc-ray fuse"
        )


def model_name(export: Path) -> str:
    """Name of the served model: the run folder's, which is the run's name by default."""
    return (export.parent if export.name == "export" else export).name


def named_models(given: Sequence[str | Path]) -> dict[str, Path]:
    """Model name -> export folder, from `FOLDER` or `NAME=FOLDER` arguments.

    Raises ServingError for no folder at all, an incomplete one, an empty name and two models of one name.
    """
    if not given:
        raise ServingError("no run folder is given")
    models: dict[str, Path] = {}
    for argument in map(str, given):
        name, equals, folder = argument.partition("=")
        if not equals or "/" in name or Path(argument).is_dir():
            name, folder = "", argument
        elif not name.strip():
            raise ServingError(f"{argument}: NAME=FOLDER needs a name")
        export = find_export(folder)
        name = name.strip() or model_name(export)
        if name in models:
            raise ServingError(f"two models are called {name!r}: {models[name]} and {export}; name one by NAME=FOLDER")
        models[name] = export
    return models


def weight_bytes(export: Path) -> int:
    """Bytes that the weights of Pilot and Copilot take in memory, in fp32. Raises ServingError for a damaged file."""
    count = 0
    for path in [*(export / "pilot").glob("*.safetensors"), *(export / "copilot").glob("*.safetensors")]:
        count += sum(math.prod(shape) for shape in _shapes(path))
    return count * _FP32_BYTES


def _shapes(path: Path) -> list[list[int]]:
    """Shapes of the tensors in a safetensors file, whose header also says how long the file must be."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        header = file.read(length) if 0 < length <= min(size, _HEADER_LIMIT_BYTES) else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = [list(entry["shape"]) for entry in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ServingError(f"{path} is no safetensors file, or a damaged one") from error
    if size != 8 + length + end:
        raise ServingError(f"{path} is cut off or damaged: {size} bytes, {8 + length + end} expected")
    return shapes


def copilot_version(export: Path) -> str:
    """16 hex digits that change with the Copilot's config or weights and with fusion.json."""
    from tc_ray.models.hub import model_identity

    content = model_identity(export / "copilot").encode() + (export / "fusion.json").read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def pilot_version(export: Path) -> str:
    """16 hex digits that change with the Pilot's config or weights."""
    from tc_ray.models.hub import model_identity

    return model_identity(export / "pilot").partition("@")[2]


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DamagedFileError as error:
        raise ServingError(str(error)) from None
    except OSError as error:
        raise ServingError(f"{path} cannot be read: {first_line(error)}") from error


def _file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
