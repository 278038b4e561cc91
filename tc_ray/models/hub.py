"""Where a model comes from: a local folder, a hub id, or a builtin name that the package registry serves.

Called by the driver before any worker starts, by the workers (who then find a builtin folder made) and by the export.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tc_ray.models.builtin import BUILTIN_MODELS, builtin_folder
from tc_ray.models.identity import ModelSourceError, tensor_shapes

_EMBEDDINGS = ("embed_tokens.weight", "shared.weight")


def resolve_model(name: str, cache: Path | None = None) -> Path | str:
    """What `from_pretrained` can read for `name`.

    A local model folder gives its absolute path. A builtin name gives its folder in `cache` (default `default_cache()`), made
    on the first call (93 MB are downloaded, 540 MB written). Any other `model` or `owner/model` is a hub id, returned as it is.
    Raises ModelSourceError for a folder that is absent or holds no config.json, and if a builtin cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and name not in BUILTIN_MODELS:
        if not (folder / "config.json").is_file():
            raise ModelSourceError(f"model folder {folder.absolute()} has no config.json: it holds no saved model")
        return folder.absolute()
    if name in BUILTIN_MODELS:
        return builtin_folder(name, cache)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelSourceError(
            f"model folder {folder.absolute()} does not exist; give a model folder, a hub id (owner/model), "
            f"or one of: {', '.join(BUILTIN_MODELS)}"
        )
    return name


def embedding_rows(path: Path | str, config: Any) -> int:
    """Tokens that the model embeds: `vocab_size` of its config, or the rows of a smaller embedding in its weights.

    For a hub id only the config is read: its weights may not be downloaded yet.
    """
    rows = [int(config.vocab_size)]
    for weights in sorted(Path(path).glob("*.safetensors")):
        # a file that cannot be read is refused where it is loaded, with its own message
        with contextlib.suppress(ModelSourceError, OSError):
            rows += [shape[0] for name, shape in tensor_shapes(weights).items() if name.endswith(_EMBEDDINGS)]
    return min(rows)
