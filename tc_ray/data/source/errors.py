"""The one error of the data package, shown to the user as it is."""

from __future__ import annotations


class DataError(ValueError):
    """Training data cannot be used; the message names file, place and field, and what to do."""
