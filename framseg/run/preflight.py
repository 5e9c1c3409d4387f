"""What a profile needs and this machine lacks, found before anything starts and without loading the model's code."""

import importlib.util
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from framseg import annotations, config, dataset, download, prompt
from framseg.run import cost, resume
from framseg.run.paths import Run

GIB = 2**30
PICTURE = 0.41  # bytes per pixel in the frame store at quality 95 (tests/benchmarks/frame_store.py)
HUB_PATIENCE = 3.0  # seconds for the hub's answer


def missing(profile: config.Profile, trains: bool = True, root: Path | None = None) -> list[str]:
    """A sentence on each thing that the profile needs and this machine lacks, and what to do; GPUs only if it `trains`.

    root: the run's folder. At most a list of files is asked of the Hugging Face hub; weights to be fetched are told.
    """
    gpu = gpus if profile.training.epochs else decodes
    out = (gpu(profile) if trains else []) + disks(profile, trains, Run(profile, root))
    if profile.data.source == "folder":
        command = f"python -m framseg.download {config.data_folder(profile)}"
        for split in ("train", "val", "test", "test_labels"):
            if not (file := dataset.annotation_file(profile, split)).is_file():
                out.append(f"annotations: {file} is not there; fetch it with {command}, or set data.folder")
        if not (videos := dataset.videos(profile)).is_dir():
            out.append(f"videos: {videos} is not there; fetch {{vid}}.mp4 of every row with {command}")
    weights, tokenizers = profile.model.weights, profile.model.tokenizers
    if size := to_fetch(weights):
        print(f"weights: {download.words(size)} of {weights} will be fetched")
    if size is None:
        out.append(
            f"weights: {weights!r} is neither a folder nor in the Hugging Face cache, and the hub, from where its "
            f"safetensors would be fetched, cannot be reached; set model.weights to a folder with them"
        )
    here = any(config.local_path(name) or cached(name, prompt.FILE) for name in tokenizers)
    if size is None and not here:  # no second wait for an answer
        names = " or ".join(tokenizers)
        out.append(f"tokenizer: would be fetched from there, too ({names}); set model.tokenizer to a {prompt.FILE}")
    else:
        try:
            prompt.fitting(profile)
        except prompt.PromptError as error:
            out.append(f"tokenizer: {error}")
    if profile.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        out.append("flash attention: the package flash-attn is not installed; install it or set model.attention=sdpa")
    return out


def gpus(profile: config.Profile) -> list[str]:
    """A sentence if this machine has fewer or smaller GPUs than the profile trains on, else nothing."""
    section, needed = profile.training, cost.gpu_bytes(profile)
    count, has, on_cpu = _machine(profile)
    needs = f"about {needed / GIB:.0f} GiB"
    if on_cpu:
        return []
    if count < section.processes:
        what = f"the profile trains on {section.processes} of {needs}, this machine has {count}"
    elif needed > has:
        what = f"the training needs {needs}, this GPU has {has / GIB:.0f}"
    else:
        return []
    ways: list[str] = []
    others = [other for other in map(config.load, config.names()) if other.training.epochs]
    # Last the one with the same data that saves least memory.
    for other in sorted(others, key=lambda other: (other.data == profile.data, cost.gpu_bytes(other))):
        if other.model.language == profile.model.language and other.training.processes <= count:
            ways = [f"use profile {other.name}"] if cost.gpu_bytes(other) < has else ways
    if settings := _smaller(profile, count, has):
        ways.append(f"set {settings}")
    return [f"GPU: {what}: {', or '.join([*ways, 'set training.device=cpu, which is very slow'])}"]


