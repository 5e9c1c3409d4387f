"""Profiles: every number of the paper's Tables II and III, once, typed and checked before anything runs.

A profile is a YAML file. `extends` names another one that it changes, so `demo.yaml` is the list of what
differs from `paper.yaml` and nothing else. `Run` holds every path a run writes to.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from framseg import FramsegError

PROFILES = Path(__file__).parent / "profiles"
REPOSITORY = Path(__file__).parent.parent  # holds the package `framseg`; site-packages where that is installed
# Where runs and data go: the repository, or the current folder where framseg is installed without one.
WORKSPACE = REPOSITORY if (REPOSITORY / "pyproject.toml").is_file() else Path.cwd()

Count = Annotated[int, Field(ge=1, le=2**20)]  # more is a slip, and would fill the memory before anything is compared
Layers = Annotated[int, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weights = tuple[NotNegative, NotNegative, NotNegative, NotNegative]


class ProfileError(FramsegError, ValueError):
    """A profile that cannot be used; the message names the file, the key and what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class Data(Section):
    source: Literal["folder", "demo"]  # `demo`: framseg.demo makes the folder's content
    folder: Path  # relative paths are taken from config.WORKSPACE
    videos: str  # folder of {vid}.mp4 inside `folder`
    train: str
    val: str
    test: str
    test_labels: str
    duration_tolerance: Positive  # seconds a video's decodable length may differ from the annotated duration


class Frames(Section):
    count: Count  # f
    neighbours: Annotated[int, Field(ge=0)]  # variations each side of the middle frame
    neighbour_distance: Positive  # seconds between two variations (3 frames at 30 fps)
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]  # of the frame store
    time_limit: Positive  # seconds one video may take to decode; of one's own video, without a new frame


