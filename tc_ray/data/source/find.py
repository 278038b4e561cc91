"""Which files of a source are read, for which part of the run, and what is left out.

Invariant: each file of a data folder belongs to the training, validation or test rows, or is named as left out. A file that
the user names directly is taken for the part it is named for. Runs in the driver; called by `prepare` and by plans.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tc_ray.config.data import EMBEDDED, DataSection
from tc_ray.data.source.records import DataError
from tc_ray.text import visible

PARTS = ("train", "validation", "test")
EXAMPLE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
SEQUENCE_SUFFIXES = (".txt",)
SIDE_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside data files."""
_WORDS = {
    "train": "train training trainset",
    "validation": "eval evaluation evalset validation valid validset val valset dev devset",
    "test": "test testset held hold heldout holdout",
}
_PART_OF_WORD = {word: part for part, words in _WORDS.items() for word in words.split()}
_SHOWN_NAMES = 5
_Found = dict[str, list[Path]]
"""Data files of one place by the part in their names, "" without one; _OTHERS: files that are not read."""
_OTHERS = "left out"


@dataclass
class Sources:
    """Files of each part (train without files: the embedded data set), and notes on what was chosen and left out.

    sets: of validation and test, the files of each named set; one that is not named is called as its part is.
    """

    files: dict[str, list[Path]]
    notes: list[str]
    sets: dict[str, dict[str, list[Path]]] = field(default_factory=dict)


def find_sources(config: DataSection) -> Sources:
    """Files of every part that has its own; the other parts are cut from train.

    In a folder of training data, a file or folder is test rows if its name holds the word test (testset, heldout), and
    validation rows if it holds eval, validation, valid, val or dev (evalset, ...). data.test and
    data.validation override this.

    Raises DataError: files are absent, of no known kind, or named so that their part is not clear.
    """
    sources = Sources({part: [] for part in PARTS}, [])
    if config.train != EMBEDDED:
        place = Path(config.train).expanduser().absolute()
        if config.fallback == EMBEDDED and not place.exists():
            sources.notes.append(
                f"data.train {place} is absent: using the embedded data set, all parts are cut from it"
            )
            return sources
        _take_train(place, config, sources)
    for part in ("validation", "test"):
        given = config.held_out_sets(part)
        named = {name: part_files(one.file, part, config, sources.notes) for name, one in given.items()}
        sources.files[part] = [file for files in named.values() for file in files] or sources.files[part]
        sources.sets[part] = named or ({part: sources.files[part]} if sources.files[part] else {})
    return sources


def part_files(source: str, part: str, config: DataSection, notes: list[str]) -> list[Path]:
    """Files of `source` (file or folder) for "validation" or "test": those named so, else those without a part."""
    place = Path(source).expanduser().absolute()
    found = _find(place, config)
    files = found[part] or found[""]
    if not files:
        raise _nothing(place, found, part, config)
    _note(
        notes, f"data.{part}: left out of {place}", place, [f for own in found.values() for f in own if f not in files]
    )
    return files


def _take_train(place: Path, config: DataSection, sources: Sources) -> None:
    found = _find(place, config)
    files, notes = sources.files, sources.notes
    files["train"] = sorted(found[""] + found["train"])
    if not files["train"]:
        raise _nothing(place, found, "train", config)
    for part in PARTS[1:]:
        if found[part] and config.format == "sequences":
            raise DataError(
                f"data.train: {place} holds {_names(place, found[part])} beside other files, but format: sequences holds out "
                "the last items of each user; name the file itself"
            )
        if getattr(config, part):
            _note(notes, f"left out of {place}, because data.{part} is set", place, found[part])
        else:
            files[part] = found[part]
            _note(notes, f"{part} rows by their names", place, found[part])
    _note(notes, f"left out of {place}", place, found[_OTHERS])


def _find(place: Path, config: DataSection) -> _Found:
    """Data files of a place. Raises DataError for a file of another kind."""
    found: _Found = defaultdict(list)
    if place.is_file():
        if not _is_data(place, config):
            raise DataError(f"{place}: unknown kind of file; convert it to {_kinds(config)}")
        found[""].append(place)
    for file in sorted(path for path in place.rglob("*") if path.is_file() or path.is_symlink()):
        relative = file.relative_to(place)
        is_data = file.is_file() and _is_data(file, config)
        hidden = any(part.startswith((".", "_")) for part in relative.parts)
        if is_data and not hidden and file.name.lower() not in SIDE_FILES:
            found[_part_by_name(relative, place)].append(file)
        elif is_data or not hidden:
            found[_OTHERS].append(file)
    return found


def _part_by_name(file: Path, folder: Path) -> str:
    """The part whose word stands in the file's name, else in the name of the nearest folder; "" without one."""
    for name in reversed(file.parts):
        parts = {_PART_OF_WORD[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in _PART_OF_WORD}
        if len(parts) > 1:
            raise DataError(
                f"{folder / file}: its name {name} holds the words of {' and '.join(sorted(parts))} rows; rename it, "
                "name each file in data.train, data.validation and data.test"
            )
        if parts:
            return parts.pop()
    return ""


def _is_data(file: Path, config: DataSection) -> bool:
    suffixes = SEQUENCE_SUFFIXES if config.format == "sequences" else EXAMPLE_SUFFIXES
    # Parquet is compressed inside
    return file.name.lower().endswith((*suffixes, *(f"{suffix}.gz" for suffix in suffixes if suffix != ".parquet")))


def _kinds(config: DataSection) -> str:
    return ".txt (or .txt.gz)" if config.format == "sequences" else ".json, .jsonl or .parquet (or .jsonl.gz)"


def _names(place: Path, files: Sequence[Path]) -> str:
    names = [visible(file.relative_to(place).as_posix()) for file in sorted(files)[:_SHOWN_NAMES]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _note(notes: list[str], what: str, place: Path, files: Sequence[Path]) -> None:
    if files:
        notes.append(f"{what}: {_names(place, files)}")


def _nothing(place: Path, found: _Found, part: str, config: DataSection) -> DataError:
    others = [file for files in found.values() for file in files]
    if others:
        return DataError(
            f"data.{part}: {place} holds no {_kinds(config)} file of {part} rows, only {_names(place, others)}; convert, "
            "rename or name the file itself"
        )
    hint = "; or set data.train=embedded, or data.fallback=embedded" if part == "train" else ""
    return DataError(
        f"data.{part}: no {_kinds(config)} file at {place}; correct the path (relative paths start at the current folder){hint}"
    )
