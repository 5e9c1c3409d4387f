"""Weights that others published: fetched from the Hugging Face hub, read from their files; the paper's own model."""

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import DryRunError
from huggingface_hub.file_download import DryRunFileInfo, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from framseg import FramsegError, config, download
from framseg.backbones import CheckpointError
from framseg.backbones.blip3 import Blip3
from framseg.download import words
from framseg.jsonl import is_integer, is_number, parse_object

NAME = "paper"  # as a checkpoint's name: the paper's model
PROFILE = "paper"  # the profile whose model and frames are those of all published weights
MERGED = "jwnt4/xgenmm-mr-v1-merged"
PAIR = {"jwnt4/xgenmm-mr-v1-vision_tokenizer", "jwnt4/xgenmm-mr-v1-lang_model-pissa-r16a16-rslora"}
ORIGIN = "the model is the paper's model, trained on QVHighlights, real videos"
RESAMPLER, START = "vision_tokenizer.safetensors", "pissa_init"  # of the authors' pair
ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # as peft names them
WEIGHTS = ["*.safetensors", "*.json"]
NOT_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")  # settings that no adapter here may have
CLOSED = "the repository is gated, private or not there: ask for access on its page, and log in with `hf auth login`"
ANSWERS = {401: CLOSED, 403: CLOSED, 404: "it has no such repository or file"}  # of the hub

Tensors = dict[str, Tensor]  # by name


@contextmanager
def hub_errors(before: str, after: str = "", kind: type[FramsegError] = CheckpointError) -> Iterator[None]:
    """Whatever the hub's library raises becomes an error of this kind: `before`, the reason in brackets, `after`."""
    try:
        yield
    except Exception as error:  # the HTTP library's errors share no base class with the hub's
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"it answers {status}: {ANSWERS[status]}" if status in ANSWERS else " ".join(str(error).split())
        raise kind(f"{before} ({reason}){after}") from None


def fetch(name: str, patterns: Sequence[str] = WEIGHTS, kind: str = "model", big: str = ".safetensors") -> Path:
    """The folder in the hub's cache with a repository's files, each fetched once; its size is told before.

    kind: "model" or "dataset". big: how the names of large files end. Of those, what has arrived when the connection,
    the disk or the user ends the call is kept: the next call goes on with it. Raises CheckpointError for a repository
    without large files and for a disk with too little room, and whatever the hub's library raises.
    """
    files, cache = _listed(name, patterns, kind), Path(constants.HF_HUB_CACHE)
    if files is not None and not any(file.filename.endswith(big) for file in files):
        what = "checkpoint" if kind == "model" else "set of frames"
        raise CheckpointError(f"{name} is no {what}: the repository has no {big} file")
    repository = repo_folder_name(repo_id=name, repo_type=kind)
    blobs, absent = cache / repository / "blobs", [file for file in files or () if file.will_download]
    size = sum(file.file_size or 0 for file in absent) - sum(part.stat().st_size for part in blobs.glob("*.part"))
    if absent:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if size > free:
            raise CheckpointError(f"{words(size)} to fetch, {cache} has {words(free)} free: make room or set HF_HOME")
        card = getattr(HfApi().repo_info(name, repo_type=kind), "card_data", None)
        licence = f"; licence, as its card says: {card.license}" if card and card.license else ""
        print(f"{name}: fetching {words(size)} into {cache}, {words(free)} are free{licence}", file=sys.stderr)
    for file in absent:
        if not file.filename.endswith(big):
            continue  # small: the hub's library, which begins a file anew after each interruption, may fetch it
        address = hf_hub_url(name, file.filename, repo_type=kind, revision=file.commit_hash)
        about = get_hf_file_metadata(address)
        blob, lock = blobs / str(about.etag), cache / ".locks" / repository / f"{about.etag}.lock"
        own = urlsplit(about.location).netloc == urlsplit(address).netloc  # another server may not see the token
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # several processes may want the same file
            if not blob.exists():
                checksum = blob.name if len(blob.name) == 64 else None
                headers = build_hf_headers() if own else {}
                download.fetch(about.location, blob, checksum, headers, "", file.filename)
    return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))


def had(name: str, patterns: Sequence[str] = WEIGHTS, after: str = "") -> Path:
    """What `fetch` gives, for a name that is no folder here. Raises CheckpointError; `after` ends its message."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):  # cannot be OWNER/NAME
        raise CheckpointError(f"{name}: there is no such folder{after}")
    with hub_errors(f"{name}: neither a folder here nor to be had from the Hugging Face hub", after):
        return fetch(name, patterns)


def _listed(name: str, patterns: Sequence[str], kind: str = "model") -> list[DryRunFileInfo] | None:
    """The files of a repository, None if the hub does not tell."""
    try:
        files = snapshot_download(name, repo_type=kind, allow_patterns=list(patterns), dry_run=True)
        return sorted(files, key=lambda file: file.filename)
    except DryRunError:
        return None


def offer(yes: bool) -> str:
    """The name of the paper's model, after asking whether it may be fetched if it is not there; `yes` is an answer.

    Raises CheckpointError if the answer is no, or if there is no terminal to ask at.
    """
    with hub_errors(f"no --checkpoint is given, and of the paper's model, {MERGED}, no size is to be had"):
        size = sum(file.file_size or 0 for file in _listed(MERGED, WEIGHTS) or () if file.will_download)
    what = f"no --checkpoint is given: the paper's model, {MERGED} ({words(size)}), can be fetched"
    if size and not yes:
        if not sys.stdin.isatty():
            raise CheckpointError(f"{what} with --yes; or give --checkpoint")
        print(f"{what}. Fetch it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise CheckpointError("nothing was fetched; give --checkpoint")
    return NAME


def names(checkpoint: Path | str | Sequence[Path | str]) -> list[Path | str]:
    """The folders or repositories that a `checkpoint=` names: one, or the two of the authors' pair."""
    given = [checkpoint] if isinstance(checkpoint, Path | str) else list(checkpoint)
    if len(given) not in (1, 2):
        raise CheckpointError(f"a checkpoint is one name or two (the authors' pair), not {len(given)}")
    return [MERGED if name == NAME else name for name in given]


