"""The benchmarks run, small, and the README shows what their records say."""

import json
import os
import subprocess
import sys

from framseg import config

FOLDER = config.REPOSITORY / "tests" / "benchmarks"


def start(script: str, *options: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_readme_shows_the_records():
    start("tables.py", "--check")


def test_decoding_beside_the_librarys(tmp_path):
    start("decoding.py", "--videos", "4", "--repeats", "1", "--random", "--out", str(tmp_path))
    found = json.loads((tmp_path / "decoding_demo.json").read_text())
    assert found["same masks"] == found["queries"] == 4
    growth = found["milliseconds a query by"]
    assert list(growth["frames"]) == ["10", "25", "50", "100"] and list(growth["beams"]) == ["1", "2", "4", "8"]
    committed = json.loads((FOLDER / "records" / "decoding_demo.json").read_text())
    assert committed["same masks"] == committed["queries"] and committed["ratio"] >= 2


def test_training_of_one_profile_against_another(tmp_path):
    """The full-size command with the demo's model: recomputing layers, as `paper` does, changes no loss."""
    changes = {
        "model": json.dumps(config.load("demo").model.model_dump(mode="json", exclude={"weights", "tokenizer"})),
        "training.processes": 1,
        "training.micro_batch": 2,
        "training.accumulation": 1,
        "training.offload_optimizer": False,
        "training.compile": False,
        "training.workers": 0,
    }
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    folder = ["--folder", str(tmp_path / "work"), "--out", str(tmp_path)]
    start("training.py", "--profile", "h100", "--against", "paper", "--random", "--steps", "6", *folder, *options)
    found = json.loads((tmp_path / "training_h100_against_paper.json").read_text())
    assert len(found["losses"]["h100"]) == len(found["losses"]["paper"]) == 6
    assert found["losses apart"]["max"] < 1e-3
    assert 0 < found["share of the matrix rate"] < 1 and found["settings"]["gradient_checkpointing"] is False
