"""The board: figures of all replicas in one place, so that one scrape through the proxy shows every replica.

Each replica pins its own text to the board every few seconds and reads the others' when it is scraped. The board is a
small actor that the first replica makes and the next one makes again when it is gone. Invariant: a board that cannot be
reached costs a scrape the others' figures and nothing else. Used by replica.py within Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tc_ray.serving.http.metrics import merged

BOARD = "tc-ray-board"
NAMESPACE = "tc-ray"
PIN_S = 5.0
"""How often a replica pins its figures: so old may the others' be in a scrape."""
FORGET_S = 20.0
READ_TIMEOUT_S = 2.0
logger = logging.getLogger("tc_ray.serving")


class Board:
    """Replica -> its newest text. An actor; its methods do not wait for anything."""

    def __init__(self) -> None:
        self._pinned: dict[str, tuple[float, str]] = {}

    def pin(self, replica: str, text: str) -> None:
        """Put a replica's text in the place of its last."""
        self._pinned[replica] = (time.monotonic(), text)

    def read(self) -> dict[str, str]:
        """All texts but those of replicas that have not been heard of for FORGET_S."""
        oldest = time.monotonic() - FORGET_S
        self._pinned = {replica: pinned for replica, pinned in self._pinned.items() if pinned[0] > oldest}
        return {replica: text for replica, (_, text) in self._pinned.items()}


class Pins:
    """A replica's side of the board. replica: its name; text: makes its figures."""

    def __init__(self, replica: str, text: Callable[[], str]) -> None:
        self._replica, self._text = replica, text
        self._actor: Any = None

    async def run(self) -> None:
        """Pin the figures until cancelled."""
        from ray.exceptions import RayError

        while True:
            try:
                await asyncio.wait_for(self._board().pin.remote(self._replica, self._text()), READ_TIMEOUT_S)
            except (RayError, asyncio.TimeoutError, ValueError) as error:
                self._actor = None  # it ended with the replica that made it: make another
                logger.debug("the board cannot be reached: %s", error)
            await asyncio.sleep(PIN_S)

    async def others(self) -> list[str]:
        """The other replicas' texts, in the order of their names; empty when the board does not answer."""
        from ray.exceptions import RayError

        with contextlib.suppress(RayError, asyncio.TimeoutError, ValueError):
            texts = await asyncio.wait_for(self._board().read.remote(), READ_TIMEOUT_S)
            return [text for replica, text in sorted(texts.items()) if replica != self._replica]
        return []

    def _board(self) -> Any:
        if self._actor is None:
            import ray

            # Owned by this replica and not detached, so that no actor stays behind when the server has ended.
            options = {"name": BOARD, "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0}
            self._actor = ray.remote(Board).options(**options).remote()
        return self._actor


class AllFigures:
    """ASGI middleware: adds the other replicas' figures to what the app answers at /metrics, once it has let the asker in."""

    def __init__(self, app: ASGIApp, pins: Pins) -> None:
        self._app, self._pins = app, pins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with all figures."""
        if scope["type"] != "http" or scope["path"] != "/metrics":
            await self._app(scope, receive, send)
            return
        start: Message = {}
        body = bytearray()

        async def collect(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            else:
                body.extend(message.get("body", b""))

        await self._app(scope, receive, collect)
        if start["status"] == 200:
            body = bytearray(merged([body.decode("utf-8"), *await self._pins.others()]).encode("utf-8"))
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode("ascii"))]})
        await send({"type": "http.response.body", "body": bytes(body), "more_body": False})
