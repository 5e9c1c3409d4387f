"""The README's first command, as a user types it, and what it promises."""

import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from framseg import config, dataset, evaluate
from framseg.predictions import read_predictions
from framseg.run.paths import Run

pytestmark = pytest.mark.slow

THRESHOLDS = {"MR-full-R1@0.5": 75, "MR-full-R1@0.7": 60}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Run]:
    run = Run("demo", tmp_path_factory.mktemp("demo run"))
    environment = {key: value for key, value in os.environ.items() if key != "FRAMSEG_SHARED"}
    command = [str(config.REPOSITORY / "run_all.sh"), "demo", "--run-dir", str(run.root)]
    done = subprocess.run(command, cwd=Path.home(), env=environment, capture_output=True, text=True, timeout=900)
    return done, run


def brief(run: Run, epoch: int | None = None) -> dict:
    predictions = read_predictions(run.predicted("val", epoch))
    return evaluate.evaluate(predictions, rows(run, "val"))["brief"]


def rows(run: Run, split: str) -> list:
    return dataset.rows(config.load(run.profile), split)


def test_five_notebooks_are_executed(demo):
    done, run = demo
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"\[(\d)/5\]", done.stdout) == list("12345")
    assert "5 notebooks in" in done.stdout
    assert len(list(run.notebooks.glob("*.ipynb"))) == 5


def test_it_has_learned(demo):
    _, run = demo
    base, trained = brief(run, 0), brief(run)
    assert base["MR-full-R1@0.7"] < 25
    for name, least in THRESHOLDS.items():
        assert trained[name] >= least
    val, profile = rows(run, "val"), config.load(run.profile)
    trivial = evaluate.trivial(val, rows(run, "train"), profile.seed, profile.frames.count)
    trivial["query ignored"] = evaluate.shuffled(read_predictions(run.predicted("val")), val, profile.seed)
    best = max(evaluate.evaluate(p, val)["brief"]["HL-min-VeryGood-Hit1"] for p in trivial.values())
    assert trained["HL-min-VeryGood-Hit1"] >= 1.5 * best


def test_it_writes_a_submission_and_figures(demo):
    _, run = demo
    with zipfile.ZipFile(run.submission) as archive:
        assert sorted(archive.namelist()) == ["hl_test_submission.jsonl", "hl_val_submission.jsonl"]
    figures = {path.suffix for path in run.figures.iterdir() if path.stat().st_size > 5000}
    assert {".png", ".pdf"} <= figures
    assert json.loads((run.checkpoint / "metrics.json").read_text())["brief"] == brief(run)
