"""With which settings a training may go on, and from which states on disk, bit for bit as if nothing had happened.

A state is a folder ``step_000123`` with the trained weights, the pairs as PiSSA began them, and for each process its
share of the optimizer and its random generators. It holds safetensors and JSON only, is written under another name and
then renamed; state.json is its last file and has a checksum of every other one.

The optimizer's share is read from DeepSpeed's ZeRO stages 1 and 2 through `single_partition_of_fp32_groups`, which is
no public interface: tried with the DeepSpeed that environment.yml pins, 0.19.8.
"""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from framseg import FramsegError, config, dataset
from framseg.jsonl import checksum
from framseg.run import launcher

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from framseg.run.paths import Run

KEPT = 2  # states on disk: should the last one be damaged, there is one before it
# What a profile may say otherwise after its training, if training.may_change names it: where things lie, what computes.
PLACES = {"data.folder", "data.videos", "model.weights", "model.tokenizer"}
PLACES |= {"training.device", "training.threads", "training.workers", "training.may_change"}
TRAINED = ("seed", "data", "frames", "model", "adapter", "losses", "training")  # what a training is made from


class ResumeError(FramsegError, RuntimeError):
    """A training, or one of its states, that this profile cannot go on from; the message says what differs."""


def label(profile: config.Profile, run: "Run") -> None:
    """Write down which settings and rows the run's training goes on with, for `changes`."""
    config.save(profile, run.trained_with)
    run.trained_on.write_text(checksum(dataset.annotation_file(profile, "train")), encoding="utf-8")


def finished(profile: config.Profile, run: "Run") -> bool:
    """True if the run's checkpoint is that of its folder's training and has all epochs, of one or more, asked for."""
    about = run.checkpoint / config.FILE
    if not about.is_file():
        return False
    made = config.load(about)
    began = config.load(run.trained_with) if run.trained_with.is_file() else made
    return made.training.epochs >= profile.training.epochs > 0 and differences(made, began, TRAINED).keys() <= PLACES


def changes(profile: config.Profile, run: "Run", trains: bool = True, sections: Sequence[str] = TRAINED) -> list[str]:
    """What differs from the training that the run folder holds, in words; how it decodes may always change.

    What is trained already, and stays if nothing `trains` now, keeps its settings: only PLACES may change then. Raises
    ResumeError for settings that may not or that `training.may_change` does not name, and for other rows.
    """
    about = run.checkpoint / config.FILE  # what is there if nothing trains; a training anew may have begun since
    about = run.trained_with if trains or not about.is_file() else about
    if not about.is_file():
        return []
    trained, over = config.load(about), not trains or finished(profile, run)
    changed = differences(trained, profile, sections)
    changed.pop("training.may_change", None)
    if changed and not trained.training.epochs:
        words = f"chapter 03 in {run.root} was made with other settings ({'; '.join(changed.values())})"
        raise ResumeError(f"{words}: run it again, too, with --from 03, or give another --run-dir")
    may = PLACES.intersection(profile.training.may_change) if over else set(profile.training.may_change)
    if profile.training.epochs < trained.training.epochs:  # steps after them may be done already
        may -= {"training.epochs"}
    refused = [words for key, words in changed.items() if key not in may]
    per_step = {t.processes * t.micro_batch * t.accumulation for t in (trained.training, profile.training)}
    if len(per_step) > 1 and not over:
        # The number of steps done would no longer say where in the data it is.
        refused.append("as many samples per step there must be (processes x micro_batch x accumulation)")
    file = dataset.annotation_file(profile, "train")
    if run.trained_on.is_file() and file.is_file() and run.trained_on.read_text(encoding="utf-8") != checksum(file):
        refused.append(f"other rows in {file.name}")
    if refused:
        way = "name the keys in training.may_change to go on with the new values"
        if over and not PLACES.issuperset(changed.keys() - may):
            way = "go back to the old ones"
        raise ResumeError(
            f"{run.root} was trained with other settings ({'; '.join(refused)}): give another --run-dir, remove "
            f"{run.train} to train anew, or {way}"
        )
    return list(changed.values())


def differences(
    old: config.Profile, new: config.Profile, sections: Sequence[str], words: str = "{key}: {old} there, {new} now"
) -> dict[str, str]:
    """The keys of these sections whose values differ, and for each both values in words."""
    dumps = [profile.model_dump(mode="json", include=set(sections)) for profile in (old, new)]
    before, after = (pd.json_normalize(dump).to_dict("records")[0] for dump in dumps)  # keys like "data.folder"
    changed = {str(key): value for key, value in after.items() if before.get(key) != value}
    return {key: words.format(key=key, old=before.get(key), new=value) for key, value in changed.items()}


