"""The mean of two Pilots and the temperature against slow references, one sequence and one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from tc_ray.evaluation.decode import HeldOut
from tc_ray.study.gold import gold_measures, gold_tokens
from tc_ray.study.pilots import TEMPERATURES, AveragedPilots, best_temperature
from tests.support.tiny_model import make_tiny_llama

PROMPTS = [[5, 9, 30], [7, 8, 60, 61, 62], [40, 41]]
NEW = 6


@pytest.fixture(scope="module")
def pilots(tmp_path_factory: pytest.TempPathFactory) -> list[AutoModelForCausalLM]:
    folder = tmp_path_factory.mktemp("pilots")
    places = [make_tiny_llama(folder / str(seed), seed=seed, scale=6.0) for seed in (1, 2)]
    return [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]


@torch.no_grad()
def slow_mean(pilots: list[AutoModelForCausalLM], ids: list[int]) -> torch.Tensor:
    """Mean probabilities of the token after `ids`."""
    return sum(pilot(torch.tensor([ids])).logits[0, -1].softmax(-1) for pilot in pilots) / 2


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def test_greedy_decoding_follows_the_mean(pilots: list[AutoModelForCausalLM]) -> None:
    ids, mask = padded(PROMPTS)
    made = AveragedPilots(*pilots).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=1
    )
    alone = pilots[0].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(PROMPTS):
        wanted = list(prompt)
        while len(wanted) < len(prompt) + NEW and wanted[-1] != 1:
            wanted.append(int(slow_mean(pilots, wanted).argmax()))
        assert made[row, ids.shape[1] :].tolist()[: len(wanted) - len(prompt)] == wanted[len(prompt) :]
    assert not torch.equal(made, alone), "the second Pilot changes nothing here"


def test_beams_that_change_places_are_scored_by_the_mean(pilots: list[AutoModelForCausalLM]) -> None:
    ids, mask = padded(PROMPTS)
    out = AveragedPilots(*pilots).generate(
        *(ids,),
        attention_mask=mask,
        max_new_tokens=NEW,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=0,
        eos_token_id=1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, prompt in enumerate(PROMPTS):
        tokens, total = out.sequences[row, ids.shape[1] :].tolist(), 0.0
        so_far = list(prompt)
        for token in tokens:
            total += float(slow_mean(pilots, so_far)[token].log())
            so_far.append(token)
            if token == 1:
                break
        assert float(out.sequences_scores[row]) == pytest.approx(total, abs=1e-3)


def test_an_encoder_decoder_is_averaged_too() -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        models.append(T5ForConditionalGeneration(config).eval())
    assert isinstance(models[0], T5ForConditionalGeneration) and AutoModelForSeq2SeqLM
    ids, mask = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    made = AveragedPilots(*models).generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for row in range(2):
        source, decoded = ids[row : row + 1, : int(mask[row].sum())], [0]
        for _ in range(4):
            if decoded[-1] == 1:
                break
            with torch.no_grad():
                p = sum(
                    m(input_ids=source, decoder_input_ids=torch.tensor([decoded])).logits[0, -1].softmax(-1)
                    for m in models
                )
            decoded.append(int(p.argmax()))
        assert made[row].tolist()[: len(decoded)] == decoded


def rows() -> list[HeldOut]:
    return [
        HeldOut(0, [5, 9, 30, 31, 32, 1], 3, "", ""),
        HeldOut(1, [7, 8], 2, "", ""),  # no gold token
        HeldOut(2, [40, 41, 42, 1], 2, "", ""),
    ]


def test_nll_of_the_mean_is_that_of_each_token_alone(pilots: list[AutoModelForCausalLM]) -> None:
    found = AveragedPilots(*pilots).gold(rows(), batch_size=2)
    assert found.tokens == [3, 0, 2] and found.nll[1] is None
    for row, example in enumerate(rows()):
        ids, start = example.input_ids, example.target_start
        wanted = [-float(slow_mean(pilots, ids[:at])[ids[at]].log()) for at in range(start, len(ids))]
        if wanted:
            assert found.nll[row] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_the_temperature_is_the_best_of_the_list(pilots: list[AutoModelForCausalLM]) -> None:
    def nll(temperature: float) -> float:
        total = 0.0
        for example in rows():
            for at in range(example.target_start, len(example.input_ids)):
                with torch.no_grad():
                    logits = pilots[0](torch.tensor([example.input_ids[:at]])).logits[0, -1]
                total -= float((logits / temperature).log_softmax(-1)[example.input_ids[at]])
        return total

    found = best_temperature(pilots[0], rows(), batch_size=2)
    assert found == min(TEMPERATURES, key=nll) != 1.0
    plain = gold_measures(gold_tokens(pilots[0], rows(), batch_size=3), 3)
    assert sum(n * t for n, t in zip(plain.nll, plain.tokens, strict=True) if n) == pytest.approx(nll(1.0), abs=1e-4)


def test_without_gold_tokens_the_temperature_is_1(pilots: list[AutoModelForCausalLM], tmp_path: Path) -> None:
    assert best_temperature(pilots[0], rows()[1:2], batch_size=2) == 1.0
