import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import small_profile
from safetensors.torch import load_file

from framseg import config, dataset, decode, frames, losses, prompt, train
from framseg.checkpoint import load_base, load_trained
from framseg.predictions import read_predictions
from framseg.run import launcher, preflight, resume
from framseg.run.paths import Run


def test_the_paper_s_deepspeed_configuration():
    resolved = train.deepspeed_config(config.load("paper"))
    print(json.dumps(resolved, indent=2))
    assert resolved == {
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.005},
        },
        "steps_per_print": 2**31,
    }


def test_the_log_has_every_step(trained):
    profile, run = trained
    steps = train.read_log(run.step_log)
    rows = len(dataset.rows(profile, "train"))
    assert len(steps) == train.total_steps(profile, rows) == 2 * rows // 2 // 2
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    for record in steps:
        parts = sum(w * record[name] for w, name in zip(record["weights"], losses.NAMES, strict=True))
        assert record["learning_rate"] == losses.learning_rate(record["step"] - 1, profile.training)
        assert record["gradient_norm"] > 0 and record["samples_per_second"] > 0 and record["memory_gib"] > 0
        if record["epoch"] <= 1:
            assert record["weights"] == [1, 0, 0, 0]
            assert record["loss"] == pytest.approx(parts, rel=1e-5)
    assert steps[-1]["weights"] == list(losses.weights(2, profile.losses))


def test_every_epoch_is_validated_by_decoding(trained):
    profile, run = trained
    records = train.read_log(run.validation_log)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    val = dataset.rows(profile, "val")
    for epoch in range(3):
        predictions = [json.loads(line) for line in run.predicted("val", epoch).read_text().splitlines()]
        assert [p["qid"] for p in predictions] == [row.qid for row in val]
        assert all(len(p["mask"]) == len(p["probability"]) == 25 for p in predictions)
    metrics = json.loads((run.checkpoint / "metrics.json").read_text())
    assert metrics == records[-1]["metrics"]


def test_only_resampler_and_adapter_are_trained(trained):
    profile, run = trained
    before = load_base(profile).state_dict()
    after, _ = load_trained(run.checkpoint)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("vision_tokenizer.") or ".layers." in name for name in changed)
    assert not any(name.startswith("vision_encoder.") for name in changed)
    inside = {name.split(".", 4)[-1] for name in changed if name.startswith("lang_model.")}
    assert inside == {
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    }
    config_file = json.loads((run.checkpoint / "adapter" / "adapter_config.json").read_text())
    assert config_file["r"] == 2 * profile.adapter.rank and not config_file["use_rslora"]


def test_a_line_that_is_being_written_is_left_for_the_next_time(trained, tmp_path):
    log = tmp_path / "log.jsonl"
    assert train.read_log(log) == []
    lines = trained[1].step_log.read_text().splitlines()
    log.write_text(f"{lines[0]}\n{lines[1][:-5]}")
    assert train.read_log(log) == [json.loads(lines[0])]


def test_a_finished_run_is_not_trained_again(trained, capsys):
    profile, run = trained
    before = run.step_log.stat().st_mtime_ns
    train.launch(profile, run)
    assert "trained already" in capsys.readouterr().out
    assert run.step_log.stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(trained):
    profile, run = trained
    changed = profile.model_copy(update={"training": profile.training.model_copy(update={"learning_rate": 1e-3})})
    before = {path: path.read_bytes() for path in (run.profile, run.trained_with)}
    with pytest.raises(resume.ResumeError, match="training.learning_rate: 0.0003 there, 0.001 now"):
        train.launch(changed, run)
    # Neither do the processes go on that somebody starts without `launch`, as on several machines.
    config.save(changed, run.root / "changed.yaml")
    arguments = ["--profile", str(run.root / "changed.yaml"), "--run-dir", str(run.root)]
    with launcher.Job("framseg.train", changed, run.root / "changed.log", arguments) as job:
        assert list(job.polls())[-1]
    assert job.failure().startswith(f"{run.root} was trained with other settings (training.learning_rate: 0.0003 there")
    assert before == {path: path.read_bytes() for path in before}


def test_a_process_has_nothing_to_train_without_epochs(small_set, tmp_path):
    profile = small_profile(small_set, training__epochs=0)
    config.save(profile, tmp_path / "profile.yaml")
    arguments = ["--profile", str(tmp_path / "profile.yaml"), "--run-dir", str(tmp_path / "run")]
    with launcher.Job("framseg.train", profile, tmp_path / "log", arguments) as job:
        assert list(job.polls())[-1]
    assert job.failure().startswith("training.epochs is 0") and not (tmp_path / "run").exists()


