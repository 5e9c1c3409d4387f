"""Every path of a run, and the lock on a folder."""

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from framseg import FramsegError
from framseg.config import FILE, WORKSPACE, Profile

DYING = 5.0  # seconds that a killed process may take until its folder is free


class BusyError(FramsegError, RuntimeError):
    """A folder that another process works in; the message names both."""


class Run:
    """Every path of one run, all below `root` (by default ``runs/<profile>`` in config.WORKSPACE)."""

    def __init__(self, profile: Profile | str, root: Path | str | None = None):
        name = profile if isinstance(profile, str) else profile.name
        self.root = Path(root) if root else WORKSPACE / "runs" / name
        self.profile = self.root / FILE
        self.notebooks = self.root / "notebooks"
        self.train = self.root / "train"
        self.step_log = self.train / "steps.jsonl"  # one line per optimizer step
        self.validation_log = self.train / "validation.jsonl"  # one line per epoch: the metrics
        self.skipped_log = self.train / "skipped.jsonl"  # one line per step that was not finite, with its qids
        self.trained_with = self.train / FILE  # what the training in this folder began with
        self.trained_on = self.train / "rows.sha256"  # of the training annotations
        self.resume = self.train / "resume"  # step_000123/: the last two states that training can go on from
        self.checkpoint = self.root / "checkpoint"  # what framseg.predict reads
        self.predictions = self.root / "predictions"
        self.metrics = self.root / "metrics"
        self.submission = self.root / "submission.zip"
        self.report = self.root / "report.html"  # all executed notebooks on one page
        self.figures = self.root / "figures"

    def predicted(self, split: str, epoch: int | None = None) -> Path:
        """Predictions of a split: the final ones, or those decoded after an epoch (counted from 1)."""
        return self.predictions / (f"{split}.jsonl" if epoch is None else f"{split}_epoch_{epoch:02d}.jsonl")


def hold(folder: Path, name: str = "lock", wait: float = DYING, busy: FramsegError | None = None) -> TextIO:
    """Keep other processes from working in `folder`, until the result, file `name`, is closed or this process ends.

    Raises `busy`, or a BusyError that names the process, if another one has it for `wait` seconds more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / name, "a+", encoding="utf-8")
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
        if time.monotonic() > deadline:
            file.seek(0)
            with file:
                raise busy or BusyError(f"process {file.read()} works in {folder}: end it, or give another --run-dir")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