class Vision(Section):
    """SigLIP."""

    hidden_size: Count
    intermediate_size: Count
    layers: Layers
    heads: Count
    image_size: Count
    patch_size: Count

    @model_validator(mode="after")
    def _fits(self):
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be divided among {self.heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch (patch_size {self.patch_size})")
        return self


class Resampler(Section):
    """Perceiver resampler."""

    latents: Count
    layers: Layers
    heads: Count
    head_dim: Count


class Language(Section):
    """Phi-3. Ids from `used_vocab` on live in `extra_rows` rows of their own, as BLIP-3 stores them."""

    hidden_size: Count
    intermediate_size: Count
    layers: Layers
    heads: Count
    context: Count
    rope_theta: Positive
    sliding_window: Count | None
    vocab_size: Count
    used_vocab: Count
    extra_rows: Count
    tie_embeddings: bool  # the head reads the embedding's rows; never in a published checkpoint
    initializer_range: Positive

    @model_validator(mode="after")
    def _fits(self):
        if self.hidden_size % (2 * self.heads):  # rotary positions turn pairs of a head's dimensions
            raise ValueError(f"hidden_size {self.hidden_size} cannot be divided among {self.heads} heads of even size")
        if self.used_vocab > self.vocab_size:
            raise ValueError(f"used_vocab {self.used_vocab} is more than the vocab_size of {self.vocab_size}")
        return self


class Tokens(Section):
    """Ids the method relies on."""

    zero: int
    one: int
    assistant: int
    end: int
    pad: int
    image: int


class Model(Section):
    weights: str  # folder of safetensors, or a Hugging Face repository's name
    tokenizer: str  # tokenizer.json, the folder that holds it, or a repository's name
    dtype: Literal["bfloat16", "float32"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    vision: Vision
    resampler: Resampler
    language: Language
    tokens: Tokens

    @model_validator(mode="after")
    def _fits(self):
        tokens, ids = self.tokens.model_dump(), self.language.used_vocab + self.language.extra_rows
        for name, token in tokens.items():
            if not 0 <= token < ids:
                raise ValueError(f"tokens.{name}: {token} is not one of the model's ids 0..{ids - 1}")
            if same := [other for other in tokens if other != name and tokens[other] == token]:
                raise ValueError(f"tokens.{name}: {token} is the id of tokens.{same[0]} too")
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention: flash_attention_2 does not work in float32; set dtype to bfloat16")
        return self


class Adapter(Section):
    rank: Count
    alpha: Positive
    dropout: BelowOne
    init: Annotated[str, Field(pattern=r"^(pissa(_niter_\d{1,2})?|gaussian|olora|orthogonal)$")]  # peft's way to begin
    rslora: bool
    targets: Annotated[tuple[Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ...], Field(min_length=1)]


class Losses(Section):
    """Weights are in the order LM, BCE, Tversky, generalized Dice."""

    pos_weight: Positive
    tversky_alpha: Positive
    tversky_beta: Positive
    eps: Positive
    schedule: Literal["linear", "table"]
    warmup_epochs: Count  # linear: `start` at epoch 1, `end` from epoch warmup_epochs + 1 on
    start: Weights
    end: Weights
    table: Annotated[
        tuple[Weights, ...], Field(min_length=1)
    ]  # table: one entry an epoch, the last one for all that follow

    @model_validator(mode="after")
    def _weights_count(self):
        for name, weights in [("start", self.start), ("end", self.end), *(("table", row) for row in self.table)]:
            if sum(weights) == 0:
                raise ValueError(f"{name}: the four loss weights sum to 0, nothing would be trained")
        return self


class Training(Section):
    processes: Count  # GPUs (or CPU processes) the DeepSpeed launcher starts
    threads: Count | None  # CPU threads a process; None leaves torch's choice
    epochs: Count
    micro_batch: Count  # samples a process and forward pass
    accumulation: Count
    remainder: Literal["drop", "carry"]  # samples that fill no micro-batch: left out of the epoch, or in the next one
    learning_rate: Positive
    weight_decay: NotNegative
    betas: tuple[BelowOne, BelowOne]
    eps: Positive
    gradient_clip: Positive
    warmup_steps: Annotated[int, Field(ge=0)]
    planned_steps: Count  # the cosine's length; the run may stop before it
    floor: Share  # lowest learning rate as a share of the peak
    zero_stage: Literal[1, 2]
    offload_optimizer: bool
    gradient_checkpointing: bool
    compile: bool
    cache_features: bool  # keep the frozen encoder's output of the training videos on disk: 126 MB a video in `paper`
    may_lack: Annotated[int, Field(ge=0)]  # training videos that may be without frames; their rows are left out
    may_skip: Annotated[int, Field(ge=0)]  # steps whose loss or gradient is not finite; they are left out
    may_change: tuple[str, ...]  # keys that a resumed training may find changed, e.g. training.epochs
    save_steps: Count  # optimizer steps between two resumable states; there is one at each epoch's end, too
    workers: Annotated[int, Field(ge=0)]  # processes that read frames, for each training process
    validation_queries: Count | None  # decode this many val queries after each epoch; None: all


class Inference(Section):
    beams: Count
    batch: Count
    windows: Literal["mask", "thresholds", "ranked"]  # policy of framseg.moments.windows
    saliency: Literal["overlap", "interpolation", "gaussian"]  # method of framseg.moments.saliency


class Profile(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$")]  # of the run's folder too, so it must not lead elsewhere
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    data: Data
    frames: Frames
    model: Model
    adapter: Adapter
    losses: Losses
    training: Training
    inference: Inference

    @model_validator(mode="after")
    def _fits(self):
        positions = self.frames.count * (self.model.resampler.latents + 1)  # images and their answer digits
        if positions >= self.model.language.context:
            raise ValueError(
                f"frames.count: {self.frames.count} frames of {self.model.resampler.latents} vectors need more "
                f"than the model's context of {self.model.language.context} positions"
            )
        if self.training.warmup_steps >= self.training.planned_steps:
            raise ValueError("training.warmup_steps must be smaller than training.planned_steps")
        language = self.model.language
        if self.adapter.rank > min(language.hidden_size, language.intermediate_size):
            raise ValueError(f"adapter.rank: {self.adapter.rank} is more than the language model's layers have")
        return self


def names() -> list[str]:
    """Names of the profiles that ship with framseg."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load(name: str | Path, overrides: dict[str, Any] | None = None) -> Profile:
    """Read a profile by its name or by the path of a YAML file.

    `overrides` maps dotted keys to values, e.g. ``{"training.epochs": 2}``; a string value is read as YAML.
    Raises ProfileError for an unknown name or key (with the nearest right one) and for a value of the wrong
    type or out of range.
    """
    path = _path(name)
    merged = _merged(path, ())
    for key, value in (overrides or {}).items():
        merged = _merge(merged, _nest(key, _yaml(value, key) if isinstance(value, str) else value))
    try:
        return Profile.model_validate(merged)
    except ValidationError as error:
        raise ProfileError("\n".join(_explain(path, item) for item in error.errors())) from None


def save(profile: Profile, path: Path) -> None:
    """Write the resolved profile, every key included, as YAML that `load` reads back."""
    Path(path).write_text(yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _path(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):  # unlike the path's own method, it takes a name of any length
            raise ProfileError(f"{path}: no such profile file")
        return path
    if str(name) not in names():
        near = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ProfileError(
            f"no profile named {str(name)!r}: {hint}there are {', '.join(names())}, or give a .yaml file"
        )
    return PROFILES / f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """A key that is there twice is an error: its first value would be lost without a word."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: Path | str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # Of a tag's value or a date that is none, PyYAML passes on what Python said.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ProfileError(f"{where}: not plain YAML: {' '.join(str(error).split())}") from None


def _merged(path: Path, seen: tuple[Path, ...]) -> dict:
    if path in seen:
        raise ProfileError(f"{path}: 'extends' goes round in a circle")
    try:
        content = _yaml(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: a profile is a mapping of sections, this is {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise ProfileError(f"{path}: extends: write the name of one profile, not {type(parent).__name__}")
    beside = path.parent / f"{parent}.yaml"
    return _merge(_merged(beside if os.path.isfile(beside) else _path(parent), (*seen, path)), content)


def _merge(base: dict, change: dict) -> dict:
    out = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _explain(path: Path, item: dict) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        section: Any = Profile
        for part in item["loc"][:-1]:
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(str(item["loc"][-1]), section.model_fields, n=1, cutoff=0)
        message = f"no such key, the nearest is {near[0]!r}"
    return f"{path.name}: {where}: {message}" if where else f"{path.name}: {message}"


def local_path(name: str | Path) -> Path | None:
    """The file or folder that a profile's `weights` or `tokenizer` names, None if there is none of that name.

    A relative path is looked up in the current folder, then in WORKSPACE, then in REPOSITORY; ~ is the home folder.
    """
    paths = (folder / os.path.expanduser(name) for folder in (Path(), WORKSPACE, REPOSITORY))
    return next((path for path in paths if os.path.exists(path)), None)  # unlike path.exists(), it takes any text


def local_weights(name: str) -> Path | None:
    """The folder that `model.weights` names (see `local_path`), None if it is not a folder of this machine."""
    path = local_path(name)
    return path if path and path.is_dir() else None


def data_folder(profile: Profile) -> Path:
    """The profile's data folder as an absolute path; a relative one is taken from WORKSPACE."""
    return WORKSPACE / profile.data.folder
