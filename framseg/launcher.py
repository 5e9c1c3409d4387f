"""Starting a module of framseg through the DeepSpeed launcher, once for each process of a profile, and ending it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch

from framseg import config

WAIT = timedelta(hours=2)  # that processes wait for each other: one may be decoding while the others are done
TAIL = 30  # lines of a failed module's output that are shown


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


def tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(True)[-TAIL:]
    return "".join(f"    {line}" for line in lines)


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
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(config.REPOSITORY), os.environ.get("PYTHONPATH")]))
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    if profile.training.threads:
        environment["OMP_NUM_THREADS"] = str(profile.training.threads)
    return environment
