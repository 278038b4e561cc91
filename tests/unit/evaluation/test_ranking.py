"""Ranking of items: the trie, beam search against scoring every item, the whole procedure."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tc_ray.config.fusion import FusionSection
from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.decode import rankings
from tc_ray.evaluation.item_trie import ItemTrie, ItemTrieProcessor
from tc_ray.evaluation.passes import Pass
from tc_ray.evaluation.procedure import Task, evaluate
from tc_ray.evaluation.rows import HeldOut
from tc_ray.evaluation.scores import ndcg_at
from tc_ray.evaluation.statistics import bootstrap_intervals
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import load_pilot
from tests.support.evaluation_samples import HerePool, row_set, source
from tests.support.family_reference import Fusion, Made, beam_search
from tests.support.family_samples import make_copilot, new_pilot, reference_model
from tests.support.tiny_families import END, VOCAB
from tests.support.tiny_model import make_tokenizer

ITEMS_MODEL = Path(__file__).resolve().parents[3] / "tc_ray" / "recipes" / "models" / "t5-items"
# one to three tokens, some beginning others
LABELS = ["1", "12", "123", "13", "2", "21", "22", "220", "3", "30", "305", "4", "45", "46", "470", "8"]


def test_bootstrap_interval_of_a_mean_and_of_a_paired_difference() -> None:
    draw = np.random.default_rng(3)
    one = draw.random(400)
    other = one + 0.02 + 0.01 * draw.standard_normal(400)
    values = np.stack([one, other, other - one], 1)
    intervals = bootstrap_intervals(values)
    assert intervals == bootstrap_intervals(values), "seeded"
    for column, (low, high) in zip(values.T, intervals, strict=True):
        reach = 1.96 * column.std() / math.sqrt(400)
        assert low == pytest.approx(column.mean() - reach, abs=0.15 * reach)
        assert high == pytest.approx(column.mean() + reach, abs=0.15 * reach)
    assert intervals[0][1] > intervals[1][0], "unpaired, the two overlap"
    assert intervals[2][0] > 0.018, "paired, the difference is clear"
    assert all(math.isnan(end) for end in bootstrap_intervals(np.empty((0, 1)))[0])


# -- the trie -----------------------------------------------------------------------------------------------------


def spelled(labels: list[str], tokenizer: Any) -> list[list[int]]:
    return [completion_ids(label, tokenizer) for label in labels]


def test_trie_against_a_dictionary_of_prefixes() -> None:
    draw = np.random.default_rng(0)
    items = sorted({tuple(draw.integers(2, 6, draw.integers(1, 5)).tolist()) for _ in range(40)})
    sequences = [[*item, 1] for item in items]
    trie = ItemTrie(sequences)
    assert (len(trie), trie.longest) == (len(items), max(map(len, sequences)))
    for length in range(4):
        for row in draw.integers(0, 7, (300, length)).tolist():
            assert trie.allowed(row) == sorted(
                {ids[length] for ids in sequences if ids[:length] == row and len(ids) > length}
            )
    padded = [ids + [0] * (6 - len(ids)) for ids in sequences]
    assert [trie.item(ids) for ids in padded] == list(range(len(items))), "padding after the end is ignored"
    assert [trie.item(ids[:1]) for ids in padded] == [None] * len(items), "part of an item is none"
    assert trie.item([0, 1]) is None and trie.item([1, 1]) is None


def test_processor_looks_at_what_was_generated_only() -> None:
    processor = ItemTrieProcessor(ItemTrie([[2, 3, 1], [2, 4, 1]]), begin=2)
    scores = torch.zeros(2, 5)
    out = processor(torch.tensor([[4, 4, 2], [4, 4, 3]]), scores)
    assert out.tolist() == [[-math.inf] * 3 + [0, 0], [-math.inf] * 5], "a beam outside the trie is dead"
    assert scores.eq(0).all()
    dead = processor(torch.tensor([[4, 4, 3], [4, 4, 1]]), scores)
    assert dead.eq(-math.inf).all(), "a fault found by attack: where all beams are dead, there was an IndexError"


@pytest.mark.parametrize("sequences", [[], [[2, 1], [2, 1]], [[2], [2, 3]], [[2, 1], []]])
def test_tries_that_cannot_be_are_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no item, two have the same tokens, or one begins another"):
        ItemTrie(sequences)


# -- beam search against scoring every item -----------------------------------------------------------------------


@cache
def joined(family: str) -> tuple[FusedModel, Made]:
    copilot, made = make_copilot(family)
    return FusedModel.join(new_pilot(family), copilot), made


def held_out(family: str, count: int = 5) -> list[HeldOut]:
    """Prompts of unlike lengths whose gold items are drawn from LABELS."""
    draw = np.random.default_rng(8)
    tokenizer = make_tokenizer()
    rows = []
    for i, length in enumerate(draw.integers(2, 12, count).tolist()):
        prompt = draw.integers(2, VOCAB, length).tolist() + ([END] if family == "t5" else [])
        answer = LABELS[int(draw.integers(len(LABELS)))]
        words = " ".join(draw.choice(LABELS, 2, replace=False))
        rows.append(HeldOut(i, prompt + completion_ids(answer, tokenizer), len(prompt), answer, words))
    return rows


def reference(family: str, lam: float, space: str) -> Fusion:
    fused, made = joined(family)
    return Fusion(reference_model(family), fused.copilot, made, lam, space)


def scores_of_all(fusion: Fusion, prompt: list[int]) -> list[float]:
    """log p~ of every item, token by token."""
    found = []
    for ids in spelled(LABELS, make_tokenizer()):
        rows = fusion.logits(prompt, ids[:-1]).log_softmax(-1)
        found.append(sum(float(row[token]) for row, token in zip(rows, ids, strict=True)))
    return found


def ranked_by(family: str, examples: list[HeldOut], lam: float, space: str, beams: int) -> list[list[int]]:
    fused, _ = joined(family)
    tokenizer = make_tokenizer()
    trie = ItemTrie(spelled(LABELS, tokenizer))
    (found,) = rankings(fused, tokenizer, examples, [(space, lam)], trie, beams=beams)
    return found


@pytest.mark.parametrize(("lam", "space"), [(0.0, "probability"), (0.7, "probability"), (1.5, "logits")])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_all_items_are_ranked_as_scoring_each_ranks_them(family: str, lam: float, space: str) -> None:
    examples = held_out(family)
    fusion = reference(family, lam, space)
    lost = 0
    for example, items in zip(examples, ranked_by(family, examples, lam, space, beams=100), strict=True):
        scores = scores_of_all(fusion, example.prompt_ids)
        # clamped p~ is 0: such an item is not ranked, neither before nor after the others
        possible = [i for i in range(len(LABELS)) if scores[i] > -math.inf]
        lost += len(LABELS) - len(possible)
        assert sorted(items) == possible
        for better, worse in pairwise(items):
            assert scores[better] >= scores[worse] - 1e-4
    assert (lost > 0) == (space == "probability" and lam > 0), "clamped items must be among what is tested"


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_few_beams_are_the_reference_s_beam_search(family: str) -> None:
    examples, lam, space = held_out(family), 1.5, "logits"
    fusion, tokenizer = reference(family, lam, space), make_tokenizer()
    sequences = [tuple(ids) for ids in spelled(LABELS, tokenizer)]
    pruned = 0
    for example, items in zip(examples, ranked_by(family, examples, lam, space, beams=3), strict=True):

        def within(tokens: list[int], prompt: list[int] = example.prompt_ids) -> torch.Tensor:
            log_probs = fusion.logits(prompt, tokens)[-1].log_softmax(-1)
            on = {
                ids[len(tokens)] for ids in sequences if list(ids[: len(tokens)]) == tokens and len(ids) > len(tokens)
            }
            kept = torch.full_like(log_probs, -math.inf)
            kept[list(on)] = log_probs[list(on)]
            return kept

        wanted = beam_search(within, beams=3, steps=4, end=END, length_penalty=0.0)
        assert items == [sequences.index(tuple(ids)) for score, ids in wanted if score > -math.inf]
        pruned += list(np.argsort(scores_of_all(fusion, example.prompt_ids))[::-1][:3]) != items
    assert pruned, "three beams never lost an item: the comparison proves little"


def test_a_trie_smaller_than_the_beams_gives_each_item_once() -> None:
    fused, _ = joined("t5")
    tokenizer, examples = make_tokenizer(), held_out("t5")
    for labels in (["7"], ["7", "88", "891"]):
        trie = ItemTrie(spelled(labels, tokenizer))
        (found,) = rankings(fused, tokenizer, examples, [("logits", 0.0)], trie, beams=100)
        assert all(sorted(items) == list(range(len(labels))) for items in found)


def test_a_plain_model_is_ranked_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ITEMS_MODEL)
    torch.manual_seed(1)
    model = load_pilot(ITEMS_MODEL, dtype=torch.float32, random_weights=True).eval()
    labels = [f"{n:04d}" for n in np.random.default_rng(2).permutation(10_000)[:300]]
    trie = ItemTrie(spelled(labels, tokenizer))
    prompt = [15, 37, 59, 81, 1]
    rows = [HeldOut(0, prompt, 5, labels[0], "")]
    ((items,),) = rankings(model, tokenizer, rows, [("logits", 0.0)], trie, beams=300)
    ids = torch.tensor(spelled(labels, tokenizer))
    start = torch.zeros(len(labels), 1, dtype=torch.long)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([prompt] * len(labels)), decoder_input_ids=torch.cat([start, ids[:, :-1]], 1)
        )
    scores = out.logits.log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0].sum(1)
    assert sorted(items) == list(range(300))
    assert (scores[items].diff() <= 1e-4).all()


# -- the whole procedure ------------------------------------------------------------------------------------------


def test_places_are_those_of_scoring_every_item(tmp_path: Path) -> None:
    fused, _ = joined("t5")
    examples, fusion = held_out("t5", 12), reference("t5", 0.8, "logits")
    labels = tuple(LABELS)
    job = Pass("ranked", source(), row_set(examples, "ranking"), (("logits", 0.8),), "own", 4, beams=100, labels=labels)
    found = HerePool(m=(fused, make_tokenizer())).at(tmp_path).run(job)
    for example, ((place, said),) in zip(examples, found, strict=True):
        scores = dict(zip(LABELS, scores_of_all(fusion, example.prompt_ids), strict=True))
        order = sorted(scores, key=lambda label: -scores[label])
        assert place == (order.index(example.answer) + 1 if scores[example.answer] > -math.inf else None)
        assert said.split()[0] == order[0] and len(said.split()) == 5


def test_the_whole_procedure_with_ranking(tmp_path: Path) -> None:
    """Gold items are those that lambda 4 raises most: validation finds it, the test rows are ranked once by each."""
    fused, _ = joined("t5")
    tokenizer = make_tokenizer()
    fusion = FusionSection(space="logits", lam_grid=[0.0, 0.1, 0.3, 4.0], metric="ranking")
    asked = held_out("t5", 12)
    before, after = (ranked_by("t5", asked, lam, "logits", 100) for lam in (0.0, 4.0))
    rows = []
    for e, old, new in zip(asked, before, after, strict=True):
        label = LABELS[
            max(range(len(LABELS)), key=lambda i: ndcg_at(10, new.index(i) + 1) - ndcg_at(10, old.index(i) + 1))
        ]
        ids = e.prompt_ids + completion_ids(label, tokenizer)
        rows.append(HeldOut(e.sample_id, ids, e.target_start, label, e.prompt))
    pool = HerePool(m=(fused, tokenizer))
    task = Task(source(), [row_set(rows[7:], "ranking")], row_set(rows[:7], "ranking", "validation"))
    report = evaluate([task], fusion, pool.at(tmp_path), tmp_path, labels=LABELS)
    chosen = report.first.chosen
    decoded = {row["lam"]: row["score"] for row in chosen.grid if row["score"] is not None}
    by_nll = sorted(chosen.grid[1:], key=lambda row: row["nll"])[:2]
    assert set(decoded) == {0.0, *(row["lam"] for row in by_nll)}, "two more are decoded, those of the best NLL"
    assert chosen.lam == max(decoded, key=lambda lam: decoded[lam])
    pilot, line = report.measured
    places = [items.index(LABELS.index(row.answer)) + 1 for items, row in zip(before[7:], rows[7:], strict=True)]
    assert pilot.value == pytest.approx(sum(ndcg_at(10, place) for place in places) / 5)
    assert pilot.measures["Hit@5"].value == pytest.approx(sum(place <= 5 for place in places) / 5)
    assert line.lam == chosen.lam and [job.kind for job in pool.passes if job.rows.name == "test"] == [
        "forced",
        "ranked",
    ]
