"""Start-up of the server: check folders, address, keys and memory, then put the app into Ray Serve; and its end.

Invariant: whatever can be known before Ray starts is checked before, and every failure ends in one ServingError. At the
end, what is under way is finished before the proxy goes. Called by `tc-ray serve`; the tests use `start_server` and stop
it themselves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tc_ray.serving.deploy.memory import available_cpus, available_memory_bytes, check_memory
from tc_ray.serving.deploy.options import build_settings
from tc_ray.serving.errors import ServingError
from tc_ray.serving.headers import FAILOVER_HEADER
from tc_ray.serving.http.auth import KEY_VARIABLE, configured_digests, require_key_for
from tc_ray.serving.models.exports import check_tokenizer, named_models, weight_bytes
from tc_ray.serving.settings import ReplicaSettings, Scale
from tc_ray.text import first_line, visible

APPLICATION = "tc-ray"
_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Name and namespace of Ray Serve's controller actor."""
PROXY_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Serve's proxy process calls the function of this name for its middlewares."""
FAILOVER_PROXY = "tc_ray.serving.failover.proxy.middlewares"
NICENESS_VARIABLE = "RAY_worker_niceness"
_STILL_LOADING_S = 10.0
_STOP_MARGIN_S = 15.0
"""For Serve to see that a replica has drained, on top of the time it has for that."""

Say = Callable[[str], None]


@dataclass
class Server:
    """A running server. url: where it is reached from this machine."""

    url: str
    settings: ReplicaSettings
    _started_ray: bool

    @property
    def models(self) -> list[str]:
        """Names of its models."""
        return [model.name for model in self.settings.models]

    def stop(self, drain_s: float | None = None) -> None:
        """Refuse new requests, let those under way end, then end the application, and Ray if it was started for it.

        drain_s: how long to wait for them; None: as long as the settings say.
        """
        import ray
        from ray import serve

        wait_s = self.settings.drain_s + _STOP_MARGIN_S if drain_s is None else drain_s
        # Serve's own shutdown ends the proxy first, and with it every stream: the application goes before.
        if wait_s > 0:
            serve.delete(APPLICATION, _blocking=False)
            until = time.monotonic() + wait_s
            while APPLICATION in serve.status().applications and time.monotonic() < until:
                time.sleep(0.1)
        serve.shutdown()
        if self._started_ray:
            ray.shutdown()

    def example(self) -> str:
        """A curl command that works as it is."""
        key = f' \\\n  -H "Authorization: Bearer ${KEY_VARIABLE}"' if self.settings.key_digests else ""
        question = {"role": "user", "content": "What is 12 + 30?"}
        body = {"model": self.models[0], "messages": [question], "temperature": 0}
        return (
            f"curl {self.url}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' \\\n  -d "
            f"'{json.dumps(body)}'"
        )


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


