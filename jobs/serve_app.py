"""Application builder of `cluster/rayservice.yaml`: `import_path: serve_app:build` with args {folder: RUN_FOLDER}.

A service of a cluster can be reached from elsewhere, so it starts only with an API key (TC_RAY_API_KEY).
"""

from __future__ import annotations

from typing import Any

from tc_ray.serving.auth import configured_digest, require_key_for
from tc_ray.serving.launch import ReplicaSettings, build_application, find_export, model_name


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application for a run folder.

    Args:
        args: `folder` (a run folder or an exported model) and any field of ReplicaSettings.

    Raises:
        ServingError: no exported model in the folder, or no API key.
    """
    options = dict(args)
    export = find_export(options.pop("folder"))
    key_digest = configured_digest()
    require_key_for("0.0.0.0", key_digest)
    settings = ReplicaSettings(export=str(export), name=model_name(export), key_digest=key_digest, **options)
    return build_application(settings)
