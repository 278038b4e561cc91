"""Keys and values of sequences that join and leave a running batch, without copying the others at every token.

Each row is aligned to the right: its entries stand in columns [start, width), and all rows write the same new column. So
one slice assignment per layer stores a token, distances between columns are distances between tokens (which is all that
sliding windows need), and a mask shows where each row begins. Columns before the first start are dropped when the space is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

_ROWS, _COLUMNS = 8, 64
"""A store grows by this many rows and columns."""


def rounded(count: int, step: int) -> int:
    """`count` up to a multiple of `step`."""
    return -(-count // step) * step


class RowStore:
    """Keys and values [layers, 2, rows, heads, columns, head_dim] of a changing set of rows."""

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = layers, heads, head_dim
        self._like = {"dtype": dtype, "device": device}
        self._data = self._zeros(0, 0)
        self.starts: list[int] = []
        """First column of each row."""
        self.width = 0
        """Columns in use; rows end here."""

    def _zeros(self, rows: int, columns: int) -> torch.Tensor:
        layers, heads, head_dim = self._shape
        # what stands before a row's start is masked, but must be finite
        return torch.zeros(layers, 2, rows, heads, columns, head_dim, **self._like)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one column of one row."""
        layers, heads, head_dim = self._shape
        return layers * 2 * heads * head_dim * self._data.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._data.nbytes

    def planned_bytes(self, rows: int, columns: int) -> int:
        """Bytes of an empty store after `reserve(rows, columns)`."""
        return rounded(rows, _ROWS) * rounded(columns, _COLUMNS) * self.bytes_per_entry

    def at_least(self, rows: int, columns: int) -> tuple[int, int]:
        """The given rows and columns, or those of the store where they are more."""
        return max(rows, self._data.shape[2]), max(columns, self._data.shape[4])

    def lengths(self) -> list[int]:
        """Entries of each row."""
        return [self.width - start for start in self.starts]

    def reserve(self, rows: int, columns: int) -> None:
        """Resize the store to these rows and columns, rounded up. Raises ValueError where the entries in use do not fit."""
        wanted = rounded(rows, _ROWS), rounded(columns, _COLUMNS)
        have = self._data.shape[2], self._data.shape[4]
        if wanted == have:
            return
        longest = max(self.lengths(), default=0)
        if len(self) > wanted[0] or longest > wanted[1]:
            raise ValueError(f"{len(self)} rows of up to {longest} entries do not fit into {wanted}")
        fresh = self._zeros(*wanted)
        if longest:
            fresh[:, :, : len(self), :, :longest] = self._data[:, :, : len(self), :, self.width - longest : self.width]
        shift = self.width - longest
        self._data, self.width = fresh, longest
        self.starts = [start - shift for start in self.starts]

    def ensure_columns(self, columns: int) -> None:
        """Drop the columns before every row if `columns` more need it. Raises ValueError where they were not reserved."""
        if self.width + columns <= self._data.shape[4]:
            return
        free = min(self.starts, default=self.width)
        if self.width - free + columns > self._data.shape[4]:
            raise ValueError(
                f"{self.width - free} + {columns} columns do not fit into the {self._data.shape[4]} reserved"
            )
        rows = len(self)
        self._data[:, :, :rows, :, : self.width - free] = self._data[:, :, :rows, :, free : self.width].clone()
        self.width -= free
        self.starts = [start - free for start in self.starts]

    def join(self, entries: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> None:
        """Add a row of `count` entries at the end.

        Args:
            entries: of each layer, keys and values [1, heads, n, head_dim]; n < count where a layer keeps the last ones only.

        Raises:
            ValueError: the row was not reserved.
        """
        if count > self._data.shape[4] or len(self) == self._data.shape[2]:
            raise ValueError(f"a row of {count} entries does not fit into the reserved {tuple(self._data.shape)}")
        if count > self.width:
            rows, shift = len(self), count - self.width
            self._data[:, :, :rows, :, shift:count] = self._data[:, :, :rows, :, : self.width].clone()
            self.starts, self.width = [start + shift for start in self.starts], count
        row, end = len(self), self.width
        for layer, pair in enumerate(entries):
            for which, tensor in enumerate(pair):
                self._data[layer, which, row, :, end - tensor.shape[2] : end] = tensor[0]
        self.starts.append(end - count)

    def leave(self, row: int) -> None:
        """Remove a row; the last one fills its place."""
        last = len(self) - 1
        if row != last:
            start = self.starts[last]
            self._data[:, :, row, :, start : self.width] = self._data[:, :, last, :, start : self.width]
            self.starts[row] = start
        self.starts.pop()
        if not self.starts:
            self.width = 0

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [rows, heads, n, head_dim] of a layer behind the columns in use; returns all its keys and values.

        The columns count as in use after `advance`, when every layer has written.
        """
        all_keys, all_values = self.read(layer, keys.shape[2])
        all_keys[:, :, self.width :] = keys
        all_values[:, :, self.width :] = values
        return all_keys, all_values

    def read(self, layer: int, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values [rows, heads, width + more, head_dim]: the columns in use, and the next ones."""
        keys, values = self._data[layer, :, : len(self), :, : self.width + more]
        return keys, values

    def advance(self, columns: int) -> None:
        """Every layer has written `columns` columns."""
        self.width += columns

    def visible(self, columns: int) -> torch.Tensor | None:
        """Bool [rows, width + columns], where each row has entries, counting those to be written; None: everywhere."""
        if not any(self.starts):
            return None
        starts = torch.tensor(self.starts, device=self._data.device)
        return torch.arange(self.width + columns, device=self._data.device) >= starts[:, None]


class RowLayer(CacheLayerMixin):
    """A layer of a RowStore as a cache layer of transformers."""

    is_sliding = False

    def __init__(self, store: RowStore, layer: int) -> None:
        super().__init__()
        self._store, self._layer = store, layer
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        """The store is allocated already."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Store new keys and values; returns all."""
        return self._store.write(self._layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that a mask covers, and the first."""
        return self._store.width + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self._store.width

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1


class RowCache:
    """The cache of the Copilot's layers `layers`, whose keys and values the store holds in this order."""

    def __init__(self, store: RowStore, layers: Sequence[int]) -> None:
        self._store, self._places = store, {layer: place for place, layer in enumerate(layers)}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values; returns all."""
        return self._store.write(self._places[layer_idx], key, value)

    def get_seq_length(self, layer_idx: int) -> int:
        """Columns in use: T5 counts distances from here."""
        return self._store.width
