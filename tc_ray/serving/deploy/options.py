"""Options of a server, by the same names on the command line and in a Serve config file, as settings.

Invariant: an option that is not known, of the wrong kind or out of range ends in a ServingError that names it; none is
ignored. Used by launch.py and jobs/serve_app.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from tc_ray.serving.errors import ServingError
from tc_ray.serving.settings import EngineLimits, Limits, ModelSettings, ReplicaSettings, Scale

_MAY_BE_ZERO = {"max_waiting", "watch_s", "prefix_bytes"}
DRAIN_MARGIN_S = 30.0
"""Default of drain_s, over the longest a request can take."""

_LIMITS = {name: kind for name, kind in get_type_hints(Limits).items()}
_ENGINE = {name: kind for name, kind in get_type_hints(EngineLimits).items() if name != "cache_bytes"}
_OTHERS: dict[str, Any] = {
    "cache_mb": int,
    "threads": int | None,
    "gpu": bool,
    "watch_s": float | None,
    "drain_s": float | None,
    "replicas": int | None,
    "min_replicas": int | None,
    "max_replicas": int | None,
}
OPTIONS: dict[str, Any] = {**_LIMITS, **_ENGINE, **_OTHERS}
"""Name -> type of every option."""


def build_settings(
    models: Sequence[ModelSettings], key_digests: tuple[bytes, ...], options: Mapping[str, Any]
) -> tuple[ReplicaSettings, Scale]:
    """Settings of the replicas and their number. Options that are None, or absent, keep their defaults; watch_s 0: never.

    Raises ServingError naming the option.
    """
    for name, value in options.items():
        _check(name, value)
    given = {name: value for name, value in options.items() if value is not None}
    limits = Limits(**{name: given[name] for name in _LIMITS if name in given})
    engine_given = {name: given[name] for name in _ENGINE if name in given}
    if "cache_mb" in given:
        engine_given["cache_bytes"] = given["cache_mb"] * 2**20
    drain_s = given.get("drain_s", limits.request_timeout_s + DRAIN_MARGIN_S)
    if drain_s < limits.request_timeout_s:
        raise ServingError(
            f"drain_s {drain_s:g} is shorter than request_timeout_s {limits.request_timeout_s:g}: requests would be cut "
            "when a replica is replaced"
        )
    rest: dict[str, Any] = {name: given[name] for name in ("threads", "gpu") if name in given}
    if "watch_s" in given:
        rest["watch_s"] = given["watch_s"] or None
    settings = ReplicaSettings(
        models=tuple(models),
        key_digests=key_digests,
        limits=limits,
        engine=EngineLimits(**engine_given),
        drain_s=float(drain_s),
        **rest,
    )
    return settings, _scale(given)


def _scale(given: Mapping[str, Any]) -> Scale:
    low, high = given.get("min_replicas"), given.get("max_replicas")
    if "replicas" in given:
        if low is not None or high is not None:
            raise ServingError("replicas is a fixed number: give it, or min_replicas and max_replicas, not both")
        return Scale(given["replicas"], given["replicas"])
    if low is not None and high is None:
        raise ServingError("min_replicas needs max_replicas: the server must know how far it may grow")
    low = low if low is not None else 1
    high = high if high is not None else low
    if high < low:
        raise ServingError(f"max_replicas {high} is less than min_replicas {low}")
    return Scale(low, high)


def _check(name: str, value: Any) -> None:
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        raise ServingError(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    kinds = get_args(OPTIONS[name]) or (OPTIONS[name],)
    if value is None:
        return
    if bool in kinds:
        if not isinstance(value, bool):
            raise ServingError(f"{name} must be true or false, not {value!r}")
        return
    whole = float not in kinds
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise ServingError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}")
    zero_allowed = name in _MAY_BE_ZERO
    if value < 0 or (value == 0 and not zero_allowed):
        raise ServingError(f"{name} {value} must be {'0 or more' if zero_allowed else 'more than 0'}")
