"""The settings of a server, from the command line or from the `args` of a Serve config file.

The `serving` section of the served run's recipe gives the defaults, or that of a config file which is named instead.
Overrides replace single fields. Invariants: nothing unknown is ignored, and nothing is loaded but text files. API keys are
hashed at once; replicas get the digests (http/gate.py checks them).
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tc_ray.config.load import load_saved_serving, load_serving
from tc_ray.config.serving import ServingSection
from tc_ray.export import check
from tc_ray.serving.errors import ServingError

KEY_VARIABLE = "TC_RAY_API_KEY"
OVERRIDE = "serving."
"""What an override begins with; any other argument of `tc-ray serve` is a run."""


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica is started with; it is pickled.

    models: name in the API -> export folder. key_digests: SHA-256 of each API key; empty: no key is needed.
    """

    models: Mapping[str, Path]
    serving: ServingSection = field(default_factory=ServingSection)
    key_digests: tuple[bytes, ...] = ()


def command_settings(arguments: Sequence[str], config: Path | None = None) -> ReplicaSettings:
    """Settings from the arguments of `tc-ray serve`: run folders, exports or NAME=FOLDER, and overrides `serving.FIELD=VALUE`.

    config: a file whose `serving` section counts instead of the recipes'. Raises ConfigError for a setting that cannot be, and
    ServingError for no exported model in a folder, recipes that differ, or an open address without an API key.
    """
    overrides = [argument for argument in arguments if argument.startswith(OVERRIDE) and "=" in argument]
    runs = [argument for argument in arguments if argument not in overrides]
    models = named_models(runs)
    return _settings(models, _section(models, config, overrides, {}))


def application_settings(args: Mapping[str, Any]) -> ReplicaSettings:
    """Settings from the `args` of a Serve config file: `runs`, `config` (a file, optional) and fields of the section.

    Raises as `command_settings`.
    """
    fields = dict(args)
    runs, config = fields.pop("runs", None), fields.pop("config", None)
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        raise ServingError("args.runs must be a list of run folders")
    for name in ("host", "port"):
        if name in fields:
            raise ServingError(f"args.{name}: the http_options of the Serve config file set the address")
    models = named_models(runs)
    section = _section(models, None if config is None else Path(config), (), fields)
    return _settings(models, section.model_copy(update={"host": "0.0.0.0"}))


def _settings(models: Mapping[str, Path], serving: ServingSection) -> ReplicaSettings:
    digests = configured_digests(serving.key_file)
    require_key_for(serving.host, digests, serving.allow_open)
    return ReplicaSettings(models, serving, digests)


def _section(
    models: Mapping[str, Path], config: Path | None, overrides: Sequence[str], fields: Mapping[str, Any]
) -> ServingSection:
    if config is not None:
        return load_serving(config, overrides, fields)
    recipes = [recipe for export in models.values() if (recipe := export / "config.yaml").is_file()]
    if not recipes:  # folders that `tc-ray fuse` wrote
        return load_serving(None, overrides, fields)
    first, *others = (load_saved_serving(recipe, overrides, fields) for recipe in recipes)
    differing = {name for other in others for name, value in other if value != getattr(first, name)}
    if differing:
        names = ", ".join(f"{OVERRIDE}{name}" for name in sorted(differing))
        raise ServingError(
            f"the recipes of these runs differ in {names}: set it on the command line, or name one config file by --config"
        )
    return first


def find_export(folder: Path | str) -> Path:
    """Absolute export folder of a run folder, or `folder` itself if it is an export.

    Raises ServingError for no folder, ExportError as `tc_ray.export.check.find_export`.
    """
    if not Path(folder).expanduser().is_dir():
        raise ServingError(
            f"{folder} is no folder; give a run folder, an exported model, or a setting as serving.FIELD=VALUE"
        )
    return check.find_export(folder)


def named_models(given: Sequence[str | Path]) -> dict[str, Path]:
    """Model name -> export folder, from `FOLDER` or `NAME=FOLDER` arguments. Without a name it is the run folder's.

    Raises ServingError for no folder at all, an empty name and two models of one name, and as `find_export`.
    """
    if not given:
        raise ServingError("no run folder is given")
    models: dict[str, Path] = {}
    for argument in map(str, given):
        name, equals, folder = argument.partition("=")
        if not equals or "/" in name or Path(argument).is_dir():
            name, folder = "", argument
        elif not name.strip():
            raise ServingError(f"{argument}: NAME=FOLDER needs a name")
        export = find_export(folder)
        name = name.strip() or (export.parent if export.name == "export" else export).name
        if name in models:
            raise ServingError(f"two models are called {name!r}: {models[name]} and {export}; name one by NAME=FOLDER")
        models[name] = export
    return models


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def configured_digests(key_file: Path | str | None = None) -> tuple[bytes, ...]:
    """Digests of the keys in `key_file`, else of the one in TC_RAY_API_KEY; empty when neither is given.

    A key file is UTF-8 with one key per line; empty lines and those that begin with # are skipped.
    Raises ServingError, which shows no key, for a file that cannot be read, a line that is no single word, and no key at all.
    """
    if key_file is None:
        value = os.environ.get(KEY_VARIABLE)
        if value is None:
            return ()
        where, lines = KEY_VARIABLE, [value]
    else:
        where = f"the API key file {key_file}"
        try:
            lines = Path(key_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"{where} cannot be read as UTF-8: {error}") from None
        lines = [line for line in lines if not line.lstrip().startswith("#")]
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ServingError(f"{where} holds no key; it is empty")
    if any(len(key.split()) > 1 or not key.isprintable() for key in keys):
        raise ServingError(f"{where}: a key is one word; a comment needs a line of its own that begins with #")
    return tuple(dict.fromkeys(map(digest, keys)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address; a name other than localhost counts as open."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key_for(host: str, key_digests: Sequence[bytes], allow_open: bool = False) -> None:
    """Raise ServingError where other machines can reach the server, no key is set and this was not allowed explicitly."""
    if not (key_digests or allow_open or is_loopback(host)):
        raise ServingError(
            f"host {host} can be reached from other machines and no API key is set: "
            f"set {KEY_VARIABLE} or give a key file, serve on 127.0.0.1, or allow it with serving.allow_open=true"
        )