def origin(checkpoint: Path | str | Sequence[Path | str]) -> str:
    """What is known of published weights, in a sentence."""
    given = set(map(str, names(checkpoint)))
    unknown = f"the model is {', '.join(sorted(given))}: what it was trained on is not known"
    return ORIGIN if given in ({MERGED}, PAIR) else unknown


def published(folder: Path) -> bool:
    """Whether a folder holds weights that framseg's training did not write."""
    ours = any((folder / name).exists() for name in (config.FILE, "resampler.safetensors"))
    return not ours and any(any(folder.glob(pattern)) for pattern in ("*.safetensors", f"*/{START}"))


def pair(folders: Sequence[Path]) -> tuple[Path, Tensors, Tensors, list[str], float] | None:
    """The authors' pair in these folders or just below, as `merged` takes it; None if it is not there.

    Their adapter is as peft trained it: peft took s B0 A0 out of each weight, so the change is s (B A - B0 A0), one
    pair of twice the rank. Raises CheckpointError for half a pair, a damaged one, or one of another kind.
    """
    places = [place for folder in folders for place in (folder, *sorted(folder.iterdir())) if place.is_dir()]
    file, init = (next((p / name for p in places if (p / name).exists()), None) for name in (RESAMPLER, START))
    if not file and not init and len(folders) == 1:
        return None
    if not file or not init:
        lacking = START if file else RESAMPLER
        raise CheckpointError(f"{', '.join(map(str, folders))}: of the authors' pair, {lacking} is missing")
    resampler = {name.removeprefix("vlm.").removeprefix("vision_tokenizer."): x for name, x in tensors(file).items()}
    _, scaling = adapter_settings(init.parent / SETTINGS, plain=False)
    trained, start = tensors(init.parent / ADAPTER), tensors(init / ADAPTER)
    if {name: x.shape for name, x in trained.items()} != {name: x.shape for name, x in start.items()}:
        raise CheckpointError(f"{init.parent}: {START} holds other pairs than the adapter; fetch both again")
    pairs = {}
    for key, value in trained.items():
        layer = key.removeprefix("base_model.model.").removeprefix("vlm.").removeprefix("lang_model.")
        dim, sign = (0, 1) if "lora_A" in key else (1, -1)
        pairs[f"base_model.model.lang_model.{layer}"] = torch.cat([value.float(), sign * start[key].float()], dim)
    ending = ".lora_A.weight"
    targets = [name[len("base_model.model.") : -len(ending)] for name in pairs if name.endswith(ending)]
    return init.parent, resampler, pairs, targets, scaling


def merged(model: Blip3, folder: Path, resampler: Tensors, pairs: Tensors, targets: list[str], scaling: float) -> Blip3:
    """The base model with the trained resampler, and the pairs added to its layers `targets`. `folder` is for messages.

    Raises CheckpointError if they do not fit the model.
    """
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
        raise CheckpointError(f"{folder}: {min(pairs)} belongs to none of the adapter's layers")
    return model.eval()


def tensors(file: Path) -> Tensors:
    """The tensors of a safetensors file. Raises CheckpointError for a damaged one or values that are no numbers."""
    try:
        read = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None
    if odd := [name for name, value in read.items() if not value.float().isfinite().all()]:
        raise CheckpointError(f"{file}: {odd[0]} holds values that are no numbers; fetch it again, or train anew")
    return read


def adapter_settings(file: Path, plain: bool = True) -> tuple[list[str], float]:
    """Layers of a LoRA adapter and what their pairs are multiplied by; nothing else is taken from the file.

    plain: the layers must be listed one by one and the factor be alpha / r. Raises CheckpointError.
    """
    try:
        settings, reasons = parse_object(file.read_bytes())
    except OSError as error:
        settings, reasons = None, [str(error.strerror)]
    if settings is not None:
        rank, alpha, targets = (settings.get(name) for name in ("r", "lora_alpha", "target_modules"))
        unread = ("use_rslora", *NOT_PLAIN) if plain else NOT_PLAIN
        reasons = [f"{key} is set, and only a plain LoRA adapter can be read" for key in unread if settings.get(key)]
        if not is_integer(rank) or rank < 1 or not is_number(alpha):
            reasons.append("r and lora_alpha must be numbers, r at least 1")
        elif plain and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
            reasons.append("target_modules must be a list of names")
        elif not reasons:
            return targets or [], alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    raise CheckpointError(f"{file}: {'; '.join(reasons)}; fetch it again, or train anew")
