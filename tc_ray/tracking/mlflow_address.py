"""Where MLflow is and as whom: the tracking URI, the experiment, the caller's variables.

Invariant: what the config leaves open is the environment's, as in MLflow itself. The variables travel as an argument of the Tracker
and of a study's cells, in no runtime environment of Ray, which its logs and its dashboard show. Used by `mlflow_writer`, `tracker`,
`run.job` and `study`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tc_ray.config.redact import named_like_secrets, redact_address, remember
from tc_ray.config.schema import RunConfig
from tc_ray.config.tracking import TRACKING_VARIABLE

EXPERIMENT_VARIABLE, EXPERIMENT_ID_VARIABLE = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
EXPERIMENT = "tc-ray"
"""Name of the experiment where neither the config nor the environment names one."""
_PREFIXES = ("MLFLOW_", "WANDB_")
_SOON = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


def resolve_uri(config: RunConfig) -> str:
    """Tracking URI: tracking.uri, else MLFLOW_TRACKING_URI, else mlflow.db beside the run folder."""
    return config.tracking.uri or os.environ.get(TRACKING_VARIABLE) or sqlite_uri(config.run.path.parent / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """URI of a database file whose path may hold any character.

    With `sqlite:` MLflow makes a folder of the name that is quoted in the URI; it does not where the driver is named.
    """
    from sqlalchemy import URL

    plain = URL.create("sqlite", database=str(file)).render_as_string()
    return plain if plain == f"sqlite:///{file}" else plain.replace("sqlite:", "sqlite+pysqlite:", 1)


def sqlite_file(uri: str) -> Path | None:
    """The database file of an sqlite URI; None: it is another store, or in memory."""
    from sqlalchemy import make_url

    if not uri.startswith("sqlite"):
        return None
    name = make_url(uri).database
    return Path(name) if name and name != ":memory:" else None


def mlflow_command(uri: str) -> str:
    """The shell command that shows a tracking URI in a browser, or a server's address. Without secrets."""
    shown = redact_address(uri)
    return shown if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(shown)}"


def experiment_name(config: RunConfig) -> str:
    """tracking.experiment, else MLFLOW_EXPERIMENT_NAME, else EXPERIMENT."""
    return config.tracking.experiment or os.environ.get(EXPERIMENT_VARIABLE) or EXPERIMENT


def experiment_id(config: RunConfig) -> str | None:
    """MLFLOW_EXPERIMENT_ID, where neither the config nor MLFLOW_EXPERIMENT_NAME names an experiment."""
    if config.tracking.experiment or os.environ.get(EXPERIMENT_VARIABLE):
        return None
    return os.environ.get(EXPERIMENT_ID_VARIABLE) or None


def tracker_variables() -> dict[str, str]:
    """The `MLFLOW_*` and `WANDB_*` variables of this process. Those named like secrets are struck out of its texts from now on."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    remember(named_like_secrets(found))
    return found


def take_variables(variables: Mapping[str, str]) -> None:
    """Let the variables of another process hold for this one too."""
    remember(named_like_secrets(variables))
    os.environ.update(variables)


@contextmanager
def refused_soon() -> Iterator[None]:
    """MLflow gives up on a server that does not answer within seconds, not after minutes, unless the user's variables say else.

    Not for uploads: a server may take longer than that to store a file.
    """
    mine = {name: value for name, value in _SOON.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
