"""Newer Copilots without a pause: each is loaded beside the one that serves, then put in its place.

Two things begin it: files that changed in the folder a Copilot came from, seen by looking every `watch_s`, and Serve's
`user_config`, which may name another folder. Invariant: a Copilot that is broken, half written or does not fit is told in
one log line and changes nothing; requests under way end with the Copilot they began with. Owned by replica.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.export.check import copilot_version
from tc_ray.serving.errors import ServingError
from tc_ray.serving.models.exports import Signature, copilot_signature, find_export
from tc_ray.serving.models.loading import (
    SETTLE_PAUSE_S,
    SETTLE_TRIES,
    ExportChanged,
    LoadedCopilot,
    LoadedRun,
    still_written,
)

if TYPE_CHECKING:
    from tc_ray.serving.models.registry import Catalogue

SETTLE_S = 0.5
"""Files that changed are read when they have been the same for so long."""
RETIRE_AFTER_S = 5.0
"""An engine that was replaced takes requests for so long still: some had looked it up before."""
logger = logging.getLogger("tc_ray.serving")


def read_user_config(user_config: Any, names: set[str]) -> dict[str, Path]:
    """Model name -> export folder of its Copilot, from `user_config: {copilots: {NAME: FOLDER}}`.

    Any other key but `reload` (whose value means nothing; changing it makes the server look at once) is refused.
    Raises ServingError.
    """
    if not isinstance(user_config, Mapping) or set(user_config) - {"copilots", "reload"}:
        raise ServingError("user_config may hold `copilots`, a mapping of model names to export folders, and `reload`")
    copilots = user_config.get("copilots") or {}
    if not isinstance(copilots, Mapping) or set(copilots) - names:
        raise ServingError(
            f"user_config.copilots must map names of served models ({', '.join(sorted(names))}) to folders"
        )
    return {name: find_export(str(folder)) for name, folder in copilots.items()}


class Reloader:
    """Keeps the catalogue's models at the newest Copilot of their folders. Safe to use from several threads.

    Args:
        catalogue: what requests are served from. loaded: run -> the Copilot it serves with now.
        watch_s: how often to look; None: only when told. drain_s: how long requests of a replaced Copilot may go on.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        loaded: Mapping[LoadedRun, LoadedCopilot],
        *,
        watch_s: float | None,
        drain_s: float,
    ) -> None:
        self._catalogue = catalogue
        self._current = dict(loaded)
        self._sources = {run: copilot.source for run, copilot in loaded.items()}
        self._refused: dict[LoadedRun, tuple[Path, Signature | None]] = {}
        self._reasons: dict[LoadedRun, str] = {}
        self._watch_s, self._drain_s = watch_s, drain_s
        self._loading = threading.Lock()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="copilot-watch", daemon=True)

    def start(self) -> None:
        """Begin to look, in a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking. A Copilot being loaded is not put in place any more."""
        self._ended.set()
        self._wake.set()

    def configure(self, user_config: Any) -> None:
        """Take folders from Serve's user_config; they are loaded soon, in the background. Raises ServingError."""
        folders = read_user_config(user_config, {run.name for run in self._sources})
        self._sources = {run: folders.get(run.name, run.export) for run in self._sources}
        self._refused.clear()
        self._wake.set()

    def look(self) -> list[str]:
        """Look once at every folder, load and swap what is new; returns the names of the models that were swapped."""
        with self._loading:
            return [run.name for run in self._current if self._look_at(run)]

    def load_all(self) -> None:
        """Load now what `configure` named. Raises ServingError for the first that is refused, or still being written."""
        for _ in range(SETTLE_TRIES):
            self.look()
            for run in self._refused:
                raise ServingError(self._reasons[run])
            waiting = [source for run, source in self._sources.items() if source != self._current[run].source]
            if not waiting:
                return
            time.sleep(SETTLE_PAUSE_S)
        raise still_written(waiting[0])

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(self._watch_s)
            self._wake.clear()
            if self._ended.is_set():
                return
            try:
                self.look()
            except Exception:
                logger.exception("looking for a newer Copilot failed; the ones loaded go on serving")

    def _look_at(self, run: LoadedRun) -> bool:
        source, current = self._sources[run], self._current[run]
        signature = self._settled(source)
        if (source, signature) in ((current.source, current.signature), self._refused.get(run)):
            return False
        try:
            if signature is None:
                raise ServingError(f"{source} lacks files of a Copilot")
            if copilot_version(source) == current.served.copilot_version:
                self._current[run] = LoadedCopilot(current.served, current.model, source, signature, current.seconds)
                return False  # the same content, written anew
            loaded = run.load_copilot(source)
        except ExportChanged:
            self._wake.set()  # still being written
            return False
        except (ServingError, OSError, ValueError) as error:
            self._refused[run], self._reasons[run] = (source, signature), str(error)
            logger.error(
                "%s: the newer Copilot is not used, %s goes on serving: %s",
                run.name,
                current.served.copilot_version,
                error,
            )
            return False
        if self._ended.is_set():
            loaded.served.engine.close()
            return False
        self._swap(run, current, loaded)
        return True

    def _settled(self, source: Path) -> Signature | None:
        """The files' signature once it stays the same; None where files are missing."""
        seen = _signature(source)
        if seen == self._current_signature(source):
            return seen
        while not self._ended.wait(SETTLE_S):
            now = _signature(source)
            if now == seen:
                return seen
            seen = now
        return seen

    def _current_signature(self, source: Path) -> Signature | None:
        return next((known.signature for known in self._current.values() if known.source == source), None)

    def _swap(self, run: LoadedRun, before: LoadedCopilot, after: LoadedCopilot) -> None:
        self._catalogue.replace(after.served)
        self._current[run] = after
        self._refused.pop(run, None)
        logger.info(
            "%s: Copilot %s from %s serves now (loaded in %.1f s), in place of %s",
            run.name,
            after.served.copilot_version,
            after.source,
            after.seconds,
            before.served.copilot_version,
        )
        threading.Thread(target=self._retire, args=(run, before), name="copilot-retire", daemon=True).start()

    def _retire(self, run: LoadedRun, before: LoadedCopilot) -> None:
        time.sleep(RETIRE_AFTER_S)
        before.served.engine.close(drain_s=self._drain_s)
        run.release(before.model)


def _signature(source: Path) -> Signature | None:
    try:
        return copilot_signature(source)
    except OSError:
        return None
