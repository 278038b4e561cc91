"""How like a free text is to the gold one, by the library that papers report from. Pure; called by `scores`."""

from __future__ import annotations

from functools import cache
from typing import Any


def chrf(said: str, gold: str) -> float:
    """chrF of one text, 0 to 100: F2 over character n-grams up to 6, blanks left out (Popovic 2015; sacrebleu's own settings).

    It needs no words, so it fits any language, and it moves with every letter. The mean over rows is not the corpus chrF of a
    translation paper, which adds the counts of all rows first.
    """
    return float(_metric().sentence_score(said, [gold]).score)


@cache
def _metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
