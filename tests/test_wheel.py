"""The package as `pip install` leaves it: built from this tree, installed into an empty environment, used there."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import SHORT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import framseg
from framseg import config
from framseg.demo import synthetic

PROJECT = tomllib.loads((config.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
TESTING, OPTIONAL = (
    [Requirement(text) for text in PROJECT["optional-dependencies"][name]] for name in ("test", "int8")
)
PART_OF = {"pydantic_core": "pydantic"}  # pydantic asks for one version of it, and has some types there alone
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the folder `cwd`, without what this process's environment says of framseg."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FRAMSEG_SHARED")}
    # nbconvert's templates are data of the environment that it is installed in, which is this one.
    own |= {"JUPYTER_DATA_DIR": f"{sys.prefix}/share/jupyter", "JUPYTER_RUNTIME_DIR": tempfile.gettempdir()}
    done = subprocess.run(command, cwd=cwd, env=own | environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository's files: building writes into the tree, and an old build would get into the wheel."""
    copy = tmp_path_factory.mktemp("tree") / "framseg"
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=config.REPOSITORY).stdout
    for name in filter(None, listing.split("\0")):
        if (config.REPOSITORY / name).is_file():  # a file may be deleted and not yet committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(config.REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", str(folder), ".", cwd=tree)
    [path] = folder.glob("framseg-*.whl")
    return path


def installed(folder: Path, *what: str) -> Path:
    """The programs of a new environment with framseg in it, and with this environment's packages behind that."""
    venv.create(folder)
    [site] = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "behind.pth").write_text("\n".join(sorted(paths)) + "\n")
    programs = folder / "bin"
    run(*PIP, "--python", str(programs / "python"), "install", *OFFLINE, *what, cwd=folder)
    return programs


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    return installed(tmp_path_factory.mktemp("environment"), str(wheel))


def test_the_wheel_holds_every_module_and_all_data(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"framseg-{framseg.__version__}.dist-info/METADATA").decode()
    kinds = ("*.py", "*.yaml", "*.js", "*.j2", "*.mplstyle", "demo/base/*", "model_card.md", "prompt.txt")
    files = {path.relative_to(tree) for kind in kinds for path in (tree / "framseg").rglob(kind)}
    notebooks = {Path("framseg") / path.relative_to(tree) for path in tree.glob("notebooks/*.ipynb")}
    assert len(notebooks) == 5 and names == {path.as_posix() for path in files | notebooks}
    assert "Requires-Dist: pandas" in metadata and f"Version: {framseg.__version__}\n" in metadata


def test_it_is_imported_from_there(programs, tmp_path):
    code = "import framseg; from framseg import config; from framseg.run import notebooks\n"
    code += "print(framseg.__file__, notebooks.NOTEBOOKS, config.data_folder(config.load('demo')), sep='\\n')"
    package, notebooks, data = run(programs / "python", "-c", code, cwd=tmp_path).stdout.splitlines()
    site = next(programs.parent.glob("lib/python*/site-packages"))
    assert Path(package).parent == site / "framseg" and Path(notebooks) == site / "framseg/notebooks"
    assert Path(data).is_relative_to(tmp_path)


def test_commands_in_an_empty_folder(programs, tmp_path):
    assert run(programs / "framseg", "--version", cwd=tmp_path).stdout == f"framseg {framseg.__version__}\n"
    assert "--run-dir DIR" in run(programs / "framseg", "run", "--help", cwd=tmp_path).stdout
    assert "make-base" in run(programs / "framseg", "demo", "--help", cwd=tmp_path).stdout
    wrong = run(programs / "framseg", "run", "papre", cwd=tmp_path, code=2).stderr
    assert "did you mean 'paper'" in wrong and "Traceback" not in wrong
    assert not list(tmp_path.iterdir())


def test_metrics_of_a_perfect_prediction(programs, tmp_path):
    row = synthetic.rows("val")[0]
    windows = [[start, end, 1.0] for start, end in row.relevant_windows]
    scores = [0.0] * int(row.duration / 2)
    for clip, votes in zip(row.relevant_clip_ids, row.saliency_scores, strict=True):
        scores[clip] = sum(votes)
    names = ("qid", "query", "vid", "duration", "relevant_windows", "relevant_clip_ids", "saliency_scores")
    (tmp_path / "rows.jsonl").write_text(json.dumps({name: getattr(row, name) for name in names}) + "\n")
    prediction = {"qid": row.qid, "query": row.query, "vid": row.vid}
    prediction |= {"pred_relevant_windows": windows, "pred_saliency_scores": scores}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(prediction) + "\n")
    done = run(programs / "framseg", "evaluate", "predictions.jsonl", "rows.jsonl", cwd=tmp_path)
    assert json.loads(done.stdout)["brief"]["MR-full-R1@0.7"] == 100


