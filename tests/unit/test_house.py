"""The house rules, checked like behaviour: borders between folders, types, style, sizes, what imports what."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "platform"
PACKAGE = SOURCE / "evenkeel"
PURE = ("core", "plan", "control", "sim")
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONGER: dict[str, str] = {}
"""What may be longer, as "folder/file.py" or "folder/file.py:function", and a reason that a reader would accept."""

PRIVATE_ROOTS = ("torch", "ray", "dist")
"""Names whose underscored attributes belong to others; `dist` is torch.distributed's usual alias."""


def run(
    *command: str | Path, cwd: Path = ROOT, path: Path | None = SOURCE, seconds: float = 280
) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds)


def ok(done: "subprocess.CompletedProcess[str]") -> bool:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return True


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


# ---------------------------------------------------------------- borders


def lint_imports(source: Path) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return run(sys.executable, "-c", code, path=source)


def test_imports_point_one_way() -> None:
    assert ok(lint_imports(SOURCE))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/ids.py", "import os"),
        ("core/ids.py", "from evenkeel.plan import samples"),
        ("plan/samples.py", "import random"),
        ("plan/samples.py", "import numpy"),
        ("control/messages.py", "from time import monotonic"),
        ("control/messages.py", "import evenkeel.engine"),
        ("engine/__init__.py", "import ray"),
        ("engine/__init__.py", "from evenkeel import config"),
        ("engine/__init__.py", "import evenkeel.store"),
        ("store/__init__.py", "import evenkeel.sim"),
        ("sim/__init__.py", "import torch"),
        ("sim/__init__.py", "import evenkeel.runtime"),
        ("runtime/__init__.py", "import evenkeel.sim"),
        ("observe/__init__.py", "import ray"),
    ],
)
def test_an_import_that_crosses_a_border_is_noticed(tmp_path: Path, file: str, line: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "evenkeel", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "evenkeel" / file
    path.write_text(f"{line}\n{path.read_text()}")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in the file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_the_engine_needs_nothing_but_torch_safetensors_and_numpy() -> None:
    allowed = {"torch", "safetensors", "numpy", *sys.stdlib_module_names}
    ours = {"core", "plan", "control", "engine"}
    wrong = []
    for path in sorted((PACKAGE / "engine").rglob("*.py")):
        for name, line in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] not in allowed and not (parts[0] == "evenkeel" and parts[1] in ours):
                wrong.append(f"{relative(path)}:{line} imports {name}")
    assert wrong == []


