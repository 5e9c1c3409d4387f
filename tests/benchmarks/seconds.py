"""Where the seconds of `./run_all.sh` go.

python tests/benchmarks/seconds.py      (about four minutes on two cores)

Runs the demo in a fresh run folder, on the video set that is made already, and takes each notebook's seconds from what
the run prints. Writes records/seconds.json.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import common

from framseg import config


def by_notebook(printed: str) -> dict[str, int]:
    """Seconds by notebook, from what a run printed."""
    seconds = re.findall(r"\[\d/5\] (\w+):.*?\n +(\d+) s$", printed, re.DOTALL | re.MULTILINE)
    return {name: int(count) for name, count in seconds}


def notebooks(folder: Path) -> dict[str, int]:
    """Seconds by notebook of a whole demo run that writes into `folder`."""
    command = [config.REPOSITORY / "run_all.sh", "demo", "--run-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return by_notebook(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = common.about() | {"demo, seconds": notebooks(Path(folder) / "run")}
    common.write("seconds", record, options.out)


if __name__ == "__main__":
    main()
