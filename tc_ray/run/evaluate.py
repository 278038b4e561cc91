"""The last phases of a run, and `tc-ray eval`: measure models on held-out rows, export what was measured.

Invariant: every start repeats both, since they are made from the two `final` folders alone; what an earlier start has computed
of the same evaluation is found in its parts. Called by `run.job` and `tc-ray eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tc_ray.cluster.capacity import check_capacity
from tc_ray.cluster.session import evaluation_need, ray_session
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.section import Metric
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.data.source.records import DataError
from tc_ray.data.source.sequences import ITEMS_FILE, read_items
from tc_ray.data.source.task_form import load_task
from tc_ray.evaluation.pool import Pool
from tc_ray.evaluation.procedure import PARTS, Task
from tc_ray.evaluation.procedure import evaluate as measure
from tc_ray.evaluation.progress import Progress, TrackedProgress
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.rows import RowSet, encoded_for, read_sets
from tc_ray.evaluation.scores import check_gold
from tc_ray.evaluation.sources import ModelSource, NotFinishedError, find_source, own_form, plain_name, run_source
from tc_ray.files import finite
from tc_ray.models.identity import tokenizer_hash
from tc_ray.pilot.callbacks import call_back
from tc_ray.run.folder import FolderLock
from tc_ray.run.state import Run
from tc_ray.text import visible

FOLDER = "evaluation"
"""Of a run: its report, its rows, its choice of lambda."""


def check_measurable(config: RunConfig) -> None:
    """Raise NoGoldError if the prepared rows of a run lack what its metrics need: before hours of training."""
    sets, validation = run_rows(config.run.path, config)
    labels = set(item_labels(config.run.path, config))
    for rows in (*sets, validation):
        check_gold(rows, labels)


def evaluate(run: Run) -> None:
    """Leaves `run.report` and evaluation/."""
    config, out = run.config, run.folder / FOLDER
    source = run_source(run.folder, config, plain_name(run.folder.name), no_copilot=run.no_copilot)
    sets, validation = run_rows(run.folder, config)
    task = Task(source, sets, validation if source.copilot else None, out)
    run.tracker.waiting.remote(FOLDER, evaluation_need(config).starting())
    with TrackedProgress(run.tracker) as progress:
        report = _measured([task], config, out, progress, labels=item_labels(run.folder, config), exports=True)
    run.tracker.evaluation.remote(finite(report.to_dict()), report.markdown())
    run.report = report
    call_back(config.callbacks, "on_evaluation", finite(report.to_dict()), out, report=run.tracker.event.remote)


def export(run: Run) -> None:
    """Leaves `export/`: both models (the Pilot alone if the Copilot failed) and how to join them."""
    from tc_ray.export.write import export_fused

    assert run.report is not None
    run.export = export_fused(run.config, run.report, rounds=run.last_round)
    tracking = run.config.tracking
    if tracking.log_model and "mlflow" in tracking.targets:
        run.tracker.model.remote(_to_log(run, run.export))


def _to_log(run: Run, exported: Path) -> Any:
    from tc_ray.export.pyfunc import describe
    from tc_ray.tracking.logged_model import ModelToLog

    sets, _ = run_rows(run.folder, run.config)
    example = next((row.prompt for rows in sets for row in rows.rows), "")
    return ModelToLog(**describe(exported, run.config), example=example, register=run.config.tracking.register)


@dataclass(frozen=True)
class Asked:
    """What `tc-ray eval` is asked for. data: files by the name of their set; without any the sets of the first run. metrics,
    tasks: by set, instead of the run's. out: default evaluation/ of a run that is alone, else of the current folder."""

    data: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    choose_again: bool = False
    out: Path | None = None


