"""`tc-ray config`: what a recipe may hold, for editors and other programs."""

from __future__ import annotations

from typing import Annotated

import typer

from tc_ray.cli.command import say

config = typer.Typer(no_args_is_help=True, help="What a recipe may hold: its JSON schema.")


@config.callback()
def _group() -> None:
    """What a recipe may hold: its JSON schema."""


@config.command("schema")
def schema(
    study: Annotated[bool, typer.Option("--study", help="The schema of a study's file, not that of a recipe.")] = False,
) -> None:
    """Print the JSON schema: sections and fields with meaning, type, bounds and default."""
    from tc_ray.config.json_schema import as_text, recipe_schema, schema_of

    if study:
        from tc_ray.study.file import StudyFile

        say(as_text(schema_of(StudyFile, "Study of tc-ray")).rstrip("\n"))
        return
    say(as_text(recipe_schema()).rstrip("\n"))
