"""Model folders as they are loaded: every tensor of the model is there, none is left over, and every number is finite.

Invariant: what a folder lacks is never made up. The library fills missing tensors with random numbers and leaves out those it
does not know, with a warning; here both are refused by name. The names are known without reading a weight, so the job and
the plan ask before a worker starts. Used by every loader of a Pilot or Copilot.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tc_ray.config.schema import RunConfig
from tc_ray.config.training import PilotSection
from tc_ray.models.families import family_of
from tc_ray.models.finite import check_finite

HEADS = ("lm_head.",)
"""Tensors of a language model that its decoder alone has no place for."""
_NAMED = 3


class WeightsError(ValueError):
    """The weights of a folder are not those of its model; the message names the tensors in one line."""


def load_whole(kind: Any, path: Path | str, *, leave_out: Collection[str] = (), **options: Any) -> Any:
    """`kind.from_pretrained(path, **options)`, refused unless it is whole and finite. Code in a folder is never run.

    With `device_map="meta"` no weight is read: names and shapes are checked alone.

    Args:
        leave_out: beginnings of names that the folder may hold beyond the model.

    Raises:
        WeightsError: missing or unexpected tensors, or of another shape. NotFiniteError: NaN or infinity in a tensor.
    """
    # other shapes too are refused here, by name, and not by the library
    known = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    with _library_quiet(no_bar=options.get("device_map") == "meta"):  # nothing is read, so there is no progress to show
        model, found = kind.from_pretrained(path, **known, **options)
    _check_names(found, path, leave_out)
    check_finite(itertools.chain(model.named_parameters(), model.named_buffers()), str(path))
    return model


def check_files(files: Iterable[Path]) -> None:
    """Raise NotFiniteError for a NaN or an infinity in safetensors files; a tensor at a time is in memory."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, "pt") as weights:
            names = weights.keys()
            check_finite(((name, weights.get_tensor(name)) for name in names), str(path))


def check_folders(config: RunConfig, pilot: Path | str, base: Path | str) -> None:
    """Refuse, before a worker starts, what the workers would refuse when they load the run's models. Reads no weight.

    Args:
        pilot, base: as `resolve_model` gives them; a hub id is left to the workers, which download it.

    Raises:
        WeightsError: missing or unexpected tensors, or of another shape. ValueError: see `check_adapters`.
        OSError: a folder has no weights at all.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if not isinstance(pilot, Path):
        return
    shape = AutoConfig.from_pretrained(pilot, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if family_of(shape).encoder_decoder else AutoModelForCausalLM
    if config.model.random_weights:
        with torch.device("meta"):
            check_adapters(kind.from_config(shape), config.pilot)
        return
    check_adapters(load_whole(kind, pilot, device_map="meta"), config.pilot)
    if config.log.enabled and isinstance(base, Path) and base != pilot:
        load_whole(AutoModel, base, leave_out=HEADS, device_map="meta")


def check_adapters(model: nn.Module, pilot: PilotSection) -> None:
    """Refuse adapters on a matrix that two modules of the model share (tied embedding and head).

    Merged, an adapter of one would change the other too: the exported model would not be the trained one.

    Raises:
        ValueError: `pilot.lora.target_modules` names such a module.
    """
    asked = (pilot.lora.target_modules or []) if pilot.method == "lora" else []
    users: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(name.rpartition(".")[0])
    for modules in users.values():
        hit = [target for target in asked if any(f".{module}".endswith(f".{target}") for module in modules)]
        if len(modules) > 1 and hit:
            raise ValueError(
                f"pilot.lora.target_modules names {', '.join(hit)}, but {' and '.join(modules)} are one and the same matrix in "
                "this model: an adapter of one would change the other when it is merged for the export. Leave "
                f"{' and '.join(hit)} out"
            )


@contextlib.contextmanager
def _library_quiet(*, no_bar: bool) -> Iterator[None]:
    """Without the library's own table of what it made up or left out: one line of ours says it."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if no_bar:
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
    if missing:
        raise WeightsError(
            f"{path} lacks weights of its model: {_listed(missing)}. They would become random numbers: take a whole copy"
        )
    if unexpected:
        raise WeightsError(
            f"{path} holds weights that its model has no place for: {_listed(unexpected)}. They would be left out: is it "
            "the folder of another model, or of adapters that are not merged?"
        )
    if shapes:
        raise WeightsError(f"{path} holds weights of other shapes than its config.json says: {_listed(shapes)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
