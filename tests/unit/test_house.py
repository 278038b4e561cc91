"""The house rules that a program can check: layers, import circles, light imports, file sizes, YAML."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tc_ray"
MAX_LINES = 400
MAX_FUNCTION = 80
MAX_MODULES = 15
FOUNDATION = {"tc_ray.files", "tc_ray.text"}
"""Modules that every room may import. They import nothing else of the package."""

ROOMS = {
    "cli": {
        "cluster",
        "config",
        "copilot",
        "export",
        "inspection",
        "mistakelog.maintain",
        "mistakelog.read",
        "mistakelog.table",
        "run",
        "run.costs",
        "run.plan",
        "serving.chat",
        "serving.deploy",
        "study",
        "tracking",
    },
    "cluster": {"config"},
    "config": set(),
    "copilot": {
        "cluster",
        "config",
        "data.prepared",
        "mistakelog.read",
        "mistakelog.rows",
        "mistakelog.table",
        "models",
        "models.copilot",
        "models.pilot",
    },
    "data": set(),
    "data.encode": {"config", "data.source"},
    "data.prepared": {"config", "data.encode", "data.source"},
    "data.source": {"config"},
    "evaluation": {
        "cluster",
        "config",
        "data.encode",
        "data.prepared",
        "data.source",
        "evaluation.answers",
        "models",
        "models.copilot",
        "models.decoding",
        "models.fusion",
        "models.pilot",
    },
    "evaluation.answers": set(),
    "export": {
        "config",
        "data.encode",
        "data.source",
        "evaluation",
        "models",
        "models.copilot",
        "models.fusion",
        "models.pilot",
    },
    "inspection": {"config", "mistakelog.read", "mistakelog.rows", "mistakelog.table", "models"},
    "mistakelog": set(),
    "mistakelog.commit": {"cluster", "config", "mistakelog.maintain", "mistakelog.rows", "mistakelog.table"},
    "mistakelog.maintain": {"config", "mistakelog.read", "mistakelog.rows", "mistakelog.table"},
    "mistakelog.read": {"mistakelog.rows", "mistakelog.table"},
    "mistakelog.rows": set(),
    "mistakelog.table": {"config", "mistakelog.rows"},
    "mistakelog.write": {"config", "mistakelog.rows", "mistakelog.table"},
    "models": {"config"},
    "models.copilot": {"models", "models.pilot"},
    "models.decoding": {"models", "models.fusion"},
    "models.fusion": {"models", "models.copilot", "models.pilot"},
    "models.pilot": {"config", "models"},
    "pilot": {
        "cluster",
        "config",
        "data.encode",
        "data.prepared",
        "mistakelog.commit",
        "mistakelog.rows",
        "mistakelog.table",
        "mistakelog.write",
        "models",
        "models.pilot",
    },
    "run": {
        "cluster",
        "config",
        "copilot",
        "data.encode",
        "data.prepared",
        "data.source",
        "evaluation",
        "export",
        "mistakelog.commit",
        "mistakelog.table",
        "models",
        "models.pilot",
        "pilot",
        "tracking",
    },
    "run.costs": {"config", "inspection", "tracking"},
    "run.plan": {
        "cluster",
        "config",
        "copilot",
        "data.encode",
        "data.source",
        "models",
        "models.copilot",
        "models.pilot",
        "pilot",
        "run",
    },
    "serving": set(),
    "serving.chat": {"config", "serving", "serving.deploy", "serving.engine", "serving.models", "serving.text"},
    "serving.deploy": {"cluster", "config", "export", "serving", "serving.engine", "serving.http", "serving.models"},
    "serving.engine": {"config", "models", "models.decoding", "models.fusion", "serving", "serving.text"},
    "serving.failover": {"config", "serving"},
    "serving.http": {"config", "serving", "serving.engine", "serving.models", "serving.page", "serving.text"},
    "serving.models": {
        "config",
        "export",
        "models",
        "models.copilot",
        "models.fusion",
        "models.pilot",
        "serving",
        "serving.engine",
        "serving.text",
    },
    "serving.page": set(),
    "serving.text": {"data.encode", "serving"},
    "study": {
        "cluster",
        "config",
        "copilot",
        "data.encode",
        "data.prepared",
        "evaluation",
        "inspection",
        "mistakelog.commit",
        "mistakelog.read",
        "mistakelog.table",
        "mistakelog.write",
        "models",
        "models.copilot",
        "models.fusion",
        "models.pilot",
        "pilot",
        "run",
        "run.plan",
        "tracking",
    },
    "tracking": {"cluster", "config"},
}
"""Every room (folder with modules) and the rooms that it imports: no other, and each of them is used."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module, all_modules: set[str], at_import_time: bool) -> Iterator[str]:
    """Modules of the package that a module imports; `at_import_time` leaves out functions and `if TYPE_CHECKING`."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tc_ray")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if (node.module or "").split(".")[0] == "tc_ray":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in all_modules else str(node.module)


@cache
def graph(at_import_time: bool) -> dict[str, set[str]]:
    found = modules()
    names = set(found)
    return {
        name: set(imports(ast.parse(path.read_text(encoding="utf-8")), names, at_import_time)) - {name}
        for name, path in found.items()
    }


def room(module: str) -> str:
    """Folder of a module, dotted and without the package's name; "" for the package's own modules."""
    folder = modules()[module].parent.relative_to(PACKAGE)
    return "" if folder == Path(".") else ".".join(folder.parts)


def arrows() -> dict[str, dict[str, list[str]]]:
    """Room -> imported room -> imports; all imports count, those in functions and under TYPE_CHECKING too."""
    found: dict[str, dict[str, list[str]]] = {}
    for module, targets in graph(at_import_time=False).items():
        here = found.setdefault(room(module), {})
        for target in sorted(targets):
            if target != "tc_ray" and target not in FOUNDATION and room(target) != room(module):
                here.setdefault(room(target), []).append(f"{module} imports {target}")
    return found


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A path that comes back to where it began, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(edges.get(name, ())):
            found = visit(target, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := visit(name, []))), None)


def test_rooms_import_what_the_table_allows_and_no_more() -> None:
    found = {name: targets for name, targets in arrows().items() if name}
    wrong = [
        line
        for name, targets in found.items()
        for target, lines in targets.items()
        if target not in ROOMS.get(name, set())
        for line in lines
    ]
    assert not wrong, "\n".join(wrong)
    unused = {name: left for name, allowed in ROOMS.items() if (left := allowed - set(found.get(name, ())))}
    assert not unused, f"allowed but not used: {unused}"


def test_the_package_itself_is_a_face_only() -> None:
    """No loose module besides the foundation."""
    assert {name for name in modules() if room(name) == ""} == FOUNDATION | {"tc_ray"}
    assert all(not graph(at_import_time=False)[name] - FOUNDATION for name in FOUNDATION)


def test_no_import_circles() -> None:
    """Between modules and between rooms, over all imports: late ones and those under TYPE_CHECKING too."""
    edges = graph(at_import_time=False)
    assert circle({name: targets - {"tc_ray"} for name, targets in edges.items()}) is None
    assert circle({name: set(targets) for name, targets in arrows().items() if name}) is None


def test_the_checks_see_what_they_look_for() -> None:
    """Guards the tests above: an empty graph would pass them."""
    edges = graph(at_import_time=True)
    assert "tc_ray.config.schema" in edges["tc_ray.tracking.tracker"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


LIGHT = [
    "tc_ray",
    "tc_ray.config.schema",
    "tc_ray.config.load",
    "tc_ray.cli.main",
    "tc_ray.run.job",
    "tc_ray.run.evaluate",
    "tc_ray.study.schedule",
    "tc_ray.serving.failover.proxy",
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_imports(module: str) -> None:
    """For the command line's sake: a refusal comes within a second or two. The last one runs in Serve's proxy process."""
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'transformers', 'mlflow'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_file_is_too_long() -> None:
    files = [p for folder in ("tc_ray", "jobs", "tests") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


def test_no_function_is_too_long() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {lines} lines"
        for folder in ("tc_ray", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_no_folder_is_too_full() -> None:
    folders = [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir())]
    full = {
        str(folder.relative_to(ROOT)): count
        for folder in folders
        if (count := sum(p.name != "__init__.py" for p in folder.glob("*.py"))) > MAX_MODULES
    }
    assert not full, f"folders of more than {MAX_MODULES} modules: {full}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name, path in modules().items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"no module docstring: {silent}"


def yaml_files() -> list[Path]:
    return sorted(p for folder in ("tc_ray", "jobs", "cluster") for p in (ROOT / folder).rglob("*.y*ml"))


@pytest.mark.parametrize("path", yaml_files(), ids=lambda p: p.name)
def test_yaml_parses(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert documents and all(isinstance(document, dict) for document in documents)


def test_there_are_recipes_and_manifests() -> None:
    folders = {p.parent.relative_to(ROOT).as_posix() for p in yaml_files()}
    assert {"tc_ray/recipes", "cluster"} <= folders
