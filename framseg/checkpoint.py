"""A model on disk and on the Hugging Face hub: the folder that chapter 03 writes, its base, its model card."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from framseg import config, prompt
from framseg.backbones import CheckpointError, device
from framseg.backbones.blip3 import Blip3
from framseg.evaluate import METRICS
from framseg.run import precision, released

PROFILE, CARD, METRICS_FILE = config.FILE, "README.md", "metrics.json"
RESAMPLER, ADAPTER = "resampler.safetensors", "adapter/adapter_model.safetensors"
ADAPTER_SETTINGS = "adapter/adapter_config.json"
# Nothing else of a repository is fetched: no code, no pickles.
HUB_FILES = [PROFILE, prompt.FILE, METRICS_FILE, CARD, RESAMPLER, "adapter/adapter_*"]
Loaded = tuple[Blip3, config.Profile, Tokenizer]
_last: dict[tuple, Loaded] = {}  # what `loaded` gave last, by what was asked for


def load_base(profile: config.Profile) -> Blip3:
    """The untouched base model of the profile, on the CPU and in eval mode.

    If `model.weights` names a Hugging Face repository, its safetensors are fetched once. Raises CheckpointError if
    there is no such folder or repository, or if its weights do not fit the profile's model.
    """
    name = profile.model.weights
    folder = config.local_weights(name) or released.had(name, after="; set model.weights to where the base model is")
    return Blip3.load_published(profile.model, folder)


def save_trained(
    folder: Path,
    model: Blip3 | None,
    start: dict[str, Tensor],
    profile: config.Profile,
    tokenizer: Tokenizer,
    metrics: dict,
) -> None:
    """Write a trained checkpoint; the base model stays where it is. A folder of that name is replaced as a whole.

    start: what `Blip3.adapt` returned. metrics: of the last validation, as `evaluate` gives them. Without a model the
    checkpoint is that of a profile which trains nothing: its base is the model.
    """
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    card = f"# Profile `{profile.name}`\n\nNothing was trained here: {released.origin(profile.model.weights)}.\n"
    if model:
        card = model_card(profile, metrics)
        lora, pairs = model.adapter(start)
        lora.save_pretrained(str(unfinished / "adapter"))
        save_file(pairs, unfinished / ADAPTER)
        resampler = {name: value.contiguous().cpu() for name, value in model.vision_tokenizer.state_dict().items()}
        save_file(resampler, unfinished / RESAMPLER)
        (unfinished / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(unfinished / prompt.FILE))
    config.save(profile, unfinished / PROFILE)
    (unfinished / CARD).write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def require_complete(folder: Path | str) -> Path:
    """The folder, if it holds a checkpoint: a profile, and what was trained. CheckpointError with what is missing."""
    folder = Path(folder)
    trained = not (folder / PROFILE).is_file() or config.load(folder / PROFILE).training.epochs
    needed = [PROFILE, RESAMPLER, ADAPTER_SETTINGS, ADAPTER] if trained else [PROFILE]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: no trained checkpoint ({', '.join(missing)} missing); notebook 03 writes one")
    return folder


def load_trained(folder: Path | str, profile: config.Profile | None = None) -> tuple[Blip3, config.Profile]:
    """A trained checkpoint merged into its base, ready to decode, and the profile it was made with, or `profile`.

    Raises CheckpointError if the folder is incomplete or damaged or its tensors do not fit the profile's model, and
    ProfileError for its profile.
    """
    folder = require_complete(folder)
    profile = profile or config.load(folder / PROFILE)
    if not profile.training.epochs:
        return load_base(profile), profile
    resampler, pairs = (released.tensors(folder / name) for name in (RESAMPLER, ADAPTER))
    adapter = pairs, *released.adapter_settings(folder / ADAPTER_SETTINGS)
    return released.merged(load_base(profile), folder, resampler, *adapter), profile


def loaded(checkpoint: Path | str | Sequence[Path | str], where: str = "auto", dtype: str | None = None) -> Loaded:
    """Model, profile and tokenizer of a checkpoint (see `framseg.predict`), in eval mode.

    The model is on `backbones.device(where)` and in `precision.chosen(dtype)`, by default the profile's; the memory
    that it takes is told on standard error. The last one stays loaded until its folder changes. Raises CheckpointError,
    ProfileError or PromptError for one that cannot be used.
    """
    place, given = device(where), released.names(checkpoint)
    precision.chosen(dtype, place, "float32")  # what cannot be had is refused before anything is fetched
    folders = tuple(map(local_folder, given))
    files = (path for folder in folders for path in (folder, *folder.rglob("*")))
    key = (folders, max(path.stat().st_mtime_ns for path in files), place, dtype)
    if key not in _last:
        _last.clear()  # at once: memory may not hold two of them
        _last[key] = _load(", ".join(map(str, given)), folders, place, dtype)
    model, profile, tokenizer = _last[key]
    if released.published(folders[0]) or not profile.training.epochs:
        model.origin = released.origin(checkpoint if profile.training.epochs else profile.model.weights)
    return model, profile, tokenizer


def _load(name: str, folders: tuple[Path, ...], place: torch.device, dtype: str | None) -> Loaded:
    foreign, int8 = len(folders) > 1 or released.published(folders[0]), dtype == precision.INT8
    profile = config.load(released.PROFILE if foreign else folders[0] / PROFILE)
    section = {"dtype": precision.chosen(dtype, place, profile.model.dtype)}
    profile = profile.model_copy(update={"model": profile.model.model_copy(update=section)})
    print(precision.told(name, profile, place, int8), end="", file=sys.stderr)
    if not foreign:
        model, tokenizer = load_trained(folders[0], profile)[0], prompt.load(folders[0])
        prompt.check(tokenizer, profile.model, profile.frames.count)  # it may be somebody else's checkpoint
    else:
        pair, tokenizer = released.pair(folders), prompt.fitting(profile, *folders)
        model = released.merged(load_base(profile), *pair) if pair else Blip3.load_published(profile.model, folders[0])
    if int8:
        precision.make_int8(model.lang_model.model.layers)
    return model.to(place), profile, tokenizer


def model_card(profile: config.Profile, metrics: dict) -> str:
    """Model card of a checkpoint in the hub's format: model_card.md, with the metrics on val that `evaluate` gives."""
    training, base = profile.training, profile.model.weights
    published = base.count("/") == 1 and config.local_weights(base) is None
    demo = profile.data.source == "demo"
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return template.format(
        profile=profile,
        base_line=f"base_model: {base}\n" if published else "",
        samples=training.micro_batch * training.accumulation * training.processes,
        rows="the synthetic demo set of framseg" if demo else "QVHighlights or other rows in its format",
        names=" | ".join(METRICS.values()),
        rules=" | ".join("---" for _ in METRICS),
        values=" | ".join(f"{metrics['brief'][name]:.2f}" for name in METRICS),
    )


def local_folder(checkpoint: Path | str) -> Path:
    """The folder of a checkpoint: `checkpoint` itself, or what the hub's repository of that name holds, fetched once.

    Raises CheckpointError if it is neither, or not a whole checkpoint.
    """
    folder = Path(os.path.expanduser(checkpoint))
    if not os.path.exists(folder):  # Path.exists raises for a name that is too long
        folder = released.had(str(checkpoint), (*HUB_FILES, *released.WEIGHTS))
    return (folder if released.published(folder) else require_complete(folder)).resolve()
