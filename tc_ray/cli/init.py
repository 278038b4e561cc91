"""`tc-ray init`: a folder to start from, with a recipe, a README and a small data file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from tc_ray.cli.command import say
from tc_ray.config.json_schema import SCHEMA_FILE
from tc_ray.config.yaml_file import RECIPES
from tc_ray.files import write_file

NAME = "NAME"
"""Stands in the files of recipes/start/ for the name of the new folder."""


class InitError(ValueError):
    """The folder cannot be made."""


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; an existing one must be empty.")],
) -> None:
    """Write a recipe, a README, a small data file and the recipe's JSON schema (for editors) to start from."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InitError(f"{folder} exists and is not an empty folder: name another one, nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-") or "my-run"
    for file in (RECIPES / "start" / "train.jsonl", SCHEMA_FILE):
        shutil.copy(file, folder)
    for text in ("recipe.yaml", "README.md"):
        written = (RECIPES / "start" / text).read_text(encoding="utf-8").replace(NAME, name)
        write_file(folder / text, written.replace(f"../{SCHEMA_FILE.name}", SCHEMA_FILE.name))
    say(f"wrote  {folder}: recipe.yaml, train.jsonl (240 examples), README.md, {SCHEMA_FILE.name}")
    say(f"next   tc-ray train {folder / 'recipe.yaml'} --plan   # what it would do; without --plan it runs")
