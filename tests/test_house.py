"""The house rules: who may import whom, names, the README's commands, import time."""

import ast
import graphlib
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinytape"

# For each part of the package: what it may import of ours, and what more inside functions (lazily).
# A part may import itself; imports under `if TYPE_CHECKING` are free.
TAPE = "engine ops random"
TAPE_USERS = "transforms recompute loop compile check inspect"
MAY = {
    "engine": ("", ""),
    "kernels": ("", ""),
    "loop.revolve": ("", ""),
    "loop.truncated": (f"{TAPE} {TAPE_USERS}", "nn"),  # a cell is put in a layer
    "random": ("engine", ""),
    "ops": ("engine random", "kernels"),
    **dict.fromkeys(TAPE_USERS.split(), (f"{TAPE} {TAPE_USERS}", "kernels")),
    "compile": (f"{TAPE} {TAPE_USERS} kernels", ""),  # itself imported in functions only
    "runtime": ("engine.errors", "kernels"),
    "prepare": ("engine nn ops random", ""),
    "nn": (f"{TAPE} {TAPE_USERS}", ""),
    "optim": ("engine", "kernels"),
    "data": ("engine.errors", ""),
    "io": ("engine.errors", ""),
}
ANYTHING = {"", "__main__", "doctor", "train", "generate"}  # "" is tinytape/__init__.py
THIRD_PARTY = {  # and numpy everywhere
    "kernels": {"numba", "llvmlite"},
    "io": {"safetensors"},
    "inspect": {"matplotlib"},
    "optim": {"matplotlib"},
    "train": {"tqdm", "tensorboardX"},
}


class Import(NamedTuple):
    target: str  # dotted, absolute
    lazy: bool  # inside a function
    line: int


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(source: str, module: str, is_package: bool) -> list[Import]:
    """All imports of a module that can run, as absolute names of modules."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append(Import(whole if is_module(whole) else base, lazy, node.lineno))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def part_of(module: str) -> str:
    """`tinytape.ops.reduce` belongs to `ops`, `tinytape.loop.revolve` to itself, `tinytape` to ``""``."""
    inner = module.split(".")[1:]
    return ".".join(inner[:2]) if ".".join(inner[:2]) in MAY else ".".join(inner[:1])


def covered(target: str, allowed: str) -> bool:
    """Whether a module of ours lies in one of the parts named in `allowed`."""
    inner = target.removeprefix("tinytape").removeprefix(".")
    return any(inner == name or inner.startswith(name + ".") for name in allowed.split())


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    part = part_of(module)
    if part not in MAY and part not in ANYTHING:
        return [f"{module}: no rule says what {part!r} may import"]
    wrong = []
    for target, lazy, line in imports(source, module, is_package):
        top = target.split(".")[0]
        if top == "tinytape":
            at_once, later = MAY.get(part, ("", ""))
            ok = part in ANYTHING or covered(target, f"{part} {at_once} {later if lazy else ''}")
        else:
            ok = top in sys.stdlib_module_names or top in {"numpy"} | THIRD_PARTY.get(part, set())
        if not ok:
            wrong.append(f"{module}:{line} imports {target}" + ("" if lazy else " at import time"))
    return wrong


def modules(folder: Path):
    """Every module below a folder (none if there is no folder), as path, dotted name, is_package."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_who_imports_whom():
    wrong = [
        line
        for path, module, is_package in modules(PACKAGE)
        for line in violations(path.read_text("utf-8"), module, is_package)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "ok"),
    [
        ("tinytape.engine.tape", "from .tensor import Tensor", True),
        ("tinytape.engine.tape", "from tinytape.ops import add", False),
        ("tinytape.engine.tape", "def f():\n    import tinytape.ops", False),
        ("tinytape.engine.tape", "if TYPE_CHECKING:\n    from tinytape.ops import add", True),
        ("tinytape.engine.tape", "import tinytape as tt", False),
        ("tinytape.engine.tape", "import numba", False),
        ("tinytape.ops.linalg", "from ..engine.op import op", True),
        ("tinytape.ops.linalg", "from .. import kernels", False),
        ("tinytape.ops.linalg", "from tinytape.kernels import gemm", False),
        ("tinytape.ops.linalg", "def f():\n    from tinytape.kernels import gemm", True),
        ("tinytape.ops.linalg", "import scipy", False),
        ("tinytape.kernels.gemm", "import numba", True),
        ("tinytape.kernels.gemm", "from ..engine import errors", False),
        ("tinytape.loop.revolve", "from tinytape.engine import errors", False),
        ("tinytape.loop.scan", "from . import revolve", True),
        ("tinytape.nn.recurrent", "from ..loop import scan", True),
        ("tinytape.optim.adam", "from ..nn import Module", False),
        ("tinytape.optim.adam", "def f():\n    from ..nn import Module", False),
        ("tinytape.io", "from .engine.errors import FileError\nimport safetensors", True),
        ("tinytape.io", "from .engine.tensor import Tensor", False),
        ("tinytape.train", "from . import nn, optim", True),
        ("tinytape.attic", "import os", False),
    ],
)
def test_the_check_itself(module, source, ok):
    assert (violations(source, module) == []) is ok


