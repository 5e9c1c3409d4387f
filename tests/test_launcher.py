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
from framseg.run.launcher import Reason

WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  …\n{0}: too big"


@pytest.mark.parametrize(
    "error, reason, sentence",
    [
        (FramsegError("as\n it is"), Reason.OTHER, "as it is"),
        (KeyError("odd"), Reason.OTHER, "KeyError: 'odd'"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), Reason.DISK_FULL, "the disk is full (/data/x): "),
        (SafetensorError("I/O error: (os error 28)"), Reason.DISK_FULL, "the disk is full (I/O error"),
        (OSError(errno.EROFS, "Read-only", "/data/x"), Reason.NOT_WRITABLE, "cannot write /data/x (Read-only): give"),
        (
            torch.OutOfMemoryError("CUDA: 2 GiB"),
            Reason.OUT_OF_MEMORY,
            "out of memory (CUDA: 2 GiB): halve training.mic",
        ),
        (MemoryError(WORKER.format("MemoryError")), Reason.OUT_OF_MEMORY, "out of memory (too big): halve"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Reason.OUT_OF_MEMORY, "out of memory (Default"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed"),
            Reason.READER_DIED,
            "a process that reads frames has died",
        ),
        (RuntimeError(WORKER.format("RuntimeError")), Reason.OTHER, "RuntimeError: too big"),
        (torch.distributed.DistNetworkError("closed"), Reason.PEER_GONE, "another process has ended (closed)"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:1] closed"), Reason.PEER_GONE, "another process has ended ([/gloo"),
    ],
)
def test_every_error_has_a_reason_and_a_sentence(error, reason, sentence):
    assert launcher.diagnosis(error)[0] == reason
    assert launcher.sentence(error).startswith(sentence)


TELLING = "import torch\nfrom framseg.run import launcher\nwith launcher.last_line():\n    raise "

MODULES = {  # what a started module does, and what is said of it
    "raise KeyError('odd')": r"a process or the DeepSpeed launcher ended with KeyError: 'odd' \(log: ",
    f"{TELLING}MemoryError('64 GiB')": r"out of memory \(64 GiB\): halve .* \(log: ",
    f"{TELLING}torch.distributed.DistBackendError('closed')": "a process was killed or crashed without a word",
    "import os\nos.kill(os.getpid(), 9)": r"a process was killed or crashed without a word \(exit code .*\(log: ",
}


@pytest.mark.parametrize("code", MODULES)
def test_what_a_process_leaves_in_the_log_is_told(tmp_path, monkeypatch, code):
    (tmp_path / "started.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last):\nof an earlier run\n")
    with launcher.Job("started", config.load("demo", {"training.processes": 1}), log, []) as job:
        assert list(job.polls())[-1]
    assert job.process.returncode
    assert re.match(MODULES[code], job.failure()), job.failure()


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
