"""`tc-ray serve`: answer over HTTP with the exported model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run that has ended, or an exported model.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own it needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    key_file: Annotated[Path | None, typer.Option(help="File that holds the API key clients must send.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens a request may ask for.")] = 512,
    max_queued: Annotated[int, typer.Option(help="Requests that may wait; more are answered with 429.")] = 32,
    threads: Annotated[int | None, typer.Option(help="torch threads; default: one a CPU.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Put the models on a GPU.")] = False,
) -> None:
    """Serve POST /v1/completions and /v1/chat/completions, GET /v1/models and /health, until Ctrl-C."""
    from tc_ray.serving.launch import serve_run

    serve_run(
        run_folder,
        host,
        port,
        key_file=key_file,
        max_tokens=max_tokens,
        max_queued=max_queued,
        threads=threads,
        gpu=gpu,
    )