def evaluate_models(models: Sequence[str], asked: Asked) -> tuple[Report, Path]:
    """Measure models on sets; returns the report and its folder. models: see `find_source`.

    Raises NotFinishedError: parts of a run are missing. DataError: a file cannot be read. ModelSourceError: no such model.
    """
    sources = [find_source(model) for model in models]
    if len({source.name for source in sources}) < len(sources):
        raise DataError("two models have one name; give each its own (NAME=FOLDER)")
    config = _leading_config(sources)
    out = (asked.out or _default_out(sources, asked)).expanduser().absolute()
    with ray_session(config), Progress() as progress:
        check_capacity([], [evaluation_need(config)])
        tasks, labels = _tasks(sources, config, asked, out)
        report = _measured(tasks, config, out, progress, labels=labels, choose_again=asked.choose_again)
    return report, out


def evaluate_part(folder: Path, config: RunConfig, part: str, out: Path) -> Report:
    """Measure the models of a run's folder on its rows of one part, `test` or `validation`, and leave the report in `out`."""
    source = run_source(folder, config, plain_name(folder.name))
    sets, validation = run_rows(folder, config)
    measured = sets if part == "test" else [validation]
    task = Task(source, measured, validation if source.copilot else None, folder / FOLDER)
    with Progress() as progress:
        return _measured([task], config, out, progress, labels=item_labels(folder, config))


def _measured(tasks: Sequence[Task], config: RunConfig, out: Path, progress: Progress, **options: Any) -> Report:
    bundle = evaluation_need(config).bundle
    memory = max(task.source.memory_bytes for task in tasks)
    out.mkdir(parents=True, exist_ok=True)
    with FolderLock(out, "an evaluation", name=f"{FOLDER}.lock"):
        with Pool(out / PARTS, progress, bundle=bundle, memory_bytes=memory) as pool:
            report = measure(tasks, config.fusion, pool, out, **options)
        report.save(out)
    return report


def _leading_config(sources: Sequence[ModelSource]) -> RunConfig:
    """Of the first run, whose sets are measured, else of the first export."""
    runs_first = sorted(sources, key=lambda source: source.run is None)
    return next((found for source in runs_first if (found := _config_of(source)) is not None), RunConfig())


def _config_of(source: ModelSource) -> RunConfig | None:
    file = (source.run or Path(source.pilot).parent) / "config.yaml"
    return load_saved_config(file) if file.is_file() else None


def _default_out(sources: Sequence[ModelSource], asked: Asked) -> Path:
    run = sources[0].run
    if len(sources) > 1 or run is None:
        return Path(FOLDER)
    # the run's own report stays
    otherwise = (f"{name}.{metric}" for name, metric in asked.metrics.items())
    return run / "-".join([FOLDER, *sorted([*asked.data, *otherwise])])


def run_rows(folder: Path, config: RunConfig) -> tuple[list[RowSet], RowSet]:
    """Test sets of a run, and its validation rows as one set, from its data folder."""
    fusion, given = config.fusion, config.data.held_out_sets("test")
    sets = []
    for name, rows, left_out in _read(folder / "data" / "test.parquet", fusion.max_test_rows):
        own = given.get(name)
        metric, by = _metric(config, own.metric if own else None, own.task if own else None)
        sets.append(RowSet(name, metric, rows, own.file if own else "the run's own data", left_out, by))
    parts = list(_read(folder / "data" / "validation.parquet", fusion.max_validation_rows))
    metric, by = _metric(config)
    left_out = LeftOut(*(sum(counts) for counts in zip(*(asdict(part[2]).values() for part in parts), strict=True)))
    rows = [row for part in parts for row in part[1]]
    return sets, RowSet("validation", metric, rows, "the run's own data", left_out, by)


def _read(file: Path, limit: int | None) -> list[tuple[str, list[Any], LeftOut]]:
    missing = LeftOut.read(file, limit)
    return [(name, rows, missing[name]) for name, rows in read_sets(file, limit).items()]


def _metric(config: RunConfig, metric: Metric | None = None, task: str | None = None) -> tuple[Metric, str]:
    """Metric and order of options of a set: its own, its task's, the run's, or that of the run's task."""
    name = task or config.data.task
    form = load_task(name) if name else None
    known = form.metric if form else "exact_match"
    by = config.fusion.choose_option_by or (form.choose_option_by if form else "sum")
    return metric or (known if task else config.fusion.metric or known), by