@pytest.mark.slow
def test_a_chapter_on_a_folder_of_data(programs, small_set, tmp_path):
    """Data are looked for, and the run is written, in the current folder."""
    shutil.copytree(small_set, tmp_path / "some data")
    changes = SHORT | {"data.folder": "some data"}
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = run(programs / "framseg", "run", "demo", "--only", "02", *options, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "1 notebooks in" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"some data", "runs"}
    assert (tmp_path / "runs/demo/report.html").is_file()
    text = (tmp_path / "runs/demo/notebooks/02_prompt_tokenizer.ipynb").read_text(encoding="utf-8")
    assert str(config.REPOSITORY) not in text


@pytest.mark.slow
def test_a_chapter_on_the_demos_data(programs, tmp_path):
    run(programs / "framseg", "run", "demo", "--only", "02", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}


def test_an_editable_installation_runs_the_tree(tree, tmp_path):
    """As run_all.sh leaves it in .venv."""
    programs = installed(tmp_path / "environment", "--editable", str(tree))
    assert run(programs / "framseg", "--version", cwd=tmp_path).stdout == f"framseg {framseg.__version__}\n"
    code = "import framseg; from framseg import config; from framseg.run import notebooks\n"
    code += "print(framseg.__file__, notebooks.NOTEBOOKS, config.WORKSPACE, sep='\\n')"
    paths = run(programs / "python", "-P", "-c", code, cwd=tmp_path).stdout.splitlines()
    assert paths == [str(tree / "framseg/__init__.py"), str(tree / "notebooks"), str(tree)]


# what it depends on


def test_every_pin_lies_in_its_range():
    content = yaml.safe_load((config.REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    *_, pip = content["dependencies"]
    pins = dict(text.split("==") for text in pip["pip"] if "==" in text)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    ranges = {canonicalize_name(requirement.name): requirement.specifier for requirement in NEEDED + OPTIONAL + TESTING}
    assert pins.keys() == ranges.keys()
    assert all(specifier for specifier in ranges.values())
    assert not {name: pin for name, pin in pins.items() if pin not in ranges[name]}


def test_run_all_asks_for_the_least_versions_of_the_ranges():
    text = (config.REPOSITORY / "run_all.sh").read_text(encoding="utf-8")
    least = {name: f"{major}.{minor}" for name, major, minor in re.findall(r'"(\w+)": \((\d+), (\d+)\)', text)}
    assert least.keys() == {"torch", "transformers"}
    for requirement in NEEDED:
        if version := least.get(requirement.name):
            assert f">={version}" in str(requirement.specifier)
            assert f"{requirement.name} >= {version}" in text  # in the usage


def third_party(source: str) -> set[str]:
    """Top-level modules that Python code imports and that neither Python nor this repository has."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
    own = {"framseg", "benchmarks"} | {path.stem for path in (config.REPOSITORY / "tests").rglob("*.py")}
    return modules - own - sys.stdlib_module_names


def test_everything_that_is_imported_is_named():
    notebooks = [nbformat.read(path, as_version=4) for path in config.REPOSITORY.glob("notebooks/*.ipynb")]
    cells = [cell.source for book in notebooks for cell in book.cells if cell.cell_type == "code"]
    modules = [path.read_text(encoding="utf-8") for path in (config.REPOSITORY / "framseg").rglob("*.py")]
    tests = [path.read_text(encoding="utf-8") for path in (config.REPOSITORY / "tests").rglob("*.py")]
    distributions = packages_distributions()
    for sources, requirements in ((cells + modules, NEEDED + OPTIONAL), (tests, NEEDED + TESTING)):
        named = {canonicalize_name(requirement.name) for requirement in requirements}
        imported = set().union(*map(third_party, sources))
        assert "torch" in imported
        missing = {
            module
            for module in imported
            if not named
            & {canonicalize_name(name) for name in [PART_OF.get(module), *distributions.get(module, [])] if name}
        }
        assert not missing, f"name the packages of {sorted(missing)} in pyproject.toml and environment.yml"
