"""Functions of the user that a config names as `module:function`: metrics, the row converter, callbacks.

Invariant: the driver imports every named function before Ray is started, so a wrong name costs no worker. Workers import it
again, from the same working directory: Ray puts the driver's on their path. Called by `run.job`, the plan and who calls them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tc_ray.config.schema import RunConfig
from tc_ray.config.section import is_named
from tc_ray.config.yaml_file import ConfigError
from tc_ray.text import first_line

_SHOWN = 8


def load_named(name: str, field: str) -> Callable[..., Any]:
    """The function `module:function`, from the working directory or the rest of the path. field: of the config, for the message.

    Raises ConfigError that says what was found: no such module, one that cannot be imported, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    # the script of an installed command stands first on the path, not the working directory
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{field} is {name}: importing {module_name} failed: {first_line(error)}") from error
        raise ConfigError(
            f"{field} is {name}: there is no module {error.name} in the working directory {here} or elsewhere on Python's "
            "path; start the command where its file is, or set PYTHONPATH"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"{field} is {name}: importing {module_name} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        place = getattr(module, "__file__", None) or module_name
        own = sorted(one for one, value in vars(module).items() if not one.startswith("_") and callable(value))
        has = f"its functions are {', '.join(own[:_SHOWN])}" if own else "it has no function"
        what = f"has no {function_name}" if found is None else f"has {function_name}, which is no function"
        raise ConfigError(f"{field} is {name}: {place} {what}; {has}")
    return found


def source_hash(name: str, field: str) -> str:
    """16 hex digits over the file of the module that is named and the file that the function stands in, which may be another; of a
    `functools.partial`, the function inside it. "" if it is in none. Arguments and errors: as `load_named`."""
    found = load_named(name, field)
    while isinstance(found, partial):
        found = found.func
    modules = (sys.modules.get(one) for one in (name.partition(":")[0], getattr(found, "__module__", None) or ""))
    files = dict.fromkeys(file for module in modules if (file := getattr(module, "__file__", None)))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16] if files else ""


def check_named(config: RunConfig) -> None:
    """Raise ConfigError, as `load_named`, for the first function of the config that cannot be imported here."""
    for field, name in named_in(config):
        load_named(name, field)


def named_in(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(field, `module:function`) of every function that the config names."""
    found: dict[str, str | None] = {"fusion.metric": config.fusion.metric, "data.convert": config.data.convert}
    found |= {f"callbacks.{name}": value for name, value in config.callbacks}
    for part in ("validation", "test"):
        sets = config.data.held_out_sets(part)
        found |= {f"data.{part}.{name}.metric": one.metric for name, one in sets.items()}
    yield from ((field, name) for field, name in found.items() if name is not None and is_named(name))
