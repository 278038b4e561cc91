"""Start and end of the server: check folders, address and keys, put the app into Ray Serve, drain it at the end.

Invariant: whatever can be known before Ray starts is checked before, and every failure is one ServingError. At the end,
requests in progress are finished before the proxy goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tc_ray.cluster.address import check_address
from tc_ray.config.serving import ServingSection
from tc_ray.export.check import check_tokenizer, weight_bytes
from tc_ray.serving.deploy.settings import ReplicaSettings, is_loopback
from tc_ray.serving.errors import ServingError
from tc_ray.serving.wire import FAILOVER_HEADER
from tc_ray.text import first_line, visible

APPLICATION = "tc-ray"
PROXY_CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Serve's proxy process calls the function of this name for its middlewares."""
FAILOVER_PROXY = "tc_ray.serving.failover.proxy.middlewares"
NICENESS_VARIABLE = "RAY_worker_niceness"
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0, read when ray is imported: Ray's own ports (gRPC, agents, metrics) listen on 127.0.0.1, as a server there has no other node."""
READY_VARIABLE = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
PROXY_READY_S = "60"
"""Serve tries three times for so long to reach its proxy. On a busy machine its own 5 s are too short: imports alone take more."""
RELOAD_SIGNAL = signal.SIGUSR1
_STOP_MARGIN_S = 15.0
"""For Serve to see that a replica has drained, on top of the time it has for that."""

Say = Callable[[str], None]


@dataclass
class Server:
    """A running server. url: where it is reached from this machine."""

    url: str
    settings: ReplicaSettings
    _started_ray: bool
    _reloads: int = 0

    def reload(self) -> None:
        """Have every replica read its Copilots' folders again and swap what has changed, in the background."""
        self._reloads += 1
        _run_application(self.settings, {"reload": self._reloads})

    def stop(self, drain_s: float | None = None) -> None:
        """Refuse new requests, let those in progress end, then end the application, and Ray if it was started for it.

        drain_s: how long to wait for them; None: as long as the settings say.
        """
        import ray
        from ray import serve

        wait_s = self.settings.serving.drain_time_s + _STOP_MARGIN_S if drain_s is None else drain_s
        # Serve's own shutdown ends the proxy first, and with it every stream: the application goes before.
        if wait_s > 0:
            serve.delete(APPLICATION, _blocking=False)
            until = time.monotonic() + wait_s
            while APPLICATION in serve.status().applications and time.monotonic() < until:
                time.sleep(0.1)
        serve.shutdown()
        if self._started_ray:
            ray.shutdown()


def check_port(host: str, port: int) -> None:
    """Raise ServingError where `port` of `host` cannot be listened on."""
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


def start_server(settings: ReplicaSettings, say: Say = lambda _: None) -> Server:
    """Serve exported models and return once they answer.

    Uses the Ray that this process is connected to, else joins RAY_ADDRESS, else starts a local one. say: shows progress.
    Raises ServingError: Copilot of another tokenizer, port taken, a cluster that serves already, a model that does not load.
    """
    serving = settings.serving
    check_port(serving.host, serving.port)
    local = _starts_ray()
    if local:
        threads = serving.threads or max(1, available_cpus() // serving.most_replicas)
        settings = replace(settings, serving=serving.model_copy(update={"threads": threads}))
    for export in settings.models.values():
        check_tokenizer(export)
    for name, export in settings.models.items():
        say(f"{name}: {export}, {weight_bytes(export) / 1e6:.0f} MB of weights")
    say("starting Ray" if local else "joining Ray")
    started_ray = _connect(settings.serving)
    host = serving.host
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    server = Server(f"http://{shown}:{serving.port}", settings, started_ray)
    try:
        _deploy(settings, say)
        if serving.failover:
            _warn_without_failover(server, say)
    except BaseException:
        if started_ray:
            import ray

            ray.shutdown()
        raise
    return server


def _starts_ray() -> bool:
    """Whether the server will have a Ray of its own on this machine."""
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return not connected and not os.environ.get("RAY_ADDRESS")


def available_cpus() -> int:
    """CPUs that this process may use: of those it is bound to, as many as the control group's quota makes up."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):
        return bound


def _connect(serving: ServingSection) -> bool:
    """Connect to Ray; true when a local one was started for the server."""
    if _starts_ray() and is_loopback(serving.host):
        os.environ.setdefault(CLUSTER_VARIABLE, "0")
    import ray

    if ray.is_initialized():
        return False
    variables = {PROXY_CALLBACK_VARIABLE: FAILOVER_PROXY} if serving.failover else {}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            check_address(address)
            ray.init(address=address, runtime_env={"env_vars": variables})
        except ConnectionError as error:
            raise ServingError(str(error)) from error
        return False
    os.environ.update(variables)
    # Ray starts its workers, Serve's proxy among them, with the priority of background work (niceness 15)
    os.environ.setdefault(NICENESS_VARIABLE, "0")
    os.environ.setdefault(READY_VARIABLE, PROXY_READY_S)
    cpus = max(available_cpus(), serving.most_replicas * (serving.threads or 1))
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _metrics_export_port=serving.metrics_port)
    except Exception as error:  # Ray raises a plain one when a busy machine takes too long
        raise ServingError(f"a local Ray could not be started: {first_line(error)}") from error
    return True


def _deploy(settings: ReplicaSettings, say: Say) -> None:
    import ray
    from ray import serve

    from tc_ray.serving.deploy.deployment import QUIET

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        pass
    else:
        # Its HTTP address is fixed, and serve.run would replace its application without asking.
        raise ServingError(
            "this Ray cluster runs Ray Serve already; end that with `serve shutdown`, or unset RAY_ADDRESS"
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    address = {"host": settings.serving.host, "port": settings.serving.port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=address, logging_config=QUIET)
        say("loading the models")
        _run_application(settings)
    except (RuntimeError, ray.exceptions.RayError) as error:
        reason = None
        with contextlib.suppress(Exception):  # Serve itself may be what died
            reason = _deployment_failure()
        with contextlib.suppress(Exception):
            serve.shutdown()
        raise ServingError(f"the server did not start: {reason or first_line(error)}") from error
    except BaseException:
        with contextlib.suppress(Exception):
            serve.shutdown()
        raise


def _run_application(settings: ReplicaSettings, user_config: dict[str, Any] | None = None) -> None:
    from ray import serve

    from tc_ray.serving.deploy.deployment import QUIET, build_application

    application = build_application(settings, user_config)
    serve.run(application, name=APPLICATION, route_prefix="/", logging_config=QUIET)


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
    return re.sub(r"^tc_ray\.[\w.]+: ", "", errors[-1]) if errors else None


def serve_until_stopped(settings: ReplicaSettings) -> None:
    """Serve until Ctrl-C or SIGTERM; RELOAD_SIGNAL swaps Copilots. Prints progress, then the address.

    Must be called in the main thread, which is the one that receives signals.
    """

    def say(line: str) -> None:
        print(visible(line), flush=True)

    server = start_server(settings, say)
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    # Ray's own handler of SIGTERM aborts the process; this one lets the server drain. A second signal acts as before.
    numbers = (signal.SIGINT, signal.SIGTERM, RELOAD_SIGNAL)
    before = {number: signal.signal(number, lambda got, _: signals.put(got)) for number in numbers}
    try:
        say(f"ready: {', '.join(settings.models)} at {server.url}")
        say(f"Ctrl-C ends it. `kill -USR1 {os.getpid()}` loads Copilots that have changed.")
        while signals.get() == RELOAD_SIGNAL:
            server.reload()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        say("finishing requests in progress; Ctrl-C again to cut them off")
        server.stop()
