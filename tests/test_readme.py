"""The README files and CONTRIBUTING: what they name exists, and the numbers that code can compute are right."""

import argparse
import ast
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from framseg import __main__ as command_line
from framseg import config, dataset, moments
from framseg.demo import synthetic

ROOT = config.REPOSITORY
FOLDERS = ("", "framseg", "framseg/demo", "notebooks", "tests/benchmarks")
FILES = [path for folder in FOLDERS if (path := ROOT / folder / "README.md").is_file()]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*FILES, ROOT / ".github/CONTRIBUTING.md"]
}
README, MODULE, BENCHMARKS = (TEXTS[f"{folder}README.md"] for folder in ("", "framseg/", "tests/benchmarks/"))
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SECTIONS = [
    "framseg",
    "Two commands",
    "Results",
    "Your own video",
    "Notebooks",
    "Real data and the published setting",
    "Layout",
    "Tests and contributing",
    "Licence and citation",
]


def commands(text: str) -> set[str]:
    """Our programs' commands in blocks and between backticks, without the folder of the environment."""
    blocks = [block for kind, block in FENCED.findall(text) if kind == "bash"]
    blocks += re.findall(r"^ {4}\S.*$", FENCED.sub("", text), re.MULTILINE)  # indented blocks
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", FENCED.sub("", text).replace("\n", " "))
    lines = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()).removeprefix(".venv/bin/") for line in lines]
    ours = r"([A-Z_]+=\S+ )*(\./run_all\.sh|python (-m framseg|tests/)|framseg [a-z]|deepspeed )"
    return {line for line in lines if re.match(ours, line)}


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


class Parsed(Exception):
    """The arguments of a command are right; its work is tested elsewhere."""


@pytest.fixture
def only_parse(monkeypatch):
    """Every program ends with Parsed as soon as it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, *arguments):
        options = parse(parser, *arguments)
        if parser.prog == "framseg":  # which hands the rest to a module
            return options
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of runpy, by modules that are loaded already
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_and_knows_its_arguments(command, only_parse, monkeypatch):
    words = shlex.split(command)
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    if words[0] == "deepspeed":  # its own options come before ours
        words = ["python", "-m", *words[words.index("--module") + 1 :]]
    if words[0] == "./run_all.sh":
        if "--help" in words or words[1:2] == ["test"]:  # the options of `test` are pytest's
            return
        assert {*words[1:2]} <= {*config.names(), "PROFILE"} or re.match(r"-|.*\.yaml$", words[1])
        words = ["framseg", "run", *(word.replace("PROFILE", "demo") for word in words[1:])]
    with pytest.raises(Parsed):
        if words[0] == "framseg":
            command_line.main(words[1:])
        elif words[1] == "-m":
            monkeypatch.setattr("sys.argv", words[2:])
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr("sys.argv", words[1:])
            monkeypatch.syspath_prepend(ROOT / Path(words[1]).parent)  # as Python does for a file
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_exists(name):
    text, folder = TEXTS[name], (ROOT / name).parent
    prose = FENCED.sub("", text)
    for target, anchor in re.findall(r"\]\(([\w./-]*)(#[\w-]+)?\)", prose):
        path = folder / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    paths = re.findall(r"`((?:tests|framseg|notebooks|\.github)/[\w./-]+)`", prose)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_first_page_is_short_and_in_order():
    assert len(README.splitlines()) <= 150
    assert re.findall(r"^#+ (.*)$", FENCED.sub("", README), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("name", TEXTS)
def test_words(name):
    assert not re.findall(r"one[']s own|\bbesides?\b", TEXTS[name])


def section(text: str, heading: str) -> list[list[str]]:
    """The cells of the lines of a section's table, without its head."""
    lines = text.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_the_map_of_the_paper_names_what_exists():
    chapters = {path.stem for path in (ROOT / "notebooks").glob("0*.ipynb")}
    mapped = set()
    for _, functions, places in section(MODULE, "Map of the paper"):
        names = re.findall(r"`([\w.]+)`", functions)
        assert names
        for name in names:
            assert callable(pkgutil.resolve_name(name)), name
        mapped |= set(re.findall(r"`(\w+)`", places))
    assert mapped == chapters