def test_other_frames_than_a_checkpoints_do_not_decode(trained):
    """As from chapter 04 in JupyterLab with another profile."""
    profile, run = trained
    changed = profile.model_copy(update={"frames": profile.frames.model_copy(update={"count": 10})})
    with pytest.raises(resume.ResumeError, match="frames.count: 25 there, 10 now"):
        decode.whole(changed, run, "val")
    changed = profile.model_copy(update={"frames": profile.frames.model_copy(update={"whole_seconds": True})})
    with pytest.raises(resume.ResumeError, match="frames.whole_seconds: False there, True now"):
        train.launch(changed, run)


def test_a_training_is_finished_when_its_checkpoint_has_all_epochs(trained):
    """More epochs are asked for, and the training is killed after the last step: the checkpoint has the first ones."""
    profile, run = trained
    longer = profile.model_copy(update={"training": profile.training.model_copy(update={"epochs": 3})})
    assert resume.finished(profile, run) and not resume.finished(longer, run)
    before = run.trained_with.read_bytes()
    config.save(longer, run.trained_with)
    assert not resume.finished(profile, run)  # the folder's training is another one
    with pytest.raises(resume.ResumeError, match="training.epochs: 3 there, 2 now"):
        resume.changes(small_profile(profile.data.folder, training__may_change=["training.epochs"]), run)
    run.trained_with.write_bytes(before)


@pytest.mark.slow
def test_settings_that_are_named_may_change(small_set, tmp_path, capsys):
    """Half of a training, then more epochs and smaller micro-batches: the steps done stay, the rest is done anew."""
    profile = small_profile(small_set, training__epochs=1)
    run = Run(profile, tmp_path / "longer")
    train.launch(profile, run)
    before = logged(run)
    more = {"training__epochs": 2, "training__micro_batch": 1, "training__accumulation": 4}
    with pytest.raises(resume.ResumeError, match="micro_batch: 2 there, 1 now; .*name the keys in training.may_change"):
        train.launch(small_profile(small_set, **more, training__may_change=["training.epochs"]), run)
    named = [key.replace("__", ".") for key in more]
    with pytest.raises(resume.ResumeError, match="as many samples per step"):
        more["training__accumulation"] = 2
        train.launch(small_profile(small_set, **more, training__may_change=named), run)
    more["training__accumulation"] = 4
    capsys.readouterr()
    train.launch(small_profile(small_set, **more, training__may_change=named), run)
    assert "training.may_change allows: training.epochs: 1 there, 2 now" in capsys.readouterr().out
    assert logged(run)[: len(before)] == before and len(logged(run)) == 2 * len(before)
    assert [record["epoch"] for record in train.read_log(run.validation_log)] == [0, 1, 2]


def test_other_rows_under_the_same_settings_are_refused(trained):
    profile, run = trained
    file = dataset.annotation_file(profile, "train")
    before = file.read_bytes()
    file.write_bytes(b"".join(before.splitlines(True)[:-1]))
    try:
        with pytest.raises(resume.ResumeError, match=f"other rows in {file.name}"):
            train.launch(profile, run)
    finally:
        file.write_bytes(before)


def same_weights(one: Run, other: Run, tolerance: float = 0) -> bool:
    for name in ("resampler.safetensors", "adapter/adapter_model.safetensors"):
        first, second = load_file(one.checkpoint / name), load_file(other.checkpoint / name)
        for key, value in first.items():
            if not torch.allclose(value, second[key], rtol=0, atol=tolerance):
                return False
    return True


def logged(run: Run) -> list[dict]:
    """The step log without what depends on the clock."""
    clock = {"seconds", "samples_per_second", "memory_gib"}
    return [{k: v for k, v in record.items() if k not in clock} for record in train.read_log(run.step_log)]


