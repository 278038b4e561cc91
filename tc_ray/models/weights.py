"""Model folders are loaded whole and finite, or refused; steps with numbers that are not finite are counted.

Invariant: a missing tensor is never made up. The library fills missing tensors with random numbers and ignores unknown ones; here
both are refused by name, without reading a weight where `device_map="meta"`. Weights with a NaN or an infinity are neither stored as
complete nor loaded.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

MOST_IN_A_ROW = 10
"""Steps left out in a row that end a training: the weights themselves must be spoilt."""


class NotFiniteError(ValueError):
    """Weights, or every step of a training, hold NaN or infinity; the message says which."""


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinity. One pass over each, without a copy; meta tensors are skipped."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        # both are NaN if one number is
        low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return name
    return None


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raise NotFiniteError that names the place and the first tensor with a NaN or an infinity."""
    name = first_not_finite(tensors)
    if name is not None:
        raise NotFiniteError(f"{where}: the weight {name} holds numbers that are not finite (NaN or infinity)")


class LeftOut:
    """Counts steps left out because their loss or gradient was not finite. what: the training; advice: for the error."""

    def __init__(self, what: str, advice: str) -> None:
        self._what, self._advice = what, advice
        self.count = 0
        """Left out so far."""
        self._in_a_row = 0

    def add(self, finite: bool, loss: float) -> bool:
        """Count the next step; returns whether it is the first in a row that is left out.

        Raises NotFiniteError: MOST_IN_A_ROW steps were left out in a row.
        """
        if finite:
            self._in_a_row = 0
            return False
        self.count += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise NotFiniteError(
                f"{self._what}: loss or gradient was not finite {self._in_a_row} times in a row (the last loss: {loss}); "
                f"{self._advice}"
            )
        return self._in_a_row == 1


HEADS = ("lm_head.",)
"""Tensors of a language model that its decoder alone has no place for."""
_NAMED = 3


class WeightsError(ValueError):
    """The weights of a folder are not those of its model; the message names the tensors in one line."""


class ExportMismatchError(RuntimeError):
    """A written folder is not the trained model; nothing was published."""


def load_whole(
    kind: Any, path: Path | str, *, leave_out: Collection[str] = (), mapped: bool = False, **options: Any
) -> Any:
    """`kind.from_pretrained(path, **options)`, refused unless it is whole and finite. Code in a folder is never run.

    leave_out: prefixes of names that the folder may hold beyond the model.
    mapped: in the type of the files, as maps of them: what is not touched takes no memory. Who uses a tensor checks that it is
    finite (`check_finite`).
    options: with `device_map="meta"` no weight is read: names and shapes are checked alone.
    Raises WeightsError: missing or unexpected tensors, or of another shape. NotFiniteError: NaN or infinity in a tensor.
    """
    # other shapes are also refused here, by name, not by the library
    known = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    with library_quiet():
        model, found = kind.from_pretrained(path, **known, **options, **({"dtype": "auto"} if mapped else {}))
    _check_names(found, path, leave_out)
    if not mapped:
        check_finite(itertools.chain(model.named_parameters(), model.named_buffers()), str(path))
    return model


def check_files(files: Iterable[Path]) -> None:
    """Raise NotFiniteError for a NaN or an infinity in safetensors files; a tensor at a time is in memory."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, "pt") as weights:
            names = weights.keys()
            check_finite(((name, weights.get_tensor(name)) for name in names), str(path))


@contextlib.contextmanager
def library_quiet() -> Iterator[None]:
    """Silence the library's bar, and its table of missing and unused tensors: our error names them in one line."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _check_names(found: Mapping[str, Any], path: Path | str, leave_out: Collection[str]) -> None:
    missing = sorted(found["missing_keys"])
    unexpected = sorted(key for key in found["unexpected_keys"] if not key.startswith(tuple(leave_out)))
    shapes = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    for names, fault, advice in (
        (missing, "lacks weights of its model", ". They would become random numbers: take a whole copy"),
        (
            unexpected,
            "holds weights that its model has no place for",
            ": is it another model's, or of adapters not merged?",
        ),
        (shapes, "holds weights of other shapes than its config.json says", ""),
    ):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise WeightsError(f"{path} {fault}: {', '.join(names[:_NAMED])}{more}{advice}")
