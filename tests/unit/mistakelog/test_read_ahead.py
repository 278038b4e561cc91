"""Reading ahead: order, bounds, errors where they belong, and threads that end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tc_ray.mistakelog.read.read_ahead import read_ahead


def threads() -> int:
    return sum(thread.name == "mistake-log-read" for thread in threading.enumerate())


class Source:
    """Counts what was asked of it."""

    def __init__(self, name: int, items: int, error: Exception | None = None, seconds: float = 0.0) -> None:
        self.name, self.items, self.error, self.seconds = name, items, error, seconds
        self.begun = False
        self.made = 0

    def __call__(self) -> Iterator[tuple[int, int]]:
        self.begun = True
        for at in range(self.items):
            time.sleep(self.seconds)
            self.made += 1
            yield self.name, at
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("depth", [1, 4])
def test_items_come_in_order(ahead: int, depth: int) -> None:
    # the first is the slowest: later ones are ready before it
    sources = [Source(name, items=5 - name, seconds=0.005 * (4 - name)) for name in range(5)]
    found = [list(items) for items in read_ahead(sources, ahead=ahead, depth=depth)]
    assert found == [[(name, at) for at in range(5 - name)] for name in range(5)]
    assert threads() == 0


def test_what_waits_is_bounded() -> None:
    sources = [Source(name, items=50) for name in range(6)]
    coming = read_ahead(sources, ahead=2, depth=3)
    items = next(coming)
    assert [next(items) for _ in range(5)] == [(0, at) for at in range(5)]
    time.sleep(0.2)
    # three wait, and one more is in the hand of the thread
    assert [source.made for source in sources] == [9, 4, 4, 0, 0, 0]
    assert [source.begun for source in sources] == [True] * 3 + [False] * 3
    coming.close()
    assert threads() == 0
    assert sum(source.made for source in sources) <= 9 + 4 + 4


def test_an_error_comes_after_the_items_before_it_and_ends_its_source_only() -> None:
    sources = [Source(0, 2), Source(1, 2, ValueError("broken")), Source(2, 2)]
    found: list[object] = []
    for items in read_ahead(sources, ahead=1, depth=1):
        try:
            found.extend(items)
        except ValueError as error:
            found.append(str(error))
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), "broken", (2, 0), (2, 1)]


def test_a_source_that_is_not_used_up_is_stopped() -> None:
    sources = [Source(name, items=1000) for name in range(3)]
    assert [next(items) for items in read_ahead(sources, ahead=1, depth=2)] == [(0, 0), (1, 0), (2, 0)]
    assert threads() == 0 and all(source.made < 10 for source in sources)


def test_an_unclosed_reader_does_not_keep_the_process() -> None:
    code = """
import itertools
from tc_ray.mistakelog.read.read_ahead import read_ahead
coming = read_ahead([itertools.count] * 3, ahead=1, depth=1)
print(next(next(coming)), flush=True)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (7, "0\n")
