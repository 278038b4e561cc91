"""Which failures of a worker a restart can cure, and a failure in one line.

Invariant: imports neither the package nor Ray. Called by the loops that restart workers (`pilot.trainer`, `copilot.group`): a
start that would fail again is not tried.
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
"""Python's own errors that follow from code, settings or data alone. A RuntimeError is not: torch raises it for a lost peer."""
SHOWN = 300


def is_final(error: BaseException) -> bool:
    """Whether a new start on the same data would end in the same error.

    Errors of this package are final unless the class has `may_pass = True`, and so are those in FINAL. All others may pass:
    dead workers, nodes and actors, memory, disks, connections, devices.
    """
    return any(_is_final(cause) for cause in _causes(error))


def first_final(errors: dict[int, Exception]) -> tuple[int, Exception]:
    """The error that explains the failure of a group (rank -> error, at least one): a final one, else the lowest rank's."""
    return min(errors.items(), key=lambda item: (not is_final(item[1]), item[0]))


def short(error: BaseException) -> str:
    """Type and last line of the error that was raised first; of Ray's about memory the first lines, the last ones are advice."""
    *_, cause = _causes(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if "OutOfMemory" in type(cause).__name__ else (lines or [""])[-1]
    return f"{type(cause).__name__}: {said}"[:SHOWN]


def reason(error: BaseException) -> str:
    """Why a run has failed: this package's own words, which may be several lines, else type and line as in `short`."""
    *_, cause = _causes(error)
    own = type(cause).__module__.partition(".")[0] == "tc_ray"
    return str(cause).strip() if own else short(cause)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: Ray keeps them in `cause`, Ray Train in `health_check_failure`."""
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
    # exact Python types only: a library's subclass may pass, for instance a file that was cut off while it was read
    return module == "builtins" and isinstance(error, FINAL)
