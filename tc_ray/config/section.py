"""What every section of the configuration is made of: the strict base class and the common field types."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_LAM = 10.0
"""Largest lambda of equation 8 that a config, an exported folder or a request may ask for."""

ON_RESUME = "may change on resume"
"""Mark of a field or section that may differ when a run is resumed: it changes nothing that was already written."""

_Kind = TypeVar("_Kind")
MayChange = Annotated[_Kind, ON_RESUME]
"""Type of such a field: `threads: MayChange[Positive] = ...`. A field without it is fixed by the first start of a run."""


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")  # noqa: TRY004 - pydantic takes ValueError
    return value


Lam = Annotated[float, Field(ge=0.0, le=MAX_LAM, allow_inf_nan=False), BeforeValidator(_no_flag)]
NAMED = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""A function of the user, as `module:function`."""
OwnMetric = Literal["exact_match", "choice", "ranking", "nll", "chrf"]
METRICS: tuple[str, ...] = get_args(OwnMetric)
"""How a set of held-out rows is measured: right final answers; options ranked by likelihood; the rank of an item; NLL;
letters that text has in common with the gold completion."""


def is_named(value: Any) -> bool:
    """Whether a value names a function, as `module:function`."""
    return isinstance(value, str) and re.match(NAMED, value) is not None


def _named_function(value: Any) -> Any:
    if value is not None and not is_named(value):
        raise ValueError("write module:function, such as my_module:my_function")
    return value


def check_metric(value: Any) -> Any:
    """The metric. ValueError if it is neither one of METRICS nor `module:function`."""
    if value is not None and value not in METRICS and not is_named(value):
        raise ValueError(f"it should be one of {', '.join(METRICS)}, or a function as module:function")
    return value


Named = Annotated[str, BeforeValidator(_named_function), Field(pattern=NAMED)]
Metric = Annotated[OwnMetric | Annotated[str, Field(pattern=NAMED)], BeforeValidator(check_metric)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: refuses unknown keys and numbers that are not finite, and checks values on assignment."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True, protected_namespaces=())


def check_lam(value: Any, where: str) -> float:
    """A lambda from a file or the command line as a float. ValueError names `where` if it is no number in 0..MAX_LAM."""
    # NaN is in no range
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_LAM:
        raise ValueError(f"{where} is {str(value)[:80]}: lambda must be a number from 0 to {MAX_LAM:g}")
    return float(value)
