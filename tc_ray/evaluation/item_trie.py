"""The items that can be answered, as a trie over their tokens; a LogitsProcessor restricts beam search to it.

Invariant: a beam that leaves the trie is dead: only -inf follows, so it cannot end as an item. All beams of a step are looked
up at once (sorted edges, binary search), whatever the number of items. Used by `decode.rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor

_DEAD = -1


class ItemTrie:
    """Items by number, 0 .. len - 1, each a sequence of token ids that ends with the end token.

    Nodes are numbered level by level from the root, 0. Edges: one per node except the root, sorted by `key` = parent * V +
    token; the edges of a node are neighbours, from first_edge[node] to first_edge[node + 1].

    Args:
        sequences: token ids of each item. vocab_size: V of the model.

    Raises:
        ValueError: no item, an empty one, two with the same ids, one that is a prefix of another, or an id outside V.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
        if not sequences:
            raise ValueError("an item trie needs at least one item")
        if not all(sequences):
            raise ValueError("an item has no tokens")
        if not all(0 <= token < vocab_size for ids in sequences for token in ids):
            raise ValueError(f"an item has a token outside the model's vocabulary of {vocab_size}")
        lengths = np.array([len(ids) for ids in sequences])
        self.vocab_size = vocab_size
        self.longest = int(lengths.max())
        padded = np.full((len(sequences), self.longest), -1, dtype=np.int64)
        for number, ids in enumerate(sequences):
            padded[number, : len(ids)] = ids
        at = np.zeros(len(sequences), dtype=np.int64)  # the node that each item has reached
        keys, count = [np.empty(0, dtype=np.int64)], 1
        for level in range(self.longest):
            going = lengths > level
            found, child = np.unique(at[going] * vocab_size + padded[going, level], return_inverse=True)
            keys.append(found)
            at[going] = count + child
            count += len(found)
        self._key = torch.from_numpy(np.concatenate(keys))
        self._first_edge = torch.searchsorted(self._key // vocab_size, torch.arange(count + 1))
        self._item = torch.full((count,), -1)
        self._item[torch.from_numpy(at)] = torch.arange(len(sequences))
        ends = self._first_edge[1:] == self._first_edge[:-1]
        if len(np.unique(at)) < len(sequences) or not bool(ends[torch.from_numpy(at)].all()):
            raise ValueError("two items have the same tokens, or one begins another")
        self._size = len(sequences)

    def __len__(self) -> int:
        return self._size

    def to(self, device: torch.device | str) -> ItemTrie:
        """Move its tensors."""
        self._key, self._first_edge, self._item = (t.to(device) for t in (self._key, self._first_edge, self._item))
        return self

    def walk(self, tokens: torch.Tensor) -> torch.Tensor:
        """Node int64 [R] that token ids [R, n] lead to from the root; -1 if they leave the trie.

        Tokens after a finished item are padding and ignored.
        """
        node = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        for step in range(tokens.shape[1]):
            key = node * self.vocab_size + tokens[:, step]
            edge = torch.searchsorted(self._key, key).clamp_max(len(self._key) - 1)
            alive = (node != _DEAD) & (self._key[edge] == key)
            following = torch.where(alive, edge + 1, _DEAD)  # edges and nodes have one order; the root has no edge
            node = torch.where(self._finished(node), node, following)
        return node

    def items(self, tokens: torch.Tensor) -> torch.Tensor:
        """Item number int64 [R] that token ids [R, n] spell, -1 for none."""
        node = self.walk(tokens)
        return torch.where(node == _DEAD, -1, self._item[node.clamp_min(0)])

    def allowed(self, node: torch.Tensor) -> torch.Tensor:
        """Bool [R, V]: tokens that continue an item from nodes [R]."""
        first = self._first_edge[node.clamp_min(0)]
        count = torch.where(node == _DEAD, 0, self._first_edge[node.clamp_min(0) + 1] - first)
        row = torch.arange(len(node), device=node.device).repeat_interleave(count)
        nth = torch.arange(len(row), device=node.device) - (count.cumsum(0) - count)[row]
        mask = torch.zeros(len(node), self.vocab_size, dtype=torch.bool, device=node.device)
        mask[row, self._key[first[row] + nth] % self.vocab_size] = True
        return mask

    def _finished(self, node: torch.Tensor) -> torch.Tensor:
        return (node != _DEAD) & (self._item[node.clamp_min(0)] >= 0)


class ItemTrieProcessor(LogitsProcessor):
    """Sets the scores of all tokens that continue no item to -inf. begin: columns before the first generated token."""

    def __init__(self, trie: ItemTrie, begin: int) -> None:
        self._trie, self._begin = trie, begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [R, V] after the sequences [R, begin + n]."""
        allowed = self._trie.allowed(self._trie.walk(input_ids[:, self._begin :]))
        kept: torch.FloatTensor = scores.masked_fill(~allowed, -torch.inf)
        return kept
