"""Start-up of the server: check the folder and the address, then put the app into Ray Serve.

Invariant: whatever can be known before Ray starts is checked before, and ends in one ServingError. Called by
`tc-ray serve`; the tests use `start_server` and stop it themselves.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.serving.auth import KEY_VARIABLE, configured_digest, require_key_for
from tc_ray.serving.errors import ServingError

if TYPE_CHECKING:
    from tc_ray.serving.app import ServedModel

APPLICATION = "tc-ray"
_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Name and namespace of Ray Serve's controller actor."""


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica needs to know; all of it can be pickled. threads None: one a CPU of the replica's machine."""

    export: str
    name: str
    key_digest: bytes | None = None
    max_tokens: int = 512
    max_queued: int = 32
    max_body_bytes: int = 2**20
    threads: int | None = None
    gpu: bool = False


def find_export(folder: Path | str) -> Path:
    """Absolute export folder of a run folder, or `folder` itself when it is one.

    Raises ServingError that names what is missing.
    """
    given = Path(folder).expanduser().absolute()
    if not given.is_dir():
        raise ServingError(f"{given} is no folder; give a run folder or an exported model")
    export = given / "export" if (given / "export").is_dir() else given
    if not any((export / part).exists() for part in ("fusion.json", "pilot", "copilot")):
        raise ServingError(f"{given} holds no exported model: the run has not ended, or it is no run folder")
    missing = [part for part in ("fusion.json", "pilot/config.json", "copilot/config.json") if not _file(export / part)]
    missing += [
        f"{part}/*.safetensors" for part in ("pilot", "copilot") if not list((export / part).glob("*.safetensors"))
    ]
    if not _file(export / "pilot/tokenizer_config.json"):
        missing.append("pilot/tokenizer_config.json")
    if missing:
        raise ServingError(f"{export} is incomplete: {', '.join(missing)} missing")
    _json(export / "fusion.json")
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
    return export


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ServingError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ServingError(f"{path} holds no JSON object")
    return content


def _file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def model_name(export: Path) -> str:
    """Name of the served model: the run folder's, which is the run's name by default."""
    return (export.parent if export.name == "export" else export).name


def check_port(host: str, port: int) -> None:
    """Raise ServingError when `port` of `host` cannot be listened on."""
    if not 0 < port < 65536:
        raise ServingError(f"port {port} is not between 1 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another port"
        ) from error


