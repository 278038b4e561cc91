"""The items that can be answered, as the tokens that continue each beginning of one; a LogitsProcessor holds beam search to it.

Invariant: a beam that leaves the trie is dead: only -inf follows, so it cannot end as an item. Used by `decode.rank`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class ItemTrie:
    """Items by number, 0 .. len - 1, each a sequence of token ids that ends with the end token.

    Raises ValueError: no item, two with the same ids, or one that is the beginning of another.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._number = {tuple(ids): number for number, ids in enumerate(sequences)}
        following: dict[tuple[int, ...], set[int]] = {}
        for ids in self._number:
            for at, token in enumerate(ids):
                following.setdefault(ids[:at], set()).add(token)
        if not sequences or len(self._number) < len(sequences) or following.keys() & self._number.keys():
            raise ValueError("there is no item, two have the same tokens, or one begins another")
        self._following = {ids: sorted(tokens) for ids, tokens in following.items()}
        self._end = sequences[0][-1]
        self.longest = max(map(len, sequences))

    def __len__(self) -> int:
        return len(self._number)

    def item(self, ids: list[int]) -> int | None:
        """Number of the item that token ids spell up to their first end token; None: they spell none."""
        return self._number.get(tuple(ids[: ids.index(self._end) + 1])) if self._end in ids else None

    def allowed(self, ids: Sequence[int]) -> list[int]:
        """Tokens that continue an item after these."""
        return self._following.get(tuple(ids), [])


class ItemTrieProcessor(LogitsProcessor):
    """Sets the scores of all tokens that continue no item to -inf. begin: columns before the first generated token."""

    def __init__(self, trie: ItemTrie, begin: int) -> None:
        self._trie, self._begin = trie, begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [R, V] after the sequences [R, begin + n]."""
        beams = enumerate(input_ids[:, self._begin :].tolist())
        places = [(row, token) for row, ids in beams for token in self._trie.allowed(ids)]
        row, token = torch.tensor(places, dtype=torch.long, device=scores.device).view(-1, 2).T
        kept: torch.FloatTensor = torch.full_like(scores, -torch.inf)
        kept[row, token] = scores[row, token]
        return kept
