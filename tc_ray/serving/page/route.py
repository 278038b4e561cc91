"""The web page at `/`: Pilot and fused answers side by side, from plain files of this package.

Invariant: each file has its own fixed route, so no path of a request reaches the disk; the page loads nothing from other
hosts. It holds no secret: it calls the API as any client does. Included by app.py; it is not in the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "tip.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def _sender(content: bytes, media_type: str) -> Callable[[], Response]:
    return lambda: Response(content, headers={**HEADERS, "Content-Type": media_type})


router = APIRouter(include_in_schema=False)
"""GET / sends the page, GET /page/NAME each file it uses. The files are read once, here."""
for name, media_type in MEDIA_TYPES.items():
    content = files(__package__).joinpath("static", name).read_bytes()
    path = "/" if name == "index.html" else f"/page/{name}"
    router.add_api_route(path, _sender(content, media_type), methods=["GET"])
