"""`tc-ray serve`: answer over HTTP with the exported models of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs that have ended, or exported models; NAME=FOLDER names one.", metavar="RUN..."
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own it needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    key_file: Annotated[Path | None, typer.Option(help="File with the API keys clients may send, one a line.")] = None,
    allow_open: Annotated[
        bool, typer.Option("--allow-open", help="Listen where others can reach it, without a key.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="Replicas; default: 1.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Least replicas, with --max-replicas.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas: their number follows the requests under way.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="torch threads, and CPUs, a replica; default: its share of this machine's CPUs, 1 on a cluster."
        ),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Put the models on a GPU, one a replica.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of a request; default: 512.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt; default: what the model has positions for.")
    ] = None,
    max_choices: Annotated[
        int | None, typer.Option(help="Most choices (n, times prompts) of a request; default: 8.")
    ] = None,
    max_key_requests: Annotated[
        int | None, typer.Option(help="Requests of one key under way in a replica; default: 128.")
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Longest request body; default: 1048576.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences in a model's batch; default: 64.")] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Sequences that may wait; more are answered with 429; default: 64.")
    ] = None,
    cache_mb: Annotated[int | None, typer.Option(help="Memory for a model's caches, MiB; default: 2048.")] = None,
    prefix_bytes: Annotated[
        int | None, typer.Option(help="Memory for prompts that later ones may begin with, a model; default: 256 MiB.")
    ] = None,
    prefill_tokens: Annotated[
        int | None, typer.Option(help="Most prompt tokens computed between two steps of the batch; default: 512.")
    ] = None,
    request_timeout_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A request that takes longer fails; default: 600.")
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="Time for requests under way at the end; default: 30 over the timeout.")
    ] = None,
    watch_s: Annotated[
        float | None, typer.Option(help="How often to look for newer Copilots, 0: never; default: 10.")
    ] = None,
) -> None:
    """Serve exported runs as an OpenAI-compatible endpoint, until Ctrl-C. A Copilot that is exported anew is taken up."""
    from tc_ray.serving.deploy.launch import serve_run

    serve_run(
        runs,
        host,
        port,
        key_file=key_file,
        allow_open=allow_open,
        replicas=replicas,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        threads=threads,
        gpu=gpu,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_choices=max_choices,
        max_key_requests=max_key_requests,
        max_body_bytes=max_body_bytes,
        max_running=max_running,
        max_waiting=max_waiting,
        cache_mb=cache_mb,
        prefix_bytes=prefix_bytes,
        prefill_tokens=prefill_tokens,
        request_timeout_s=request_timeout_s,
        drain_s=drain_s,
        watch_s=watch_s,
    )
