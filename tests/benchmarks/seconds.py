"""Where do the seconds of a demo run and of the tests go, and what did the slowest things take before?

./run_all.sh test --all | tee test.log; python tests/benchmarks/seconds.py --tests test.log --before COMMIT

Runs `./run_all.sh demo` in a fresh run folder and takes the notebooks' seconds from what it prints, and the tests' from
pytest's list of the slowest in `test.log`. With --before, three things are measured in turns in that commit's tree and
in this one: how long it takes to say what the profile `paper` lacks, the demo's training steps alone and beside
other work (a busy process a core), and the test of the README's commands. Writes records/seconds.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import common

from framseg import config
from framseg.run import WAITING_THREADS

ROUNDS = 2
STEPS = "10"  # of training, five of them counted


def start(tree: Path, *command: str | Path, **changes: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != WAITING_THREADS[0]}
    environment |= {"PYTHONPATH": str(tree), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | changes
    return subprocess.run(list(map(str, command)), cwd=tree, env=environment, capture_output=True, text=True)


def notebooks(folder: Path) -> dict[str, int]:
    """Seconds by notebook of a whole demo run, the set being there already."""
    done = start(config.REPOSITORY, config.REPOSITORY / "run_all.sh", "demo", "--run-dir", folder / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"\[\d/5\] (\w+):.*?\n +(\d+) s$", done.stdout, re.DOTALL | re.MULTILINE)
    return {name: int(seconds) for name, seconds in found}


def slowest(log: Path) -> dict[str, int]:
    """Seconds of the ten slowest tests or fixtures out of pytest's lists."""
    text = log.read_text(encoding="utf-8")
    found = re.findall(r"^([\d.]+)s (setup|call|teardown) +(\S.*)$", text, re.MULTILINE)
    found.sort(key=lambda line: -float(line[0]))
    return {f"{name} ({what})": round(float(seconds)) for seconds, what, name in found[:10]}


@contextmanager
def other_work() -> Iterator[None]:
    """A busy process for every core."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def wall(*arguments) -> float:
    began = time.perf_counter()
    start(*arguments)
    return round(time.perf_counter() - began, 1)


def speed(tree: Path, folder: Path) -> float:
    """Training samples a second."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        done = start(tree, sys.executable, tree / "tests/benchmarks/training.py", "--steps", STEPS, "--out", out)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((Path(out) / "training_demo.json").read_text())["samples a second"]["median"]


def compared(trees: dict[str, Path], folder: Path) -> dict:
    found: dict = {}

    def note(what: str, side: str, value: float) -> None:
        found.setdefault(what, {}).setdefault(side, []).append(value)
        print(what, side, value, flush=True)

    for _ in range(ROUNDS):
        for side, tree in trees.items():
            run = folder / "none"
            note(
                "saying what is missing, s",
                side,
                wall(tree, sys.executable, "-P", "-m", "framseg.run", "paper", "--run-dir", run),
            )
            note("training alone, samples/s", side, speed(tree, folder))
            with other_work():
                note("training beside other work, samples/s", side, speed(tree, folder))
            note("test_readme.py, s", side, wall(tree, sys.executable, "-m", "pytest", "-q", "tests/test_readme.py"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, metavar="LOG", help="what the tests printed, in one call or several")
    parser.add_argument("--before", metavar="COMMIT")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    record = common.about()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        record["demo, seconds"] = notebooks(folder)
        if options.tests:
            record["slowest tests, seconds"] = slowest(options.tests)
        if options.before:
            tree, git = folder / "before", ["git", "-C", str(config.REPOSITORY), "worktree"]
            subprocess.run([*git, "add", "--detach", str(tree), options.before], check=True, capture_output=True)
            stack.callback(subprocess.run, [*git, "remove", "--force", str(tree)], check=True)
            (tree / "data").symlink_to(config.REPOSITORY / "data")
            record |= {
                "before": options.before,
                "rounds": compared({"before": tree, "after": config.REPOSITORY}, folder),
            }
    common.write("seconds", record, options.out)


if __name__ == "__main__":
    main()
