"""Secrets in texts, addresses, options, overrides and command lines; what is harmless stays."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest

from tc_ray.cli.command import message, run_command
from tc_ray.config.load import dump_config, load_config
from tc_ray.config.redact import redact, redact_address, redact_options, redact_override, remember
from tc_ray.config.yaml_file import ConfigError
from tc_ray.mistakelog.table.location import Location
from tc_ray.run.plan.plan import make_plan
from tc_ray.tracking.mlflow_address import mlflow_command
from tc_ray.tracking.mlflow_writer import flat_params, open_run
from tc_ray.tracking.targets import TrackingError
from tc_ray.tracking.tracker import Tracker
from tests.support.tiny_run import tiny_config

SECRET = "Tr0ub4dor-3"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:{}@db:5432/runs",
        "postgresql://{}@db/runs",
        "cannot reach 'https://user:{}@host/path?x=1', giving up",
        "mysql+pymysql://user:a@{}/x?y#z@host/db",
        "https://user:%54r{}%40@host/",
        "https://host/db?user=me&password={}&x=1",
        "https://bucket.host/key?X-Amz-Credential=ab&X-Amz-Signature={}",
        "https://account.host/c/blob?sv=1&sig={}&se=2",
        "GET https://host/x?token={} failed",
        "aws_secret_access_key={}",
        "options {{'AWS_SECRET_ACCESS_KEY': '{}', 'region': 'x'}}",
        '{{"account_key": "{}"}}',
        "Authorization: Bearer {}-and-more",
        "s3://key:{}@bucket/log",
        "hub.refresh_token={}",
        "eos_token_secret={}",
    ],
)
def test_no_secret_is_left_in_a_text(text: str) -> None:
    """Fault 3: userinfo, query credentials and named values, alone and inside longer texts."""
    shown = redact(text.format(SECRET))
    assert SECRET not in shown and "***" in shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "left out because the prompt fills data.cutoff_tokens: 3 rows",
        "http://host:8080/a@b and https://github.com/owner/repo@main",
        "1234 tokens, 12 of them targets; mean_tokens_per_second=4.5",
        "sqlite:////home/me/mlflow.db",
        "unset TC_RAY_API_KEY: it is empty",
        "pilot.learning_rate is 'fast', allowed: a number above 0",
        "s3://bucket/runs/one?versionId=3",
        "write to me@host.org",
        "select a token to use as `pad_token` (tokenizer.pad_token = tokenizer.eos_token e.g.)",
        "eos_token='</s>', pad_token: \"<pad>\", eos_token_id=2, token_accuracy=0.53, token_type_ids=None, first_token=7",
    ],
)
def test_harmless_texts_stay(text: str) -> None:
    assert redact(text) == text


def test_options_are_kept_by_a_list_of_the_harmless_ones() -> None:
    """Fault 3: a list of bad words missed `pass`, `sas` under other names, and userinfo of endpoints and proxies."""
    options = {
        "AWS_REGION": "us-east-1",
        "aws_endpoint_url": "https://host:9000",
        "endpoint": f"http://u:{SECRET}@host:9000",
        "allow_http": "true",
        "some_new_way_in": SECRET,
        "azure_storage_account_name": "mine",
    }
    assert redact_options(options) == {
        **options,
        "endpoint": "http://***@host:9000",
        "some_new_way_in": "***",
    }


def test_command_lines() -> None:
    words = [
        "train",
        "recipe.yaml",
        "pilot.epochs=2",
        f"log.storage_options.way={SECRET}",
        f"tracking.uri=http://u:{SECRET}@h",
    ]
    shown = ["train", "recipe.yaml", "pilot.epochs=2", "log.storage_options.way=***", "tracking.uri=http://***@h"]
    assert [redact_override(word) for word in words] == shown
    assert redact_override("log.storage_options.aws_region=eu") == "log.storage_options.aws_region=eu"


@pytest.mark.parametrize(
    "override",
    [
        "log.storage_option.aws_secret_access_key={}",
        "logs.storage_options.x={}",
        "log.storage_options={}",
        "log={{storage_options: {{aws_secret_access_key: {}}}, path: [1]}}",
        "log.storage_options.aws_secret_access_key.more={}",
        "pilot.epochs=http://user:{}@host/",
        "tracking.password={}",
        "LOG.Storage_Options.some_way={}",
    ],
)
def test_refused_overrides_show_no_secret(override: str) -> None:
    """Fault 3: the message quoted the override as it was typed."""
    text = override.replace("{}", SECRET).replace("{{", "{").replace("}}", "}")
    with pytest.raises(ConfigError) as caught:
        load_config(None, [text])
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in str(caught.value), shown


def test_refused_recipes_show_no_secret(tmp_path: Path) -> None:
    """Fault 3: YAML's own messages quote the line."""
    recipe = tmp_path / "recipe.yaml"
    for text in (
        f"log:\n  storage_options: {SECRET}\n",
        f"log:\n  storage_options:\n    aws_secret_access_key: [{SECRET}]\n",
        f"log:\n  storage_options:\n    aws_secret_access_key: '{SECRET}\n",
        f"log:\n  storage_options:\n    key: @{SECRET}\n",
        f"log:\n  storage_options:\n    key: *{SECRET}\n",
        f"log: {{storage_options: {{a: {SECRET}}}\n",
    ):
        recipe.write_text(text)
        with pytest.raises(ConfigError, match=r"recipe\.yaml.*line \d") as caught:
            load_config(recipe)
        assert SECRET not in str(caught.value)


