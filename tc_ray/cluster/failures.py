"""Which failures of a worker can pass when it is started again, and how a failure is said in one line.

Invariant: imports nothing of the package and not Ray, so that Pilot and Copilot may ask. Called by the loops that restart
workers (`pilot.trainer`, `copilot.group`): what would fail again is not tried again.
"""

from __future__ import annotations

from collections.abc import Iterator

FINAL = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    NameError,
    ArithmeticError,
    NotImplementedError,
)
"""Python's own errors that follow from code, settings or data alone. A RuntimeError may be torch's word for a lost peer."""
SHOWN = 300


def is_final(error: BaseException) -> bool:
    """Whether a new start on the same data would end in the same error.

    Final are the errors of this package, unless the class says `may_pass = True`, and those of Python's own that follow from
    code, settings or data. All else may pass: dead workers, nodes and actors, memory, disks, connections, devices.
    """
    return any(_is_final(cause) for cause in _causes(error))


def first_final(errors: dict[int, Exception]) -> tuple[int, Exception]:
    """Of the errors of a group by rank (at least one), the one that says most: a final one, else that of the lowest rank."""
    return min(errors.items(), key=lambda item: (not is_final(item[1]), item[0]))


def short(error: BaseException) -> str:
    """Type and last line of the error that was raised first."""
    *_, cause = _causes(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"[:SHOWN]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised for: Ray hands on `cause`, Ray Train `health_check_failure`."""
    seen: set[int] = set()
    current: BaseException | None = error
    while isinstance(current, BaseException) and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = getattr(current, "cause", None) or getattr(current, "health_check_failure", None)


def _is_final(error: BaseException) -> bool:
    module = type(error).__module__
    if module.partition(".")[0] == "tc_ray":
        return not getattr(error, "may_pass", False)
    # errors of other libraries may derive from these and yet pass: a file that was cut off while it was read
    return module == "builtins" and isinstance(error, FINAL)
