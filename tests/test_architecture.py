"""The house rules, held: arrows point down, one home a library, budgets, docstrings, the tree of `docs`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("mlray", "jobs", "serve_app") for path in (ROOT / folder).rglob("*.py"))
BASE = {"access", "config", "configuration", "console", "schema", "languages", "seal", "storage"}
LAYERS = [
    {"base"},
    {"corpus", "models"},
    {"objectives"},
    {"training", "evaluation"},
    {"tuning", "release"},
    {"jobs", "serve_app"},
]
HOMES = {
    "deepspeed": "mlray/training/engine.py",
    "ray.data": "mlray/corpus/",
    "ray.train": "mlray/training/",
    "ray.tune": "mlray/tuning/",
    "ray.serve": "serve_app/",
    "transformers": "mlray/models/",
    "peft": "mlray/models/",
    "tokenizers": "mlray/models/",
    "boto3": "mlray/access.py",
}
MAX_FILE, MAX_JOB, MAX_FUNCTION, MAX_LOOP = 300, 50, 50, 60
MAX_CONFIG = 480
"""`mlray/config.py` is a list of settings: it stays one page, though a longer one."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: str) -> str:
    """The part of the house that a file belongs to."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] != "mlray":
        return parts[0]
    return "base" if len(parts) == 2 else parts[1]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_arrows_point_down(path: Path) -> None:
    own = room(name(path))
    for target in imports(path):
        parts = target.split(".")
        if parts[0] == "mlray" and len(parts) > 1:
            other = "base" if parts[1] in BASE else parts[1]
            assert other == own or level(other) < level(own), f"{name(path)} imports {target}"


def test_no_import_circle() -> None:
    modules = {
        name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in FILES
    }
    arrows = {module: imports(path) & modules.keys() - {module} for module, path in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in arrows[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in modules:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_heavy_library_has_one_home(path: Path) -> None:
    for target in imports(path):
        for library, home in HOMES.items():
            if target == library or target.startswith(f"{library}."):
                assert name(path).startswith(home), f"{name(path)} imports {target}, whose home is {home}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_budgets_and_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{name(path)} has no docstring"
    limit = MAX_JOB if name(path).startswith("jobs/") else MAX_FILE
    limit = MAX_CONFIG if name(path) == "mlray/config.py" else limit
    assert len(text.splitlines()) <= limit, f"{name(path)} is longer than {limit} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            longest = MAX_LOOP if node.name == "steps" else MAX_FUNCTION
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= longest, f"{name(path)}: {node.name} has {length} lines, more than {longest}"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, f"{name(path)} holds more than a docstring"


def test_config_loads_without_torch_or_ray() -> None:
    code = "import sys, mlray.configuration; print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tree_equals_the_disk() -> None:
    text = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
    block = text.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    told: dict[str, str] = {}
    folder = ""
    for line in block.splitlines():
        if entry := re.fullmatch(r"(\S+/)(\s{2,}\S.*)?", line):
            folder = entry[1]
        elif entry := re.fullmatch(r"\s+(\S+)\s{2,}(\S.*)", line):
            told[folder + entry[1]] = entry[2]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {
        path
        for path in tracked.splitlines()
        if path.startswith(("mlray/", "jobs/", "serve_app/", "benchmarks/"))
        and not path.endswith(("__init__.py", ".jsonl", ".json", ".png", "LICENSE"))
    }
    assert told.keys() == wanted
