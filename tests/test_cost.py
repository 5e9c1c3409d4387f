import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from benchmarks import whole_run
from conftest import small_profile
from small import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from framseg import annotations, config, dataset, download
from framseg.annotations import LabelledRow
from framseg.backbones import blip3
from framseg.run import cost, preflight
from framseg.run.paths import Run

TEXT = 12  # ids other than the images', with the answer


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    return tiny(model__language__sliding_window=None, adapter__init="gaussian", adapter__dropout=0.0)


def test_the_papers_sample():
    """About 17 + 5 + 59 TFLOP to train, 29 more with recomputation, 47 at inference."""
    counted_work = cost.operations(config.load("paper"), 3621)
    assert counted_work.encoder / cost.TERA == pytest.approx(17, abs=0.5)
    assert (counted_work.resampler + counted_work.resampler_backward) / cost.TERA == pytest.approx(5, abs=0.5)
    assert (counted_work.language + counted_work.language_backward) / cost.TERA == pytest.approx(59, abs=1)
    assert counted_work.recomputation / cost.TERA == pytest.approx(29, abs=0.5)
    assert counted_work.inference / cost.TERA == pytest.approx(47, abs=0.5)
    assert cost.operations(config.load("h100"), 3621).training == counted_work.training - counted_work.recomputation


@sdpa_kernel(SDPBackend.MATH)  # torch does not count the CPU's fused attention
def test_operations_are_those_that_torch_counts(profile):
    """torch counts attention over all pairs, also those that the causal mask leaves out."""
    torch.manual_seed(0)
    model = blip3.Blip3(profile.model)
    model.adapt(profile.adapter, 0)
    tokens, frames = profile.model.tokens, profile.frames.count
    ids = torch.randint(0, 200, (1, TEXT + frames))
    ids[0, 1 : 1 + frames] = tokens.image
    positions = torch.arange(TEXT + frames - frames - 2, TEXT + frames - 1)[None]
    length = TEXT + frames * profile.model.resampler.latents
    expected = cost.operations(profile, length)
    language = profile.model.language
    beyond = language.layers * 4 * language.hidden_size * (length**2 - length * (length + 1) / 2)

    pixels = torch.rand(1, frames, 3, 56, 56)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.vision_features(pixels[0])
    assert counted.get_total_flops() == expected.encoder
    with FlopCounterMode(display=False) as counted:
        vision = model.vision_tokens(pixels)
    assert counted.get_total_flops() == expected.encoder + expected.resampler
    with FlopCounterMode(display=False) as counted:
        logits = model(None, ids, torch.ones_like(ids), positions, vision)
    assert counted.get_total_flops() == expected.language + beyond
    with FlopCounterMode(display=False) as counted:
        logits.sum().backward()
    backward = expected.language_backward + expected.resampler_backward
    assert counted.get_total_flops() == pytest.approx(backward + 2 * beyond, rel=0.01)