def save(
    folder: Path, step: int, model: torch.nn.Module, start: dict[str, Tensor], optimizer: "DeepSpeedZeroOptimizer"
) -> None:
    """Write the state after `step` steps into `folder`, of all processes together, and remove all but the last ones.

    start: what `Blip3.adapt` returned.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    unfinished = folder / "part"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        for name, tensors in (("weights", trained), ("start", start)):
            tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
            save_file(tensors, unfinished / f"{name}.safetensors")
    torch.distributed.barrier()
    # This process's part of the float32 weights ("master") and of AdamW's two moments and step, by group and name.
    partition = {
        f"{i}.{key}": torch.as_tensor(value).detach().cpu().clone()
        for i, master in enumerate(optimizer.single_partition_of_fp32_groups)
        for key, value in {"master": master, **optimizer.optimizer.state[master]}.items()
    }
    save_file(partition | generators(), unfinished / f"process_{rank}.safetensors")
    torch.distributed.barrier()
    if rank == 0:
        sums = {path.name: checksum(path) for path in sorted(unfinished.iterdir())}
        about = {"step": step, "world": world, "sha256": sums}
        (unfinished / "state.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder / f"step_{step:06d}")
        for old in sorted(folder.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)
    torch.distributed.barrier()


def newest(folder: Path) -> Path | None:
    """The newest state in `folder` whose files are whole, the same on all processes; damaged ones are removed."""
    states = sorted(folder.glob("step_*")) if torch.distributed.get_rank() == 0 else []
    while states and (reason := damage(states[-1])):
        print(f"warning: {states[-1]} is damaged ({reason}): going on from the state before it", flush=True)
        shutil.rmtree(states.pop())
    return launcher.gathered(states[-1] if states else None)[0]


def damage(state: Path) -> str | None:
    """What is wrong with a state, None if its files are as they were written."""
    try:
        about = json.loads((state / "state.json").read_text(encoding="utf-8"))
        sums = about["sha256"]
        processes = len(sums) - 2
        names = {"weights.safetensors", "start.safetensors", *(f"process_{i}.safetensors" for i in range(processes))}
        numbers = int(state.name.removeprefix("step_")), processes
        if names != sums.keys() or (about["step"], about["world"]) != numbers or type(about["step"]) is not int:
            return "state.json is another state's"
        wrong = [name for name, expected in sums.items() if checksum(state / name) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"state.json or a file it lists cannot be read: {error}"
    return f"the checksum of {', '.join(wrong)} is another" if wrong else None


def load_weights(state: Path, model: torch.nn.Module, start: dict[str, Tensor], processes: int) -> int:
    """Put a state's trained weights into the model, before DeepSpeed copies them; returns the steps it has done.

    Raises ResumeError for another number of processes, and if `start`, what `Blip3.adapt` returned, is not the state's.
    """
    about = json.loads((state / "state.json").read_text(encoding="utf-8"))
    anew = f"remove {state.parent.parent} to start anew"
    if about["world"] != processes:
        raise ResumeError(
            f"{state} was written by {about['world']} processes and cannot go on with {processes}: "
            f"set training.processes back, or {anew}"
        )
    before = load_file(state / "start.safetensors")
    if differing := [name for name, value in before.items() if not torch.equal(start[name].cpu(), value)]:
        raise ResumeError(f"{state}: PiSSA begins elsewhere ({differing[0]}): other weights, seed or library; {anew}")
    model.load_state_dict(load_file(state / "weights.safetensors"), strict=False)
    return about["step"]


def load_process(state: Path, rank: int, optimizer: "DeepSpeedZeroOptimizer") -> None:
    """Put this process's share of a state into DeepSpeed's optimizer and the random generators."""
    saved = load_file(state / f"process_{rank}.safetensors")
    for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
        own = {key.partition(".")[2]: value for key, value in saved.items() if key.startswith(f"{i}.")}
        master.data.copy_(own.pop("master"))
        own = {key: value.to(master.device) if value.dim() else value for key, value in own.items()}
        optimizer.optimizer.state[master] = own
    set_generators(saved)


def generators() -> dict[str, Tensor]:
    """The states of all random generators of this process: torch's (dropout), the GPU's, Python's, NumPy's."""
    _, words, _ = random.getstate()  # the third is a spare value of random.gauss, which nothing here draws
    numpy = np.random.get_state(legacy=False)["state"]
    out = {"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return out | {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor(words),
        "random.numpy": torch.from_numpy(np.append(numpy["key"].astype(np.int64), numpy["pos"])),
    }


def set_generators(saved: dict[str, Tensor]) -> None:
    """Set all random generators to what `generators` returned."""
    torch.set_rng_state(saved["random.torch"])
    random.setstate((3, tuple(saved["random.python"].tolist()), None))
    *key, position = saved["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, 0, 0.0))
    if "random.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random.cuda"])
