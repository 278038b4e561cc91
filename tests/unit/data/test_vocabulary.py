"""Token ids that the model does not embed are refused by name, before anything starts, and padding is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tc_ray.config.data import DataSection
from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.prepare import prepare, prepare_test_file
from tc_ray.data.source.records import DataError
from tc_ray.run.plan.plan import make_plan
from tests.support.data_writers import SUMS, lines
from tests.support.tiny_model import make_tiny_llama, make_tokenizer

ROWS = [{"prompt": f"<tool>{i}", "completion": "x"} for i in range(60)]
REFUSED = r"token '<tool>' has the id 258, but the model embeds 258 tokens .*resize_token_embeddings"


def grown_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def section(folder: Path, rows: list[dict[str, str]]) -> DataSection:
    return DataSection(train=str(lines(folder / "t.jsonl", rows)), template="plain", plain_template="{prompt}>")


def test_a_token_that_the_embedding_lacks_is_refused_where_the_data_have_it(tmp_path: Path) -> None:
    """Fault 20: it ended in an IndexError in the worker, which Ray Train tried again and again."""
    tokenizer, config = grown_tokenizer(), section(tmp_path, ROWS)
    with pytest.raises(DataError, match=REFUSED):
        prepare(Encoder(config, tokenizer, 1, vocab_size=258), tmp_path / "out")
    with pytest.raises(DataError, match=REFUSED):
        prepare_test_file(Encoder(config, tokenizer, 1, vocab_size=258), config.train, tmp_path / "eval")
    assert prepare(Encoder(config, tokenizer, 1, vocab_size=300), tmp_path / "out").rows["train"] == 48, (
        "padding is fine"
    )
    unused = section(tmp_path, SUMS)
    assert prepare(Encoder(unused, tokenizer, 1, vocab_size=258), tmp_path / "out2").rows["train"] == 52


def test_the_name_of_a_special_token_that_is_not_embedded_is_refused_too(tmp_path: Path) -> None:
    """`newtoken`: it would be read as plain text, without a word. Control: without its name nothing is wrong."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    refused = "line 1: names the special token '<tool>', whose id 258 the model does not embed; resize"
    with pytest.raises(DataError, match=f"60 of 60 rows are bad(.|\n)*{refused}"):
        prepare(Encoder(section(tmp_path, ROWS), tokenizer, 1, vocab_size=258), tmp_path / "out")
    assert not prepare(Encoder(section(tmp_path, ROWS), tokenizer, 1, vocab_size=259), tmp_path / "out").quarantined
    assert not prepare(Encoder(section(tmp_path, SUMS), tokenizer, 1, vocab_size=258), tmp_path / "out").quarantined


def test_in_test_rows_too(tmp_path: Path) -> None:
    config = section(tmp_path, SUMS).model_copy(update={"test": str(lines(tmp_path / "x.jsonl", ROWS))})
    with pytest.raises(DataError, match=REFUSED):
        prepare(Encoder(config, grown_tokenizer(), 1, vocab_size=258), tmp_path / "out")


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_end_and_padding_token_must_be_embedded(tmp_path: Path, role: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({role: "<tool>"})
    with pytest.raises(DataError, match=REFUSED):
        prepare(Encoder(section(tmp_path, SUMS), tokenizer, 1, vocab_size=258), tmp_path / "out")


def test_a_plan_refuses_as_the_run_does(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "run": {"folder": tmp_path / "run"},
            "model": {"pilot": str(folder)},
            "data": section(tmp_path, ROWS).model_dump(),
            "pilot": {"method": "full", "batch_size": 8, "micro_batch_size": 4},
        }
    )
    assert re.search(REFUSED, make_plan(config).refusals[0])


def test_a_plan_reads_the_files_that_the_run_reads(tmp_path: Path) -> None:
    """Fault 19: held-out files of the folder are no training rows in the plan either, and what is left out is said."""
    folder = make_tiny_llama(tmp_path / "model")
    lines(tmp_path / "d" / "train.jsonl", SUMS)
    lines(tmp_path / "d" / "eval.jsonl", SUMS[:20])
    lines(tmp_path / "d" / "b.xlsx", ["prompt,completion"])
    config = RunConfig.model_validate(
        {
            "run": {"folder": tmp_path / "run"},
            "model": {"pilot": str(folder)},
            "data": {"train": str(tmp_path / "d"), "template": "plain", "test_size": 4},
            "pilot": {"method": "full", "batch_size": 8, "micro_batch_size": 4},
        }
    )
    plan = make_plan(config)
    assert plan.data is not None and plan.data.rows == 60
    assert "eval.jsonl" in str(plan) and "b.xlsx" in str(plan)
    prepared = prepare(Encoder(config.data, make_tokenizer(), 1), tmp_path / "out")
    assert prepared.rows["train"] == plan.data.rows
