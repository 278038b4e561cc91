"""The logit lens of the Pilot and its picture."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tc_ray.models.fusion import Explain, Explanation, FusedModel, draw_logit_lens
from tc_ray.models.fusion.explain import token_text
from tc_ray.models.fusion.lens_picture import words_of
from tests.support.family_layers import final_norm
from tests.support.family_reference import pilot_pass
from tests.support.family_samples import left_padded, make_copilot, new_pilot, prompts, quiet, reference_model
from tests.support.tiny_model import make_tokenizer

quiet()


def generated(family: str, steps: int = 7) -> tuple[FusedModel, Any]:
    """A left-padded batch with a lambda for each sequence, decoded greedily and explained."""
    copilot, _ = make_copilot(family)
    fused = FusedModel.join(new_pilot(family), copilot, space="logits")
    ids, mask = left_padded(prompts())
    lam = torch.tensor([6.0, 0.0, 3.0])
    out = fused.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, lam=lam, explain=Explain(logit_lens=True)
    )
    return fused, out.explanation


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "t5", "flan_t5", "mt5"])
@torch.no_grad()
def test_logit_lens_is_the_reference_s(family: str) -> None:
    """Every layer's output through norm and head by hand; the last layer's is what the Pilot says."""
    _, told = generated(family)
    lens, model = told.logit_lens, reference_model(family)
    decoder, config = model.get_decoder(), model.config
    norm = decoder.final_layer_norm if config.is_encoder_decoder else decoder.norm
    for row, prompt in enumerate(prompts()):
        tokens = told.tokens[row][told.mask[row]].tolist()
        seen, n = pilot_pass(model, prompt, tokens[:-1]), len(tokens)
        assert lens.ids.shape[2] == len(seen.layers)
        chosen = torch.tensor(tokens)[:, None]
        for layer, states in enumerate(seen.layers[:, -n:]):
            states = final_norm(norm, config, states)
            if config.model_type == "t5" and config.scale_decoder_outputs:
                states = states * config.d_model**-0.5
            logits = model.lm_head(states)
            if cap := getattr(config, "final_logit_softcapping", None):
                logits = cap * torch.tanh(logits / cap)
            p = logits.softmax(-1)
            assert torch.equal(lens.ids[row, :n, layer], p.argmax(-1))
            for found, wanted in (
                (lens.probabilities, p.amax(-1)),
                (lens.chosen_probability, p.gather(1, chosen)[:, 0]),
            ):
                torch.testing.assert_close(found[row, :n, layer], wanted, rtol=0, atol=1e-5)
            assert torch.equal(lens.chosen_rank[row, :n, layer], 1 + (p > p.gather(1, chosen)).sum(1))
        assert torch.equal(lens.ids[row, :n, -1], told.pilot_top.ids[row, :n, 0])
        for found, wanted in (
            (lens.probabilities, told.pilot_top.pilot),
            (lens.chosen_probability, told.chosen.pilot),
        ):
            torch.testing.assert_close(found[row, :n, -1], wanted[row, :n, 0], rtol=0, atol=1e-6)
    assert not torch.equal(lens.ids[..., 0], lens.ids[..., -1])


def test_no_hook_stays() -> None:
    fused, _ = generated("llama")
    heard = [len(layer._forward_hooks) for layer in fused.family.layers(fused.pilot)]
    assert heard == [1] * 4, "the tap's, and no other"
    assert not fused._forward_pre_hooks


# -- the picture --------------------------------------------------------------------------------------------------


@cache
def explained() -> Explanation:
    """20 tokens: more than a picture shows by default."""
    _, told = generated("llama", steps=20)
    return told


def figure(**given: Any) -> Any:
    return draw_logit_lens(explained(), make_tokenizer(), **given)


def test_cells_say_what_the_explanation_says() -> None:
    told = explained()
    lens = told.logit_lens
    assert lens is not None
    n = 16
    assert int(told.mask[0].sum()) > n
    panel = figure().axes[0]
    rows = [lens.ids[0, :n, layer] for layer in range(4)] + [
        top.ids[0, :n, 0] for top in (told.pilot_top, told.fused_top)
    ]
    words = words_of(make_tokenizer(), {int(token) for row in rows for token in row} | set(told.tokens[0].tolist()))
    cells = {text.get_position(): text for text in panel.texts}
    assert len(cells) == 6 * n
    bold = 0
    for column, said in enumerate(told.tokens[0, :n].tolist()):
        for number, row in enumerate(rows):
            text = cells[column, number]
            assert text.get_text() == words[int(row[column])]
            assert (text.get_fontweight() == "bold") == (int(row[column]) == said)
            bold += text.get_fontweight() == "bold"
    assert [label.get_text() for label in panel.get_xticklabels()] == [words[t] for t in told.tokens[0, :n].tolist()]
    names = [*(f"layer {layer}" for layer in (1, 2, 3, 4)), "Pilot", "fused"]
    assert [label.get_text() for label in panel.get_yticklabels()] == names
    changed = (told.pilot_top.ids[0, :n, 0] != told.fused_top.ids[0, :n, 0]).nonzero()[:, 0].tolist()
    assert [patch.get_x() for patch in panel.patches] == [column - 0.5 for column in changed]
    assert changed
    assert 0 < bold < 6 * n


def test_colours_are_probabilities() -> None:
    """The darker, the likelier: red falls from 1 to that of the dark end."""
    from matplotlib.colors import to_rgba

    told = explained()
    lens = told.logit_lens
    assert lens is not None
    [image] = figure(count=5).axes[0].images
    shown = image.get_array()
    for layer in range(4):
        assert shown[layer].tolist() == pytest.approx(lens.probabilities[0, :5, layer].tolist())
    assert shown[5].tolist() == pytest.approx(told.fused_top.fused[0, :5, 0].tolist())
    darkest = to_rgba("#0f4c8a")[0]
    for p in (0.0, 0.25, 1.0):
        assert image.to_rgba(p)[0] == pytest.approx(1 - p * (1 - darkest), abs=0.01)


def test_part_of_a_sequence() -> None:
    told = explained()
    panel = figure(sequence=2, first=3, count=4).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "layer 1",
        "layer 2",
        "layer 3",
        "layer 4",
        "Pilot",
        "fused",
    ]
    words = words_of(make_tokenizer(), told.tokens[2].tolist())
    assert [label.get_text() for label in panel.get_xticklabels()] == [words[t] for t in told.tokens[2, 3:7].tolist()]


def test_picture_is_written(tmp_path: Path) -> None:
    import matplotlib.image

    draw_logit_lens(explained(), make_tokenizer(), tmp_path / "lens.png", count=6)
    picture = matplotlib.image.imread(tmp_path / "lens.png")
    height, width = picture.shape[:2]
    assert width > 900 and height > 300
    assert len({tuple(pixel) for pixel in picture[:: height // 40, :: width // 40].reshape(-1, 4).tolist()}) > 10


def test_pictures_that_cannot_be_drawn() -> None:
    copilot, _ = make_copilot("llama")
    fused = FusedModel.join(new_pilot("llama"), copilot)
    plain = fused.generate(torch.tensor([prompts()[0]]), max_new_tokens=2, do_sample=False, explain=True).explanation
    with pytest.raises(ValueError, match=r"explain=Explain\(logit_lens=True\)"):
        draw_logit_lens(plain, make_tokenizer(), "lens.png")
    with pytest.raises(ValueError, match="no tokens to draw: sequence 0 has"):
        figure(first=99)


def test_words_that_nobody_could_read() -> None:
    """Blanks, line ends, bytes of a character, formulas, padding of the vocabulary and long words."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([" tab\tand\n", "$x^2$", "<|a special one|>", "\u03c0\u03c1", "\x00"])
    base = 258
    [blank] = tokenizer.encode(" ")
    [byte, _] = tokenizer.encode("\u00e8")
    words = words_of(tokenizer, {blank, byte, base, base + 1, base + 2, base + 3, base + 4, 500})
    assert words[blank] == "\u2423"
    assert words[byte] == f"#{byte}"
    assert words[base] == "\u2423tab\u21e5and\u21b5"
    assert words[base + 1] == "$x^2$"
    assert words[base + 2] == "<|a speci\u2026".replace(" ", "\u2423")
    assert words[base + 3] == "\u03c0\u03c1"
    assert words[base + 4] == "\\x00"
    assert words[500] == "#500"


def test_text_of_a_sentencepiece_token() -> None:
    """Its decoder drops the blank before what it takes for the first word."""
    vocabulary = {"<unk>": 0, "\u2581the": 1, "re": 2, "\u2581": 3}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    assert [token_text(tokenizer, token) for token in (1, 2, 3, 0, 9)] == [" the", "re", " ", "<unk>", ""]
