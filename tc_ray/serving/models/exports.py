"""The export folders that a server is given: named, and checked before anything is loaded.

Invariant: every problem is one ServingError that names folder and part; importing this module loads neither torch nor
transformers. `tc_ray.export.check` knows the folder; here are the server's own conditions. Used by `deploy`, `loading` and `swap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tc_ray.export import check
from tc_ray.models.folder import PILOT
from tc_ray.serving.errors import ServingError


def find_export(folder: Path | str) -> Path:
    """Absolute export folder of a run folder, or `folder` itself if it is an export. Raises ServingError."""
    if not Path(folder).expanduser().is_dir():
        raise ServingError(
            f"{folder} is no folder; give a run folder, an exported model, or a setting as serving.FIELD=VALUE"
        )
    with _as_serving_error():
        export = check.find_export(folder)
    check_config(export)
    return export


def check_config(export: Path) -> None:
    """Raise ServingError if the configs of the export cannot be read or do not fit, or if it is an encoder-decoder."""
    with _as_serving_error():
        check.check_configs(export)
        encoder_decoder = check.read_part(export / PILOT / "config.json").get("is_encoder_decoder")
    if encoder_decoder:
        raise ServingError(
            f"{export} is an encoder-decoder; the server answers with decoder-only models. "
            "Use FusedModel.from_pretrained(folder).generate for it"
        )


def check_tokenizer(export: Path, own: str | None = None) -> None:
    """`export.check.check_tokenizer`. Raises ServingError."""
    with _as_serving_error():
        check.check_tokenizer(export, own)


def weight_bytes(export: Path) -> int:
    """`export.check.weight_bytes`. Raises ServingError."""
    with _as_serving_error():
        return check.weight_bytes(export)


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


@contextmanager
def _as_serving_error() -> Iterator[None]:
    try:
        yield
    except check.ExportError as error:
        raise ServingError(str(error)) from None
