"""What every section of the configuration is made of: the strict base class and the common field types."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

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
Metric = Literal["exact_match", "choice", "ranking", "nll"]
"""How a set of held-out rows is measured: right final answers; options ranked by likelihood; the rank of an item; NLL."""
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
