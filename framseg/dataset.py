"""A profile's data: its rows, its frame store, and the samples that training reads."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from framseg import annotations, config, frames, prompt
from framseg.annotations import Row
from framseg.backbones import fingerprint
from framseg.jsonl import whole_file

if TYPE_CHECKING:
    from framseg.backbones.blip3 import Blip3


def annotation_file(profile: config.Profile, split: str) -> Path:
    """File of a split: train, val, test (without labels) or test_labels."""
    return config.data_folder(profile) / getattr(profile.data, split)


def rows(profile: config.Profile, split: str) -> list[Row]:
    """Checked rows of a split: train, val, test (without labels) or test_labels."""
    return annotations.read(annotation_file(profile, split))


def videos(profile: config.Profile) -> Path:
    """Folder of {vid}.mp4."""
    return config.data_folder(profile) / profile.data.videos


def store(profile: config.Profile) -> frames.Store:
    """The profile's frame store; profiles with the same data, frames and image size share one."""
    section, size = profile.frames, profile.model.vision.image_size
    # Published neighbours are kept for training alone.
    neighbours = section.neighbours if profile.data.source != "frames" or "train" in profile.data.splits else 0
    name = f"frames_{section.count}x{2 * neighbours + 1}_{size}px_q{section.jpeg_quality}"
    sampling = section.count, neighbours, section.neighbour_distance
    return frames.Store(config.data_folder(profile) / name, size, *sampling, section.jpeg_quality)


def extract(profile: config.Profile, splits: tuple[str, ...] = ()) -> frames.Report:
    """Store the frames of the splits, by default `data.splits`, by `frames.extract` or `run.archive.extract`."""
    splits = splits or profile.data.splits
    if profile.data.source == "frames":
        from framseg.run import archive

        return archive.extract(profile, splits)
    durations = {row.vid: row.duration for split in splits for row in rows(profile, split)}
    limit, tolerance = profile.frames.time_limit, profile.data.duration_tolerance
    return frames.extract(durations, videos(profile), store(profile), time_limit=limit, duration_tolerance=tolerance)


@dataclass(frozen=True)
class Features:
    """The frozen encoder's output on disk, one safetensors file per video: [f, 2 * neighbours + 1, patches, width]."""

    folder: Path

    @classmethod
    def of(cls, profile: config.Profile, model: "Blip3") -> "Features":
        """The cache of this profile and model; its name holds a hash of the encoder's weights, so others differ."""
        frames_folder = store(profile).folder
        return cls(frames_folder.with_name(f"{frames_folder.name}_features_{fingerprint(model.vision_encoder)}"))

    def path(self, vid: str) -> Path:
        """The video's file."""
        return self.folder / f"{vid}.safetensors"

    def make(self, profile: config.Profile, model: "Blip3", vids: Iterable[str]) -> None:
        """Encode every variation of every frame of the videos that have no file yet; files appear whole."""
        frame_store, section = store(profile), profile.frames
        for vid in vids:
            if self.path(vid).is_file():
                continue
            variations = [
                model.vision_features(pixels(frame_store.read(vid, np.full(section.count, k))).to(model.device)).cpu()
                for k in range(2 * section.neighbours + 1)
            ]
            with whole_file(self.path(vid)) as unfinished:
                save_file({"features": torch.stack(variations, dim=1)}, unfinished)

    def read(self, vid: str, choice: np.ndarray) -> Tensor:
        """Features of each frame's chosen variation, [f, patches, width]. VideoError for a damaged file."""
        try:
            with safe_open(self.path(vid), "pt") as file:
                part = file.get_slice("features")
                return torch.stack([part[frame, variation] for frame, variation in enumerate(choice.tolist())])
        except (SafetensorError, OSError) as error:
            raise frames.VideoError(
                f"{vid}: its file in the feature cache {self.folder} is damaged ({error}); remove {self.path(vid)} and "
                f"start the training again: it is made anew"
            ) from error


