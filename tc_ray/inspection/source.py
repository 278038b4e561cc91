"""Which log a user means: a run folder, a log's own folder, or its place in an object store.

Invariant: the storage options in a folder's config are not used. The folder may come from anybody, and its options could send
the caller's credentials to another server. Called by the `tc-ray log` commands and `train-copilot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tc_ray.config.yaml_file import read_sections
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.text import visible

CONFIG_FILE = "config.yaml"
TABLE_FOLDER = "_delta_log"


class LogNotFoundError(FileNotFoundError):
    """No Mistake Log where the user said; the message names the place and what to give."""


@dataclass(frozen=True)
class LogPlace:
    """Where a log is."""

    uri: str
    """Folder or URI of the table."""
    run_folder: Path | None = None
    """Folder of the run that wrote it, where it is known: its tokenizer is there."""
    options: dict[str, str] = field(default_factory=dict)
    """Storage options of an object store, as the caller gave them."""
    note: str = ""
    """For the user: that options of the folder were not used, and how to give them."""

    def open(self) -> MistakeLog:
        """The log at its latest version.

        Raises LogSchemaError: no Mistake Log there, or one of an unknown schema version.
        """
        return MistakeLog(self.uri, storage_options=self.options or None)


def find_log(source: str, options: Sequence[str] = ()) -> LogPlace:
    """Find the log of a run folder (log/ in it, or `log.path` of its config.yaml), or take a table's folder or URI.

    Args:
        source: what the user typed.
        options: storage options as KEY=VALUE; only these and the environment are used.

    Raises:
        LogNotFoundError: nothing there. ConfigError: a config.yaml that cannot be read. ValueError: an option that is not
            KEY=VALUE, or a key given twice.
    """
    if any("=" not in pair for pair in options):
        raise ValueError("--storage-option: expected KEY=VALUE")  # what was given may be the secret itself
    given = dict(pair.split("=", 1) for pair in options)
    if len(given) < len(options):
        raise ValueError("--storage-option: give each KEY once")
    if "://" in source:
        return LogPlace(source, None, given)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise LogNotFoundError(f"{source}: there is no such folder; give a run folder, a log's folder or its URI")
    if (folder / TABLE_FOLDER).is_dir():
        parent = folder.absolute().parent
        return LogPlace(str(folder), parent if (parent / CONFIG_FILE).is_file() else None, given)
    # unchecked, because another version of tc-ray may have other fields
    config = folder / CONFIG_FILE
    section = read_sections(config).get("log") if config.is_file() else None
    section = section if isinstance(section, dict) else {}
    path = section.get("path")
    place = str(path or folder / "log")
    if "://" not in place and not (Path(place).expanduser() / TABLE_FOLDER).is_dir():
        what = f"log.path of its {CONFIG_FILE} is {place}, and no log is there" if path else "no Mistake Log in it"
        raise LogNotFoundError(f"{source}: {what}; give a run folder, a log's folder or its URI")
    note, stored = "", section.get("storage_options")
    unused = [str(key) for key in stored if key not in given] if isinstance(stored, dict) else []
    if "://" in place and unused:
        note = visible(
            f"log.storage_options of {config} are not used ({', '.join(unused)}): your credentials would go wherever that "
            f"file says. If you trust it, give them: --storage-option {unused[0]}=..."
        )
    return LogPlace(place, folder, given, note)
