"""A training that is hit: killed, out of disk or memory, its data damaged. It ends with one sentence, and goes on."""

import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from conftest import small_profile
from safetensors.torch import load_file, save_file
from test_train import logged, same_weights, validated

from framseg import config, dataset, train
from framseg.checkpoint import load_base
from framseg.run.paths import BusyError, Run


def processes_of(run: Run) -> list[psutil.Process]:
    """The launcher and the training processes of a run, oldest first."""
    running = [p for p in psutil.process_iter(["cmdline"]) if str(run.root) in " ".join(p.info["cmdline"] or [])]
    return sorted((p for p in running if p.pid != os.getpid()), key=lambda process: process.pid)


def alive(run: Run) -> list[psutil.Process]:
    """Those that a moment after the end still run; the killed take one to go."""
    return psutil.wait_procs(processes_of(run), timeout=5)[1]


def wait_for(event, seconds: float = 240, every: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline
        time.sleep(every)


def same(one: Run, other: Run) -> bool:
    return logged(one) == logged(other) and same_weights(one, other) and validated(one) == validated(other)


@pytest.mark.parametrize("processes,epochs,kills", [(1, 2, 3), pytest.param(2, 10, 20, marks=pytest.mark.slow)])
def test_killed_at_any_point_and_resumed_is_bit_for_bit_the_same(trained, tmp_path, processes, epochs, kills):
    """SIGKILL for the launcher and each process in turn, while it starts, trains, decodes or writes its state."""
    profile, whole = trained
    changes = {"training__save_steps": 2, "training__processes": processes, "training__epochs": epochs}
    profile = small_profile(profile.data.folder, **changes, training__accumulation=2 // processes)
    if processes > 1:
        whole = Run(profile, tmp_path / "whole")
        train.launch(profile, whole)
    run, steps = Run(profile, tmp_path / "killed"), len(train.read_log(whole.step_log))
    draw, hit, writing = random.Random(0), 0, 0
    for number in range(kills):
        ended = threading.Event()

        def kill(ended=ended, at=number * steps // kills, how=number % 4, turn=number):
            wait_for(lambda: processes_of(run) or ended.is_set())
            if how == 0:  # while it starts, or decodes for the first time
                ended.wait(draw.uniform(0, 8))
            else:
                wait_for(lambda: len(train.read_log(run.step_log)) >= at or ended.is_set(), every=0.005)
            if how == 2:  # while a state is being written, which is over before one has looked for processes
                wait_for(lambda: len(processes_of(run)) >= 2 + processes or ended.is_set())
                victims, turn = processes_of(run)[2 : 2 + processes], turn // 4
                wait_for(lambda: (run.resume / "part").exists() or ended.is_set(), every=0.0005)
            else:
                victims = processes_of(run)
            if victims and not ended.is_set():
                victims[turn % len(victims)].send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        try:
            train.launch(profile, run)
        except train.TrainError as error:
            hit += 1
            assert str(error).startswith("training failed: a process ")
        ended.set()
        killer.join()
        assert not alive(run)
        writing += (run.resume / "part").exists()
    assert hit >= kills - 1 and writing  # the last may find it finished
    train.launch(profile, run)
    assert same(run, whole)


def test_a_damaged_state_is_seen_and_the_one_before_it_used(trained, tmp_path):
    profile, whole = trained
    run = Run(profile, tmp_path / "damaged")
    shutil.copytree(whole.root, run.root)
    shutil.rmtree(run.checkpoint)
    first, last = sorted(run.resume.iterdir())
    content = bytearray((last / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "weights.safetensors").write_bytes(content)
    with open(run.step_log, "a") as file:
        file.write('{"step": 99, "epo')  # killed while it wrote a line
    train.launch(profile, run)
    assert same(run, whole)
    log = (run.train / "output.log").read_text()
    assert f"warning: {last} is damaged (the checksum of weights.safetensors is another)" in log
    assert sorted(path.name for path in run.resume.iterdir()) == [first.name, last.name]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_ends_with_its_reason_and_leaves_no_process(small_set, tmp_path, workers):
    profile = small_profile(small_set, training__workers=workers)
    run = Run(profile, tmp_path / "run")
    store = dataset.store(profile)
    vid = dataset.rows(profile, "train")[0].vid
    content = store.path(vid).read_bytes()
    store.path(vid).write_bytes(content[:1000])
    try:
        with pytest.raises(train.TrainError, match="training failed") as caught:
            train.launch(profile, run)
    finally:
        store.path(vid).write_bytes(content)
    assert str(caught.value).startswith(f"training failed: {vid}: its file ")
    assert "output.log" in str(caught.value) and not alive(run)


LAUNCH = """
import resource, sys
from framseg import config, train
from framseg.run.paths import Run

profile, folder, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
try:
    profile = config.Profile.model_validate_json(profile)
    train.launch(profile, Run(profile, folder))
except train.TrainError as error:
    sys.exit(str(error))
"""


def start_elsewhere(profile: config.Profile, run: Run, *before: str, limit: int = 0) -> subprocess.Popen:
    """`train.launch` in a process of its own; `before` stands before its command, `limit` is its memory in bytes."""
    command = [*before, sys.executable, "-c", LAUNCH, profile.model_dump_json(), str(run.root), str(limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_where_the_kernel_is_killed_the_training_ends_with_a_state(trained, tmp_path):
    profile, whole = trained
    run = Run(profile, tmp_path / "left alone")
    watcher = start_elsewhere(profile, run)
    wait_for(lambda: len(train.read_log(run.step_log)) >= 2)
    watcher.kill()
    watcher.communicate()
    assert not psutil.wait_procs(processes_of(run), timeout=60)[1]
    assert list(run.resume.glob("step_*")) and len(train.read_log(run.step_log)) < len(train.read_log(whole.step_log))
    train.launch(profile, run)
    assert same(run, whole)


def test_a_second_training_in_the_same_folder_is_refused(trained, tmp_path):
    profile, _ = trained
    run = Run(profile, tmp_path / "twice")
    run.train.mkdir(parents=True)
    with open(run.train / "lock", "w") as first:
        first.write("1234")
        first.flush()
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="process 1234 works in .*give another --run-dir"):
            train.launch(profile, run)
    assert not run.step_log.exists()


@pytest.fixture
def not_a_number(small_set, tmp_path):
    """A profile that reads the encoder's output from the disk, where that of one training video is damaged."""
    profile = small_profile(small_set, training__cache_features=True)
    model = load_base(profile).eval()
    features = dataset.Features.of(profile, model)
    rows = dataset.rows(profile, "train")
    features.make(profile, model, [rows[0].vid])
    path = features.path(rows[0].vid)
    before = path.read_bytes()
    content = load_file(path)
    content["features"][:] = torch.nan
    save_file(content, path)
    yield profile, {row.qid for row in rows if row.vid == rows[0].vid}
    path.write_bytes(before)


def test_a_loss_that_is_no_number_stops_or_is_skipped_and_written_down(not_a_number, tmp_path):
    profile, qids = not_a_number
    run = Run(profile, tmp_path / "not a number")
    with pytest.raises(train.TrainError, match="the loss of step .* is not finite, for .*may_skip allows 0"):
        train.launch(profile, run)
    [record] = train.read_log(run.skipped_log)
    assert record["not_finite"] == "loss" and qids & set(record["qids"])
    assert len(record["qids"]) <= 2 * profile.training.micro_batch  # the micro-batches concerned, not the whole step
    step = train.read_log(run.step_log)[-1] if train.read_log(run.step_log) else {"step": 0}
    assert step["step"] == record["step"] - 1

    changes = {"training.may_skip": 99, "training.may_change": ["training.may_skip"]}
    patient = config.load(run.profile, changes)
    train.launch(patient, run)
    skipped, steps = train.read_log(run.skipped_log), train.read_log(run.step_log)
    assert [one["step"] for one in steps] == list(range(1, len(steps) + 1))
    assert {one["step"] for one in skipped} == {one["step"] for one in steps if one["loss"] is None}
    assert {one["step"] for one in skipped} == {one["step"] for one in steps if one["gradient_norm"] is None}
    assert len(skipped) < len(steps) and set().union(*(one["qids"] for one in skipped)) >= qids
    weights = load_file(run.checkpoint / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_gradient_that_is_no_number_stops_too(small_set, tmp_path):
    """The loss is around 1e36 and finite, its gradient's norm is not."""
    profile = small_profile(small_set, losses__pos_weight=1e36, losses__start=[0, 1, 0, 0])
    run = Run(profile, tmp_path / "steep")
    with pytest.raises(train.TrainError, match="the gradient of step 1 is not finite"):
        train.launch(profile, run)
    [record] = train.read_log(run.skipped_log)
    assert record["not_finite"] == "gradient"
    assert len(record["qids"]) == profile.training.micro_batch * profile.training.accumulation


def test_a_full_disk_ends_with_one_sentence(small_set, tmp_path):
    profile = small_profile(small_set)
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=1m none '{tmp_path}/disk'"
    alone = ("unshare", "--mount", "sh", "-c")
    if not shutil.which("unshare") or subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("root may mount the disk of 1 MB that this needs; the next test does with files that may not grow")
    run = Run(profile, tmp_path / "disk" / "run")
    process = start_elsewhere(profile, run, *alone, f'{mount} && exec "$@"', "sh")
    message = process.communicate(timeout=120)[1].strip()
    assert process.returncode == 1 and not alive(run)
    assert message.startswith("training failed: the disk is full (") and "make room and start again" in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow
def test_a_file_that_cannot_be_written_ends_with_one_sentence_and_training_goes_on(trained, tmp_path):
    profile, whole = trained
    run = Run(profile, tmp_path / "full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # logs fit, a state does not
    try:
        with pytest.raises(train.TrainError, match="training failed: the disk is full"):
            train.launch(profile, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not run.checkpoint.exists() and not list(run.resume.glob("step_*")) and not alive(run)
    train.launch(profile, run)
    assert same(run, whole)


def without_override() -> tuple[str, ...]:
    """Before a command: root, too, may write only where the permissions say so."""
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


def test_a_read_only_folder_ends_with_one_sentence(trained, tmp_path):
    profile, _ = trained
    (tmp_path / "shut").mkdir(mode=0o555)
    run = Run(profile, tmp_path / "shut" / "run")
    process = start_elsewhere(profile, run, *without_override())
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and not run.root.exists()
    [sentence] = message.strip().splitlines()
    assert (
        sentence.startswith("training cannot start: ")
        and f"cannot write {run.root}" in sentence
        and "(Permission denied)" in sentence
    )
    assert "give another --run-dir" in sentence


def test_a_missing_gpu_is_said_before_anything_starts(small_set, tmp_path):
    count = torch.cuda.device_count()
    profile = small_profile(small_set, model__dtype="bfloat16", training__processes=count + 1)
    run = Run(profile, tmp_path / "no GPU")
    with pytest.raises(train.TrainError, match=f"trains on {count + 1} of about 4 GiB, this machine has {count}: "):
        train.launch(profile, run)
    assert not run.root.exists()


@pytest.mark.slow
def test_out_of_memory_ends_with_one_sentence(small_set, tmp_path):
    profile = small_profile(small_set, inference__batch=2**20, training__micro_batch=6, training__accumulation=1)
    run = Run(profile, tmp_path / "narrow")
    process = start_elsewhere(profile, run, limit=3 * 2**30)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and not alive(run)
    assert "training failed: out of memory" in message and "halve training.micro_batch" in message


@pytest.mark.slow
def test_a_reader_of_frames_that_dies_ends_with_one_sentence(trained, tmp_path):
    profile = small_profile(trained[0].data.folder, training__workers=1)
    run = Run(profile, tmp_path / "reader")

    def kill():
        wait_for(lambda: train.read_log(run.step_log))
        [reader] = [p for p in processes_of(run) if p.cmdline() == p.parent().cmdline()]  # forked off
        reader.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(train.TrainError, match="a process that reads frames has died .*lower training.workers"):
        train.launch(profile, run)
    killer.join()
    assert not alive(run)
    train.launch(profile, run)
    assert same(run, trained[1])
