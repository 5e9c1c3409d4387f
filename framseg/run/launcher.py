"""Starting a module of framseg in the processes of a profile through the DeepSpeed launcher, and watching them.

A process that fails ends the log with the sentence for the user, which the process that started it looks for there.
"""

import argparse
import contextlib
import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from framseg import FramsegError, config
from framseg.backbones import device
from framseg.run import WAITING_THREADS
from framseg.run.paths import Run

WAIT = timedelta(hours=2)  # that processes wait for each other: one may be decoding while the others are done
POLL = 0.5  # seconds between two looks at processes that run
WATCHER = "FRAMSEG_WATCHER"  # environment variable: the process that looks after the started ones
LAST_LINE = "framseg ends: "  # begins the line in which a failing process says why
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# A traceback: whether Python has ignored the error, and the error at its end.
TRACEBACK = re.compile(r"^(Exception ignored.*\n)?Traceback \(most recent call last\).*\n(?:[ \t].*\n|\n)*(\S.*)", re.M)
# A line in which a program without a traceback says why it ends: a C++ library, a shell, the loader, argparse.
ERROR_LINE = re.compile(
    r"^(?!.*warning)(terminate called.*(?:\n +what\(\):.*)?|"
    r".*(?:error\b|\bfatal\b|\babort|fault\b|not found|no such|no module named|\bcannot\b|denied).*)$",
    re.M | re.I,
)
LAUNCHERS_LINE = re.compile(r"^\[20\d\d-.*\n?", re.M)  # what DeepSpeed's launcher itself writes: it only counts codes
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
DISK_FULL = "the disk is full ({}): make room and start again, finished steps are kept"
T = TypeVar("T")


def peer_gone(error: Exception) -> bool:
    """True for an error that says no more than that another process has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)  # gloo: a RuntimeError


def sentence(error: Exception) -> str:
    """What to tell a user about an error of this process: what happened and, where that is known, what to do.

    By its type and errno; by its text only where a library raises a type that says nothing.
    """
    message = str(error)
    if "in DataLoader worker process" in message:  # torch: the message is the worker's whole traceback
        message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
    text = " ".join(message.split())
    if isinstance(error, FramsegError):
        return text
    if peer_gone(error):
        return f"another process has ended ({text})"
    # An error of safetensors has its errno in the text alone.
    if getattr(error, "errno", None) in FULL or any(f"(os error {number})" in text for number in FULL):
        return DISK_FULL.format(getattr(error, "filename", None) or text)
    # On the CPU torch raises a RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory ({text}): halve training.micro_batch (or inference.batch, if it was decoding) and double "
            "training.accumulation, or set training.gradient_checkpointing=true"
        )
    if isinstance(error, OSError) and error.errno in REFUSED:
        return f"cannot write {error.filename} ({error.strerror}): give another --run-dir or data.folder"
    if "DataLoader worker (pid" in text:  # torch: a RuntimeError
        return f"a process that reads frames has died ({text}): lower training.workers if memory is short"
    return f"{type(error).__name__}: {text}"


class Job(contextlib.AbstractContextManager["Job"]):
    """`python -m module arguments` in `training.processes` processes, whose output is appended to `log`.

    They are killed when its context is left. FramsegError without DeepSpeed, OSError for a log that cannot be written.
    """

    def __init__(self, module: str, profile: config.Profile, log: Path, arguments: list[str]):
        if importlib.util.find_spec("deepspeed") is None:
            raise FramsegError("DeepSpeed is not installed with this Python: install what environment.yml lists")
        command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={profile.training.processes}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={get_free_port()}", "--no_local_rank"]
        command += ["--module", module, *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with open(log, "a", encoding="utf-8") as output:
            self.begin = output.tell()
            # In a session of its own: the terminal's Ctrl-C is the caller's, who asks the processes to stop.
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=_environment(profile), start_new_session=True
            )

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # nothing is left
            os.killpg(self.process.pid, signal.SIGKILL)  # also where the launcher itself is gone already
        self.process.wait()

    def polls(self) -> Iterator[bool]:
        """False every POLL seconds while the launcher runs, then True once, when it has ended."""
        while self.process.poll() is None:
            yield False
            time.sleep(POLL)
        yield True

    def failure(self) -> str:
        """Why the processes ended, in one sentence that names the log."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(self.begin)
            text = file.read()
        given = [line.removeprefix(LAST_LINE) for line in text.splitlines() if line.startswith(LAST_LINE)]
        errors = [error for ignored, error in TRACEBACK.findall(text) if not ignored]
        if any(given):
            why = next(filter(None, given))
        elif shutil.disk_usage(self.log.parent).free < 2**20:  # too full for a last line
            why = DISK_FULL.format(self.log.parent)
        elif errors and not given and 0 < self.process.returncode < 128:
            why = f"a process or the DeepSpeed launcher ended with {errors[-1]}"
        else:
            why = _unspoken(self.process.returncode, "" if given else LAUNCHERS_LINE.sub("", text))
        return f"{why} (log: {self.log})"