def test_bytes_are_those_of_the_model(profile):
    model = blip3.Blip3(profile.model)
    assert cost.fixed_bytes(profile)[0] == sum(parameter.nbytes for parameter in model.parameters())
    model.adapt(profile.adapter, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = profile.training.model_copy(update={"offload_optimizer": False, "processes": 1})
    assert cost.fixed_bytes(profile.model_copy(update={"training": alone}))[1] == 16 * trained
    assert cost.fixed_bytes(config.load("paper"))[1] == 2 * 135_067_392


def test_parameters_are_those_of_the_full_size_model():
    full, tied = config.load("paper"), config.load("demo")
    for profile in (full, tied, config.load("paper", {"adapter.targets": ["o_proj", "down_proj"]})):
        with torch.device("meta"):
            model = blip3.Blip3(profile.model)
            base = sum(parameter.numel() for parameter in model.parameters())
            model.adapt(profile.adapter.model_copy(update={"init": True}), 0)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert cost.parameters(profile) == (base, trained)


@pytest.mark.parametrize("name", ["h100", "paper"])
def test_a_samples_memory_is_that_of_the_record(name):
    """The record has what autograd keeps at full size; the estimate follows from the profile's sizes alone."""
    record = json.loads((config.REPOSITORY / "tests/benchmarks/records/activations.json").read_text())
    profile = config.load(name)
    assert cost.sample_bytes(profile) / 2**30 == pytest.approx(record[name]["GiB per sample"], rel=0.02)
    decoded = profile.inference.batch * cost.query_bytes(profile)
    trained = profile.training.micro_batch * cost.sample_bytes(profile)
    assert cost.gpu_bytes(profile) == sum(cost.fixed_bytes(profile)) + max(decoded, trained) + cost.SPARE


def test_the_profile_for_24_gb_takes_as_many_samples_as_fit():
    section, (room, _) = config.load("24gb").training, whole_run.GPUS["RTX 4090"]
    assert section.processes * section.micro_batch * section.accumulation == 128 and section.processes == 1
    more = config.load("24gb", {"training.micro_batch": 2 * section.micro_batch})
    assert cost.gpu_bytes(config.load("24gb")) < room < 24 * 2**30 < cost.gpu_bytes(more)
    assert section.gradient_checkpointing and section.offload_optimizer


def test_what_is_not_trained_needs_memory_for_decoding_alone():
    released, states = config.load("released"), sum(cost.fixed_bytes(config.load("released_train"))[1:])
    weights, decoding = cost.fixed_bytes(released)[0], released.inference.batch * cost.query_bytes(released)
    assert cost.gpu_bytes(released) == weights + decoding + cost.DECODING_SPARE and states > 0
    assert whole_run.host_bytes(released) == weights + whole_run.PROCESS
    assert whole_run.disk_bytes(released)["states"] == 0


def test_the_hours_are_those_of_the_authors_logs():
    """They trained 2.49 samples per second on an H100, and answered 0.98 queries (where nothing was trained)."""
    gpu, training, _ = whole_run.hours(config.load("paper"))
    assert gpu == "H100" and training == pytest.approx(11 * 7218 / (2 * 2.49 * 3600), rel=0.01)
    gpu, training, decoding = whole_run.hours(config.load("released", {"inference.batch": 16}))  # too many for 24 GB
    assert (gpu, training) == ("H100", 0) and decoding == pytest.approx((1550 + 1542) / (0.98 * 3600), rel=0.01)
    # The same operations, on one GPU instead of two and at another rate.
    slow, fast = (whole_run.hours(config.load(name))[1] for name in ("24gb", "paper"))
    assert slow / fast == pytest.approx(2 * whole_run.GPUS["H100"][1] / whole_run.GPUS["RTX 4090"][1])


def test_the_host_holds_weights_or_what_training_keeps_there():
    paper, workers = config.load("paper"), config.load("paper", {"training.workers": 70})
    assert whole_run.host_bytes(paper) == 2 * (whole_run.PROCESS + cost.fixed_bytes(paper)[0])
    frames = 70 * 2 * 16 * 25 * 3 * 384**2
    assert whole_run.host_bytes(workers) == pytest.approx(2 * (whole_run.PROCESS + frames) + 16 * 135_067_392)


def test_the_counted_queries_and_videos_are_those_of_the_data_set(shared):
    for split, videos in whole_run.VIDEOS.items():
        rows = annotations.read(shared / "qvhighlights" / getattr(config.load("paper").data, split))
        assert (len(rows), len({row.vid for row in rows})) == (whole_run.QUERIES[split], videos)


def test_a_whole_run_on_disk():
    folder, frames, released = (whole_run.disk_bytes(config.load(name)) for name in ("paper", "24gb", "released"))
    assert folder["archive"] == folder["videos"] == download.ARCHIVE_BYTES and not frames["archive"]
    assert folder["frames"] == frames["frames"] == pytest.approx(45.9e9, rel=0.01)  # records/frame_store.json
    share = (2 * dataset.store(config.load("released")).neighbours + 1) / 3
    assert released["frames"] == pytest.approx(frames["frames"] * share * (1519 + 1529) / 10148)


def test_memory_grows_with_what_it_is_made_of():
    profile = config.load("paper")
    for change in (
        {"training.micro_batch": 32},
        {"training.gradient_checkpointing": False},
        {"training.offload_optimizer": False},
        {"inference.batch": 128},
        {"model.dtype": "float32"},
        {"frames.count": 28},
    ):
        assert cost.gpu_bytes(config.load("paper", change)) > cost.gpu_bytes(profile), change


def test_a_window_leaves_fewer_pairs(profile):
    near = tiny(model__language__sliding_window=16)
    language = near.model.language
    pairs = sum(min(position + 1, 16) for position in range(100))
    less = cost.operations(profile, 100).language - cost.operations(near, 100).language
    assert less == language.layers * 4 * language.hidden_size * (100 * 101 / 2 - pairs)


def test_matrix_rate_is_that_of_the_device():
    left, right = torch.randn(2, 256, 256)
    began = time.perf_counter()
    for _ in range(200):
        left @ right
    plain = 200 * 2 * 256**3 / (time.perf_counter() - began)
    for speed in (1, 1000):  # of the clock
        rate = cost.matrix_rate("cpu", torch.float32, 256, 0.1 * speed, lambda speed=speed: speed * time.perf_counter())
        assert plain / 10 < speed * rate < 10 * plain


# what of it this machine has, before anything starts


@pytest.fixture
def machine(monkeypatch):
    """Make this machine one with so many GPUs of so many GiB, and of a disk with so many GiB free."""

    def become(gpus: int = 0, gib: float = 0, free: float = 10**6):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        about = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free * 2**30))

    return become


