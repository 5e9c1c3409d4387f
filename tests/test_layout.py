"""The house as it is meant to stand: which module lies where, and what each may import."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import framseg
from framseg import config

PACKAGE = config.REPOSITORY / "framseg"
ROOMS = {"backbones", "viz", "run", "demo"}
IN_FRONT = 18  # modules at most, besides __init__ and __main__

# From the bottom to the top: a module imports at its module level only from the rows above its own in this list.
LAYERS = """
framseg
jsonl config run viz demo
run.paths
run.container
annotations frames prompt losses
moments
predictions
evaluate
backbones
backbones.blip3
dataset download
run.cost
run.released run.precision
checkpoint
hub
run.launcher
run.resume
run.preflight
run.archive
decode
train predictor
codalab viz.paper_results viz.player
viz.figures viz.tables
viz.error_analysis viz.browser viz.parity
viz.ask_form
demo.synthetic run.stamps
demo.base_model run.report
run.notebooks
demo.__main__ run.__main__
__main__
""".strip().splitlines()
LAYER = {name: number for number, line in enumerate(LAYERS) for name in line.split()}

UNCLEAR = {"stage", "steps", "needs", "errors", "reported", "ask"}  # file names that had to be explained


def module_name(path: Path) -> str:
    """`run.paths` for framseg/run/paths.py, `run` for framseg/run/__init__.py, `framseg` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "framseg"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def run_on_import(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a module executes: not the insides of functions, nor imports for types alone."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for block in ("orelse",) if for_types else ("body", "orelse", "finalbody", "handlers"):
            yield from run_on_import(getattr(node, block, []))


def imports(path: Path) -> set[str]:
    """The modules of framseg that a module imports at its module level, named as in LAYERS."""
    names = set()
    for node in run_on_import(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write 'from framseg… import', not a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner.removeprefix("framseg.") in MODULES else str(node.module))
    return {name.removeprefix("framseg.") for name in names if name.split(".")[0] == "framseg"}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_every_module_has_its_place():
    front = [name for name in MODULES if "." not in name and name not in ROOMS | {"framseg", "__main__"}]
    assert len(front) <= IN_FRONT, (
        f"{len(front)} modules in front, {IN_FRONT} at most: what nobody needs to follow the method goes into "
        f"one of the rooms {', '.join(sorted(ROOMS))}"
    )
    assert {path.parent.name for path in PACKAGE.rglob("*.py")} == ROOMS | {"framseg"}, "framseg has these rooms only"
    unplaced, gone = MODULES.keys() - LAYER, LAYER.keys() - MODULES
    assert not unplaced, f"write {sorted(unplaced)} into LAYERS of {__file__}, below the modules it imports"
    assert not gone, f"take {sorted(gone)} out of LAYERS of {__file__}"


def test_no_file_name_needs_explaining():
    assert not UNCLEAR & {path.stem for path in MODULES.values()}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    upwards = {other for other in GRAPH[name] if LAYER.get(other, 0) >= LAYER.get(name, len(LAYERS))}
    assert not upwards, (
        f"{name} imports {sorted(upwards)}, which lie no lower than itself in LAYERS of {__file__}: move what both "
        f"need further down, or import it inside the function that needs it"
    )


def test_no_import_goes_in_a_circle():
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, with the circle


def test_nothing_in_front_loads_pictures():
    front = {name for name in MODULES if not name.startswith(("viz.", "run.", "demo."))}
    loading = {name for name in front if any(other.split(".")[0] == "viz" for other in GRAPH[name])}
    assert not loading, "import framseg.viz inside the function that draws: decoding and metrics do without matplotlib"


@pytest.mark.parametrize(
    "modules,without",
    [
        ("annotations jsonl moments predictions evaluate codalab", "torch av decord matplotlib"),
        ("dataset", "framseg.demo framseg.viz"),
    ],
)
def test_what_loads_quickly_stays_light(modules, without):
    for name in modules.split():
        code = f"import sys, framseg.{name}; print(*(set({without.split()}) & set(sys.modules)))"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert not loaded, f"importing framseg.{name} loads {loaded}: import it where it is used"


def test_all_errors_have_one_base():
    for module in pkgutil.walk_packages(framseg.__path__, "framseg."):
        if module.name.endswith("__main__"):
            continue
        for name, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if value.__module__ == module.name and issubclass(value, BaseException):
                assert issubclass(value, framseg.FramsegError), f"{module.name}.{name} must derive from FramsegError"


def test_the_code_stays_small():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    method = sum(count for name, count in lines.items() if not name.startswith(("viz", "run", "demo")))
    assert method <= 5000, f"{method} lines in front and in backbones; whoever reads the method reads all of them"
    assert sum(lines.values()) < 9000, "the package shares or replaces what is there before it grows"
