"""A trained model on disk and on the Hugging Face hub: the folder that training writes, its base, its model card."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from framseg import config, prompt
from framseg.backbones import CheckpointError, device
from framseg.backbones.blip3 import Blip3
from framseg.evaluate import METRICS
from framseg.jsonl import is_integer, is_number, parse_object

PROFILE, CARD, METRICS_FILE = config.FILE, "README.md", "metrics.json"
RESAMPLER, ADAPTER = "resampler.safetensors", "adapter/adapter_model.safetensors"
ADAPTER_SETTINGS = "adapter/adapter_config.json"
NOT_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")  # settings of an adapter
# Nothing else of a repository is fetched: no code, no pickles.
HUB_FILES = [PROFILE, prompt.FILE, METRICS_FILE, CARD, RESAMPLER, "adapter/adapter_*"]


@contextmanager
def hub_errors(before: str, after: str = "") -> Iterator[None]:
    """Whatever the hub's library raises becomes a CheckpointError: `before`, the reason in brackets, `after`."""
    try:
        yield
    except Exception as error:  # the HTTP library's errors share no base class with the hub's
        raise CheckpointError(f"{before} ({' '.join(str(error).split())}){after}") from None


def load_base(profile: config.Profile) -> Blip3:
    """The untouched base model of the profile, on the CPU and in eval mode.

    If `model.weights` names a Hugging Face repository, its safetensors are fetched once. Raises CheckpointError if
    there is no such folder or repository, or if its weights do not fit the profile's model.
    """
    name = profile.model.weights
    folder = config.local_weights(name)
    if folder is None:
        advice = "; set model.weights to where it is"
        if Path(name).is_absolute() or name.count("/") != 1:
            raise CheckpointError(f"{name}: the base model's folder is not here{advice}")
        with hub_errors(f"{name}: neither the base model's folder nor to be had from the Hugging Face hub", advice):
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    return Blip3.load_published(profile.model, folder)


def save_trained(
    folder: Path,
    model: Blip3,
    start: dict[str, Tensor],
    profile: config.Profile,
    tokenizer: Tokenizer,
    metrics: dict,
) -> None:
    """Write a trained checkpoint; the base model stays where it is. A folder of that name is replaced as a whole.

    start: what `Blip3.adapt` returned. metrics: of the last validation, as `evaluate` gives them.
    """
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    lora, pairs = model.adapter(start)
    lora.save_pretrained(str(unfinished / "adapter"))
    save_file(pairs, unfinished / ADAPTER)
    resampler = {name: value.contiguous().cpu() for name, value in model.vision_tokenizer.state_dict().items()}
    save_file(resampler, unfinished / RESAMPLER)
    tokenizer.save(str(unfinished / prompt.FILE))
    config.save(profile, unfinished / PROFILE)
    (unfinished / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (unfinished / CARD).write_text(model_card(profile, metrics), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def require_complete(folder: Path | str) -> Path:
    """The folder, if it holds a trained checkpoint. Raises CheckpointError with what is missing."""
    folder = Path(folder)
    missing = [name for name in (PROFILE, RESAMPLER, ADAPTER_SETTINGS, ADAPTER) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: no trained checkpoint here ({', '.join(missing)} missing); notebook 03 writes one"
        )
    return folder


def load_trained(folder: Path | str) -> tuple[Blip3, config.Profile]:
    """A trained checkpoint merged into its base, ready to decode, and the profile it was trained with.

    Raises CheckpointError if the folder is incomplete or damaged or its tensors do not fit the profile's model, and
    ProfileError for its profile.
    """
    folder = require_complete(folder)
    profile = config.load(folder / PROFILE)
    resampler, pairs = (_tensors(folder / name) for name in (RESAMPLER, ADAPTER))
    targets, scaling = _adapter_settings(folder / ADAPTER_SETTINGS)
    model = load_base(profile)
    try:
        model.vision_tokenizer.load_state_dict(resampler)
        with torch.no_grad():
            for target in targets:
                a, b = (pairs.pop(f"base_model.model.{target}.lora_{half}.weight").float() for half in "AB")
                weight = model.get_parameter(f"{target}.weight")
                weight.add_((b @ a * scaling).to(weight.dtype))
    except (RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: does not fit the profile's model: {error}") from None
    if pairs:
        raise CheckpointError(f"{folder / ADAPTER}: {min(pairs)} belongs to none of adapter_config.json's targets")
    return model.eval(), profile


def loaded(checkpoint: Path | str, where: str = "auto") -> tuple[Blip3, config.Profile, Tokenizer]:
    """Model, profile and tokenizer of a checkpoint (see `local_folder`), on `backbones.device(where)` and in eval mode.

    The last one stays loaded until its folder changes. Raises CheckpointError, ProfileError or PromptError for one
    that cannot be used.
    """
    folder = local_folder(checkpoint)
    return _loaded(folder, max((file.stat().st_mtime_ns for file in folder.rglob("*")), default=0), where)


@lru_cache(maxsize=1)
def _loaded(folder: Path, changed: int, where: str) -> tuple[Blip3, config.Profile, Tokenizer]:
    """`changed` is the time of the folder's last change, so that a checkpoint written anew is loaded anew."""
    model, profile = load_trained(folder)
    tokenizer = prompt.load(folder)
    prompt.check(tokenizer, profile.model, profile.frames.count)  # it may be somebody else's checkpoint
    return model.to(device(where)), profile, tokenizer


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None
    if odd := [name for name, value in tensors.items() if not value.float().isfinite().all()]:
        raise CheckpointError(f"{file}: {odd[0]} holds values that are no numbers; fetch it again, or train anew")
    return tensors


def _adapter_settings(file: Path) -> tuple[list[str], float]:
    """Layers of a plain LoRA adapter and what their pairs are multiplied by; nothing else is taken from the file."""
    settings, reasons = parse_object(file.read_bytes())
    if settings is not None:
        rank, alpha, targets = (settings.get(key) for key in ("r", "lora_alpha", "target_modules"))
        reasons = [f"{key} is set, and only a plain LoRA adapter can be read" for key in NOT_PLAIN if settings.get(key)]
        if not is_integer(rank) or rank < 1 or not is_number(alpha):
            reasons.append("r and lora_alpha must be numbers, r at least 1")
        elif not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            reasons.append("target_modules must be a list of names")
        elif not reasons:
            return targets, alpha / rank
    raise CheckpointError(f"{file}: {'; '.join(reasons)}; fetch it again, or train anew")


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
    if os.path.exists(folder) or str(checkpoint).count("/") != 1 or str(checkpoint).startswith((".", "/", "~")):
        return require_complete(folder).resolve()
    with hub_errors(f"{checkpoint}: neither a checkpoint's folder nor to be had from the Hugging Face hub"):
        fetched = snapshot_download(str(checkpoint), allow_patterns=HUB_FILES)
    return require_complete(fetched)
