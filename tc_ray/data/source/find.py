"""Which files of a source are read, for which part of the run, and what is left out.

Invariant: each file of a data folder belongs to the training, validation or test rows, or is named as left out. A file that
the user names directly is taken for the part it is named for. Runs in the driver; called by `prepare` and by plans.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from tc_ray.config.data import DataSection
from tc_ray.data.source.files import COMPRESSED, DataFile, Listing, is_address, is_pattern, list_place
from tc_ray.data.source.hub import HUB, list_hub
from tc_ray.data.source.readers import BINARY
from tc_ray.data.source.records import DataError
from tc_ray.text import visible

PARTS = ("train", "validation", "test")
EXAMPLE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
SEQUENCE_SUFFIXES = (".txt",)
SIDE_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside data files."""
_CACHE = "cache-*.arrow"
"""What `datasets` keeps of `map` and `filter` in a saved folder: rows of it, changed or repeated."""
_WORDS = {
    "train": "train training trainset",
    "validation": "eval evaluation evalset validation valid validset val valset dev devset",
    "test": "test testset held hold heldout holdout",
}
_PART_OF_WORD = {word: part for part, words in _WORDS.items() for word in words.split()}
_SHOWN_NAMES = 5
_OTHERS = "left out"


@dataclass
class Sources:
    """Files of each part (train without files: the embedded data set), and notes on what was chosen and left out.

    sets: of validation and test, the files of each named set; one that is not named is called as its part is. entries: of a
    training file, the index of its entry of data.train. weights: how often its rows are trained on in an epoch, where that is
    not once.
    """

    files: dict[str, list[DataFile]]
    notes: list[str]
    sets: dict[str, dict[str, list[DataFile]]] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """A place's files by the part in their names ("" without one), as relative names; _OTHERS: what is not read."""

    source: str
    listing: Listing
    parts: dict[str, list[str]]

    def files(self, *parts: str) -> list[DataFile]:
        """The data files of these parts, in the order of their names."""
        names = sorted(name for part in parts for name in self.parts.get(part, []))
        return [file for name in names if (file := self.listing.files[name]) is not None]

    def named(self, parts: Iterable[str]) -> str:
        """Names of the files of these parts, for a message."""
        return _names([name for part in parts for name in self.parts.get(part, [])])


def find_sources(config: DataSection) -> Sources:
    """Files of every part that has its own; the other parts are cut from train.

    In a folder, a pattern or a data set of training data, a file or folder is test rows if its name holds the word test
    (testset, heldout), and validation rows if it holds eval, validation, valid, val or dev (evalset, ...). data.test and
    data.validation override this.

    Raises DataError: files are absent, of no known kind, or named so that their part is not clear.
    """
    sources = Sources({part: [] for part in PARTS}, [])
    given = config.train_sources()
    places = [_find(one.file, config) for one in given]
    absent = [place.source for place in places if not place.listing.files and not Path(place.source).exists()]
    if absent and config.fallback is not None:
        sources.notes.append(
            f"data.train {', '.join(absent)} is absent: using the embedded data set, all parts are cut from it"
        )
        return sources
    for index, (one, place) in enumerate(zip(given, places, strict=True)):
        _take_train(place, config, sources)
        if len(set(sources.files["train"])) < len(sources.files["train"]):
            raise DataError(f"data.train: a file of {one.file} stands in two of its entries; name each file once")
        own = [file.place for file in sources.files["train"] if file.place not in sources.entries]
        sources.entries |= dict.fromkeys(own, index)
        if one.weight != 1:
            sources.weights |= dict.fromkeys(own, one.weight)
    for part in ("validation", "test"):
        sets = config.held_out_sets(part)
        named = {name: part_files(one.file, part, config, sources.notes) for name, one in sets.items()}
        sources.files[part] = [file for files in named.values() for file in files] or sources.files[part]
        sources.sets[part] = named or ({part: sources.files[part]} if sources.files[part] else {})
    return sources


