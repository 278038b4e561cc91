"""From the device to the host without stopping the device.

On CUDA a side stream copies into pinned memory while the backward pass runs; whoever needs the numbers waits for the
copy's event, which in a run is the log's writer thread. On the CPU a tensor's memory is used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tc_ray.mistakelog.rows.records import Records


@dataclass(frozen=True)
class PendingRecords:
    """Records whose arrays are still being copied to the host: their values may be read only after `resolve`.

    round, rank, attempt: those of all records. count: how many there are.
    """

    records: Records
    copied: Any
    round: int
    rank: int
    attempt: int

    @property
    def count(self) -> int:
        """Records."""
        return len(self.records)

    def resolve(self) -> Records:
        """Wait until the copy has ended (any thread may)."""
        self.copied.synchronize()
        return self.records


class HostCopy:
    """Copies tensors of one device to the host.

    Args:
        device: of the tensors; its side stream is made here once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, index: np.ndarray) -> torch.Tensor:
        """An index made on the host, on the device; does not wait for the device."""
        tensor = torch.from_numpy(index)
        return tensor if self._stream is None else tensor.pin_memory().to(self.device, non_blocking=True)

    def arrays(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], Any]:
        """Host arrays of contiguous tensors, and the event after which they may be read.

        On the CPU the arrays are the tensors' memory and the event is None. bfloat16 comes as its bits, uint16.
        """
        if self._stream is None:
            return {name: _numpy(tensor) for name, tensor in tensors.items()}, None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            arrays = {}
            for name, tensor in tensors.items():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                # the allocator must not give the memory to the next step before the copy has read it
                tensor.record_stream(self._stream)
                arrays[name] = _numpy(host)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return arrays, copied


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
