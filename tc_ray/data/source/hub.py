"""Data sets of the Hugging Face hub: hf://datasets/OWNER/NAME[@REVISION][/CONFIGURATION], through the package `datasets`.

Invariant: what `datasets` has loaded is read like any file: one Arrow file or more of its cache (HF_HOME) for each split, named
as the split is. So that folder must be seen by all nodes of a cluster. Called by `find` in the driver.
"""

from __future__ import annotations

import re
from typing import Any

from tc_ray.data.source.files import DataFile, Listing
from tc_ray.data.source.records import DataError
from tc_ray.text import first_line

HUB = "hf://"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+?))?/?")


def list_hub(place: str) -> Listing:
    """The files of a data set by SPLIT/NAME, fetched where the cache has none.

    Raises DataError: the address is wrong, `datasets` is not installed, or the data set cannot be had.
    """
    found = _ADDRESS.fullmatch(place)
    if found is None:
        raise DataError(f"{place}: a data set of the hub is hf://datasets/OWNER/NAME[@REVISION][/CONFIGURATION]")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{place}: reading it needs the package `datasets`, which is not installed: pip install datasets"
        ) from None
    name, revision, configuration = found.groups()
    try:
        splits: Any = datasets.load_dataset(name, configuration, revision=revision)
    except Exception as error:
        # its errors have many types: of the hub, of the network, of the data set's own files
        cause = f" ({first_line(error.__cause__, 300)})" if error.__cause__ else ""
        raise DataError(
            f"{place}: `datasets` cannot load it: {type(error).__name__}: {first_line(error, 300)}{cause}"
        ) from error
    return Listing(
        place,
        {
            f"{split}/{number:05d}.arrow": DataFile(file["filename"])
            for split, rows in splits.items()
            for number, file in enumerate(rows.cache_files)
        },
    )