def test_interrupted_and_resumed_is_bit_for_bit_the_same(trained, tmp_path, capsys):
    profile, whole = trained
    run = Run(profile, tmp_path / "cut")

    def interrupt():
        while len(train.read_log(run.step_log)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train.launch(profile, run)
    done = len(train.read_log(run.step_log))
    assert 2 <= done < len(train.read_log(whole.step_log))
    assert list(run.resume.glob("step_*/state.json")) and not run.checkpoint.exists()
    printed = capsys.readouterr()
    assert printed.out.count("epoch 0: R1@0.5") == 1 and "step/s" not in printed.err  # no bar: this is no terminal

    seen = []
    train.launch(profile, run, on_progress=lambda *logs: seen.append(logs))
    assert seen[-1] == (train.read_log(run.step_log), train.read_log(run.validation_log))
    assert [len(steps) for steps, _ in seen] == sorted(len(steps) for steps, _ in seen)
    printed = capsys.readouterr()
    assert "epoch 0" not in printed.out and "epoch 2: R1@0.5" in printed.out and "GiB)" in printed.out
    assert "step/s" in printed.err
    assert logged(run) == logged(whole)
    assert same_weights(run, whole)
    assert validated(run) == validated(whole)


def test_keys_that_only_one_profile_has_are_differences():
    changed = resume.differences(config.load("demo"), config.load("released"), ("data", "inference"))
    assert changed["data.frames.val"].startswith("data.frames.val: None there, ")
    assert changed["data.source"] == "data.source: demo there, frames now" and "data.frames" not in changed


def test_every_random_generator_is_part_of_the_state():
    saved = resume.generators()
    drawn = [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)]
    resume.set_generators(saved)
    assert [(torch.rand(1).item(), random.random(), np.random.rand()) for _ in range(2)] == drawn


def validated(run: Run) -> list[dict]:
    return [record["metrics"] for record in train.read_log(run.validation_log)]


