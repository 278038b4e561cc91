"""A server that does nothing but refuse: how fast any server could, with this HTTP stack, on this machine.

Run as a module: the port.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

BODY = b'{"error": {"code": "queue_full"}}'


async def refuse(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """429 to whatever comes, without a look at it."""
    if scope["type"] != "http":
        return
    await receive()
    headers = [(b"retry-after", b"1"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


if __name__ == "__main__":
    uvicorn.run(refuse, port=int(sys.argv[1]), lifespan="off", log_level="warning", access_log=False)