def test_no_cycles_between_parts():
    graph: dict[str, set[str]] = {}
    for path, module, is_package in modules(PACKAGE):
        for target, lazy, _ in imports(path.read_text("utf-8"), module, is_package):
            if target.startswith("tinytape.") and not lazy:
                graph.setdefault(part_of(module), set()).add(part_of(target))
    for part, needs in graph.items():
        needs.discard(part)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_models_use_only_the_public_door():
    wrong = []
    for path, module, _ in modules(ROOT / "models"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                ours = [alias for alias in node.names if alias.name.split(".")[0] == "tinytape"]
                bad = any((alias.name, alias.asname) != ("tinytape", "tt") for alias in ours)
            else:
                bad = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinytape"
            if bad:
                wrong.append(f"{module}:{node.lineno} says {ast.unparse(node)}, not `import tinytape as tt`")
    assert not wrong, "\n".join(wrong)


def test_no_function_has_the_name_of_a_module_beside_it():
    wrong = []
    for path, package, is_package in modules(PACKAGE):
        if not is_package:
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound = {node.name: ""}
            elif isinstance(node, ast.ImportFrom):
                bound = {alias.asname or alias.name: alias.name for alias in node.names}
            else:
                continue
            for name, original in bound.items():
                home = imports(ast.unparse(node), package, True) if original else []
                is_that_module = any(i.target == f"{package}.{name}" for i in home) and original == name
                if is_module(f"{package}.{name}") and not is_that_module:
                    wrong.append(f"{package}:{node.lineno} {name} hides the module {package}.{name}")
    assert not wrong, "\n".join(wrong)


def test_f811_and_f841_are_never_silenced():
    files = [path for name in ("tinytape", "models", "bench", "tests") for path, *_ in modules(ROOT / name)]
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(r"#\s*(ruff:\s*)?noqa\b.*\bF8[14]1\b", line)
    ]
    assert not wrong, wrong
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    assert "F811" not in settings and "F841" not in settings


MAIN_JOB = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[models]' && .venv/bin/python -m models.char_lm"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest -n 2"


def test_readme_commands():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"^```sh\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL) == [MAIN_JOB, TESTS]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_runs_the_readmes_test_command():
    command = ["bash", ".ci/run", "--show"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == TESTS


def fresh(code: str) -> str:
    """What a fresh interpreter prints for a program."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # else it compiles anew
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_numba_is_not_imported_with_tinytape():
    assert fresh("import sys, tinytape; print('numba' in sys.modules)") == "False"


def test_import_time():
    """`import tinytape` costs at most 2.2 times `import numpy`: a ratio, because machines differ."""
    program = "from time import perf_counter as t; a = t(); import {}; print(t() - a)"

    def ratio() -> float:
        ours, numpys = [], []
        for _ in range(7):
            ours.append(float(fresh(program.format("tinytape"))))
            numpys.append(float(fresh(program.format("numpy"))))
        return statistics.median(ours) / statistics.median(numpys)

    ratios = []
    for _ in range(3):  # noise only adds, so one good attempt is proof enough
        ratios.append(ratio())
        if ratios[-1] <= 2.2:
            return
    pytest.fail(f"import tinytape / import numpy: {ratios}, at most 2.2 wanted")
