"""A trained model on disk and on the Hugging Face hub: the folder that training writes, its base, its model card."""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from framseg import config
from framseg.backbones import CheckpointError
from framseg.backbones.blip3 import Blip3
from framseg.evaluate import METRICS
from framseg.jsonl import is_integer, is_number, parse_object

ADAPTER_FILE = "adapter/adapter_model.safetensors"
NOT_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")  # settings of an adapter


def load_base(profile: config.Profile) -> Blip3:
    """The untouched base model of the profile; a Hugging Face repository's weights are fetched (safetensors alone)."""
    name = profile.model.weights
    folder = config.local_weights(name)
    if folder is None and (Path(name).is_absolute() or name.count("/") != 1):
        raise CheckpointError(f"{name}: the base model's folder is not here; set model.weights to where it is")
    try:
        folder = folder or Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the HTTP library's errors share no base of the hub's
        raise CheckpointError(
            f"{name}: neither the base model's folder nor to be had from the Hugging Face hub "
            f"({' '.join(str(error).split())}); set model.weights to where it is"
        ) from None
    return Blip3.load_published(profile.model, folder)


def save_trained(
    folder: Path, model: Blip3, start: dict[str, Tensor], profile: config.Profile, tokenizer: Tokenizer
) -> None:
    """Write what `load_trained` reads: profile, tokenizer, resampler and adapter; the base stays where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lora, tensors = model.adapter(start)
    lora.save_pretrained(folder / "adapter")
    save_file(tensors, folder / ADAPTER_FILE)
    resampler = {name: value.contiguous().cpu() for name, value in model.vision_tokenizer.state_dict().items()}
    save_file(resampler, folder / "resampler.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    config.save(profile, folder / "profile.yaml")


def require_complete(folder: Path | str) -> Path:
    """The folder, if it holds a trained checkpoint. Raises CheckpointError with what is missing."""
    folder = Path(folder)
    needed = [
        "profile.yaml",
        "resampler.safetensors",
        "adapter/adapter_config.json",
        ADAPTER_FILE,
    ]
    missing = [name for name in needed if not (folder / name).is_file()]
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
    profile = config.load(folder / "profile.yaml")
    resampler, pairs = (_tensors(folder / name) for name in ("resampler.safetensors", ADAPTER_FILE))
    targets, scaling = _adapter_settings(folder / "adapter" / "adapter_config.json")
    model = load_base(profile)
    dtype = getattr(torch, profile.model.dtype)
    try:
        model.vision_tokenizer.load_state_dict({name: value.to(dtype) for name, value in resampler.items()})
        with torch.no_grad():
            for target in targets:
                a, b = (pairs.pop(f"base_model.model.{target}.lora_{half}.weight").float() for half in "AB")
                weight = model.get_parameter(f"{target}.weight")
                weight += (b @ a * scaling).to(weight.dtype)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: does not fit the profile's model: {error}") from None
    if pairs:
        raise CheckpointError(f"{folder / ADAPTER_FILE}: {min(pairs)} belongs to none of adapter_config.json's targets")
    return model.eval(), profile


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
    about, reasons = parse_object(file.read_bytes())
    if not reasons:
        rank, alpha, targets = (about.get(key) for key in ("r", "lora_alpha", "target_modules"))
        if not is_integer(rank) or rank < 1 or not is_number(alpha):
            reasons = ["r and lora_alpha must be numbers, r at least 1"]
        elif not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            reasons = ["target_modules must be a list of names"]
        reasons += [f"{key} is set, and only a plain LoRA adapter can be read" for key in NOT_PLAIN if about.get(key)]
    if reasons:
        raise CheckpointError(f"{file}: {'; '.join(reasons)}; fetch it again, or train anew")
    return targets, alpha / rank


CARD = "README.md"
# Nothing else of a repository is fetched: no code, no pickles.
HUB_FILES = ["profile.yaml", "tokenizer.json", "metrics.json", CARD, "resampler.safetensors", "adapter/adapter_*"]


def model_card(profile: config.Profile, metrics: dict) -> str:
    """Model card of a checkpoint with its val metrics (as `evaluate` gives them), in the hub's format."""
    training, base = profile.training, profile.model.weights
    published = base.count("/") == 1 and config.local_weights(base) is None
    samples = training.micro_batch * training.accumulation * training.processes
    measured = " | ".join(f"{metrics['brief'][name]:.2f}" for name in METRICS)
    synthetic = (
        "the synthetic demo set of framseg" if profile.data.source == "demo" else "QVHighlights or one's own rows"
    )
    base_line = f"base_model: {base}\n" if published else ""
    return f"""---
library_name: peft
{base_line}tags: [video-moment-retrieval, highlight-detection, framseg]
---
# framseg checkpoint, profile `{profile.name}`

Finds moments (windows in seconds) and highlights (a score for every 2-second clip) of a query in a video: the model is
shown {profile.frames.count} frames and answers with a digit for each. Made by framseg, a reproduction of *Moment and
Highlight Detection via MLLM Frame Segmentation* (Jiwanta and Purwarianti).

- Base model: `{base}`; this folder holds the trained resampler and a plain LoRA adapter (PiSSA of rank
  {profile.adapter.rank}, exported), both as safetensors, with the tokenizer and the whole profile.
- Trained for {training.epochs} epochs with {samples} samples a step, peak learning rate {training.learning_rate:g}, on
  {synthetic} (`{profile.data.folder.name}`).

Validation, every answer decoded (percent):

| {" | ".join(METRICS.values())} |
|{" --- |" * len(METRICS)}
| {measured} |

```python
import framseg

answer = framseg.predict("video.mp4", "a girl cooks while talking on facetime", checkpoint="this folder or repository")
```

QVHighlights' annotations are licensed CC BY-NC-SA 4.0; mind this and the base model's licence before you use or pass on
weights trained on them.
"""


def local_folder(checkpoint: Path | str) -> Path:
    """The folder of a checkpoint: itself, or what the hub's repository of that name holds, fetched once.

    Raises CheckpointError if it is neither.
    """
    folder = Path(os.path.expanduser(checkpoint))
    if os.path.exists(folder) or str(checkpoint).count("/") != 1 or str(checkpoint).startswith((".", "/", "~")):
        return require_complete(folder).resolve()
    try:
        return require_complete(snapshot_download(str(checkpoint), allow_patterns=HUB_FILES))
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library's errors share no base of the hub's
        raise CheckpointError(
            f"{checkpoint}: neither a checkpoint's folder nor to be had from the Hugging Face hub "
            f"({' '.join(str(error).split())})"
        ) from None
