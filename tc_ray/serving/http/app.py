"""The HTTP application: OpenAI's routes over the engines of one replica. Plain FastAPI; the replica puts it into Ray Serve.

Invariant: a response is complete or ends with an error, and every refusal is OpenAI's error envelope. A request passes, from
the outside in: metrics, key, admission, body limit, route.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tc_ray.config.serving import ServingSection
from tc_ray.serving.errors import RequestError, from_validation
from tc_ray.serving.http.auth import BearerAuth
from tc_ray.serving.http.limits import Admission, BodyLimit
from tc_ray.serving.http.metrics import Metrics, Observed
from tc_ray.serving.http.openapi import document
from tc_ray.serving.http.routes import make_router
from tc_ray.serving.models.registry import ModelRegistry
from tc_ray.serving.page.route import router as page

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
    # No documentation pages: they load scripts from elsewhere. /openapi.json stays. No redirects: they would go where the
    # client's Host header says.
    app = FastAPI(title="tc-ray", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.metrics = metrics
    app.state.registry = registry
    # The one added last is outermost: the key is checked before its limit, and the limits before the body is read.
    app.add_middleware(BodyLimit, limit_bytes=limits.max_body_bytes)
    app.add_middleware(Admission, registry=registry, max_key_requests=limits.max_key_requests)
    if key_digests:
        app.add_middleware(BearerAuth, key_digests=key_digests)
    app.add_middleware(Observed, metrics=metrics)
    for kind in (RequestError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    app.include_router(make_router(registry, limits, metrics))
    app.include_router(page)
    app.openapi = lambda: document(app, registry, limits, keys=bool(key_digests))  # type: ignore[method-assign]
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Any error of the application or the framework in OpenAI's envelope."""
    headers: Mapping[str, str] = {}
    if isinstance(error, RequestValidationError):
        error = from_validation(error.errors())
    elif isinstance(error, HTTPException):
        headers, code = error.headers or {}, _CODES.get(error.status_code, "http_error")
        error = RequestError(f"{error.detail}.", status=error.status_code, code=code)
    elif not isinstance(error, RequestError):
        error = RequestError("The server failed.", status=500, code="internal_error")
    request.state.refused = error.code
    response = error.response()
    response.headers.update(headers)
    return response