def _unspoken(code: int, text: str) -> str:
    """Why processes ended that left neither a reason nor a traceback: by the launcher's exit code, and their output."""
    number = -code if code <= 0 else 256 - code  # DeepSpeed's launcher ends with a signal's negative number
    words = [" ".join(error.split()) for error in ERROR_LINE.findall(text)] or text.split("\n")
    last = next((line for line in reversed(words) if line.strip()), "")
    if last and 0 < code < 128:
        return f"a process or the DeepSpeed launcher ended with the words: {last}"
    if number in CRASHES:
        return f"a process crashed with {signal.Signals(number).name}{last and f', its last words were: {last}'}"
    return (
        f"a process was killed or crashed without a word (exit code {code}), by somebody or by the system for want of "
        f"memory: start again, finished steps are kept"
    )


def _environment(profile: config.Profile) -> dict[str, str]:
    environment = os.environ | {WATCHER: str(os.getpid())}
    # DeepSpeed takes a missing program (numactl) for none, but ends if a folder in PATH may not be searched for it.
    searched = os.environ.get("PATH", os.defpath).split(os.pathsep)
    environment["PATH"] = os.pathsep.join(folder for folder in searched if os.access(folder, os.X_OK))
    environment["PYTHONPATH"] = config.import_path()
    environment.setdefault(*WAITING_THREADS)
    if device(profile.training.device).type == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if profile.training.threads:
        environment["OMP_NUM_THREADS"] = str(profile.training.threads)
    return environment


@contextlib.contextmanager
def started(
    module: str, purpose: str, arguments: Sequence[str] | None, splits: Sequence[str] = ()
) -> Iterator[tuple[config.Profile, Run, argparse.Namespace]]:
    """In a started process: its profile, run and options, while it works together with the other processes.

    splits: between which `--split` chooses, if there are any.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=purpose)
    parser.add_argument("--profile", required=True, help="a profile's name or the path of a YAML file")
    parser.add_argument("--run-dir", type=Path)
    if splits:
        parser.add_argument("--split", choices=splits, required=True)
    options = parser.parse_args(arguments)
    with last_line():
        profile = config.load(options.profile)
        if "RANK" not in os.environ:
            raise FramsegError("this process has no rank: `deepspeed --module` starts it, or framseg run does it all")
        import deepspeed

        # DeepSpeed would compile a shared-memory helper for CPU collectives first (minutes); gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(timeout=WAIT)
        _, world = place()
        if world != profile.training.processes:
            raise FramsegError(f"training.processes is {profile.training.processes}, {world} were started")
        if profile.training.threads:
            torch.set_num_threads(profile.training.threads)
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        yield profile, Run(profile, options.run_dir), options
        torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's rank and how many processes work together; (0, 1) if it has not joined others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(value: T) -> list[T]:
    """What every process gives here, in the order of their ranks; each waits for all of them."""
    values = [value] * place()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def last_line() -> Iterator[None]:
    """An error ends this process; the log gets its traceback and then the line that `Job.failure` reads.

    A process that no `Job` started, as on several machines, tells its user in a sentence what a user can cause.
    """
    try:
        yield
    except Exception as error:
        if WATCHER not in os.environ and isinstance(error, FramsegError | OSError):
            raise FramsegError(sentence(error)) from None  # for `command_line`
        traceback.print_exc()
        # Where another process has ended, that one has written its own reason, or was killed.
        why = "" if peer_gone(error) else " ".join(sentence(error).split())
        print(f"{LAST_LINE}{why}", file=sys.stderr, flush=True)
        sys.exit(1)