def item_labels(folder: Path, config: RunConfig) -> list[str]:
    """Items to rank; none where nothing is ranked."""
    if config.data.format != "sequences":
        return []
    return sorted(read_items(folder / "data" / ITEMS_FILE).values())


def _tasks(sources: Sequence[ModelSource], config: RunConfig, asked: Asked, out: Path) -> tuple[list[Task], list[str]]:
    """Each model with the rows as it reads them. The first model (of whose run the rows may be) says which rows there are."""
    run = next((source.run for source in sources if source.run is not None), None)
    first = sources[0]
    of_run = next((source.name for source in sources if source.run is not None), first.name)
    forms = {source.name: _Form(source, first.data or config.data if run is not None else None) for source in sources}
    sets, validation = run_rows(run, config) if run is not None else ([], None)
    if asked.data:
        sets = [_from_file(name, file, forms[first.name], config, asked, out) for name, file in asked.data.items()]
        read_by = forms[first.name]
    elif not sets:
        raise NotFinishedError(f"{of_run} has no test rows of its own: give --data NAME=FILE")
    else:
        read_by = forms[of_run]
    sets = [replace(rows, metric=asked.metrics.get(rows.name, rows.metric)) for rows in sets]
    for option, given, known in (
        ("metric", asked.metrics, [rows.name for rows in sets]),
        ("task", asked.tasks, asked.data),
    ):
        if unknown := ", ".join(sorted(set(given) - set(known))):
            of_files = " of --data" if option == "task" else ""
            raise DataError(
                f"--{option}: there is no set {unknown}; the sets{of_files} are {', '.join(known) or '(none)'}"
            )
    tasks = []
    for source in sources:
        own_validation, own = validation, config
        if source.run is not None and source.run != run:
            own = _config_of(source) or config
            own_validation = run_rows(source.run, own)[1]
        elif own_validation is not None and source.run is None:
            own_validation = forms[source.name].read([own_validation], forms[of_run])[0]
        tasks.append(
            Task(
                source,
                forms[source.name].read(sets, read_by),
                own_validation if source.copilot is not None else None,
                None if source.run is None else source.run / FOLDER,
                own.fusion,
            )
        )
    return tasks, [] if run is None else item_labels(run, config)


class _Form:
    """How a model reads prompts. given: the form of one that brings none; None: its chat template, or the text alone."""

    def __init__(self, source: ModelSource, given: Any) -> None:
        from transformers import AutoConfig, AutoTokenizer

        shape = AutoConfig.from_pretrained(source.pilot, trust_remote_code=False)
        self.tokenizer = AutoTokenizer.from_pretrained(source.pilot, trust_remote_code=False)
        if source.data is None and source.settings is not None:
            given = None  # an exported model carries its form as its chat template
        self.data = source.data or given or own_form(self.tokenizer)
        self.encoder_decoder, self.vocab_size = bool(shape.is_encoder_decoder), int(shape.vocab_size)
        self._key = tokenizer_hash(self.tokenizer), self.data.template, self.data.plain_template, self.data.system

    def encoder(self, config: RunConfig) -> Encoder:
        """For files of records."""
        return Encoder(self.data, self.tokenizer, config.data_seed, self.encoder_decoder, self.vocab_size)

    def read(self, sets: Sequence[RowSet], other: _Form) -> list[RowSet]:
        """Rows that `other` has encoded, for this model."""
        if self._key == other._key:
            return list(sets)
        form = self.data, self.tokenizer, self.encoder_decoder, other.tokenizer
        return [replace(rows, rows=encoded_for(rows.rows, *form)) for rows in sets]


def _from_file(name: str, file: str, form: _Form, config: RunConfig, asked: Asked, out: Path) -> RowSet:
    from tc_ray.data.prepared.prepare import prepare_test_file

    task = asked.tasks.get(name)
    prepared = prepare_test_file(form.encoder(config).for_task(task), file, out / "data" / name, name)
    for line in prepared.notes:
        print(visible(line), flush=True)
    ((_, rows, left_out),) = _read(prepared.file("test"), None)
    metric, by = _metric(config, task=task)
    return RowSet(name, metric, rows, file, left_out, by)
