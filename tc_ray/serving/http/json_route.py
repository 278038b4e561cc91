"""How JSON bodies are read: by a strict parser, before FastAPI validates them.

Invariant: bodies are parsed here and nowhere else. NaN, lone surrogates, deep nesting and long numbers are refused by
pydantic's parser; bodies of very many parts before it. Used by routes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from tc_ray.serving.errors import RequestError

MAX_CONTAINERS = 4096
MAX_NAMES = 8192
"""Lists and objects, and names in objects, of one body. Parsing a megabyte of `[5],` would take a second."""


class JsonRequest(Request):
    """A request whose body is parsed by pydantic's own parser, which bounds depth and numbers."""

    async def parse(self) -> None:
        """Read and parse the body. Raises RequestError 400."""
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(
                "The body must be a JSON object, sent with Content-Type: application/json.", code="invalid_content_type"
            )
        raw = await self.body()
        check_size(raw)
        try:
            self._parsed = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise RequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None

    async def json(self) -> Any:
        """The parsed body; FastAPI validates it."""
        return self._parsed


class JsonRoute(APIRoute):
    """A route that takes a JSON body. It refuses query parameters that its function does not declare."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Parse the body before FastAPI validates it."""
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def parsed(request: Request) -> Response:
            for name in request.query_params:
                if name not in known:
                    raise RequestError(
                        f"Query parameter `{name}` is not supported by this route.",
                        param=name,
                        code="unsupported_field",
                    )
            json_request = JsonRequest(request.scope, request.receive)
            await json_request.parse()
            return await handle(json_request)

        return parsed


def check_size(raw: bytes) -> None:
    """Raise RequestError for a body with more lists, objects or names than any valid request has."""
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b":") > MAX_NAMES:
        # Do not count inside strings: these are every second piece between unescaped quotes.
        bare = b"".join(raw.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
        if bare.count(b"[") + bare.count(b"{") > MAX_CONTAINERS or bare.count(b":") > MAX_NAMES:
            raise RequestError(
                f"The body has more than {MAX_CONTAINERS} lists and objects, or more than {MAX_NAMES} names in them.",
                code="invalid_body",
            )