CPU = "set training.device=cpu, which is very slow"
GPUS = {  # profile, GPUs, GiB of each: what is said
    ("paper", 2, 79): [],
    ("h100", 1, 79): [],
    ("demo", 0, 0): [],
    ("demo", 1, 8): [],
    ("paper", 0, 0): [f"GPU: the profile trains on 2 of about 61 GiB, this machine has 0: {CPU}"],
    ("paper", 1, 79): [
        "GPU: the profile trains on 2 of about 61 GiB, this machine has 1: use profile h100, or set "
        f"training.processes=1 training.accumulation=8, or {CPU}"
    ],
    ("paper", 2, 24): [
        "GPU: the training needs about 61 GiB, this GPU has 24: use profile 24gb, or set training.micro_batch=2 "
        f"training.accumulation=32 inference.batch=4, or {CPU}"
    ],
    ("h100", 1, 24): [
        "GPU: the training needs about 58 GiB, this GPU has 24: use profile 24gb, or set "
        f"training.gradient_checkpointing=True inference.batch=4, or {CPU}"
    ],
    ("released_train", 1, 79): [
        "GPU: the profile trains on 2 of about 61 GiB, this machine has 1: use profile 24gb, or set "
        f"training.processes=1 training.accumulation=8, or {CPU}"
    ],
    ("24gb", 1, 21.9): [],
    ("h100", 1, 8): [f"GPU: the training needs about 58 GiB, this GPU has 8: {CPU}"],
}


@pytest.mark.parametrize("name, gpus, gib", GPUS)
def test_gpus_that_are_missing_or_too_small_are_said(machine, name, gpus, gib):
    machine(gpus, gib)
    assert preflight.gpus(config.load(name)) == GPUS[name, gpus, gib]
    assert preflight.gpus(config.load(name, {"training.device": "cpu"})) == []


@pytest.mark.parametrize(
    "name, gpus, gib", [key for key, said in GPUS.items() if said and "set training.device" not in said[0][:110]]
)
def test_the_settings_that_are_named_fit_and_train_the_same(machine, name, gpus, gib):
    machine(gpus, gib)
    [sentence] = preflight.gpus(config.load(name))
    settings = dict(pair.split("=") for pair in re.search(r"set ((?:[\w.]+=\w+ ?)+)", sentence)[1].split())
    profile, before = config.load(name, settings).training, config.load(name).training
    assert preflight.gpus(config.load(name, settings)) == []
    size, old = (t.processes * t.micro_batch * t.accumulation for t in (profile, before))
    assert size == old


