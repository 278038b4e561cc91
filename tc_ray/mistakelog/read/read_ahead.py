"""Reads sources ahead of their consumer: a thread and a bounded queue for each, order kept.

Invariant: items come source by source, and in order within a source. At most `depth` items of a source wait, and at most `ahead`
sources besides the current one have been started. If the consumer stops early, so do the threads; an iterator that is not closed
does not keep the process from ending. Used by `reader`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Feed(Generic[T]):
    """Items of one source, between its thread and the consumer."""

    def __init__(self, source: Callable[[], Iterator[T]], depth: int) -> None:
        self._depth = depth
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        # a daemon: it may wait for ever if an exception's traceback keeps the iterator from being closed
        self._thread = threading.Thread(target=self._fill, args=(source,), name="mistake-log-read", daemon=True)
        self._thread.start()

    def _fill(self, source: Callable[[], Iterator[T]]) -> None:
        try:
            for item in source():
                with self._changed:
                    self._changed.wait_for(lambda: len(self._items) < self._depth or self._stopped)
                    if self._stopped:
                        return
                    self._items.append(item)
                    self._changed.notify_all()
                del item  # frees its memory while the next one is made
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def stop(self) -> None:
        """End the thread; waits for the item that it is reading."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    break
                waiting = [self._items.popleft()]
                self._changed.notify_all()
            yield waiting.pop()  # no name keeps it alive until the next one comes
        if self._error is not None:
            raise self._error


def read_ahead(
    sources: Iterable[Callable[[], Iterator[T]]], *, ahead: int, depth: int
) -> Generator[Iterator[T], None, None]:
    """The items of each source, in order; use them up before the next source. They raise what the source raised.

    Args:
        sources: each is called once, in a thread of its own.
        ahead: sources that are started besides the current one.
        depth: items of a source that may wait.
    """
    coming: deque[_Feed[T]] = deque()
    waiting = iter(sources)
    try:
        while True:
            while len(coming) <= ahead and (source := next(waiting, None)) is not None:
                coming.append(_Feed(source, depth))
            if not coming:
                return
            yield iter(coming[0])
            coming.popleft().stop()
    finally:
        for feed in coming:
            feed.stop()