def test_the_glossary_has_ten_lines():
    assert len(section(MODULE, "Glossary")) == 10


def test_the_layout_names_every_module_and_its_test():
    package = ROOT / "framseg"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.name.startswith("__")}
    modules |= {path.relative_to(package).as_posix() for path in package.rglob("*.js")} | {"__main__.py"}
    rows = section(MODULE, "Layout in full")
    assert {name for files, _, _ in rows for name in re.findall(r"`([\w/]+\.(?:py|js))`", files)} == modules
    for files, _, tests in rows:
        named = set(re.findall(r"`(\w+\.py)`", tests))
        assert named and all((ROOT / "tests" / name).is_file() for name in named)
        own = {f"test_{name}.py" for name in re.findall(r"(\w+)\.py`", files)}
        assert {name for name in own if (ROOT / "tests" / name).is_file()} <= named


def test_every_dependency_has_a_reason():
    pins = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"][-1]["pip"]
    named = {name.strip() for names, _ in section(MODULE, "Dependencies") for name in names.split(",")}
    assert {pin.split("==")[0] for pin in pins if "==" in pin} == named


def test_the_example_asks_for_a_query_of_the_demo_about_its_own_video():
    code = next(block for kind, block in FENCED.findall(README) if kind == "python")
    call = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    video, query = (ast.literal_eval(argument) for argument in call.args)
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    profile = config.load("demo")
    assert Path(video).parent == profile.data.folder / profile.data.videos
    assert query in {row.query for row in synthetic.rows("val") if f"{row.vid}.mp4" == Path(video).name}
    assert options == {"checkpoint": "runs/demo/checkpoint"}
    assert f'framseg predict {video} --query "{query}" --checkpoint {options["checkpoint"]}' in README


def test_numbers_in_the_text_are_those_of_code_and_records():
    paper, videos = config.load("paper"), synthetic.VIDEOS
    records = ROOT / "tests/benchmarks/records"
    policy, store = (json.loads((records / f"{name}.json").read_text()) for name in ("ranked_policy", "frame_store"))
    stored = next(value for name, value in store.items() if name.startswith("GB for"))
    ranking = sum(map(len, moments.RANKING))
    batch = paper.training.micro_batch * paper.training.accumulation * paper.training.processes
    assert f"sees {paper.frames.count} frames" in README
    assert f"draws {sum(videos.values())} videos" in README
    assert f"Their {ranking + 1} constants" in README  # and the kernel's width
    assert f"{moments.KERNEL} frames wide" in MODULE
    assert f"`accumulation` x `processes` at {batch}" in MODULE
    assert f"[{stored:.0f} GB for the frame store]" in MODULE
    assert f"`{dataset.store(paper).folder.name}/{{vid}}.zip`" in MODULE
    assert f"the {policy['recordings']} recordings" in BENCHMARKS
    demo = TEXTS["framseg/demo/README.md"].replace("\n", " ")
    assert f"({videos['train']} train, {videos['val']} val, {videos['test']} test; {synthetic.WIDTH} x " in demo
    assert f"{synthetic.HEIGHT} pixels, {synthetic.FPS} frames per second)" in demo
    assert "a stretch of {} to {} s shows".format(*synthetic.STRETCH) in demo
    assert not [shown for shown in synthetic.ACTIVITIES if f"{shown.phrase} {shown.verb}" not in demo]


def test_the_tests_take_the_same_time_everywhere():
    usage = subprocess.run([ROOT / "run_all.sh", "--help"], capture_output=True, text=True, check=True).stdout
    fast, all_of_them = re.findall(r"at most (\d+) minutes", usage)
    for text in (README, TEXTS[".github/CONTRIBUTING.md"]):
        prose = " ".join(text.split())
        assert re.search(rf"`\./run_all\.sh test` takes (at most )?{fast} minutes on two cores", prose)
        assert re.search(r"`\./run_all\.sh test --all` (at most )?an hour", prose) and all_of_them == "60"
