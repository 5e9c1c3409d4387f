"""The benchmarks run, small, and the README files show what their records say."""

import json
import os
import subprocess
import sys
import time

import pytest
from benchmarks import ranked_policy, whole_run

from framseg import config
from framseg.predictions import WINDOWS, read_released

FOLDER = config.REPOSITORY / "tests" / "benchmarks"


def start(script: str, *options: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_readme_files_show_the_records():
    start("tables.py", "--check")


@pytest.fixture
def fetched(shared, tmp_path):
    """A folder as `framseg download --reference` fills it, with the authors' JSON made from the CSV."""
    (tmp_path / "qvhighlights").symlink_to(shared / "qvhighlights")
    (tmp_path / "released").mkdir()
    for split in ("val", "test"):
        rows = []
        for record in read_released(shared / f"golden/released_{split}_scores.csv"):
            digits = "".join(map(str, ranked_policy.listed_mask(record)))
            windows = [window for window in record[WINDOWS] if window[2]]
            about = {"qid": record["qid"], "duration": record["duration"], "score": record["probability"]}
            rows.append(about | {"preds": digits, WINDOWS: windows})
        (tmp_path / f"released/hl_{split}_predictions.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_authors_predictions_are_the_same_from_csv_and_from_json(shared, fetched, split):
    csv, listed = ranked_policy.read(shared, split), ranked_policy.read(fetched, split)
    assert csv.rows == listed.rows
    for name in ("masks", "probabilities", "recording"):
        assert (getattr(csv, name) == getattr(listed, name)).all()


def test_the_test_split_scores_what_the_record_says(fetched):
    assert ranked_policy.test_scores(fetched) == json.loads(ranked_policy.RECORD.read_text())["test"]


@pytest.mark.slow
def test_rescoring_from_what_was_fetched_gives_the_readmes_numbers(fetched):
    done = subprocess.run(
        [sys.executable, FOLDER / "ranked_policy.py", "--score", "--reference", fetched],
        env=os.environ | {"PYTHONPATH": str(config.REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(ranked_policy.RECORD.read_text())
    shown = [line.split()[-5:] for line in done.stdout.splitlines() if not line.startswith(("val ", "test "))]
    systems = [*(system["scores"] for system in record["systems"].values()), *record["test"]["systems"].values()]
    assert shown == [[f"{value:.2f}" for value in scores.values()] for scores in systems]


def test_the_submission_scores_what_the_paper_reports(shared):
    reported = json.loads((shared / "golden/reported_scores.json").read_text())
    record = json.loads(ranked_policy.RECORD.read_text())
    val, test = record["systems"]["as submitted"]["scores"], record["test"]["systems"]["as submitted"]
    for scores, official in ((val, reported["val_as_submitted"]), (test, reported["test"])):
        for short, name in ranked_policy.SHOWN.items():
            assert scores[short] == pytest.approx(official[name], abs=0.0101)


def test_decoding_next_to_the_librarys(tmp_path, monkeypatch):
    options = ("--videos", "4", "--repeats", "1", "--random", "--batch", "4", "1")
    start("decoding.py", *options, "--out", str(tmp_path))
    record = json.loads((tmp_path / "decoding_demo.json").read_text())
    assert list(record["by batch"]) == ["4", "1"] and record["by batch"]["4"].items() <= record.items()
    for size, run in record["by batch"].items():
        assert run["same masks"] == run["queries"] == 4 and run["batch"] == int(size)
        assert 0 < run["peak GiB"]["ours"] < run["counted GiB"]  # which allows for a GPU's fragments
    growth = record["milliseconds per query by"]
    assert list(growth["frames"]) == ["10", "25", "50", "100"] and list(growth["beams"]) == ["1", "2", "4", "8"]
    committed = json.loads((FOLDER / "records" / "decoding_demo.json").read_text())
    assert committed["same masks"] == committed["queries"] and committed["ratio"] >= 2

    # The table of what a GPU measured shows such records, and says of which there are none.
    monkeypatch.syspath_prepend(FOLDER)
    import tables

    monkeypatch.setattr(tables.common, "RECORDS", tmp_path)
    (tmp_path / "decoding_demo.json").rename(tmp_path / "decoding_released.json")
    trained = json.loads((FOLDER / "records" / "training_demo.json").read_text())
    trained |= {"memory of": "RTX 4090", "counted GiB": 18.4}
    (tmp_path / "training_24gb.json").write_text(json.dumps(trained))
    _, _, *rows = tables.full_size(batches=(1, 4, 16)).splitlines()
    assert [tables.UNMEASURED in row for row in rows] == [True, False, True, False, False, True]
    assert rows[1].endswith("| 18.4 GiB | 0.9 GiB | AMD EPYC, 2 cores, memory of RTX 4090 |")


def test_a_larger_gpu_can_be_given_the_memory_of_a_smaller_one():
    setting, value = whole_run.memory_of("RTX 4090", 80 * 2**30).split(":")
    assert setting == "per_process_memory_fraction"  # as torch's allocator knows it
    assert float(value) * 80 * 2**30 == pytest.approx(whole_run.GPUS["RTX 4090"][0], rel=1e-3)
    assert whole_run.memory_of("H100", 8 * 2**30) == "per_process_memory_fraction:1.0000"


@pytest.mark.slow
def test_the_released_profile_from_frames_to_figures_with_random_weights(tmp_path, monkeypatch):
    place = tmp_path / "disk"
    place.mkdir()
    start("released.py", "--sizes", "demo", "--folder", str(place), "--out", str(tmp_path))
    assert not list(place.iterdir())
    record = json.loads((tmp_path / "released_cpu_demo.json").read_text())
    assert len(record["seconds by chapter"]) == 5 and record["weights"] == "random, seed 0"
    assert len(record["archives fetched"]) == 2 and record["bytes of weights"] > 4 * record["parameters"]
    assert record["run"]["peak GiB"] > 0 and record["seconds per query"].keys() == {"val", "test"}

    # Its table; the queries of so small a model may be answered between two looks.
    monkeypatch.syspath_prepend(FOLDER)
    import tables

    assert tables.full_size_cpu().count(tables.UNMEASURED) in (0, 7)
    monkeypatch.setattr(tables.common, "RECORDS", tmp_path)
    record["seconds per query"] = {"val": 190.0, "test": 188.0}
    (tmp_path / "released_cpu.json").write_text(json.dumps(record))
    assert "| a query | 190 s (val), 188 s (test) |" in tables.full_size_cpu()


def test_weights_that_were_drawn_go_when_the_run_is_ended(tmp_path):
    command = [sys.executable, str(FOLDER / "released.py"), "--sizes", "demo", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None and not list(tmp_path.glob("*/weights/*")):
            time.sleep(0.05)
        assert running.poll() is None, running.stderr.read()
        running.terminate()
        assert "ended from outside" in running.stderr.read()
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_there_is_said_before_weights_are_drawn(tmp_path):
    command = [sys.executable, str(FOLDER / "released.py"), "--tokenizer", "nowhere.json", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr.endswith("--tokenizer nowhere.json: there is no such file or folder\n")


def test_number_formats_on_a_trained_model(trained, tmp_path):
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    start("precision.py", "--checkpoint", str(trained[1].checkpoint), "--queries", "3", "--out", str(tmp_path))
    made = json.loads((tmp_path / "precision.json").read_text())
    committed = json.loads((FOLDER / "records" / "precision.json").read_text())
    assert made["queries"] == 3 and made["ways"].keys() == committed["ways"].keys()
    for name, way in made["ways"].items():
        logit = way["difference"]["logit"]
        assert (logit["largest"] > 0) == (name != "float32") and logit["mean"] < 0.1


@pytest.mark.slow
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
    record = json.loads((tmp_path / "training_h100_against_paper.json").read_text())
    assert len(record["losses"]["h100"]) == len(record["losses"]["paper"]) == 6
    assert record["losses apart"]["max"] < 1e-3
    assert 0 < record["share of the matrix rate"] < 1 and record["settings"]["gradient_checkpointing"] is False
