"""Where and how `run_all.sh` may be started: from any folder, off a read-only tree, without a network, cut short."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHORT
from test_faults import alive, processes_of, wait_for, without_override

from framseg import config, train
from framseg.run.paths import Run

# In a network of its own the loopback address is down, through which kernels and training processes are spoken to.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", UP_AND_RUNNING))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def run_all(source: Path, run: Path, *options: str, before: tuple = (), **environment: str) -> subprocess.Popen:
    """`run_all.sh demo` of the tree `source`, with this environment's Python, started from the root folder."""
    command = [*before, str(source / "run_all.sh"), "demo", "--run-dir", str(run), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd="/", env=environment, start_new_session=True, **pipes)


def settings(folder: Path) -> list[str]:
    """A short training on a folder of data, as options."""
    changes = SHORT | {"data.folder": folder}
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def listed(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_read_only_tree_with_an_odd_name_a_fresh_home_and_no_network(small_set, tmp_path):
    source, run, home, temporary = (tmp_path / name for name in ("quelle ä 源", "läufe 1/run ß", "home", "tmp"))
    names = subprocess.run(["git", "ls-files", "-z"], cwd=config.REPOSITORY, capture_output=True, text=True, check=True)
    for name in names.stdout.split("\0")[:-1]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config.REPOSITORY / name, source / name)
    for folder, _, files in os.walk(source):
        for name in [".", *files]:
            os.chmod(Path(folder) / name, (Path(folder) / name).stat().st_mode & 0o555)
    home.mkdir()
    temporary.mkdir()
    data = tmp_path / "dätä"
    shutil.copytree(small_set, data)
    before = listed(source)
    offline = ("unshare", "--net")
    if not shutil.which("unshare") or subprocess.run([*offline, "true"], capture_output=True).returncode:
        offline = ()  # not allowed here: then with a network that is not used
    else:
        offline += (sys.executable, "-c", LOOPBACK_UP)
    own = {"HOME": str(home), "TMPDIR": str(temporary)}
    process = run_all(source, run, *settings(data), before=(*offline, *without_override()), **own)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed[-4000:]
    assert "5 notebooks in" in printed and (run / "report.html").is_file() and (run / "submission.zip").is_file()
    assert listed(source) == before
    assert not listed(temporary)
    usual = (".cache", ".config", ".ipython", ".jupyter", ".local", ".triton")
    assert {Path(name).parts[0] for name in listed(home)} <= set(usual)


@pytest.mark.slow
def test_ctrl_c_in_the_shell_leaves_a_state_and_no_process(small_set, tmp_path):
    run = Run("demo", tmp_path / "cut short")
    process = run_all(config.REPOSITORY, run.root, "--only", "03", *settings(small_set), "--set", "training.epochs=50")
    wait_for(lambda: len(train.read_log(run.step_log)) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "interrupted" in printed and "go on with --from 03" in printed
    wait_for(lambda: not processes_of(run), seconds=60)
    assert list(run.resume.glob("step_*/state.json")) and not alive(run)
    assert not run.checkpoint.exists()


def test_without_a_network_what_would_be_fetched_is_named_within_ten_seconds(small_set, tmp_path):
    """The hub's address takes connections and never answers, which is worse than an address that is not there."""
    published = config.load("paper").model
    names = {"data.folder": small_set, "model.weights": published.weights, "model.tokenizer": published.tokenizer}
    code = (
        "import json, sys, time; from framseg import config; from framseg.run import preflight;"
        "began = time.monotonic();"
        "print(*preflight.missing(config.load('demo', json.loads(sys.argv[1]))), sep='\\n');"
        "print(time.monotonic() - began)"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", code, json.dumps(names, default=str)]
        done = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, tokenizer, seconds = done.stdout.splitlines()
    assert weights.startswith(f"weights: {published.weights!r}") and "would be fetched, cannot be reached" in weights
    assert tokenizer.startswith("tokenizer: would be fetched from there") and float(seconds) < 10