def start_server(
    folders: Sequence[Path | str],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    key_file: Path | str | None = None,
    allow_open: bool = False,
    say: Say = lambda _: None,
    **options: Any,
) -> Server:
    """Serve exported models and return once they answer.

    Uses the Ray this process is connected to, else joins RAY_ADDRESS, else starts a local one.

    Args:
        folders: run folders or exports, or NAME=FOLDER. key_file: see `configured_digests`. allow_open: listen where
            others can reach it, without a key. say: is told of progress. options: see `options.OPTIONS`.

    Raises:
        ServingError: folder missing or incomplete, Copilot of another tokenizer, an option that cannot be, port taken, too
            little memory, open address without a key, cluster that serves already, or a model that does not load.
    """
    models = named_models(folders)
    key_digests = configured_digests(key_file)
    require_key_for(host, key_digests, allow_open)
    check_port(host, port)
    settings, scale = build_settings(models, key_digests, options)
    here = _runs_here()
    if here:
        check_memory(models, settings.engine, scale.max_replicas, available_memory_bytes())
        if settings.threads is None:
            settings = replace(settings, threads=max(1, available_cpus() // scale.max_replicas))
    for model in models:
        check_tokenizer(Path(model.export))
    for model in models:
        say(f"{model.name}: {model.export}, {weight_bytes(Path(model.export)) / 1e6:.0f} MB of weights")
    say("starting Ray" if here else "joining Ray")
    started_ray = _connect(settings, scale)
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    server = Server(f"http://{shown}:{port}", settings, started_ray)
    try:
        _deploy(settings, scale, host, port, say)
        _warn_without_failover(server, say)
    except BaseException:
        if started_ray:
            import ray

            ray.shutdown()
        raise
    return server


def _runs_here() -> bool:
    """Whether the server will have a Ray of its own on this machine."""
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return not connected and not os.environ.get("RAY_ADDRESS")


def _connect(settings: ReplicaSettings, scale: Scale) -> bool:
    """Connect to Ray; true when a local one was started for the server."""
    import ray

    if ray.is_initialized():
        return False
    variables = {PROXY_CALLBACK_VARIABLE: FAILOVER_PROXY}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": variables})
        except ConnectionError as error:
            raise ServingError(f"RAY_ADDRESS {address} cannot be joined: {error}") from error
        return False
    os.environ.update(variables)
    # Ray gives its workers the priority of background work (15), Serve's proxy too: what answers clients came last
    os.environ.setdefault(NICENESS_VARIABLE, "0")
    cpus = max(available_cpus(), scale.max_replicas * (settings.threads or 1))
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    except Exception as error:  # Ray raises a plain one when a busy machine takes too long
        raise ServingError(f"a local Ray could not be started: {first_line(error)}") from error
    return True


def _deploy(settings: ReplicaSettings, scale: Scale, host: str, port: int, say: Say) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from tc_ray.serving.deploy.deployment import build_application

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
        with _still_loading(say):
            serve.run(build_application(settings, scale), name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        reason = _deployment_failure() or str(error)
        serve.shutdown()
        raise ServingError(f"the server did not start: {reason}") from error
    except BaseException:
        serve.shutdown()
        raise


@contextlib.contextmanager
def _still_loading(say: Say) -> Iterator[None]:
    """Say that models are loading, and again now and then."""
    ended, begun = threading.Event(), time.monotonic()

    def run() -> None:
        while not ended.wait(_STILL_LOADING_S):
            say(f"still loading, {time.monotonic() - begun:.0f} s")

    say("loading the models")
    threading.Thread(target=run, name="loading-progress", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _warn_without_failover(server: Server, say: Say) -> None:
    """Warn where Serve's proxy lacks the failover proxy, as in a Ray that others started without its variable."""
    import httpx

    with contextlib.suppress(httpx.HTTPError):
        if FAILOVER_HEADER not in httpx.get(f"{server.url}/health", timeout=30).headers:
            say(
                "warning: Ray was started without the failover proxy, so a stream whose replica dies is cut; set "
                f"{PROXY_CALLBACK_VARIABLE}={FAILOVER_PROXY} where Ray is started"
            )


def _deployment_failure() -> str | None:
    """The last line of the traceback that Serve keeps of a replica which did not start."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return None
    lines = [line.strip() for state in application.deployments.values() for line in state.message.splitlines()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return errors[-1].removeprefix(f"{ServingError.__module__}.{ServingError.__name__}: ") if errors else None


def serve_run(folders: Sequence[Path | str], host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; prints progress, then the address and an example. `options` as in `start_server`.

    Must be called in the main thread, which is the one that receives signals.
    """
    server = start_server(folders, host, port, say=lambda line: print(visible(line), flush=True), **options)
    ended = threading.Event()
    # Ray's own handler of SIGTERM aborts the process; ours lets the server drain. A second signal acts as before.
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(visible(f"ready: {', '.join(server.models)} at {server.url}\n\n{server.example()}\n"), flush=True)
        print("Ctrl-C ends it.", flush=True)
        ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        print("finishing what is under way; Ctrl-C again to cut it off", flush=True)
        server.stop()
