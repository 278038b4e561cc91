"""`tc-ray serve`: answer over HTTP with the exported models of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs that have ended, or exported models; NAME=FOLDER names one. Then settings, such as "
            "serving.max_tokens=256 (docs/config.md).",
            metavar="RUN... [serving.FIELD=VALUE]...",
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML file whose `serving` section counts instead of that of the run's recipe.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (serving.host); one that others can reach needs a key.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (serving.port).")] = None,
) -> None:
    """Serve exported runs as an OpenAI-compatible endpoint, until Ctrl-C. SIGUSR1 loads Copilots that have changed."""
    from tc_ray.serving.deploy.launch import serve_until_stopped
    from tc_ray.serving.deploy.settings import command_settings

    address = {"host": host, "port": port}
    overrides = [f"serving.{name}={value}" for name, value in address.items() if value is not None]
    serve_until_stopped(command_settings([*arguments, *overrides], config))
