"""The house rules that a program can check: layers, import circles, light imports, file sizes, YAML."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tc_ray"
MAX_LINES = 400

FOUNDATION = {"capacity", "failures", "files", "signals", "text"}
"""Modules at the root that everything may import, and that import nothing of the package."""

MAY_IMPORT = {
    "config": set(),
    "data": {"config", "models"},
    "models": {"config"},
    "tracking": {"config"},
    "mistakelog": {"config", "data", "models"},
    "inspection": {"config", "models", "mistakelog"},
    "pilot": {"config", "data", "models", "mistakelog"},
    "copilot": {"config", "data", "models", "mistakelog"},
    "evaluation": {"config", "data", "models"},
    "export": {"config", "models", "evaluation"},
    "serving": {"config", "data", "models", "export"},
}
"""Layers and what each may import besides itself. Modules not named (job, plan, cli, ...) are the composition root and may
import everything but `cli`, which only `cli` imports."""


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


def graph(at_import_time: bool) -> dict[str, set[str]]:
    found = modules()
    names = set(found)
    return {
        name: set(imports(ast.parse(path.read_text(encoding="utf-8")), names, at_import_time)) - {name}
        for name, path in found.items()
    }


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


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


def test_imports_run_one_way() -> None:
    wrong = []
    for module, targets in graph(at_import_time=False).items():
        here = layer(module)
        for target in sorted(targets):
            there = layer(target)
            if there in ("", here) or there in FOUNDATION:
                continue
            allowed = here not in FOUNDATION and there in MAY_IMPORT[here] if here in MAY_IMPORT else there != "cli"
            if not allowed:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_import_circles() -> None:
    assert circle(graph(at_import_time=True)) is None
    between_layers: dict[str, set[str]] = {}
    for module, targets in graph(at_import_time=False).items():
        between_layers.setdefault(layer(module), set()).update(layer(t) for t in targets)
    edges = {name: targets - {name, ""} for name, targets in between_layers.items() if name}
    assert circle(edges) is None


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
    "tc_ray.serving.failover.proxy",
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_imports(module: str) -> None:
    """For the command line's sake, and because the last one runs in Serve's proxy process."""
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'transformers', 'mlflow'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_file_is_too_long() -> None:
    files = [p for folder in ("tc_ray", "jobs", "tests") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


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