class Samples(Dataset):
    """Training samples: frames drawn from their variations, token ids of prompt and answer, soft targets.

    With `features`, a sample holds the encoder's output of its frames instead of the frames. Samples are indexed by
    (epoch, number of the row): every draw follows from the seed and the index alone, so a resumed run repeats none.

    Raises PromptError for queries that are too long for the model, AnnotationError for rows without labels.
    """

    def __init__(
        self, profile: config.Profile, tokenizer: Tokenizer, rows: Iterable[Row], features: Features | None = None
    ):
        self.profile, self.tokenizer, self.features = profile, tokenizer, features
        self.rows = annotations.labelled(rows)
        self.store = store(profile)
        prompt.refuse_long(tokenizer, profile.model, profile.frames.count, {row.qid: row.query for row in self.rows})
        # Prompts differ in their queries alone, so these lengths compare samples.
        encodings = tokenizer.encode_batch([row.query for row in self.rows], add_special_tokens=False)
        self.lengths = [len(encoding.ids) for encoding in encodings]

    def __getitem__(self, index: tuple[int, int]) -> dict:
        epoch, number = index
        row, section, tokens = self.rows[number], self.profile.frames, self.profile.model.tokens
        draw = np.random.default_rng([self.profile.seed, epoch, row.qid])
        choice = draw.integers(2 * section.neighbours + 1, size=section.count)
        mask = "".join(map(str, annotations.frame_labels(row, section.count, section.whole_seconds)))
        ids = prompt.prompt_ids(self.tokenizer, tokens, row.query, section.count) + prompt.answer_ids(tokens, mask)
        sample = {"qid": row.qid, "ids": ids, "soft_targets": annotations.soft_targets(row, section.count)}
        return sample | {"frames": (self.features or self.store).read(row.vid, choice)}

    def collate(self, samples: list[dict]) -> dict[str, Tensor | list[int]]:
        """Batch of B samples, padded on the left.

        pixel_values uint8 [B, f, 3, H, W], or vision_features [B, f, patches, width]; input_ids, attention_mask [B, L];
        positions [B, f + 1], whose logits predict answer_ids [B, f + 1]; soft_targets float32 [B, f]; qids.
        """
        count = self.profile.frames.count + 1
        padded = prompt.pad_left([sample["ids"] for sample in samples], self.profile.model.tokens.pad)
        ids, mask = map(torch.from_numpy, padded)
        ends = torch.arange(ids.shape[1] - count, ids.shape[1]).expand(len(samples), -1)
        batch: dict[str, Tensor | list[int]] = {
            "qids": [sample["qid"] for sample in samples],
            "input_ids": ids,
            "attention_mask": mask,
            "positions": ends - 1,
            "answer_ids": ids[:, -count:],
            "soft_targets": torch.from_numpy(np.stack([sample["soft_targets"] for sample in samples])).float(),
        }
        images = [sample["frames"] for sample in samples]
        if self.features:
            return batch | {"vision_features": torch.stack(images)}
        return batch | {"pixel_values": pixels(np.stack(images))}


def pixels(images: np.ndarray) -> Tensor:
    """Frames [..., H, W, 3] as decoded -> [..., 3, H, W] as the model takes them; uint8 stays uint8."""
    return torch.from_numpy(images).movedim(-1, -3).contiguous()


def samples_per_epoch(profile: config.Profile, rows: int) -> int:
    """Number of samples that an epoch over `rows` rows trains on (`training.remainder`).

    All of them (`carry`), or as many as fill whole micro-batches on every process (`drop`). ProfileError for too few.
    """
    group = profile.training.micro_batch * profile.training.processes
    if rows < group:
        raise config.ProfileError(
            f"{rows} training rows do not fill one micro-batch of {profile.training.micro_batch} on "
            f"{profile.training.processes} processes; lower training.micro_batch"
        )
    return rows if profile.training.remainder == "carry" else rows // group * group


class MicroBatches:
    """The endless sequence of micro-batches of process `rank`, as lists of `Samples` indexes.

    Every epoch is a new permutation from the seed. Its remainder, which does not fill a micro-batch on every process,
    goes into the next epoch's first one (`training.remainder: carry`), or is left out as in the paper's run (`drop`:
    225 micro-batches of 2 x 16 out of 7,218 samples). Within an optimizer step, samples of similar length share a
    micro-batch, which saves padding and changes no gradient. `lengths` are `Samples.lengths`; the first `first`
    micro-batches, on which a resumed run has trained already, are left out.
    """

    def __init__(self, lengths: Sequence[int], profile: config.Profile, rank: int, first: int = 0):
        section = profile.training
        self.lengths, self.seed, self.rank, self.first = np.asarray(lengths), profile.seed, rank, first
        self.shape = section.accumulation, section.processes, section.micro_batch
        self.epoch_size = samples_per_epoch(profile, len(self.lengths))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, skip = divmod(self.first, self.shape[0])
        drawn = (each for step in itertools.count(first) for each in zip(*self._step(step), strict=True))
        for epochs, numbers in itertools.islice(drawn, skip, None):
            yield list(zip(epochs[self.rank].tolist(), numbers[self.rank].tolist(), strict=True))

    def _step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and row of every sample of an optimizer step, each [accumulation, processes, micro_batch]."""
        size = int(np.prod(self.shape))
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), self.epoch_size)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            numbers[epochs == epoch] = order[places[epochs == epoch]]
        # A micro-batch has the loss weights of the epoch it begins in, so none of its samples may change to another.
        begun = np.repeat(epochs.reshape(self.shape[0], -1)[:, 0], size // self.shape[0])
        order = np.lexsort((self.lengths[numbers], begun))
        return epochs[order].reshape(self.shape), numbers[order].reshape(self.shape)
