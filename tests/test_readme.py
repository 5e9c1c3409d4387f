"""The README's commands name programs, files and options that are there (what they do is tested where they live)."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from framseg import config

TEXT = (config.REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).replace("\n", " ")
INLINE = [text for text in re.findall(r"`([^`]+)`", PROSE) if re.match(r"(\./run_all|python )", text)]
COMMANDS = sorted(
    {line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()} | set(INLINE)
)


@functools.cache
def usage(*command: str) -> str:
    """What a program says of its options."""
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY)}
    done = subprocess.run(
        [*command, "--help"], cwd=config.REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_there_and_knows_its_options(command):
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    if words[0] == "python":
        words[0] = sys.executable
        program = tuple(words[:3] if words[1] == "-m" else words[:2])
    elif words[0] in ("deepspeed", "jupyter", "conda"):
        pytest.skip(f"{words[0]} is not ours")
    else:
        program = (str(config.REPOSITORY / words[0]),)
        profiles = [word for word in words[1:2] if not word.startswith("-")]
        assert set(profiles) <= {*config.names(), "test", "<profile>"}
    said = usage(*program)
    for word in words[len(program) :]:
        if word.startswith("--") and word != "--help":
            assert word.partition("=")[0] in said


def test_every_path_it_names_is_there():
    names = set(re.findall(r"\]\(([\w./]+)\)", TEXT)) | set(
        re.findall(r"`((?:tests|framseg|notebooks)/[\w./]+)`", TEXT)
    )
    assert names and not [name for name in names if not (config.REPOSITORY / name).exists()]


def test_every_dependency_has_a_reason():
    section = TEXT.split("## Dependencies")[1].split("\n## ")[0]
    pins = yaml.safe_load((config.REPOSITORY / "environment.yml").read_text(encoding="utf-8"))["dependencies"][-1][
        "pip"
    ]
    named = {
        name.strip() for line in section.splitlines() if line.startswith("| ") for name in line.split("|")[1].split(",")
    }
    assert {pin.split("==")[0] for pin in pins if "==" in pin} == named - {"package", "---"}


def test_it_names_every_module():
    modules = {path.name for path in (config.REPOSITORY / "framseg").glob("[a-z]*.py")}
    layout = TEXT.split("## Layout")[1].split("\n## ")[0]
    assert modules == {Path(name).name for name in re.findall(r"`(\w+\.py)`", layout)}
