"""The web page at `/`: Pilot and fused answers side by side, from plain files of this package.

Invariant: each file has its own fixed route, so no path of a request reaches the disk; the page loads nothing from other
hosts. It holds no secret: it calls the API as any client does. It is not in the OpenAPI document.
"""

from __future__ import annotations

import mimetypes
from functools import partial
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def _send(_: Request, content: bytes, media_type: str | None) -> Response:
    return Response(content, headers=HEADERS, media_type=media_type)


router = APIRouter(include_in_schema=False)
"""GET / sends the page, GET /page/NAME each file it uses. The files are read once, here."""
for file in files(__package__).joinpath("static").iterdir():
    path = "/" if file.name == "index.html" else f"/page/{file.name}"
    sender = partial(_send, content=file.read_bytes(), media_type=mimetypes.guess_type(file.name)[0])
    router.add_route(path, sender, methods=["GET"])