def decodes(profile: config.Profile) -> list[str]:
    """A sentence if no GPU here is large enough for a profile that trains nothing; prints how slow a CPU is instead."""
    needed, batch = cost.gpu_bytes(profile), profile.inference.batch
    _, has, on_cpu = _machine(profile)
    if needed <= has and not on_cpu:
        return []
    work = cost.operations(profile, profile.frames.count * profile.model.resampler.latents + cost.TEXT).inference
    seconds = work / cost.matrix_rate("cpu", getattr(torch, profile.model.dtype), width=1024, seconds=0.5)
    slow = f"where an answer takes {seconds:.2g} s or more"
    if on_cpu:
        print(f"decoding on the CPU, {slow}")
        return []
    fits = batch + int((has - needed) // cost.query_bytes(profile))
    ways = [*([f"set inference.batch={fits}"] if fits > 0 else []), f"set training.device=cpu, {slow}"]
    needs = f"decoding needs about {needed / GIB:.0f} GiB, this machine has {has / GIB:.0f}"
    return [f"GPU: {needs}: {', or '.join(ways)}"]


def _machine(profile: config.Profile) -> tuple[int, float, bool]:
    """How many GPUs there are, the bytes of the smallest, and whether the profile computes on the CPU instead."""
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    on_cpu = profile.training.device == "cpu" or not (sizes or profile.model.dtype == "bfloat16")
    return len(sizes), min(sizes, default=0), on_cpu


def _smaller(profile: config.Profile, count: int, has: float) -> str:
    """The settings with which `count` GPUs of `has` bytes do the same training soonest, "" if there are none."""
    training, inference = profile.training, profile.inference
    processes = min(count, training.processes)
    for saves, share in itertools.product(range(3), (1, 2, 4, 8, 16, 32, 64)):
        micro_batch, left = divmod(training.micro_batch, share)
        if left or not processes or training.processes % processes:
            continue
        change = {
            "processes": processes,
            "micro_batch": micro_batch,
            "accumulation": training.accumulation * share * training.processes // processes,
            "gradient_checkpointing": saves > 0 or training.gradient_checkpointing,
            "offload_optimizer": saves > 1 or training.offload_optimizer,
        }
        batch = {"batch": min(inference.batch, 2 * micro_batch)}
        sections = {"training": training.model_copy(update=change), "inference": inference.model_copy(update=batch)}
        trial = profile.model_copy(update=sections)
        if cost.gpu_bytes(trial) < has:
            return " ".join(resume.differences(profile, trial, tuple(sections), "{key}={new}").values())
    return ""


def disks(profile: config.Profile, trains: bool, run: Run) -> list[str]:
    """A sentence on each disk with too little room for what a run writes there: frames, weights, states."""
    by_disk: dict[int, list[tuple[str, Path, float]]] = {}
    for what, folder, size in _writes(profile, trains, run):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        by_disk.setdefault(os.stat(there).st_dev, []).append((what, there, size))
    out = []
    for writes in by_disk.values():
        needs, free = sum(size for _, _, size in writes), shutil.disk_usage(writes[0][1]).free
        if needs > free:
            listed = ", ".join(f"{what} about {size / GIB:.1f}" for what, _, size in writes)
            out.append(
                f"disk: {writes[0][1]} has {free / GIB:.1f} GiB free, {needs / GIB:.1f} are needed ({listed}): make "
                f"room, or choose another disk by data.folder (frames, features), HF_HOME (weights, archive), "
                f"--run-dir (states)"
            )
    return out


def _writes(profile: config.Profile, trains: bool, run: Run) -> Iterator[tuple[str, Path, float]]:
    """What a run still has to write: in words, its folder, and its bytes, about."""
    store, vision = dataset.store(profile), profile.model.vision
    files = [dataset.annotation_file(profile, split) for split in profile.data.splits]
    if all(file.is_file() for file in files):  # else that is what is missing
        vids = [{row.vid for row in annotations.read(file)} for file in files]
        pictures = profile.frames.count * (2 * store.neighbours + 1)
        waiting = sum(vid not in store for vid in set().union(*vids))
        yield "frames", store.folder, waiting * video_bytes(profile)
        if trains and profile.training.cache_features and not any(store.folder.parent.glob("*_features_*")):
            values = (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size
            size = getattr(torch, profile.model.dtype).itemsize
            yield "features", store.folder, len(vids[0]) * pictures * values * size
    if profile.data.source == "frames":
        from framseg.run import archive  # which needs this module

        yield "archive", Path(constants.HF_HUB_CACHE), archive.to_fetch(profile)
    name = profile.model.weights
    if not Path(name).is_absolute() and (weights := to_fetch(name)) != 0:
        yield "weights", Path(constants.HF_HUB_CACHE), weights or cost.fixed_bytes(profile)[0]
    if trains and profile.training.epochs:
        kept = sum(file.stat().st_size for file in run.resume.rglob("*") if file.is_file())
        yield "states", run.root, max(0, state_bytes(profile) - kept)


def state_bytes(profile: config.Profile) -> float:
    """Bytes of the states that training keeps to go on from, about; the new one is written before the oldest goes."""
    size, trained = getattr(torch, profile.model.dtype).itemsize, cost.parameters(profile)[1]
    # Weights, pairs as they start, the optimizer's share.
    return trained * ((resume.KEPT + 1) * (2 * size + 12) + size + 4) if profile.training.epochs else 0


def video_bytes(profile: config.Profile) -> float:
    """Bytes of a video in the frame store, about."""
    pictures = profile.frames.count * (2 * dataset.store(profile).neighbours + 1)
    return pictures * profile.model.vision.image_size**2 * PICTURE


def cached(name: str, file: str, kind: str = "model") -> Path | None:
    """A repository's file in the hub's cache, None if it is not there."""
    try:
        path = try_to_load_from_cache(name, file, repo_type=kind)
    except HFValidationError:  # no repository can have this name
        return None
    return Path(path) if isinstance(path, str) else None


def to_fetch(name: str, ending: str = ".safetensors", kind: str = "model") -> int | None:
    """Bytes still to be fetched of a repository's files that end so; None if it has none or the hub does not answer."""
    if kind == "model" and config.local_weights(name):
        return 0
    if name.count("/") != 1:
        return None
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))
    if any(file.exists() for file in cache.glob(f"snapshots/*/*{ending}")):
        return 0
    try:
        about = HfApi().repo_info(name, repo_type=kind, timeout=HUB_PATIENCE, files_metadata=True)
        files = about.siblings or []  # type: ignore[union-attr]  # only kernels have none
    except Exception:  # the HTTP library's errors share no base class with the hub's
        return None
    sizes = [file.size or 0 for file in files if file.rfilename.endswith(ending)]
    return max(0, sum(sizes) - sum(part.stat().st_size for part in cache.glob("blobs/*.part"))) if sizes else None