def load_served(settings: ReplicaSettings) -> ServedModel:
    """Load models and tokenizer of an export and start the engine."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from tc_ray.models.fusion import FusedModel
    from tc_ray.serving.app import ServedModel
    from tc_ray.serving.engine import Engine
    from tc_ray.serving.prompt import PromptEncoder

    disable_progress_bar()  # Serve copies a replica's output to the user's terminal
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    model = FusedModel.from_pretrained(settings.export, device="cuda" if settings.gpu else "cpu")
    pilot = Path(settings.export) / "pilot"
    # Two tokenizers: one belongs to the engine's thread, one to the requests.
    decoder, encoder = (AutoTokenizer.from_pretrained(pilot) for _ in range(2))
    return ServedModel(
        name=settings.name,
        engine=Engine(model, decoder, max_queued=settings.max_queued),
        encoder=PromptEncoder(encoder, model.vocab_size),
        default_lam=model.default_lam,
        max_tokens=settings.max_tokens,
        max_body_bytes=settings.max_body_bytes,
    )


def build_application(settings: ReplicaSettings) -> Any:
    """The Ray Serve application: one replica, which loads the export when it starts."""
    from ray import serve

    def build() -> Any:
        from tc_ray.serving.app import create_app

        return create_app(load_served(settings), settings.key_digest)

    # The engine's queue is the bound that clients meet (429); Serve lets enough requests through to reach it.
    @serve.deployment(
        name="FusedModel",
        num_replicas=1,
        max_ongoing_requests=2 * settings.max_queued + 32,
        max_queued_requests=256,
        max_constructor_retry_count=1,
        health_check_period_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.gpu else 0},
    )
    @serve.ingress(build)
    class FusedReplica:
        """A replica; Serve replaces it when the check fails."""

        def check_health(self) -> None:
            """Raise when the generation worker is dead or stalled."""
            reason = self.app.state.served.engine.unhealthy()  # type: ignore[attr-defined]
            if reason:
                raise RuntimeError(reason)

    return FusedReplica.bind()  # type: ignore[attr-defined]


@dataclass
class Server:
    """A running server."""

    url: str
    model: str
    settings: ReplicaSettings
    _started_ray: bool

    def stop(self) -> None:
        """Drain and end the application, and Ray if it was started for it."""
        import ray
        from ray import serve

        serve.shutdown()
        if self._started_ray:
            ray.shutdown()

    def example(self) -> str:
        """A curl command that works as it is."""
        key = f' \\\n  -H "Authorization: Bearer ${KEY_VARIABLE}"' if self.settings.key_digest else ""
        body = {"model": self.model, "messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0}
        return (
            f"curl {self.url}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' \\\n  -d "
            f"'{json.dumps(body)}'"
        )


def start_server(
    folder: Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    key_file: Path | str | None = None,
    max_tokens: int = 512,
    max_queued: int = 32,
    threads: int | None = None,
    gpu: bool = False,
) -> Server:
    """Serve an exported model and return once it answers.

    Uses the Ray this process is connected to, else joins RAY_ADDRESS, else starts a local one.
    Raises ServingError: folder missing or incomplete, port taken, open address without a key, cluster that serves
    already, or a model that does not load.
    """
    export = find_export(folder)
    key_digest = configured_digest(key_file)
    require_key_for(host, key_digest)
    check_port(host, port)
    if max_tokens < 1 or max_queued < 1:
        raise ServingError(f"max_tokens {max_tokens} and max_queued {max_queued} must be at least 1")
    settings = ReplicaSettings(
        export=str(export),
        name=model_name(export),
        key_digest=key_digest,
        max_tokens=max_tokens,
        max_queued=max_queued,
        threads=threads,
        gpu=gpu,
    )
    started_ray = _connect()
    try:
        _deploy(settings, host, port)
    except BaseException:
        if started_ray:
            import ray

            ray.shutdown()
        raise
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return Server(f"http://{shown}:{port}", settings.name, settings, started_ray)


def _connect() -> bool:
    """Connect to Ray; true when a local one was started for the server."""
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address)
        except ConnectionError as error:
            raise ServingError(f"RAY_ADDRESS {address} cannot be joined: {error}") from error
        return False
    ray.init(address="local", include_dashboard=False)
    return True


def _deploy(settings: ReplicaSettings, host: str, port: int) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    try:
        ray.get_actor(_CONTROLLER[0], namespace=_CONTROLLER[1])
    except ValueError:
        pass
    else:
        # Its HTTP address is fixed, and serve.run would take it over without a word.
        raise ServingError(
            "this Ray cluster runs Ray Serve already; end that with `serve shutdown`, or unset RAY_ADDRESS"
        )
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        serve.run(build_application(settings), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        reason = _deployment_failure() or str(error)
        serve.shutdown()
        raise ServingError(f"{settings.export} cannot be served: {reason}") from error
    except BaseException:
        serve.shutdown()
        raise


def _deployment_failure() -> str | None:
    """The last line of the traceback that Serve keeps of a replica which did not start."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return None
    lines = [line.strip() for state in application.deployments.values() for line in state.message.splitlines()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return errors[-1] if errors else None


def serve_run(folder: Path | str, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; prints the address and an example. `options` as in `start_server`.

    Must be called in the main thread, which is the one that receives signals.
    """
    server = start_server(folder, host, port, **options)
    ended = threading.Event()
    # Ray's own handler of SIGTERM aborts the process; ours lets the server drain. A second signal acts as before.
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(f"Serving {server.model} ({server.settings.export}) at {server.url}\n\n{server.example()}\n", flush=True)
        print("Ctrl-C ends it.", flush=True)
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.stop()
