"""What `from tc_ray import ...` offers, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tc_ray


@pytest.mark.parametrize("name", tc_ray.__all__)
def test_public_names_are_there(name: str) -> None:
    assert callable(getattr(tc_ray, name)) and name in dir(tc_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Fused'"):
        _ = tc_ray.Fused


def test_type_checkers_see_the_same_places() -> None:
    """The imports under TYPE_CHECKING and the table of places agree, and the package says that it is typed."""
    source = Path(tc_ray.__file__).read_text(encoding="utf-8")
    typed = {
        name.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tc_ray.")
        for name in node.names
    }
    assert typed == tc_ray._PLACES and sorted(typed) == sorted(tc_ray.__all__)
    assert (Path(tc_ray.__file__).parent / "py.typed").is_file()


def test_reading_a_config_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from tc_ray import load_config; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
