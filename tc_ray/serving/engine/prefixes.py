"""Computed prompts that later prompts begin with, so that a system prompt is computed once.

Invariant: a prompt reuses prompts of its own owner only: a quick answer would show what others have asked.
"""

from __future__ import annotations

from collections import OrderedDict

from tc_ray.models.decoding.prefill import Prefill, PromptPrefix, shared_length

MIN_TOKENS = 16
"""Shorter beginnings are computed again: copying them saves nothing."""


class Prefixes:
    """The prompts used last, within a number of bytes; 0 keeps none."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._kept: OrderedDict[tuple[bytes, tuple[int, ...]], PromptPrefix] = OrderedDict()
        self.nbytes = 0
        """Bytes held."""

    def longest(self, ids: tuple[int, ...], owner: bytes = b"") -> PromptPrefix | None:
        """The owner's kept prompt that shares the longest beginning with `ids`, if that is worth it."""
        best, shared = None, MIN_TOKENS - 1
        for (whose, _), prefix in self._kept.items():
            if whose == owner and prefix.ids[: shared + 1] == ids[: shared + 1]:  # otherwise it shares no more
                count = shared_length(prefix.ids, ids)
                if count > shared:
                    best, shared = prefix, count
        if best is not None:
            self._kept.move_to_end((owner, best.ids))
        return best

    def keep(self, prefill: Prefill, owner: bytes = b"") -> None:
        """Keep a computed prompt; drop the least recently used ones beyond the budget."""
        if not self._budget or len(prefill.ids) < MIN_TOKENS or (owner, prefill.ids) in self._kept:
            return
        prefix = prefill.prefix()
        if prefix is None or prefix.nbytes > self._budget:
            return
        self._kept[owner, prefix.ids] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._budget:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
