"""The HTTP application: OpenAI's routes over the engines of one replica. Plain FastAPI; the replica puts it into Ray Serve.

Invariant: a response is complete or ends with an error, and every refusal is OpenAI's error envelope.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import tc_ray
from tc_ray.config.serving import ServingSection
from tc_ray.serving.errors import RequestError, from_validation
from tc_ray.serving.http.accepted import INSTEAD
from tc_ray.serving.http.answers import LOG_OF_ZERO, ErrorEnvelope
from tc_ray.serving.http.gate import Gate
from tc_ray.serving.http.metrics import Metrics
from tc_ray.serving.http.routes import make_router
from tc_ray.serving.models.registry import ModelRegistry
from tc_ray.serving.page.route import router as page
from tc_ray.serving.wire import COPILOT_HEADER, SEED_HEADER

_DESCRIPTION = (
    "Fused Pilot and Copilot behind OpenAI's API. Unknown fields are refused, unknown query parameters are not read. "
    f"The log of 0 is {LOG_OF_ZERO}."
)
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(registry: ModelRegistry, limits: ServingSection, key_digests: Sequence[bytes] = ()) -> FastAPI:
    """The application over a model registry, which may change while it runs. Its end closes the engines.

    key_digests: of the API keys; without any, no key is needed. `app.state`: metrics, registry.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(served.engine.close) for served in registry))

    metrics = Metrics()
    app = FastAPI(
        title="tc-ray",
        version=tc_ray.__version__,
        description=_DESCRIPTION,
        # The documentation pages load scripts from elsewhere, and a redirect would go where the client's Host header says.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses={"default": {"model": ErrorEnvelope, "description": "Any error."}},
        # documented here, checked by Gate
        dependencies=[Depends(HTTPBearer(auto_error=False))] if key_digests else None,
    )
    app.state.metrics = metrics
    app.state.registry = registry
    app.add_middleware(Gate, registry=registry, limits=limits, key_digests=key_digests, metrics=metrics)
    if limits.cors_origins:  # outside the gate: a browser asks first without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[SEED_HEADER, COPILOT_HEADER, "Retry-After"],
        )
    for kind in (RequestError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    app.include_router(make_router(registry, limits, metrics))
    app.include_router(page)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Any error of the application or the framework in OpenAI's envelope."""
    headers: Mapping[str, str] = {}
    if isinstance(error, RequestValidationError):
        error = from_validation(error.errors(), INSTEAD)
    elif isinstance(error, HTTPException):
        headers, code = error.headers or {}, _CODES.get(error.status_code, "http_error")
        error = RequestError(f"{error.detail}.", status=error.status_code, code=code)
    elif not isinstance(error, RequestError):
        error = RequestError("The server failed.", status=500, code="internal_error")
    request.state.refused = error.code
    response = error.response()
    response.headers.update(headers)
    return response
