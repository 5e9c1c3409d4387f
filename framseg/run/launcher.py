"""Starting a module of framseg through the DeepSpeed launcher, once for each process of a profile, and ending it."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from framseg import config
from framseg.run import WAITING_THREADS

WAIT = timedelta(hours=2)  # that processes wait for each other: one may be decoding while the others are done
WATCHER = "FRAMSEG_WATCHER"  # environment variable: the process that looks after the started ones
LAST_WORDS = "framseg: "  # how the sentence begins that a failing process leaves in the log
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def start(module: str, profile: config.Profile, log: Path, arguments: list[str]) -> subprocess.Popen:
    """Start `python -m module arguments` in `training.processes` processes; what they print is appended to `log`.

    Raises FileNotFoundError if there is no DeepSpeed launcher.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [*_launcher(profile.training.processes), "--module", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(profile),
            start_new_session=True,  # the terminal's Ctrl-C is the caller's, who asks the processes to stop
        )


def join(profile: config.Profile) -> tuple[int, int]:
    """In a started process: join the others. Returns this one's rank and how many there are."""
    import deepspeed

    # DeepSpeed would compile a shared-memory helper for CPU collectives first (minutes); gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=WAIT)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world != profile.training.processes:
        raise ValueError(f"training.processes is {profile.training.processes}, {world} were started")
    if profile.training.threads:
        torch.set_num_threads(profile.training.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    return rank, world


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def end(process: subprocess.Popen) -> None:
    """Kill what is left of the launcher and its processes, also where the launcher itself is gone already."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def watched() -> bool:
    """In a started process: False if who started it is gone (a kernel that was killed), and with it every reader."""
    return WATCHER not in os.environ or Path(f"/proc/{os.environ[WATCHER]}").exists()


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """In a started process: an error ends it with its traceback and one sentence in the log, for `failure`."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        # That another process is gone is no reason: that one has left it, or was killed.
        if not (isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)):
            print(f"{LAST_WORDS}{sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def failure(process: subprocess.Popen, log: Path, begin: int) -> str:
    """Why the launcher's processes ended, in one sentence; what they printed stands in `log` from byte `begin` on."""
    with open(log, "rb") as file:
        file.seek(begin)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    why = next((line.removeprefix(LAST_WORDS) for line in lines if line.startswith(LAST_WORDS)), None)
    if why is None and shutil.disk_usage(log.parent).free < 2**20:  # too full for a last word
        why = _full(log.parent)
    if why is None:
        why = (
            f"a process was killed or crashed without a word (exit code {process.returncode}), by somebody or by the "
            f"system for want of memory: start again, finished steps are kept"
        )
    return f"{why} (log: {log})"


def sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    full = isinstance(error, OSError) and error.errno in FULL
    if full or any(f"(os error {number})" in text for number in FULL):  # the latter: safetensors
        return _full(getattr(error, "filename", None) or text)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory ({text}): halve training.micro_batch (or inference.batch, if it was decoding) and double "
            f"training.accumulation, or set training.gradient_checkpointing=true"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename} cannot be written ({error.strerror}): give another --run-dir or data.folder"
    if "DataLoader worker" in text:
        return f"a process that reads frames has died ({text}): lower training.workers if memory is short"
    ours = type(error).__module__.partition(".")[0] in (__package__, "__main__")  # the latter: the module started
    return text if ours else f"{type(error).__name__}: {text}"


def _full(where: Path | str) -> str:
    return f"the disk is full ({where}): make room and start again, finished steps are kept"


def _launcher(processes: int) -> list[str]:
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which("deepspeed")
    if launcher is None:
        raise FileNotFoundError(
            "the DeepSpeed launcher is not installed beside this Python: install what environment.yml lists"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The launcher's own scripts start "python": it must be this one.
    return [
        sys.executable, launcher, f"--num_gpus={processes}", "--master_addr=127.0.0.1", f"--master_port={port}",
        "--no_local_rank",
    ]  # fmt: skip


def _environment(profile: config.Profile) -> dict[str, str]:
    environment = os.environ | {WATCHER: str(os.getpid())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(config.REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment.setdefault(*WAITING_THREADS)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    if profile.training.threads:
        environment["OMP_NUM_THREADS"] = str(profile.training.threads)
    return environment
