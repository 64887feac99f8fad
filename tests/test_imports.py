"""The package's imports point one way, every public name says what it does, and importing changes nothing."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llm2vec"

#: The files and wings of the package. Each imports only those that stand before it.
ORDER = (
    "types", "files", "table", "hub", "processes", "cli", "distributed", "text", "data", "model", "models", "upstream",
    "llm2vec", "choice",
    "objectives", "llm2vec_q2d_d2q", "probes", "training", "planning", "corpus", "evaluation",
    "reports", "compare", "export", "verify", "quickstart", "loss", "dataset",
    "experiment_utils", "commands", "__main__", "__init__", "version",
)  # fmt: skip

#: Most files of a folder, so that it can be seen at a glance, and most lines of a file.
WIDEST, LONGEST = 12, 400

FILES = sorted(PACKAGE.rglob("*.py"))

# Runs in a fresh interpreter. Libraries are imported first, so that what they do at import is not held against us;
# then every import of a module of ours must leave the process as it was. An audit hook sees each file it changes.
WATCH = """
import importlib, json, logging, os, random, sys
import numpy, torch

sys.dont_write_bytecode = True
imports, modules = json.loads(sys.stdin.read())
for statement in imports:
    exec(statement, {})

written, watching = [], False

def hook(event, arguments):
    if not watching:
        return
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile", "subprocess.Popen"):
        written.append(f"{event} {arguments[0]}")

def state():
    return {
        "handlers of the root logger": [repr(h) for h in logging.getLogger().handlers],
        "level of the root logger": logging.getLogger().level,
        "environment": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "torch seed": [torch.initial_seed(), torch.random.get_rng_state().tolist()],
        "python seed": repr(random.getstate()),
        "numpy seed": repr(numpy.random.get_state()),
        "working directory": os.getcwd(),
        "import path": list(sys.path),
    }

sys.addaudithook(hook)
changes = []
for module in modules:
    before, watching = state(), True
    importlib.import_module(module)
    watching, after = False, state()
    changes += [f"{module}: {what}" for what in before if before[what] != after[what]]
    changes += [f"{module}: writes {path}" for path in written]
    written.clear()
print("RESULT" + json.dumps(changes))
"""


def module_name(file: Path) -> str:
    """`llm2vec/a/b.py` -> `a.b`; `llm2vec/a/__init__.py` -> `a`."""
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules a file imports, at whatever depth of its code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            assert node.module is not None
            # `from llm2vec.data import rows` names a module too.
            yield from (
                f"{node.module}.{alias.name}"
                if (PACKAGE.parent / node.module.replace(".", "/") / f"{alias.name}.py").is_file()
                else node.module
                for alias in node.names
            )


def imports_of(file: Path) -> list[str]:
    """Full names of all modules that `file` imports."""
    return list(imported_modules(ast.parse(file.read_text(encoding="utf-8"))))


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions and classes of a module, and the methods of the latter without the private ones."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and (
                    not member.name.startswith("_") or _is_dunder(member.name)
                ):
                    yield f"{node.name}.{member.name}", member


def public_names(tree: ast.Module) -> Iterator[str]:
    """What a module defines at its top for others: functions, classes, constants and types."""
    for node in tree.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def run_python(code: str, standard_input: str, folder: Path) -> str:
    """Standard output of a fresh interpreter that runs `code` in `folder`."""
    result = subprocess.run(
        [sys.executable, "-c", code], input=standard_input, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def place_of(module: str) -> int:
    """Where a module's wing stands in the order."""
    return ORDER.index(module.split(".")[0])


def imports_inside(file: Path) -> set[str]:
    """Modules of the package that a file imports, as `a.b`; a name out of a module counts as the module."""
    names = {module_name(file) for file in FILES}
    inside = {name.removeprefix("llm2vec.") for name in imports_of(file) if name.startswith("llm2vec.")}
    assert inside <= names, f"{module_name(file)} imports {sorted(inside - names)}, which are no modules"
    return inside


