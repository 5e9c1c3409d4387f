"""What a profile needs and this machine lacks, found before anything starts and without loading the model's code."""

import importlib.util

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

from framseg import config, dataset, prompt

WEIGHTS = "model.safetensors.index.json"  # of a published model
HUB_PATIENCE = 3.0  # seconds for the hub's answer


def missing(profile: config.Profile, trains: bool = True) -> list[str]:
    """A sentence on each thing that the profile needs and this machine lacks, and what to do; GPUs only if it `trains`.

    At most a file's header is asked of the Hugging Face hub.
    """
    out = []
    if profile.data.source == "folder":
        command = f"python -m framseg.download {config.data_folder(profile)}"
        for split in ("train", "val", "test", "test_labels"):
            if not (file := dataset.annotation_file(profile, split)).is_file():
                out.append(
                    f"annotations: {file} is not there; fetch it with {command}, or set data.folder to where it is"
                )
        if not (videos := dataset.videos(profile)).is_dir():
            out.append(f"videos: {videos} is not there; fetch {{vid}}.mp4 of every row with {command}")
    weights, tokenizer = profile.model.weights, profile.model.tokenizer
    unreachable = config.local_weights(weights) is None and not _on_hub(weights, WEIGHTS)
    if unreachable:
        out.append(
            f"weights: {weights!r} is neither a folder nor in the Hugging Face cache, and the hub, from where its "
            f"safetensors would be fetched, cannot be reached; set model.weights to a folder with them"
        )
    if unreachable and tokenizer == weights and not _cached(tokenizer, prompt.FILE):  # no second wait for an answer
        out.append(f"tokenizer: would be fetched from there, too; set model.tokenizer to the path of its {prompt.FILE}")
    else:
        try:
            prompt.check(prompt.load(tokenizer), profile.model, profile.frames.count)
        except prompt.PromptError as error:
            out.append(f"tokenizer: {error}")
    out += gpus(profile) if trains else []
    if profile.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        out.append("flash attention: the package flash-attn is not installed; install it or set model.attention=sdpa")
    return out


def gpus(profile: config.Profile) -> list[str]:
    """A sentence if this machine has fewer GPUs than the profile trains on, else nothing."""
    section, count = profile.training, torch.cuda.device_count()
    if profile.model.dtype != "bfloat16" or count >= section.processes:
        return []
    return [
        f"GPU: the profile trains on {section.processes}, this machine has {count}; set training.processes (and "
        f"accumulation, to keep {section.micro_batch} x accumulation x processes samples per step)"
    ]


def _cached(name: str, file: str) -> bool:
    return isinstance(try_to_load_from_cache(name, file), str)


def _on_hub(name: str, file: str) -> bool:
    if name.count("/") != 1:
        return False
    try:
        return _cached(name, file) or bool(get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_PATIENCE))
    except Exception:  # the HTTP library's errors share no base class with the hub's
        return False