def test_cached_features_train_the_same(trained, tmp_path):
    profile, whole = trained
    section = profile.training.model_copy(update={"cache_features": True})
    run = Run(profile, tmp_path / "cached")
    train.launch(profile.model_copy(update={"training": section}), run)
    assert [r["loss"] for r in logged(run)] == pytest.approx([r["loss"] for r in logged(whole)], rel=1e-4)
    assert same_weights(run, whole, tolerance=1e-4)
    features = dataset.Features.of(profile, load_base(profile))
    files = {path.stem for path in features.folder.iterdir()}
    assert files == {row.vid for row in dataset.rows(profile, "train")}
    [size] = {path.stat().st_size for path in features.folder.iterdir()}
    vision = profile.model.vision
    values = 25 * 3 * (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size
    assert 4 * values < size < 4 * values + 500

    vid = min(files)
    features.path(vid).write_bytes(features.path(vid).read_bytes()[:-1])
    with pytest.raises(frames.VideoError, match=f"^{vid}: its file in the feature cache .* is damaged .*; remove "):
        features.read(vid, np.zeros(25, int))
    features.path(vid).unlink()  # as it says; other tests train on these videos, too


def on_two_nodes(run: Run, folder: Path) -> None:
    """The README's command for several nodes, on two loopback addresses of this machine."""
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", encoding="utf-8")
    command = f"--no_ssh --master_addr 127.0.0.1 --master_port {free_port()} --no_local_rank --module framseg.train"
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = [
        subprocess.Popen(
            ["deepspeed", "--hostfile", str(folder / "hosts"), "--node_rank", str(rank), *command.split()]
            + ["--profile", str(run.profile), "--run-dir", str(run.root)],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_and_two_nodes_train_as_one_with_twice_the_accumulation(small_set, tmp_path):
    runs = []
    for name, processes, accumulation in (("two", 2, 1), ("one", 1, 2), ("nodes", 2, 1)):
        profile = small_profile(
            small_set,
            training__processes=processes,
            training__accumulation=accumulation,
            training__epochs=1,
            adapter__dropout=0.0,
        )
        run = Run(profile, tmp_path / f"run of {name}")
        runs.append(run)
        if name == "nodes":
            run.root.mkdir()
            config.save(profile, run.profile)
            on_two_nodes(run, tmp_path)
        else:
            train.launch(profile, run)
    two, one, nodes = runs
    assert same_weights(two, one, tolerance=2e-5) and same_weights(two, nodes)
    assert logged(two) == logged(nodes)
    assert [a["loss"] for a in logged(two)] == pytest.approx([b["loss"] for b in logged(one)], rel=1e-4)
    shared_out, alone = (read_predictions(run.predicted("val", 0)) for run in (two, one))
    assert [(p["qid"], p["mask"]) for p in shared_out] == [(p["qid"], p["mask"]) for p in alone]
    for first, second in zip(shared_out, alone, strict=True):
        assert first["probability"] == pytest.approx(second["probability"], abs=1e-4)  # other batches round otherwise


def test_two_processes_decode_a_split_as_one(trained, tmp_path):
    profile, run = trained
    two = small_profile(profile.data.folder, training__processes=2)
    alone = decode.whole(profile, run, "val")
    path = run.predicted("val")
    assert read_predictions(path) == alone
    path.unlink()

    # What one process finished before it was interrupted is kept by two, a line that was cut off is not.
    model, _ = load_trained(run.checkpoint)
    made_by = decode.made_by(model, prompt.load(run.checkpoint), two)
    kept = alone[1] | {"pred_saliency_scores": [0.5] * 75}
    lines = [json.dumps(made_by), json.dumps(kept), json.dumps(alone[0])[:40]]
    path.with_name("val.jsonl.part7").write_text("\n".join(lines))
    shared_out = decode.whole(two, run, "val")
    assert [record["qid"] for record in shared_out] == [row.qid for row in dataset.rows(profile, "val")]
    assert shared_out[1] == kept
    for one, other in zip(shared_out, alone, strict=True):
        assert one["mask"] == other["mask"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)  # other batches round otherwise
    assert read_predictions(path) == shared_out and not list(run.predictions.glob("*.part*"))


def test_a_process_that_fails_to_decode_is_said(trained, tmp_path):
    profile, run = trained
    broken = Run(profile, tmp_path / "broken")
    shutil.copytree(run.checkpoint, broken.checkpoint)
    (broken.checkpoint / "resampler.safetensors").write_bytes(b"not tensors")
    two = small_profile(profile.data.folder, training__processes=2)
    with pytest.raises(decode.DecodeError, match="decoding val failed: .*damaged or not a safetensors file"):
        decode.whole(two, broken, "val")
    running = psutil.process_iter(["cmdline"])
    assert not [process.pid for process in running if str(broken.root) in " ".join(process.info["cmdline"] or [])]


def test_training_videos_without_frames_are_refused_or_left_out_by_name(small_set):
    profile = small_profile(small_set)
    store, rows = dataset.store(profile), dataset.rows(profile, "train")
    aside = store.path(rows[0].vid).with_suffix(".aside")
    store.path(rows[0].vid).rename(aside)
    try:
        with pytest.raises(train.TrainError, match=f"{rows[0].vid}.*training.may_lack=1 trains without them"):
            train.readable(profile)
        kept, sentence = train.readable(small_profile(small_set, training__may_lack=1))
    finally:
        aside.rename(store.path(rows[0].vid))
    assert rows[0].vid in sentence and kept == [row for row in rows if row.vid != rows[0].vid]
    assert train.readable(profile) == (rows, "")


def test_bfloat16_trains_and_decodes_on_a_cpu_where_the_profile_says_so(small_set, tmp_path):
    profile = small_profile(small_set, model__dtype="bfloat16", training__device="cpu", training__epochs=1)
    run = Run(profile, tmp_path / "bfloat16")
    train.launch(profile, run)
    steps = train.read_log(run.step_log)
    assert len(steps) == train.total_steps(profile, len(dataset.rows(profile, "train")))
    assert all(step["loss"] > 0 and step["gradient_norm"] > 0 for step in steps)
    answers = decode.whole(profile, run, "val")
    assert len(answers) == len(dataset.rows(profile, "val")) and all(len(answer["mask"]) == 25 for answer in answers)
    # The adapter is merged into the weights now, which rounds.
    both = [[record["probability"] for record in made] for made in (answers, read_predictions(run.predicted("val", 1)))]
    assert np.abs(np.subtract(*both)).mean() < 0.05
    model, _ = load_trained(run.checkpoint)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and model.device.type == "cpu"


def test_decoding_whose_launcher_is_killed_leaves_no_old_answers(trained, monkeypatch):
    """DeepSpeed's launcher then ends with the code 0."""
    profile, run = trained
    two = small_profile(profile.data.folder, training__processes=2)
    run.predictions.mkdir(exist_ok=True)
    run.predicted("test").write_text("{}\n")

    def killed(job):
        job.process.kill()
        job.process.wait()
        job.process.returncode = 0
        yield True

    monkeypatch.setattr(launcher.Job, "polls", killed)
    with pytest.raises(decode.DecodeError, match="decoding test failed: a process was killed"):
        decode.whole(two, run, "test")
    run.predicted("test").unlink()


def test_what_is_missing_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    profile = config.load("paper", {"data.folder": str(tmp_path), "model.weights": str(tmp_path / "none")})
    sentences = "\n".join(preflight.missing(profile))
    for what in ("highlight_train_release.jsonl", "videos", "weights", "tokenizer", "GPU"):
        assert what in sentences
    assert sentences.count(f"python -m framseg.download {tmp_path}") == 5  # four annotation files and the videos
    assert preflight.missing(config.load("demo")) == []
