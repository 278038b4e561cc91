"""The metric of recommendation: the rank of the next item among all items.

Hit@K = 1 if it is among the first K, NDCG@K = 1 / log2(rank + 1) if it is, else 0 (one relevant item per row, so the ideal
DCG is 1); both are means over rows. All items of the run compete, none are sampled as negatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tc_ray.config.fusion import FusionSection
from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.decode import HeldOut, rank
from tc_ray.evaluation.item_trie import ItemTrie
from tc_ray.evaluation.metric import Measure, Outcome
from tc_ray.evaluation.statistics import bootstrap_intervals, wilson_interval

SHOWN_ITEMS = 5
RIGHT_WITHIN = 10
"""Wins and losses are counted by Hit@10, lambda is chosen by NDCG@10."""


def hit_at(k: int, place: int | None) -> float:
    """1 if the item's place in the ranking (from 1; None: not ranked) is at most k, else 0."""
    return float(place is not None and place <= k)


def ndcg_at(k: int, place: int | None) -> float:
    """1 / log2(place + 1) if the item's place in the ranking (from 1; None: not ranked) is at most k, else 0."""
    return 1.0 / math.log2(place + 1) if place is not None and place <= k else 0.0


class Ranking:
    """Ranks the items of a run by beam search. labels: item id -> label, the completion that names it."""

    right_name = f"Hit@{RIGHT_WITHIN}"
    score_name = f"NDCG@{RIGHT_WITHIN}"

    def __init__(self, tokenizer: Any, config: FusionSection, labels: Mapping[str, str]) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._labels = sorted(labels.values())
        self._number = {label: number for number, label in enumerate(self._labels)}
        self._trie = ItemTrie([completion_ids(label, tokenizer) for label in self._labels])

    def outcome(self, model: Any, examples: Sequence[HeldOut], lam: float | None) -> Outcome:
        """Rankings and all measures of the configured cutoffs."""
        cutoffs = self._config.ranking.cutoffs
        ranked = rank(
            model,
            self._tokenizer,
            examples,
            self._trie,
            beams=max(cutoffs),
            batch_size=self._config.eval_batch_size,
            lam=lam,
        )
        wanted = [self._number[e.answer] for e in examples]
        places = [items.index(item) + 1 if item in items else None for items, item in zip(ranked, wanted, strict=True)]
        columns = {f"Hit@{k}": [hit_at(k, place) for place in places] for k in cutoffs}
        columns |= {f"NDCG@{k}": [ndcg_at(k, place) for place in places] for k in cutoffs}
        return Outcome(
            right=[bool(value) for value in columns[self.right_name]],
            score=columns[self.score_name],
            said=[" ".join(self._labels[item] for item in items[:SHOWN_ITEMS]) for items in ranked],
            columns=columns,
        )

    def measures(self, pilot: Outcome, fused: Outcome) -> list[Measure]:
        """Every measure: Wilson intervals for hits; the paired bootstrap for NDCG and for all differences."""
        names = list(pilot.columns)
        one, other = (np.array([outcome.columns[name] for name in names]).T for outcome in (pilot, fused))
        intervals = bootstrap_intervals(np.concatenate([one, other, other - one], 1))
        found = []
        for i, name in enumerate(names):
            of_pilot, of_fused, of_difference = intervals[i :: len(names)]
            if name.startswith("Hit"):
                of_pilot, of_fused = (wilson_interval(int(values[:, i].sum()), len(values)) for values in (one, other))
            means = float(one[:, i].mean()), float(other[:, i].mean())
            found.append(Measure(name, means[0], of_pilot, means[1], of_fused, means[1] - means[0], of_difference))
        return found
