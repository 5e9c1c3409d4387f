import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from framseg.run.paths import Run

# Small models on small machines: a second thread takes more time than it saves, most of all with others at work.
torch.set_num_threads(1)
# A shell starts background processes with Ctrl-C ignored, and all that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHORT = {  # a training of seconds, on a folder of data
    "data.source": "folder",
    "training.epochs": 2,
    "training.micro_batch": 2,
    "training.accumulation": 2,
    "training.warmup_steps": 2,
    "training.planned_steps": 16,
    "training.threads": 1,
}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the tests marked slow, too")


def pytest_configure(config):
    # The same cases in every run; --all draws the thousands.
    cases = 2000 if config.getoption("--all") else 100
    settings.register_profile("framseg", max_examples=cases, derandomize=True, database=None, deadline=None)
    settings.load_profile("framseg")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: ./run_all.sh test --all runs it"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the reference material: real annotations, golden files, the published vocabulary."""
    name = os.environ.get("FRAMSEG_SHARED")
    if not name:
        pytest.skip("FRAMSEG_SHARED is not set: it runs with the folder of real annotations and golden files")
    folder = Path(name).resolve()
    if not (folder / "golden").is_dir():  # as `framseg download --reference` leaves it
        pytest.skip(f"{folder} has no golden files: it runs with those, which are not public")
    return folder


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """A data folder as a user would bring it: a few of the demo's videos with their annotations, frames extracted."""
    from small import unlabelled

    from framseg import annotations, config, dataset
    from framseg.demo import synthetic

    folder = tmp_path_factory.mktemp("small set")
    data = config.load("demo").data
    (folder / data.videos).mkdir()
    for split, count in {"train": 6, "val": 3, "test": 2}.items():
        scenes = dict(list(synthetic.scenes(split).items())[:count])
        for vid, scene in scenes.items():
            synthetic.write_video(folder / data.videos / f"{vid}.mp4", scene)
        rows = [row for row in synthetic.rows(split) if row.vid in scenes]
        annotations.write(folder / getattr(data, "test_labels" if split == "test" else split), rows)
        if split == "test":
            annotations.write(folder / data.test, [unlabelled(row) for row in rows])
    report = dataset.extract(small_profile(folder))
    assert not report.failed
    return folder


def small_profile(folder: Path, **changes):
    """The demo's model on a folder of data, two short epochs; `changes` are keys with __ for the dots."""
    from framseg import config

    return config.load(
        "demo", SHORT | {"data.folder": folder} | {key.replace("__", "."): value for key, value in changes.items()}
    )


@pytest.fixture(scope="session")
def trained(small_set, tmp_path_factory):
    """A profile and its finished run: a short training that nothing disturbed."""
    from framseg import train

    profile = small_profile(small_set)
    run = Run(profile, tmp_path_factory.mktemp("run with a space") / "trained")
    train.launch(profile, run)
    return profile, run


@pytest.fixture(scope="session")
def merged(trained, tmp_path_factory) -> Path:
    """The weights of the training above as others would publish them: in the layout of the base model."""
    from framseg.checkpoint import load_trained

    folder = tmp_path_factory.mktemp("published") / "weights"
    load_trained(trained[1].checkpoint)[0].save_published(folder)
    return folder


def start(folder: Path, *options: str, **settings) -> subprocess.CompletedProcess:
    """Run the notebooks for the profile demo as run_all.sh does; a failure is in the result's exit code."""
    from framseg import config

    changes = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    command = [sys.executable, "-P", "-m", "framseg.run", "demo", "--run-dir", str(folder), *options, *changes]
    # One thread does so little work sooner than several that wait for each other.
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def chain(request, tmp_path_factory):
    """The run of all five notebooks on a few videos, with a training of two epochs."""

    folder = tmp_path_factory.mktemp("notebooks") / "a run"
    small_set = request.getfixturevalue("small_set")
    done = start(folder, **SHORT, **{"data.folder": small_set})
    assert done.returncode == 0, done.stderr[-4000:]
    return Run("demo", folder)


@pytest.fixture(scope="session")
def untrained(request, tmp_path_factory):
    """The same of a profile that trains nothing: its model are the weights of `merged`."""
    folder = tmp_path_factory.mktemp("untrained") / "a run"
    data, merged = (request.getfixturevalue(name) for name in ("small_set", "merged"))
    done = start(folder, **SHORT | {"data.folder": data, "training.epochs": 0, "model.weights": merged})
    assert done.returncode == 0, done.stderr[-4000:]
    return Run("demo", folder)
