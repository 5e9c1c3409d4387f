"""The README's commands name programs, files and options that are there (what they do is tested where they live)."""

import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
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
def usage(program: str) -> str:
    """What a module, a Python file or run_all.sh says of its options.

    The first two in this process, which has loaded already what takes each of them seconds.
    """
    file = config.REPOSITORY / program
    if file.suffix == ".sh":
        return subprocess.run([file, "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [program, "--help"])
        patch.syspath_prepend(file.parent)  # as Python does for a file
        if file.suffix == ".py":
            runpy.run_path(str(file), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    assert not end.value.code
    return said.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of runpy, by modules that are loaded already
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_there_and_knows_its_options(command):
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    if words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    elif words[0] in ("deepspeed", "jupyter", "conda"):
        pytest.skip(f"{words[0]} is not ours")
    else:
        profiles = [word for word in words[1:2] if not word.startswith("-")]
        assert set(profiles) <= {*config.names(), "test", "<profile>"}
    said = usage(words[0])
    for word in words[1:]:
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
