"""Profiles: every number of the paper's Tables II and III, typed and checked before anything runs.

A profile is a YAML file. With `extends` it names another profile and lists only what differs from it, as
`profiles/demo.yaml` does from `profiles/paper.yaml`. Each key is explained at its field below.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from framseg import FramsegError

PROFILES = Path(__file__).parent / "profiles"
FILE = "profile.yaml"  # of a run and of a checkpoint
REPOSITORY = Path(__file__).parent.parent  # holds the package `framseg`; site-packages where that is installed
# Where runs and data go: the repository, or the current folder where framseg is installed without one.
WORKSPACE = REPOSITORY if (REPOSITORY / "pyproject.toml").is_file() else Path.cwd()

Count = Annotated[int, Field(ge=1, le=2**20)]  # a larger number is a slip and would fill the memory
Layers = Annotated[int, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weights = tuple[NotNegative, NotNegative, NotNegative, NotNegative]


class ProfileError(FramsegError, ValueError):
    """A profile that cannot be used; the message names the file, the key and what to write instead."""


class Section(BaseModel):
    """A part of a profile: immutable, without unknown keys, every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class Data(Section):
    """Where the rows and videos lie, and how far they may disagree. QVHighlights: see `framseg download`."""

    # `folder`: videos; `demo`: framseg.demo makes the folder's content; `frames`: pictures that others published
    source: Literal["folder", "demo", "frames"]
    folder: Path  # a relative path is taken from the repository, or the current folder where there is none
    videos: str  # folder of {vid}.mp4 inside `folder`
    train: str  # names of the annotation files inside `folder`
    val: str
    test: str  # without labels
    test_labels: str
    duration_tolerance: Positive  # seconds a video's decodable length may differ from the annotated duration
    frames: dict[str, str] = {}  # for `frames`: the data set on the Hugging Face hub that has each split's pictures
    splits: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")  # whose frames are taken


class Frames(Section):
    """Which frames the model sees, and how they are stored (`framseg.frames`)."""

    count: Count  # f, frames per video
    neighbours: Annotated[int, Field(ge=0)]  # variations on either side of each frame, drawn from in training
    neighbour_distance: Positive  # seconds between two variations (3 frames at 30 fps)
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]  # of the frame store
    whole_seconds: bool = False  # labels at the frames' times cut to whole seconds, as the authors' own are
    time_limit: Positive  # seconds that decoding a video may take; for your own video, seconds without a new frame


class Vision(Section):
    """The vision encoder, SigLIP: sizes as in its published configuration. It stays frozen."""

    hidden_size: Count
    intermediate_size: Count
    layers: Layers
    heads: Count
    image_size: Count  # pixels of a frame's side
    patch_size: Count  # pixels of a patch's side

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be divided among {self.heads} heads")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch (patch_size {self.patch_size})")
        return self


class Resampler(Section):
    """The vision tokenizer, a Perceiver resampler, which is trained in full."""

    latents: Count  # vectors per frame in the prompt
    layers: Layers
    heads: Count
    head_dim: Count


class Language(Section):
    """The language model, Phi-3. Ids from `used_vocab` on have `extra_rows` rows of their own, as in BLIP-3's files."""

    hidden_size: Count
    intermediate_size: Count
    layers: Layers
    heads: Count
    context: Count  # positions of prompt and answer together
    rope_theta: Positive  # base of the rotary position angles
    sliding_window: Count | None  # earlier positions that a position can attend to; null: all
    vocab_size: Count  # rows of the embedding in the file
    used_vocab: Count
    extra_rows: Count
    tie_embeddings: bool  # the head uses the embedding's rows; false for published weights
    initializer_range: Positive  # standard deviation of weights drawn at random

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % (2 * self.heads):  # rotary positions turn pairs of a head's dimensions
            raise ValueError(f"hidden_size {self.hidden_size} cannot be divided among {self.heads} heads of even size")
        if self.used_vocab > self.vocab_size:
            raise ValueError(f"used_vocab {self.used_vocab} is more than the vocab_size of {self.vocab_size}")
        return self


class Tokens(Section):
    """Ids of the tokens that the method relies on; `framseg.prompt.check` compares them with the tokenizer's."""

    zero: int  # '0', a background frame
    one: int  # '1', a foreground frame
    assistant: int  # <|assistant|>, after which the answer begins
    end: int  # <|end|>
    pad: int
    image: int  # <image>, the place of a frame's vectors


