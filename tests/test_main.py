import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

import framseg
from framseg import FramsegError, __main__, config


def module(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "framseg", *arguments]
    return subprocess.run(command, cwd=config.REPOSITORY, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_with_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(["--help"])
    assert not end.value.code
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    purposes = {line[0]: line[1] for line in lines if len(line) == 2}
    names = ("predict", "evaluate", "codalab", "download", "hub", "run", "demo")
    assert tuple(__main__.COMMANDS) == names
    assert all(purposes[name] == __main__.COMMANDS[name][1] for name in names)


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_a_command_is_named_in_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main([name, "--help"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f"usage: framseg {name} ")


def test_the_version_is_said_without_loading_anything_else():
    done = module("--version")
    assert (done.returncode, done.stdout) == (0, f"framseg {framseg.__version__}\n")
    code = "import sys; sys.argv = ['framseg', '--version']\n"
    code += "try:\n from framseg.__main__ import main; main()\n"
    code += (
        "finally: print(*sorted(name for name in sys.modules if name.split('.')[0] in ('framseg', 'torch', 'numpy')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=config.REPOSITORY, capture_output=True, text=True).stdout
    assert loaded.split()[2:] == ["framseg", "framseg.__main__"]


@pytest.mark.parametrize("arguments", [[], ["predikt"]])
def test_a_missing_or_wrong_command_ends_with_the_list(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error,message",
    [
        (FramsegError("no frames"), "error: no frames"),
        (
            FileNotFoundError(2, "No such file or directory", "a.mp4"),
            "error: a.mp4: No such file or directory",
        ),
    ],
)
def test_an_error_is_one_sentence(error, message, monkeypatch):
    def fail(arguments):
        assert arguments == ["--private", "x"]
        raise error

    monkeypatch.setattr(__main__, "import_module", lambda name: SimpleNamespace(main=fail))
    with pytest.raises(SystemExit) as end:
        __main__.main(["hub", "--private", "x"])
    assert end.value.code == message


@pytest.mark.parametrize("result,code", [(None, 0), (0, 0), (2, 2)])
def test_a_commands_exit_code_is_handed_on(result, code, monkeypatch):
    monkeypatch.setattr(__main__, "import_module", lambda name: SimpleNamespace(main=lambda arguments: result))
    assert __main__.main(["run"]) == code


def test_every_module_with_a_command_is_there():
    for name, (path, _) in __main__.COMMANDS.items():
        assert callable(import_module(path).main), name