def test_a_disk_that_is_too_small_is_said_first(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [LabelledRow(i, "a dog", 150, f"v{i}", ((0, 2),), (0,), ((4, 4, 4),)) for i in range(1000)]
    profile = config.load("paper", {"data.folder": str(tmp_path)})
    for split in ("train", "val", "test"):
        annotations.write(tmp_path / getattr(profile.data, split), rows)
    machine(2, 79, free=15)
    # 1,000 of the 10,148 videos whose frames take 45.9 GB; 4.36 billion parameters; three states of 135 million.
    listed = "frames about 4.2, weights about 8.1, states about 6.8"
    first, ways = preflight.missing(profile, True, tmp_path / "run")[0].split(": make room, or choose ")
    assert first == f"disk: {tmp_path} has 15.0 GiB free, 19.1 are needed ({listed})"
    assert ways == "another disk by data.folder (frames, features), HF_HOME (weights, archive), --run-dir (states)"
    for trains, free in ((True, 20), (False, 13)):
        machine(2, 79, free=free)
        assert not [
            sentence for sentence in preflight.missing(profile, trains, tmp_path / "run") if "disk:" in sentence
        ]


def test_what_is_on_the_disk_already_needs_no_room(machine, trained):
    profile, run = trained
    for folder, needs in ((run, 0), (Run(profile, run.root / "another"), 1)):
        writes = {what: size for what, _, size in preflight._writes(profile, True, folder)}
        assert writes["frames"] == 0
        states, checkpoint = (
            sum(path.stat().st_size for path in made.rglob("*.safetensors")) for made in (run.resume, run.checkpoint)
        )
        three = states * 3 / 2 + checkpoint  # there are two, and the next one is written before the first goes
        assert needs * three + (1 - needs) * three / 4 < writes["states"] < (1 if needs else 0.6) * 1.2 * three
    cached = small_profile(profile.data.folder, training__cache_features=True, frames__count=24)
    features = {what: size for what, _, size in preflight._writes(cached, True, run)}["features"]
    # As many pictures of 9 patches by 64 float32 numbers.
    assert features == len({row.vid for row in dataset.rows(profile, "train")}) * 24 * 3 * 9 * 64 * 4
    other = small_profile(profile.data.folder, frames__jpeg_quality=50)
    assert dict((what, size > 0) for what, _, size in preflight._writes(other, False, run)) == {"frames": True}


@pytest.mark.parametrize("gpus, gib", [(0, 0), (1, 8), (1, 12), (1, 79), (2, 24)])
def test_what_is_not_trained_needs_a_gpu_for_its_answers_alone(machine, monkeypatch, capsys, gpus, gib):
    machine(gpus, gib)
    monkeypatch.setattr(cost, "matrix_rate", lambda *_, **__: 0.5 * cost.TERA)
    released = config.load("released")
    said = preflight.decodes(released)
    assert not capsys.readouterr().out.count("decoding on the CPU")
    if cost.gpu_bytes(released) <= gib * 2**30:
        assert not said
    else:
        size = f"{cost.gpu_bytes(released) / 2**30:.0f} GiB, this machine has {gib}"
        assert said[0].startswith(f"GPU: decoding needs about {size}: set ")
        assert said[0].endswith("set training.device=cpu, where an answer takes 94 s or more")
        if gib == 12:
            batch = int(re.search(r"inference.batch=(\d+)", said[0])[1])
            sizes = [cost.gpu_bytes(config.load("released", {"inference.batch": b})) for b in (batch, batch + 1)]
            assert 1 <= batch and sizes[0] <= 12 * 2**30 < sizes[1]
        else:
            assert "inference.batch" not in said[0]
    slow = config.load("released", {"training.device": "cpu"})
    assert preflight.decodes(slow) == []
    assert "decoding on the CPU, where an answer takes 94 s or more\n" in capsys.readouterr().out


def test_the_size_of_weights_that_will_be_fetched_is_told(monkeypatch, tmp_path):
    files = {"a.safetensors": 7 * 10**9, "b.safetensors": 10**9, "code.py": 5}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    monkeypatch.setattr(preflight.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(preflight.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    assert preflight.to_fetch("somebody/weights") == 8 * 10**9
    part = tmp_path / "models--somebody--weights/blobs/x.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    assert preflight.to_fetch("somebody/weights") == 8 * 10**9 - 1000
    assert preflight.to_fetch("framseg/demo/base") == 0 and preflight.to_fetch("weights") is None
    siblings[:] = siblings[2:]
    assert preflight.to_fetch("somebody/weights") is None  # no checkpoint
    kept = tmp_path / "models--somebody--weights/snapshots/1/a.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert preflight.to_fetch("somebody/weights") == 0
