"""What a model's weights are, as one number, so that a run is not gone on with over other weights.

Invariant: the number follows from config.json and from the names, types, shapes and bytes of the tensors: not from the files
that they are divided over, nor from where or when these were written. Called by the driver before any worker starts, and by
the training of a Copilot from a stored log.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tc_ray.models.hub import ModelSourceError

_NO_CONTENT = ("_name_or_path", "transformers_version")
"""Keys of config.json that say where and with what it was written."""


def weights_hash(path: Path | str, *, random_weights: bool = False) -> str:
    """16 hex digits over config and weights of a model; every byte is read, at the speed of the disk.

    Args:
        path: model folder; or a hub id, whose commit stands for its content.
        random_weights: the weights are not read but made from the config.

    Raises:
        ModelSourceError: a weight file is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _digest(["hub", str(path), _hub_commit(str(path))])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content: list[Any] = [{key: value for key, value in config.items() if key not in _NO_CONTENT}]
    if random_weights:
        return _digest([*content, "random"])
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return _digest([*content, sorted(tensor for file in files for tensor in _tensors(file))])
    return _digest([*content, [_file_digest(file) for file in sorted(folder.glob("*.bin"))]])


def _hub_commit(name: str) -> str | None:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "_commit_hash", None)


def _tensors(file: Path) -> list[tuple[str, str, str, str]]:
    """(name, type, shape, SHA-256) of the tensors of a safetensors file."""
    if file.stat().st_size < 8:
        raise ModelSourceError(f"{file} is damaged: it is too short to hold tensors; fetch the model again")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        try:
            header = json.loads(content[8:start])
            places = [(name, told) for name, told in header.items() if name != "__metadata__"]
            spans = [(start + told["data_offsets"][0], start + told["data_offsets"][1]) for _, told in places]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelSourceError(f"{file} is damaged: its header cannot be read; fetch the model again") from error
        if any(not start <= first <= last <= len(content) for first, last in spans):
            raise ModelSourceError(f"{file} is damaged: it is shorter than its header says; fetch the model again")

        def hashed(span: tuple[int, int]) -> str:
            with memoryview(content) as whole, whole[span[0] : span[1]] as part:
                return hashlib.sha256(part).hexdigest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing lets go of the interpreter's lock
            digests = list(threads.map(hashed, spans))
    return [
        (name, str(told["dtype"]), str(told["shape"]), digest)
        for (name, told), digest in zip(places, digests, strict=True)
    ]


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
