"""Many streaming clients in one process of their own: what each request got, when, and how it ended.

Run as a module: URL of the server, a JSON file of request bodies, number of clients, seconds, seconds in which the clients come one
after the other. Each client sends one request
after the other until the time is over, in an order of its own, and prints one JSON line for each when all have ended. A
refused client waits a part of what Retry-After says. Plain sockets, so that the measurement costs less than what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """One request. case: index of its body. end: `[DONE]`, an error's code, or `cut`. Times in seconds from its start."""

    case: int
    status: int = 0
    end: str = "cut"
    text: str = ""
    at_s: float = 0.0
    """When it began, from the start of the load."""
    head_s: float = 0.0
    first_s: float = 0.0
    total_s: float = 0.0
    chunks: int = 0
    headers: dict[str, str] = field(default_factory=dict)


async def ask(host: str, port: int, body: dict[str, Any], outcome: Outcome) -> None:
    """Send one request on a connection of its own and read its answer."""
    content = json.dumps(body).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        outcome.status = int((await reader.readline()).split()[1])
        while line := (await reader.readline()).decode("latin-1").strip():
            name, _, value = line.partition(":")
            outcome.headers[name.lower()] = value.strip()
        outcome.head_s = time.perf_counter() - began
        if outcome.status != 200:
            outcome.end = (
                json.loads((await reader.read()).split(b"\r\n")[0] or b"{}").get("error", {}).get("code", "none")
            )
            return
        while line := (await reader.readline()).decode():
            if not line.startswith("data: "):
                continue  # blank lines and the sizes of HTTP's chunks
            if line == "data: [DONE]\n":
                outcome.end = "[DONE]"
                continue
            event = json.loads(line[6:])
            if "error" in event:
                outcome.end = event["error"]["code"]
                continue
            outcome.text += event["choices"][0]["text"]
            outcome.chunks += 1
            outcome.first_s = outcome.first_s or time.perf_counter() - began
    finally:
        outcome.total_s = time.perf_counter() - began
        writer.close()


async def load(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float, coming_s: float) -> list[Outcome]:
    """So many clients for so long, which come within `coming_s`; all requests begun are ended."""
    address = urlsplit(url)
    assert address.hostname and address.port
    host, port = address.hostname, address.port
    began = time.perf_counter()
    outcomes: list[Outcome] = []

    async def client(number: int) -> None:
        dice = random.Random(number)
        await asyncio.sleep(coming_s * number / clients)
        while time.perf_counter() - began < seconds:
            outcome = Outcome(dice.randrange(len(bodies)), at_s=time.perf_counter() - began)
            outcomes.append(outcome)
            try:
                await ask(host, port, {**bodies[outcome.case], "stream": True}, outcome)
            except OSError as error:
                outcome.end = f"cut: {type(error).__name__}"
            if outcome.status == 429:
                await asyncio.sleep(float(outcome.headers.get("retry-after", 1)) * dice.uniform(0.5, 1.0))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcomes


def start_load(url: str, bodies: Path, clients: int, seconds: float, coming_s: float = 0.0) -> subprocess.Popen[str]:
    """Begin a load in a process of its own."""
    numbers = [str(clients), str(seconds), str(coming_s)]
    command = [sys.executable, "-m", "tests.support.serving_load", url, str(bodies), *numbers]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def outcomes_of(process: subprocess.Popen[str], timeout_s: float) -> list[Outcome]:
    """What a load gave when it has ended."""
    printed, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0
    return [Outcome(**json.loads(line)) for line in printed.splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("coming_s", type=float)
    given = parser.parse_args()
    gc.disable()  # its pauses would be taken for the server's
    results = asyncio.run(
        load(given.url, json.loads(given.bodies.read_text()), given.clients, given.seconds, given.coming_s)
    )
    for one in results:
        print(json.dumps(asdict(one)))
