"""Application builder for Serve config files: `import_path: serve_app:build`, as in `cluster/serve.yaml`.

A service of a cluster can be reached from elsewhere, so it starts only with an API key (TC_RAY_API_KEY, or `key_file`),
or with `allow_open: true`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_ray.serving.deploy.deployment import build_application
from tc_ray.serving.deploy.options import build_settings
from tc_ray.serving.errors import ServingError
from tc_ray.serving.http.auth import configured_digests, require_key_for
from tc_ray.serving.models.exports import check_tokenizer, named_models


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application for exported runs.

    Args:
        args: `runs`, a list of run folders, exports or NAME=FOLDER; `key_file`; `allow_open`; and the options of
            `tc-ray serve` with underscores (tc_ray/serving/deploy/options.py). Any other is refused by name.

    Raises:
        ServingError: no exported model in a folder, an argument that cannot be, or no API key.
    """
    options = dict(args)
    runs, key_file, allow_open = (
        options.pop("runs", None),
        options.pop("key_file", None),
        options.pop("allow_open", False),
    )
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        raise ServingError("args.runs must be a list of run folders")
    if not isinstance(allow_open, bool):
        raise ServingError(f"args.allow_open must be true or false, not {allow_open!r}")
    models = named_models(runs)
    key_digests = configured_digests(key_file)
    require_key_for("0.0.0.0", key_digests, allow_open)
    settings, scale = build_settings(models, key_digests, options)
    for model in models:
        check_tokenizer(Path(model.export))
    return build_application(settings, scale)
