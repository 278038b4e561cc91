"""One small exported run and an engine over it, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.engine.engine import Engine
from tests.support.serving_samples import LIMITS, make_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def model(export: Path) -> FusedModel:
    return FusedModel.from_pretrained(export)


@pytest.fixture
def engine(model: FusedModel, export: Path) -> Iterator[Engine]:
    engine = Engine(model, AutoTokenizer.from_pretrained(export / "pilot"), LIMITS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompt(export: Path) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(export / "pilot")("Tom has 3 apples")["input_ids"])
