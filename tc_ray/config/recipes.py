"""The recipes that come with the package, known by name: `tc-ray train demo`.

Invariant: a file that is there always goes before a recipe of that name. Called by `load.load_config` and `tc-ray init`.
"""

from __future__ import annotations

from pathlib import Path

from tc_ray.config.yaml_file import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""One YAML file a recipe; models/ has what they name; start/ is what `tc-ray init` copies."""


def find_recipe(path: Path) -> Path:
    """The file at `path`, or for a bare name such as `demo` the recipe of the package.

    Raises:
        ConfigError: a bare name that is neither a file nor a recipe; it lists the recipes.
    """
    if path.is_file() or path.name != str(path) or path.suffix in (".yaml", ".yml"):
        return path
    shipped = RECIPES / f"{path.name}.yaml"
    if not shipped.is_file():
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{path} is neither a file here nor a recipe of tc-ray; the recipes are {names}")
    return shipped