def test_every_wing_has_a_place_in_the_order() -> None:
    """A new wing must be put into ORDER, and one that is gone must leave it."""
    assert sorted({module_name(file).split(".")[0] for file in FILES}) == sorted(ORDER)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_one_way(file: Path) -> None:
    """A module imports only what stands in its own wing or in one before it."""
    own = place_of(module_name(file))
    behind = [name for name in imports_inside(file) if place_of(name) > own]
    assert not behind, f"{module_name(file)} imports {sorted(behind)}, which stand after it"


def test_there_is_no_ring_inside_a_wing() -> None:
    graph = {module_name(file): imports_inside(file) for file in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the ring
    assert set(graph) <= set(order)


def test_no_folder_is_wide() -> None:
    folders = {file.parent for file in FILES}
    wide = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name: width for name, width in wide.items() if width > WIDEST}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_module_is_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_only_the_adapter_imports_mteb() -> None:
    importers = {module_name(f) for f in FILES if any(name.split(".")[0] == "mteb" for name in imports_of(f))}
    assert importers == {"evaluation.mteb_adapter"}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_the_package_imports_nothing_around_it(file: Path) -> None:
    """Scripts and tests import the package, never the other way round."""
    assert not {name.split(".")[0] for name in imports_of(file)} & {
        "benchmarks",
        "experiments",
        "tests",
        "helpers",
        "conftest",
    }


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_public_name_is_documented(file: Path) -> None:
    """A header on the module; a docstring on every public class, function, method and property."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module header"
    missing = [
        f"line {node.lineno}: {name}"
        for name, node in public_definitions(tree)
        if not _is_dunder(node.name) and not ast.get_docstring(node)
    ]
    assert not missing


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_public_signature_is_annotated(file: Path) -> None:
    """All arguments and what is returned; `self` and `cls` aside."""
    missing = []
    for name, node in public_definitions(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            continue
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
        bare = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
        missing += [f"line {node.lineno}: {name}({x})" for x in bare]
        missing += [f"line {node.lineno}: {name} -> ?"] * (node.returns is None)
    assert not missing


def test_a_public_name_means_one_thing() -> None:
    """In the whole package; each module has a `logger` of its own, and each command a `main`."""
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for name in {*public_names(ast.parse(file.read_text(encoding="utf-8")))} - {"logger", "main"}:
            if not name.startswith("_"):
                homes.setdefault(name, []).append(module_name(file))
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    """No handler, file, process, variable, seed or default of the process is changed by any module's import."""
    libraries = sorted(
        {
            ast.unparse(node)
            for file in FILES
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            and "llm2vec" not in ast.unparse(node)
            and "__future__" not in ast.unparse(node)
        }
    )
    ours = ["llm2vec", *(f"llm2vec.{name}" for name in map(module_name, FILES) if name != "__init__")]
    output = run_python(WATCH, json.dumps([libraries, ours]), tmp_path)
    assert json.loads(output.rpartition("RESULT")[2]) == []
    assert not list(tmp_path.iterdir())


def test_importing_the_package_takes_no_time(tmp_path: Path) -> None:
    """0.04 s of CPU where this was measured; 0.9 are allowed. Its names are loaded when they are used."""
    code = "import llm2vec, resource, sys; used = resource.getrusage(resource.RUSAGE_SELF)"
    code += "\nprint(used.ru_utime + used.ru_stime, *(name for name in ('numpy', 'torch') if name in sys.modules))"
    seconds, *loaded = run_python(code, "", tmp_path).split()
    assert not loaded and float(seconds) < 0.9


def test_the_model_loads_without_what_only_evaluation_or_training_needs(tmp_path: Path) -> None:
    """Whoever only embeds texts does not wait for mteb, matplotlib or datasets."""
    code = "import sys, llm2vec, llm2vec.llm2vec; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run_python(code, "", tmp_path).split())
    assert "llm2vec" in loaded
    assert not loaded & {"mteb", "matplotlib", "datasets"}