def part_files(source: str, part: str, config: DataSection, notes: list[str]) -> list[DataFile]:
    """Files of `source` (as data.train, but one place) for "validation" or "test": those named so, else those without a part."""
    place = _find(source, config)
    chosen = part if place.parts.get(part) else ""
    files = place.files(chosen)
    if not files:
        raise _nothing(place, part, config)
    _note(notes, f"data.{part}: left out of {place.source}", place, [other for other in place.parts if other != chosen])
    return files


def _take_train(place: _Place, config: DataSection, sources: Sources) -> None:
    files, notes = sources.files, sources.notes
    found = place.files("", "train")
    if not found:
        raise _nothing(place, "train", config)
    files["train"] += found
    for part in PARTS[1:]:
        if place.parts.get(part) and config.format == "sequences":
            raise DataError(
                f"data.train: {place.source} holds {place.named([part])} beside other files, but format: sequences holds "
                "out the last items of each user; name the file itself"
            )
        if getattr(config, part):
            _note(notes, f"left out of {place.source}, because data.{part} is set", place, [part])
        else:
            files[part] += place.files(part)
            _note(notes, f"{part} rows by their names", place, [part])
    _note(notes, f"left out of {place.source}", place, [_OTHERS])


def _find(source: str, config: DataSection) -> _Place:
    """Data files of a place. Raises DataError for a file of another kind."""
    listing = list_hub(source) if source.startswith(HUB) else list_place(source)
    shown = source if is_address(source) else str(Path(source).expanduser().absolute())
    parts: dict[str, list[str]] = defaultdict(list)
    for name, file in listing.files.items():
        is_data = file is not None and _is_data(file, config)
        if listing.one:
            if not is_data:
                raise DataError(f"{shown}: unknown kind of file; convert it to {_kinds(config)}")
            parts[""].append(name)
            continue
        hidden = any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
        last = PurePosixPath(name).name.lower()
        if is_data and not hidden and last not in SIDE_FILES and not fnmatchcase(last, _CACHE):
            parts[_part_by_name(name, listing.root)].append(name)
        elif is_data or not hidden:
            parts[_OTHERS].append(name)
    return _Place(shown, listing, parts)


def _part_by_name(file: str, folder: str) -> str:
    """The part whose word stands in the file's name, else in the name of the nearest folder; "" without one."""
    for name in reversed(PurePosixPath(file).parts):
        parts = {_PART_OF_WORD[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in _PART_OF_WORD}
        if len(parts) > 1:
            raise DataError(
                f"{folder}/{file}: its name {name} holds the words of {' and '.join(sorted(parts))} rows; rename it, "
                "name each file in data.train, data.validation and data.test"
            )
        if parts:
            return parts.pop()
    return ""


def _is_data(file: DataFile, config: DataSection) -> bool:
    if file.kind in BINARY and file.name.lower().endswith(COMPRESSED):  # these are compressed inside
        return False
    return file.kind in (SEQUENCE_SUFFIXES if config.format == "sequences" else EXAMPLE_SUFFIXES)


def _kinds(config: DataSection) -> str:
    if config.format == "sequences":
        return ".txt (or .txt.gz, .txt.zst)"
    return ".jsonl, .json, .csv, .tsv (.gz or .zst too), .parquet or .arrow"


def _names(names: Sequence[str]) -> str:
    shown = [visible(name) for name in sorted(names, key=lambda name: PurePosixPath(name).parts)[:_SHOWN_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _note(notes: list[str], what: str, place: _Place, parts: Sequence[str]) -> None:
    if any(place.parts.get(part) for part in parts):
        notes.append(f"{what}: {place.named(parts)}")


def _nothing(place: _Place, part: str, config: DataSection) -> DataError:
    if place.listing.files:
        return DataError(
            f"data.{part}: {place.source} holds no {_kinds(config)} file of {part} rows, only {place.named(place.parts)}; "
            "convert, rename or name the file itself"
        )
    hint = "" if is_address(place.source) else " (relative paths start at the current folder"
    hint += "; a data set of the hub is hf://datasets/OWNER/NAME)" if hint else ""
    if part == "train":
        hint += "; or set data.train=embedded, or data.fallback=embedded"
    what = "matches" if is_pattern(place.source) else "at"
    return DataError(f"data.{part}: no {_kinds(config)} file {what} {place.source}; correct the path{hint}")
