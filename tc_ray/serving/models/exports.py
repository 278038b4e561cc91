"""The export folders that a server is given: named, and checked before anything is loaded.

Invariant: importing this module loads neither torch nor transformers. `tc_ray.export.check` knows the folder; here are the
server's own conditions. Used by deploy/settings.py and swap.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tc_ray.export import check
from tc_ray.models.folder import PILOT
from tc_ray.serving.errors import ServingError


def find_export(folder: Path | str) -> Path:
    """Absolute export folder of a run folder, or `folder` itself if it is an export.

    Raises ServingError for no folder and for an encoder-decoder, ExportError as `tc_ray.export.check.find_export`.
    """
    if not Path(folder).expanduser().is_dir():
        raise ServingError(
            f"{folder} is no folder; give a run folder, an exported model, or a setting as serving.FIELD=VALUE"
        )
    export = check.find_export(folder)
    if check.read_part(export / PILOT / "config.json").get("is_encoder_decoder"):
        raise ServingError(
            f"{export} is an encoder-decoder; the server answers with decoder-only models. "
            "Use FusedModel.from_pretrained(folder).generate for it"
        )
    return export


def named_models(given: Sequence[str | Path]) -> dict[str, Path]:
    """Model name -> export folder, from `FOLDER` or `NAME=FOLDER` arguments. Without a name it is the run folder's.

    Raises ServingError for no folder at all, an empty name and two models of one name, and as `find_export`.
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
        name = name.strip() or (export.parent if export.name == "export" else export).name
        if name in models:
            raise ServingError(f"two models are called {name!r}: {models[name]} and {export}; name one by NAME=FOLDER")
        models[name] = export
    return models
