"""Replicas and a client of the failover proxy, without Ray: ASGI apps that stream, answer, die or hang."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tc_ray.serving.failover.proxy import FailoverProxy

App = Callable[[Scope, Receive, Send], Awaitable[None]]
STREAMED = b'{"stream": true}'
DONE = b"data: [DONE]\n\n"


def event(index: int, text: str) -> bytes:
    chunk = {"id": "cmpl-1", "created": 7, "choices": [{"index": index, "text": text}]}
    return f"data: {json.dumps(chunk)}\n\n".encode()


class Client:
    """Sends one request through the failover proxy and keeps what came back."""

    def __init__(
        self, app: App, *, body: bytes = b"{}", headers: list[tuple[bytes, bytes]] | None = None, method: str = "POST"
    ) -> None:
        self.messages: list[Message] = []
        self.gone = asyncio.Event()
        self._body: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {"type": "http", "method": method, "path": "/v1/completions", "headers": headers or []}
        asyncio.run(self._run(FailoverProxy(app), scope))

    async def _run(self, proxy: FailoverProxy, scope: Scope) -> None:
        async def receive() -> Message:
            if self._body:
                return self._body.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.messages.append(message)

        await asyncio.wait_for(proxy(scope, receive, send), 10)

    @property
    def status(self) -> int:
        starts = [message for message in self.messages if message["type"] == "http.response.start"]
        assert len(starts) == 1, "a response has one head"
        return int(starts[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def text(self) -> bytes:
        """The body, which must have been ended."""
        bodies = self.messages[1:]
        assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]
        return b"".join(message.get("body", b"") for message in bodies)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.text)["error"]
        return error


class Replicas:
    """An ASGI app whose n-th call behaves as the n-th replica given; keeps the headers each was called with."""

    def __init__(self, *replicas: App) -> None:
        self._replicas = list(replicas)
        self.bodies: tuple[bytes, ...] = (b"{}", STREAMED)
        self.asked: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(dict(scope["headers"]))
        message = await receive()
        assert message["type"] == "http.request" and message["body"] in self.bodies
        await self._replicas[len(self.asked) - 1](scope, receive, send)


def streams(*events: bytes, copilot: bytes = b"v1") -> App:
    """A replica that sends these events and ends, as it would be cut off where `DONE` is not among them."""

    async def replica(_: Scope, __: Receive, send: Send) -> None:
        kind = (b"content-type", b"text/event-stream; charset=utf-8")
        head = [kind, (b"x-tc-ray-seed", b"42"), (b"x-tc-ray-copilot", copilot)]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for one in events:
            await send({"type": "http.response.body", "body": one, "more_body": True})
        if DONE in events:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return replica


def answers(status: int, body: bytes, kind: bytes = b"application/json", **headers: bytes) -> App:
    async def replica(_: Scope, __: Receive, send: Send) -> None:
        head = [(b"content-type", kind), *((name.encode().replace(b"_", b"-"), v) for name, v in headers.items())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return replica


async def dies(_: Scope, __: Receive, ___: Send) -> None:
    """A replica that ends before it answers."""


async def dies_in_its_answer(_: Scope, __: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
