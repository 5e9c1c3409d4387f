"""How fast does it train? Real training steps of a profile through the launcher, data loading and all.

python tests/benchmarks/training.py                                        (the demo on this machine)
python tests/benchmarks/training.py --profile h100 --random                (full size, random weights, on a GPU)
python tests/benchmarks/training.py --profile 24gb --random --gpu "RTX 4090"   (with no more memory than that one has)
python tests/benchmarks/training.py --profile h100 --random --against paper --steps 50

Writes records/training_<profile>.json: samples per second over the steps after the warm-up, memory, and the share of
what matrix products reach on the device. The data are the demo's videos, stored at the profile's own picture size. With
--against, a second profile trains on the same samples and its losses are compared step by step. What is done stays in
--folder, so that an interrupted call goes on.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import common
import torch
import whole_run

from framseg import annotations, config, dataset, prompt, train
from framseg.backbones import blip3
from framseg.demo import synthetic
from framseg.run import cost
from framseg.run.paths import Run

WARM_UP = 5  # steps that are not counted: compilation, caches, the first reads


def prepared(name: str, options: argparse.Namespace) -> config.Profile:
    """The profile on just as many of the demo's rows as the steps need, validated on almost nothing."""
    demo, folder = config.load("demo"), options.folder / "data"
    synthetic.prepare(demo)
    rows = dataset.rows(demo, "train")
    changes = dict(change.split("=", 1) for change in options.set)
    section = config.load(name, changes).training
    if "training.processes" not in changes:  # on one device, with as many samples per step
        changes |= {"training.processes": 1, "training.accumulation": section.accumulation * section.processes}
        section = config.load(name, changes).training
    samples = options.steps * section.micro_batch * section.accumulation * section.processes
    epochs = -(-samples // len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / demo.data.videos).exists():
        (folder / demo.data.videos).symlink_to(dataset.videos(demo))
    annotations.write(folder / demo.data.train, rows[: -(-samples // epochs)])
    annotations.write(folder / demo.data.val, dataset.rows(demo, "val")[:2])
    changes |= {
        "data.folder": str(folder),
        "model.tokenizer": "framseg/demo/base",
        "training.remainder": "carry",
        "training.epochs": epochs,
    }
    if options.random:
        changes["model.weights"] = str(options.folder / "weights")
    return config.load(name, changes | {"data.source": "folder"})


def random_weights(profile: config.Profile) -> None:
    folder = Path(profile.model.weights)
    if not folder.is_dir():
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, profile.model.dtype))
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = blip3.Blip3(profile.model)
        torch.set_default_dtype(torch.float32)
        aside = folder.with_name("weights.part")
        model.cpu().save_published(aside)
        aside.rename(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the training is another process and needs it


def trained(profile: config.Profile, options: argparse.Namespace) -> list[dict]:
    """The log of the first --steps optimizer steps."""
    dataset.extract(profile, ("train", "val"))
    run = Run(profile, options.folder / profile.name)
    train.launch(profile, run)
    return train.read_log(run.step_log)[: options.steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--against", metavar="PROFILE", help="compare the losses of the same steps with this profile's")
    parser.add_argument("--random", action="store_true", help="random weights: a speed does not depend on them")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of the profiles"
    )
    parser.add_argument("--gpu", choices=whole_run.GPUS, help="take no more memory of the GPU than this one has")
    parser.add_argument("--folder", type=Path, help="working folder, kept; without it a temporary one")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} steps of warm-up")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu limits the memory of a GPU, and there is none here")
    if options.gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        os.environ["PYTORCH_ALLOC_CONF"] = whole_run.memory_of(
            options.gpu, total
        )  # read by the processes that are started
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        profile = prepared(options.profile, options)
        if options.random:
            random_weights(profile)
        steps = trained(profile, options)
        section, counted = profile.training, steps[WARM_UP:]
        a_step = section.micro_batch * section.accumulation * section.processes
        speeds = [a_step / step["seconds"] for step in counted]
        text = prompt.prompt_ids(
            prompt.load("framseg/demo/base"), profile.model.tokens, prompt.EXAMPLE_QUERY, profile.frames.count
        )
        count = profile.frames.count
        positions = len(text) + count * (profile.model.resampler.latents - 1) + count + 1
        work = cost.operations(profile, positions).training
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rate = cost.matrix_rate(device, getattr(torch, profile.model.dtype)) * section.processes
        speed = statistics.median(speeds)
        record = common.about(
            profile=profile.name,
            weights="random" if options.random else profile.model.weights,
            settings=section.model_dump(mode="json"),
            positions=positions,
            steps=len(counted),
        )
        record["samples per second"] = {
            "median": round(speed, 3), "min": round(min(speeds), 3), "max": round(max(speeds), 3)
        }  # fmt: skip
        record["memory of"] = options.gpu
        record["counted GiB"] = round(cost.gpu_bytes(profile) / 2**30, 2)
        record["memory GiB"] = round(max(step["memory_gib"] for step in steps), 2)
        record["TFLOP per sample"] = round(work / cost.TERA, 4)
        record["share of the matrix rate"] = round(speed * work / rate, 4)
        record["matrix rate TFLOP/s"] = round(rate / cost.TERA, 3)
        if options.against:
            other = prepared(options.against, options)
            losses = [[step["loss"] for step in log] for log in (steps, trained(other, options))]
            record["losses"] = {profile.name: losses[0], other.name: losses[1]}
            apart = [abs(one - two) / two for one, two in zip(*losses, strict=True)]
            record["losses apart"] = {"mean": statistics.mean(apart), "max": max(apart)}
    print(record["samples per second"], record["share of the matrix rate"])
    name = f"training_{profile.name}" + (f"_against_{options.against}" if options.against else "")
    common.write(name, record, options.out)


if __name__ == "__main__":
    main()