def private_uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Underscored modules and attributes (dunders aside) of torch and Ray."""
    for name, line in imported(tree):
        parts = name.split(".")
        if parts[0] in PRIVATE_ROOTS and any(p.startswith("_") for p in parts[1:]):
            yield name, line
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in PRIVATE_ROOTS:
                yield ast.unparse(node), node.lineno


def test_private_parts_of_torch_and_ray_stay_in_compat() -> None:
    used = [
        f"{relative(path)}:{line} uses {name}"
        for path in FILES
        if path.name != "compat.py"
        for name, line in private_uses(ast.parse(path.read_text()))
    ]
    assert used == []


def test_private_uses_are_recognised() -> None:
    code = "import ray._private.state\nfrom torch import _C\nimport torch\ntorch._dynamo.reset()\ntorch.nn.x.__doc__\n"
    assert sorted(private_uses(ast.parse(code))) == [("ray._private.state", 1), ("torch._C", 2), ("torch._dynamo", 4)]


# ---------------------------------------------------------------- importing


def test_platform_is_still_pythons_own_module() -> None:
    assert not (SOURCE / "__init__.py").exists()
    done = run(sys.executable, "-c", "import platform; print(platform.system(), platform.__file__)", path=None)
    assert ok(done)
    system, file = done.stdout.split()
    assert system == "Linux"
    assert not file.startswith(str(ROOT / "platform"))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("evenkeel", "torch ray numpy scipy omegaconf fsspec rich typer yaml"),
        ("evenkeel.config", "torch ray numpy scipy fsspec rich typer"),
        ("evenkeel.control.controller", "torch ray numpy omegaconf fsspec rich typer yaml"),
        ("evenkeel.store.run_directory", "torch ray omegaconf typer"),
        ("evenkeel.cli", "torch ray"),
    ],
)
def test_importing_is_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*(m for m in {heavy.split()!r} if m in sys.modules))"
    done = run(sys.executable, "-c", code)
    assert ok(done)
    assert done.stdout.split() == []


# ---------------------------------------------------------------- types, style, sizes


def test_types_are_strict() -> None:
    assert ok(run(sys.executable, "-m", "mypy", "--no-error-summary"))


def test_ruff_is_content() -> None:
    folders = [ROOT / name for name in ("platform", "tests", "jobs") if (ROOT / name).exists()]
    assert ok(run(Path(sys.executable).parent / "ruff", "check", "--quiet", *folders))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths of all functions, from `def` to the last line, docstrings not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                assert node.body[0].end_lineno is not None
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, length


def test_files_and_functions_are_short() -> None:
    long = {relative(p): n for p in FILES if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES}
    long |= {f"{relative(p)}:{name}": n for p in FILES for name, n in functions(p) if n > MAX_FUNCTION_LINES}
    assert {name: n for name, n in long.items() if name not in LONGER} == {}
    assert [name for name in LONGER if name not in long] == [], "no longer needed"


# ---------------------------------------------------------------- without Ray and torch


BARE_NEEDS = ("pytest", "pytest-timeout", "hypothesis", "scipy")


def distributions(names: tuple[str, ...]) -> Iterator[Path]:
    """Top-level files and folders of installed distributions and all that they depend on."""
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop().lower()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] != ".."}
        yield from (Path(str(found.locate_file(top))) for top in tops - {"__pycache__"})
        requirements = [Requirement(text) for text in found.requires or ()]
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own, with what the pure tests need linked in and nothing else. Needs no network."""
    place = tmp_path_factory.mktemp("bare")
    ok(run(sys.executable, "-m", "venv", "--without-pip", place))
    (site,) = place.glob("lib/python*/site-packages")
    for top in distributions(BARE_NEEDS):
        (site / top.name).symlink_to(top)
    return place / "bin" / "python"


@pytest.mark.parametrize("module", ["torch", "ray", "fsspec", "omegaconf"])
def test_the_bare_environment_is_bare(bare_python: Path, module: str) -> None:
    assert f"No module named '{module}'" in run(bare_python, "-c", f"import {module}").stderr


def pure_tests() -> list[Path]:
    unit = ROOT / "tests" / "unit"
    found = [p for kind in ("core", "plan", "control") for p in sorted(unit.glob(f"test_{kind}_*.py"))]
    return found + sorted((ROOT / "tests" / "scripts").glob("test_*.py"))


@pytest.mark.parametrize(
    "how", [pytest.param((), marks=pytest.mark.soak, id="run"), pytest.param(("--co",), id="load")]
)
def test_the_pure_tests_run_without_ray_and_torch(bare_python: Path, how: tuple[str, ...]) -> None:
    """To load them imports all that they import; that no function of the pure parts imports more, the borders show."""
    # A module of the core's own tests would be missed silently if it were named otherwise.
    assert len(pure_tests()) >= 8
    options = ("-q", "-p", "no:cacheprovider", "-m", "not soak")
    done = run(bare_python, "-m", "pytest", *options, *how, *pure_tests(), seconds=1800)
    assert ok(done)
    assert (" passed" if not how else " tests collected") in done.stdout


def test_the_simulator_runs_without_ray_and_torch(bare_python: Path) -> None:
    code = "from evenkeel.sim.swarm import run_seed\nfor seed in range(20): print(run_seed(seed).verdict)"
    done = run(bare_python, "-c", code)
    assert ok(done)
    assert done.stdout.split() == ["ok"] * 20


@pytest.mark.parametrize("folder", PURE)
def test_every_pure_module_imports_without_ray_and_torch(bare_python: Path, folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    names = [f"evenkeel.{relative(p)[:-3].replace('/', '.')}" for p in files if p.name != "__init__.py"]
    assert names
    assert ok(run(bare_python, "-c", "import " + ", ".join(names)))
