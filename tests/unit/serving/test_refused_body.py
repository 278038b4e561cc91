"""What a refused body leaves behind: nothing, also before the garbage collector comes by."""

from __future__ import annotations

import asyncio
import gc
import weakref

from starlette.types import Message, Receive, Scope, Send

from tc_ray.config.serving import ServingSection
from tc_ray.serving.http.gate import Gate
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.models.registry import ModelRegistry


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("a refused body was passed on")


def test_a_refused_body_is_freed_at_once() -> None:
    """Refused bodies count as held no longer, so many of them must not wait for the collector together."""

    class Client:
        async def __call__(self) -> Message:
            return {"type": "http.request", "body": bytes(200), "more_body": False}

    async def send(message: Message) -> None:
        pass

    async def refuse() -> weakref.ref[Client]:
        client = Client()
        gate = Gate(app, ModelRegistry(), ServingSection(max_body_bytes=100), (), Metrics())
        await gate({"type": "http", "method": "POST", "path": "/", "headers": []}, client, send)
        return weakref.ref(client)

    gc.disable()
    try:
        assert asyncio.run(refuse())() is None
    finally:
        gc.enable()