class Model(Section):
    """BLIP-3: its files and the sizes of its parts."""

    weights: str  # folder of safetensors (looked up by `local_path`), or a Hugging Face repository's name
    # tokenizer.json or the folder that holds it (`local_path`), or a repository's name; of several the first that fits
    tokenizer: str | Annotated[tuple[str, ...], Field(min_length=1)]
    dtype: Literal["bfloat16", "float32"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    vision: Vision
    resampler: Resampler
    language: Language
    tokens: Tokens

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Where a tokenizer is looked for, in this order."""
        return (self.tokenizer,) if isinstance(self.tokenizer, str) else self.tokenizer

    @model_validator(mode="after")
    def _fits(self) -> Self:
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
    """The low-rank adapter of the language model's linear layers (paper: PiSSA with rsLoRA scaling)."""

    rank: Count
    alpha: Positive
    dropout: BelowOne
    init: Annotated[str, Field(pattern=r"^(pissa(_niter_\d{1,2})?|gaussian|olora|orthogonal)$")]  # as peft names it
    rslora: bool  # scale by alpha / sqrt(rank) instead of alpha / rank
    targets: Annotated[tuple[Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ...], Field(min_length=1)]


class Losses(Section):
    """The four losses (`framseg.losses`); weights are in the order LM, BCE, Tversky, generalized Dice."""

    pos_weight: Positive  # BCE: background frames per foreground frame
    tversky_alpha: Positive  # factor of false positives
    tversky_beta: Positive  # factor of false negatives
    eps: Positive  # Tversky and generalized Dice: added so that no division is by 0
    schedule: Literal["linear", "table"]
    warmup_epochs: Count  # linear: `start` in epoch 1, `end` from epoch warmup_epochs + 1 on
    start: Weights
    end: Weights
    table: Annotated[tuple[Weights, ...], Field(min_length=1)]  # of each epoch; the last for all that follow

    @model_validator(mode="after")
    def _no_weights_of_zero(self) -> Self:
        for name, weights in [("start", self.start), ("end", self.end), *(("table", row) for row in self.table)]:
            if sum(weights) == 0:
                raise ValueError(f"{name}: the four loss weights sum to 0, nothing would be trained")
        return self


class Training(Section):
    """Optimizer (AdamW), learning rate and batches of the paper, and what a run may use and tolerate."""

    # `cpu`: no GPU is used, and bfloat16 needs none. Profiles that were saved before this key existed mean `auto`.
    device: Literal["auto", "cpu"] = "auto"  # of training and of decoding a split; `auto`: the GPU where there is one
    processes: Count  # GPUs (or CPU processes) that the DeepSpeed launcher starts
    threads: Count | None  # CPU threads per process; null leaves torch's choice
    epochs: Annotated[int, Field(ge=0, le=2**20)]  # 0: nothing is trained, `model.weights` are taken as they are
    micro_batch: Count  # samples per process and forward pass
    accumulation: Count  # micro-batches per process and optimizer step
    remainder: Literal["drop", "carry"]  # samples that fill no micro-batch: left out, or taken into the next epoch
    learning_rate: Positive  # the peak
    weight_decay: NotNegative
    betas: tuple[BelowOne, BelowOne]
    eps: Positive
    gradient_clip: Positive  # largest norm of the gradient
    warmup_steps: Annotated[int, Field(ge=0)]  # optimizer steps of linear warm-up
    planned_steps: Count  # optimizer steps until the cosine reaches `floor`; the run may stop before
    floor: Annotated[float, Field(ge=0, le=1)]  # lowest learning rate as a share of the peak
    zero_stage: Literal[1, 2]
    offload_optimizer: bool  # the optimizer works in the CPU's memory
    gradient_checkpointing: bool  # recompute activations in the backward pass to save memory
    compile: bool  # torch.compile
    cache_features: bool  # keep the frozen encoder's output of the training videos on disk: 126 MB per video in `paper`
    may_lack: Annotated[int, Field(ge=0)]  # training videos that may be without frames; their rows are left out
    may_skip: Annotated[int, Field(ge=0)]  # steps whose loss or gradient is not finite; they are left out
    may_change: tuple[str, ...]  # keys that a resumed training may find changed, e.g. training.epochs
    save_steps: Count  # optimizer steps between two resumable states; each epoch's end has one too
    workers: Annotated[int, Field(ge=0)]  # processes that read frames, for each training process
    validation_queries: Count | None  # decode this many val queries after each epoch; null: all


class Inference(Section):
    """Beam search, and how its answers become windows and clip scores (`framseg.moments`)."""

    beams: Count
    batch: Count  # queries decoded at once
    windows: Literal["mask", "thresholds", "ranked"]  # policy of framseg.moments.windows
    rounding: Literal["floor", "nearest"] = "floor"  # of windows' ends to seconds, see framseg.moments.windows
    saliency: Literal["overlap", "interpolation", "gaussian"]  # method of framseg.moments.saliency


class Profile(Section):
    """All settings of a run. `paper` has the values of Tables II and III, completed from the authors' run logs."""

    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$")]  # names the run's folder too, so it has no path separators
    seed: Annotated[int, Field(ge=0, lt=2**31)]  # of data order, frame variations, adapter and dropout
    data: Data
    frames: Frames
    model: Model
    adapter: Adapter
    losses: Losses
    training: Training
    inference: Inference

    @model_validator(mode="after")
    def _fits(self) -> Self:
        frames, data, latents, language = self.frames, self.data, self.model.resampler.latents, self.model.language
        if frames.count * (latents + 1) >= language.context:  # each frame's vectors and its answer digit
            needed = f"{frames.count} frames of {latents} vectors need more than the model's context"
            raise ValueError(f"frames.count: {needed} of {language.context} positions")
        if data.source == "frames" and (frames.count, frames.neighbours) not in ((25, 0), (25, 1)):
            raise ValueError("frames: pictures are published of 25 frames (count) with 1 neighbour or none")
        if data.source == "frames" and not {"train", "val", "test"} <= data.frames.keys():
            raise ValueError("data.frames: name the data sets on the hub that have the splits train, val and test")
        if self.training.epochs and "train" not in data.splits:
            raise ValueError("data.splits: without train there is nothing to train on; set training.epochs to 0")
        if self.training.warmup_steps >= self.training.planned_steps:
            raise ValueError("training.warmup_steps must be smaller than training.planned_steps")
        if self.model.attention == "flash_attention_2" and self.training.device == "cpu":
            raise ValueError("model.attention: flash_attention_2 needs a GPU; set sdpa, or training.device to auto")
        if self.adapter.rank > min(language.hidden_size, language.intermediate_size):
            raise ValueError(f"adapter.rank: {self.adapter.rank} is more than the language model's layers have")
        return self


def names() -> list[str]:
    """Names of the profiles that come with framseg, sorted."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load(name: str | Path, overrides: dict[str, Any] | None = None) -> Profile:
    """Read a profile by its name or by the path of a YAML file.

    `overrides` maps dotted keys to values, e.g. ``{"training.epochs": 2}``; a string value is read as YAML.
    Raises ProfileError for an unknown name or key (with the nearest known one) and for every value of the wrong type
    or out of range.
    """
    path = _path(name)
    merged = _merged(path, ())
    for key, value in (overrides or {}).items():
        value = _yaml(value, key) if isinstance(value, str) else value
        for part in reversed(key.split(".")):
            value = {part: value}
        merged = _merge(merged, value)
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
        if not os.path.isfile(path):  # unlike path.is_file(), it takes a name of any length
            raise ProfileError(f"{path}: no such profile file")
        return path
    if str(name) not in names():
        near = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ProfileError(f"no profile named {str(name)!r}: {hint}there are {', '.join(names())}, or a .yaml file")
    return PROFILES / f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """PyYAML would keep the last value of a key that is written twice; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            if str(key.value) in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is written twice", key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: Path | str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # PyYAML passes on Python's own errors for a tag with an unfit value and for a date that does not exist.
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
    neighbour = path.parent / f"{parent}.yaml"
    return _merge(_merged(neighbour if os.path.isfile(neighbour) else _path(parent), (*seen, path)), content)


def _merge(base: dict, change: dict) -> dict:
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base = base | {key: _merge(base[key], value) if both else value}
    return base


def _explain(path: Path, item: ErrorDetails) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        section: Any = Profile
        for part in item["loc"][:-1]:  # only sections refuse keys
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(str(item["loc"][-1]), section.model_fields, n=1, cutoff=0)
        message = f"no such key, the nearest is {near[0]!r}"
    return ": ".join(filter(None, (path.name, where, message)))


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


def import_path() -> str:
    """The PYTHONPATH with which a process that is started imports this framseg, from whatever folder."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def data_folder(profile: Profile) -> Path:
    """The profile's data folder as an absolute path; a relative one is taken from WORKSPACE, ~ is the home folder."""
    return WORKSPACE / os.path.expanduser(profile.data.folder)