def test_dumps_and_parameters(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            f"tracking.uri=postgresql://user:{SECRET}@host/db",
            f"log.storage_options.aws_secret_access_key={SECRET}",
            "data.system=write to postgresql://user:word@host as asked",
            f"log.path=s3://key:{SECRET}@bucket/log",
        ],
    )
    assert SECRET not in dump_config(config) + json.dumps(flat_params(config)) + str(Location(config.log.path or ""))
    assert config.public_dump()["tracking"]["uri"] == "postgresql://***@host/db"
    assert config.public_dump()["data"]["system"] == config.data.system, "what is trained on is saved to the letter"
    assert mlflow_command(config.tracking.uri or "") == "mlflow ui --backend-store-uri 'postgresql://***@host/db'"


def test_plan(tmp_path: Path) -> None:
    """Fault 3: what `--plan` prints."""
    config = tiny_config(tmp_path, log__storage_options={"secret_way": SECRET}, tracking__uri=f"http://u:{SECRET}@h")
    config.data.train = f"s3://u:{SECRET}@bucket/rows"
    config.data.fallback = "embedded"
    plan = make_plan(config)
    assert SECRET not in str(plan)


def test_a_struck_out_secret_is_asked_for(tmp_path: Path) -> None:
    """Fault 3, what a resume needs: `***` is never used as if it were the secret."""
    saved = tmp_path / "config.yaml"
    first = [f"tracking.uri=http://u:{SECRET}@h", f"log.storage_options.aws_secret_access_key={SECRET}"]
    saved.write_text(dump_config(load_config(None, first)))
    with pytest.raises(ConfigError, match=r"tracking\.uri, log\.storage_options\.aws_secret_access_key: \*\*\* stands"):
        make_plan(load_config(saved))
    assert not load_config(saved, first).secrets_to_give()
    assert not load_config(saved, ["tracking.enabled=false", first[1]]).secrets_to_give()


def test_errors_events_and_lines_of_loggers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 3: texts of other libraries, known by value from the config."""
    config = tiny_config(tmp_path, log__storage_options={"new_option": f"{SECRET}-option"})
    config.run.path.mkdir()
    tracker = Tracker(config, config.run.path)
    tracker.event("log", f"signature mismatch for {SECRET}-option")
    tracker.finish("failed")
    for file in ("status.json", "metrics.jsonl"):
        text = (config.run.path / file).read_text()
        assert SECRET not in text and "signature mismatch for ***" in text

    assert message(ValueError(f"no entry for {SECRET}-option")).startswith("ValueError: no entry for ***")

    def fail() -> Any:
        logging.getLogger("some.package").warning("retrying %s", f"http://u:{SECRET}@h")
        raise OSError(2, "No such file", f"/share/{SECRET}-option")

    factory = logging.getLogRecordFactory()
    try:
        for debug in ("0", "1"):
            monkeypatch.setenv("TC_RAY_DEBUG", debug)
            with pytest.raises(SystemExit):
                run_command(fail)
    finally:
        logging.setLogRecordFactory(factory)
    shown = capsys.readouterr()
    assert SECRET not in shown.err + shown.out and "Traceback" in shown.err


def test_tracking_error_shows_no_password(tmp_path: Path) -> None:
    """Fault 3: an address that cannot be used is named without its password."""
    config = tiny_config(tmp_path, tracking__enabled=True, tracking__uri=f"nonsense://user:{SECRET}@host/db")
    with pytest.raises(TrackingError) as caught:
        open_run(config, config.run.path)
    assert SECRET not in str(caught.value) and "nonsense://***@host/db" in str(caught.value)


def test_addresses_do_not_depend_on_the_process() -> None:
    """What is compared on a resume must not change with the secrets that a process knows."""
    remember(["bucket-of-mine"])
    assert redact_address("s3://bucket-of-mine/log") == "s3://bucket-of-mine/log"
    assert "bucket-of-mine" not in redact("s3://bucket-of-mine/log")
