"""Style, types, docstrings and words, and that what the public checks run is there."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from framseg import config

CHECKS = [
    ("ruff", "check", "."),  # with D1: every public thing of the package has a docstring
    ("ruff", "format", "--check", "."),
    ("mypy",),
]

# Words that a newcomer has to ask about, each as a regular expression, and what to write in their place.
THINGS = "samples|queries|videos|frames|windows|clips|words|tokens|operations|bytes|times|steps"
UNITS = "second|minute|hour|epoch|step|query|video|window|frame|clip|sample|word|token|digit|line|class"
WORDS = {
    r"\bbeside\b": "next to, compared with",
    r"\bone's own\b": "your own",
    rf"\b({THINGS}) an? ({UNITS})\b(?! time)": "per",
    r"leaves no one\b|an answer needs one|short runs keep a body|that feel it\b|header's word for|proves nothing": "",
    r"another process is gone is no reason|do not tell the hour|threads that wait for others soon|tensor caught": "",
    r"hang on the annotated|hardly more often than chance would|of few vectors|comparable in their course": "",
    r"what no model can pass|trained and read as one|finds the weights of one process|test that takes 20 ends": "",
}
RATES = ["samples a second", "words a query", "Operations a second", "frames\n    # a video", "queries an hour"]

WORKFLOW = config.REPOSITORY / ".github" / "workflows" / "ci.yml"


@pytest.mark.parametrize("check", CHECKS, ids=" ".join)
def test_a_tool_has_nothing_to_say(check):
    command = [sys.executable, "-m", *check]
    done = subprocess.run(command, cwd=config.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_section_of_the_profile_is_explained():
    models = inspect.getmembers(config, lambda value: inspect.isclass(value) and value.__module__ == config.__name__)
    sections = {name: value for name, value in models if hasattr(value, "model_fields")}
    assert {"Profile", "Training", "Losses"} <= sections.keys()
    inherited = {name for name, value in sections.items() if not vars(value).get("__doc__")}
    assert not inherited, f"write a docstring for the sections {sorted(inherited)}"


def words(text: str) -> str:
    """A text as it is read: line breaks and the signs of comments in between are spaces."""
    return re.sub(r"\s*\n[\s#>]*", " ", text)


def texts() -> dict[str, str]:
    """What people read here, by file: code with its comments and docstrings, notebooks, every other text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=config.REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    read = {}
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        path = config.REPOSITORY / name
        if path.suffix == ".ipynb" and path.exists():
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            read[name] = "\n\n".join("".join(cell["source"]) for cell in cells)
        elif path.suffix in (".py", ".md", ".sh", ".yml", ".yaml", ".toml", ".js") and path.is_file():
            read[name] = path.read_text(encoding="utf-8")
    del read[Path(__file__).relative_to(config.REPOSITORY).as_posix()]  # it has to name them
    return read


@pytest.mark.parametrize("phrase", WORDS)
def test_the_words_are_plain(phrase):
    found = {
        name: [text[max(0, hit.start() - 30) : hit.end() + 30] for hit in re.finditer(phrase, text, re.IGNORECASE)]
        for name, text in ((name, words(text)) for name, text in texts().items())
    }
    found = {name: hits for name, hits in found.items() if hits}
    assert not found, f"say it in other words{WORDS[phrase] and ': ' + WORDS[phrase]}; {json.dumps(found, indent=1)}"


def test_the_words_are_seen():
    pattern = next(phrase for phrase, better in WORDS.items() if better == "per")
    assert all(re.search(pattern, words(rate), re.IGNORECASE) for rate in RATES)
    assert not re.search(pattern, "reads the frames a second time")


def commands() -> list[tuple[str, str]]:
    """The commands of the workflow, with the name of their job."""
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    return [
        (name, line.strip())
        for name, job in workflow["jobs"].items()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
    ]


def test_the_public_checks_run_what_is_there():
    usage = subprocess.run([config.REPOSITORY / "run_all.sh", "--help"], capture_output=True, text=True, check=True)
    modules = set()
    for _, line in commands():
        for path in re.findall(r"(?:^|[\s/'])((?:\./|\.ci/|tests/)[\w./]+|\w+\.(?:yml|toml))", line):
            assert (config.REPOSITORY / path).exists(), f"{WORKFLOW}: {path} is not there"
        modules |= set(re.findall(r"python -m (\w+)", line))
        for options in re.findall(r"run_all\.sh([^'&|]*)", line):
            for word in options.split():
                assert word.startswith("tests/") or word in usage.stdout, f"{WORKFLOW}: run_all.sh knows no {word}"
    assert {"ruff", "mypy"} <= modules


def test_the_public_checks_cover_the_pythons_the_package_takes_and_a_bare_debian():
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    bare = "\n".join(line for name, line in commands() if name == "debian")
    packages = " ".join(re.findall(r"apt-get install .*recommends (.*)", bare)).split()
    assert set(packages) == {"python3", "python3-venv", "git", "g++", "ca-certificates"}
    assert "useradd" in bare and {"./run_all.sh'", "./run_all.sh test'"} <= set(
        re.findall(r"\./run_all\.sh[^']*'", bare)
    )
