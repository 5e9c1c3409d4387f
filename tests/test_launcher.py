"""Starting processes through the DeepSpeed launcher, and the sentence that a user gets when they fail."""

import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from test_faults import without_override

from framseg import FramsegError, config
from framseg.run import launcher

WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  …\n{0}: too big"


@pytest.mark.parametrize(
    "error, sentence",
    [
        (FramsegError("as\n it is"), "as it is"),
        (KeyError("odd"), "KeyError: 'odd'"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "the disk is full (/data/x): make room"),
        (SafetensorError("I/O error: (os error 28)"), "the disk is full (I/O error: (os error 28)): make room"),
        (OSError(errno.EROFS, "Read-only", "/data/x"), "cannot write /data/x (Read-only): give another --run-dir"),
        (torch.OutOfMemoryError("CUDA: 2 GiB"), "out of memory (CUDA: 2 GiB): halve training.micro_batch"),
        (MemoryError(WORKER.format("MemoryError")), "out of memory (too big): halve"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory (DefaultCPUAllocator: can't"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "a process that reads frames has died (DataLoader"),
        (RuntimeError(WORKER.format("RuntimeError")), "RuntimeError: too big"),
        (torch.distributed.DistNetworkError("closed"), "another process has ended (closed)"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:1] closed"), "another process has ended ([/gloo/transport/tcp"),
    ],
)
def test_every_error_has_a_sentence(error, sentence):
    assert launcher.sentence(error).startswith(sentence)
    assert launcher.peer_gone(error) == sentence.startswith("another process has ended")


TELLING = "import torch\nfrom framseg.run import launcher\nwith launcher.last_line():\n    raise "

WORDS = "a process or the DeepSpeed launcher ended with the words"
MODULES = {  # what a started module does, and what is said of it
    "raise KeyError('odd')": r"a process or the DeepSpeed launcher ended with KeyError: 'odd' \(log: ",
    f"{TELLING}MemoryError('64 GiB')": r"out of memory \(64 GiB\): halve .* \(log: ",
    f"{TELLING}torch.distributed.DistBackendError('closed')": "a process was killed or crashed without a word",
    "import os\nos.kill(os.getpid(), 9)": r"a process was killed or crashed without a word \(exit code .*\(log: ",
    "import os\nos.kill(os.getppid(), 9)": r"a process was killed or crashed without a word \(exit code 0\)",
    "print('well so far')\nraise SystemExit('error: no such video')": f"{WORDS}: error: no such video \\(log: ",
    "raise SystemExit('the end')": f"{WORDS}: the end \\(log: ",
    "import argparse\nargparse.ArgumentParser('x').parse_args(['--y'])": f"{WORDS}: x: error: unrecognized arguments",
    "import os, sys\nsys.exit(os.system('no-such-program') >> 8)": f"{WORDS}: .*no-such-program: not found",
    "import os, sys\nos.execv(sys.executable, ['python', '-m', 'gone'])": f"{WORDS}: .*No module named gone",
    "import sys\nprint('error: 1\\nUserWarning: error 2\\nbye')\nsys.exit(3)": f"{WORDS}: error: 1 \\(log: ",
    "import ctypes\nctypes.string_at(0)": r"a process crashed with SIGSEGV \(log: ",
    "import os\nos.write(2, b\"terminate called after throwing an instance of 'X'\\n  what():  Y\\n\")\nos.abort()": (
        r"a process crashed with SIGABRT, its last words were: terminate called after .* 'X' what\(\): Y \(log: "
    ),
}


@pytest.mark.parametrize("code", MODULES)
def test_what_a_process_leaves_in_the_log_is_told(tmp_path, monkeypatch, code):
    (tmp_path / "started.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last):\nof an earlier run\n")
    with launcher.Job("started", config.load("demo", {"training.processes": 1}), log, []) as job:
        assert list(job.polls())[-1]
    assert re.match(MODULES[code], job.failure()), job.failure()


def test_only_a_process_that_a_job_started_writes_its_line(tmp_path, monkeypatch):
    """Started on several machines, by hand, it ends with a sentence."""
    monkeypatch.delenv(launcher.WATCHER, raising=False)
    with pytest.raises(FramsegError, match=r"^cannot write a \(Permission denied\): give another --run-dir"):
        with launcher.last_line():
            raise PermissionError(errno.EACCES, "Permission denied", "a")
    monkeypatch.setenv(launcher.WATCHER, str(os.getpid()))
    with pytest.raises(SystemExit), launcher.last_line():
        raise PermissionError(errno.EACCES, "Permission denied", "a")


@pytest.mark.parametrize("where, gpus", [("auto", ""), ("auto", "0"), ("cpu", "0")])
def test_what_trains_on_the_cpu_is_started_without_a_gpu(monkeypatch, where, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    environment = launcher._environment(config.load("demo", {"training.device": where}))
    on_cpu = where == "cpu" or not gpus
    assert environment.get("DS_ACCELERATOR") == ("cpu" if on_cpu else None)
    assert environment["CUDA_VISIBLE_DEVICES"] == ("" if on_cpu else gpus)


START = """
import os, sys
from pathlib import Path
from framseg import config
from framseg.run import launcher

path = os.environ["PATH"] = f"{sys.argv[1]}/shut"
if sys.argv[2] == "unchanged":
    own, launcher._environment = launcher._environment, lambda profile: own(profile) | {"PATH": path}
with launcher.Job("this", config.load("demo"), Path(sys.argv[1]) / "log", []) as job:
    list(job.polls())
print(job.failure() if job.process.returncode else "well")
"""


@pytest.mark.parametrize("given", ["searched", "unchanged"])
def test_a_folder_in_path_that_may_not_be_entered(tmp_path, given):
    """DeepSpeed's launcher looks for numactl there; where it fails by itself, its error is what is told."""
    (tmp_path / "shut").mkdir(mode=0)
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "DS_ACCELERATOR": "cpu"}
    command = [*without_override(), sys.executable, "-c", START, str(tmp_path), given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if given == "searched":
        assert done.stdout == "well\n", done.stderr
    else:
        assert "ended with PermissionError: [Errno 13] Permission denied: 'numactl' (log: " in done.stdout, done.stderr
