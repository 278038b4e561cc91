"""Writes a model's weights to safetensors files one tensor at a time: no more than a tensor is ever held.

Invariant: a file's header stands before its first tensor, so names, shapes and type of all weights are known first, and each
comes in its turn. transformers loads the folder as one of its own. Called by the Pilot's export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from tc_ray.files import write_json

SHARD_BYTES = 5 * 10**9
"""Most of one file, if it holds more than one tensor: what hubs and file systems take well."""
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def write_shards(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write `model.safetensors`, or several files and their index, into a folder; returns the digests by name.

    shapes: of all weights, in the order in which they come. weights: names and tensors on the CPU, each asked for when the one
    before is written. shard_bytes: most of a file.
    Raises ValueError: a weight is missing, too many, out of turn, or of another shape or type than was said.
    """
    files = _split({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}, shard_bytes)
    digests: dict[str, str] = {}
    coming = iter(weights)
    for file, names in files.items():
        with open(folder / file, "wb") as out:
            out.write(_header(names, shapes, dtype))
            for due in names:
                name, tensor = next(coming, ("nothing", torch.empty(0)))
                if (name, tensor.shape, tensor.dtype) != (due, shapes[due], dtype):
                    raise ValueError(
                        f"{name} of {tuple(tensor.shape)} {tensor.dtype} is not the weight that is due: {due} of "
                        f"{tuple(shapes[due])} {dtype}"
                    )
                data = _bytes_of(tensor)
                del tensor
                out.write(data)
                digests[name] = hashlib.sha256(data).hexdigest()
    for name, _ in coming:
        raise ValueError(f"{name} is a weight too many")
    if len(files) > 1:
        size = sum(shape.numel() for shape in shapes.values())
        total = {"total_parameters": size, "total_size": size * dtype.itemsize}
        places = {name: file for file, names in files.items() for name in names}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
    return digests


def _header(names: Sequence[str], shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> bytes:
    """Of a file with these tensors, one behind the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        end = at + shapes[name].numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _split(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{at:05}-of-{len(groups):05}.safetensors": names for at, names in enumerate(groups, 1)}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Of a tensor on the CPU; a copy only if it is not contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
