"""The licence of a Pilot's base: named by its card, a licence file in its folder, or the builtin model's entry; else "unknown".

Invariant: a licence is never guessed from a model's name. Used by the model card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tc_ray.models.hub import BUILTIN_MODELS
from tc_ray.text import first_line

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge, to any person",
    "bsd-3-clause": r"Neither the name of .{1,80} nor the names of its\s+contributors",
}
"""What the text of a licence file holds, by the hub's name of the licence."""
_HEAD = 20_000
"""Bytes of a licence file that are read."""
CARD_SECONDS = 5.0
"""How long the hub may take to answer for a base's card."""


@dataclass(frozen=True)
class Licence:
    """Of a base. name: the hub's id, or "unknown". named_by: a clause for the card. title, link: what the hub wants beside "other".
    files: of the base's folder, to go with what is made of it."""

    name: str
    named_by: str
    title: str | None = None
    link: str | None = None
    files: tuple[Path, ...] = ()


def is_hub_id(model: str) -> bool:
    """Whether `model.pilot` names a model of the hub: OWNER/NAME, and no folder here."""
    return bool(HUB_ID.fullmatch(model)) and not Path(model).expanduser().exists()


def licence_of(model: str) -> Licence:
    """The licence of `model.pilot`: folder, builtin name or hub id, whose card is asked for (`CARD_SECONDS`)."""
    if model in BUILTIN_MODELS:
        known = BUILTIN_MODELS[model]
        return Licence(known.licence, f"that of {known.base}, from the package {known.requirement}")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _of_folder(folder)
    if not is_hub_id(model):
        return _unknown("the base is neither a folder here nor a model of the hub")
    from huggingface_hub import hf_hub_download

    try:
        card = hf_hub_download(model, CARD, etag_timeout=CARD_SECONDS)
    except Exception as error:  # noqa: BLE001 - of several libraries: offline, refused, no card; a card is no reason to fail
        return _unknown(f"the card of {model} cannot be read ({first_line(error, 80)})")
    return _of_card(Path(card), "its card on the hub") or _unknown(f"the card of {model} names none")


def _of_folder(folder: Path) -> Licence:
    files = tuple(sorted(file for file in folder.iterdir() if re.match(r"(?i)(licen[cs]e|notice)\b", file.name)))
    named = _of_card(folder / CARD, "the card in its folder") if (folder / CARD).is_file() else None
    for file in files:
        if named is not None or not re.match(r"(?i)licen[cs]e", file.name):
            continue
        text = file.read_bytes()[:_HEAD].decode("utf-8", "replace")
        name = next((name for name, pattern in _TEXTS.items() if re.search(pattern, text, re.DOTALL)), "other")
        title = next((line.strip() for line in text.splitlines() if line.strip()), file.name)
        beside = (title[:60], file.name) if name == "other" else ()
        named = Licence(name, f"the file {file.name} in its folder", *beside)
    named = named or _unknown("neither a card nor a licence file in its folder names one")
    return replace(named, files=files)


def _of_card(file: Path, named_by: str) -> Licence | None:
    """The licence that a card's front matter names."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        head: Any = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return None
    name = head.get("license") if isinstance(head, dict) else None
    if isinstance(name, list) and name:
        name = name[0]
    if not isinstance(name, str) or name == "unknown":
        return None
    title, link = (str(head[key]) if head.get(key) else None for key in ("license_name", "license_link"))
    return Licence(name, named_by, title, link)


def _unknown(why: str) -> Licence:
    return Licence("unknown", why)
