"""A profile's data: its rows, its frame store, and the samples that training reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from framseg import annotations, config, demo, frames, prompt


def prepare(profile: config.Profile) -> None:
    """Make the demo set if the profile uses it and it is not there yet."""
    if profile.data.source == "demo":
        demo.make(profile.data, config.data_folder(profile))


def annotation_file(profile: config.Profile, split: str) -> Path:
    """File of a split: train, val, test (without labels) or test_labels."""
    return config.data_folder(profile) / getattr(profile.data, split)


def rows(profile: config.Profile, split: str) -> list[annotations.Row]:
    """Checked rows of a split: train, val, test (without labels) or test_labels."""
    return annotations.read(annotation_file(profile, split))


def videos(profile: config.Profile) -> Path:
    """Folder of {vid}.mp4."""
    return config.data_folder(profile) / profile.data.videos


def store(profile: config.Profile) -> frames.Store:
    """The profile's frame store; profiles that sample alike on the same data share one."""
    section, size = profile.frames, profile.model.vision.image_size
    name = f"frames_{section.count}x{2 * section.neighbours + 1}_{size}px_q{section.jpeg_quality}"
    return frames.Store(
        config.data_folder(profile) / name,
        size,
        section.count,
        section.neighbours,
        section.neighbour_distance,
        section.jpeg_quality,
    )


def extract(
    profile: config.Profile, splits: tuple[str, ...] = ("train", "val", "test"), progress: bool = True
) -> frames.Report:
    """Decode the splits' videos into the frame store; what is there already is skipped."""
    durations = {row.vid: row.duration for split in splits for row in rows(profile, split)}
    return frames.extract(
        durations,
        videos(profile),
        store(profile),
        time_limit=profile.frames.time_limit,
        duration_tolerance=profile.data.duration_tolerance,
        progress=progress,
    )


class Samples(Dataset):
    """Training samples: frames drawn from their variations, token ids of prompt and answer, soft targets.

    Indexed by (epoch, number of the row), so that every draw follows from the seed alone and a resumed run sees
    what an uninterrupted one would have seen.
    """

    def __init__(self, profile: config.Profile, tokenizer: Tokenizer, split_rows: list[annotations.Row]):
        self.profile = profile
        self.tokenizer = tokenizer
        self.rows = split_rows
        self.store = store(profile)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int]) -> dict:
        epoch, number = index
        row, section, tokens = self.rows[number], self.profile.frames, self.profile.model.tokens
        draw = np.random.default_rng([self.profile.seed, epoch, row.qid])
        choice = draw.integers(2 * section.neighbours + 1, size=section.count)
        mask = "".join(map(str, annotations.frame_labels(row, section.count)))
        return {
            "qid": row.qid,
            "frames": self.store.read(row.vid, choice),
            "ids": prompt.prompt_ids(self.tokenizer, tokens, row.query, section.count)
            + prompt.answer_ids(tokens, mask),
            "soft_targets": annotations.soft_targets(row, section.count),
        }

    def collate(self, samples: list[dict]) -> dict[str, Tensor | list[int]]:
        """Batch of B samples, padded on the left.

        pixel_values uint8 [B, f, 3, H, W]; input_ids, attention_mask [B, L]; positions [B, f + 1], whose logits
        predict answer_ids [B, f + 1]; soft_targets float32 [B, f]; qids.
        """
        count = self.profile.frames.count + 1
        ids, mask = prompt.pad_left([sample["ids"] for sample in samples], self.profile.model.tokens.pad)
        ids = torch.from_numpy(ids)
        ends = torch.arange(ids.shape[1] - count, ids.shape[1]).expand(len(samples), -1)
        return {
            "qids": [sample["qid"] for sample in samples],
            "pixel_values": pixels(np.stack([sample["frames"] for sample in samples])),
            "input_ids": ids,
            "attention_mask": torch.from_numpy(mask),
            "positions": ends - 1,
            "answer_ids": ids[:, -count:],
            "soft_targets": torch.from_numpy(np.stack([sample["soft_targets"] for sample in samples])).float(),
        }


def pixels(images: np.ndarray) -> Tensor:
    """Frames [..., H, W, 3] as decoded -> [..., 3, H, W] as the model takes them; uint8 stays uint8."""
    return torch.from_numpy(images).movedim(-1, -3).contiguous()


class MicroBatches:
    """The endless sequence of micro-batches of one process, as lists of `Samples` indexes.

    Every epoch is a new permutation from the seed; its remainder that fills no micro-batch on every process is
    left out, as in the paper's run (225 micro-batches of 2 x 16 out of 7,218 samples).
    """

    def __init__(self, count: int, profile: config.Profile, rank: int, world: int, first: int = 0):
        self.count, self.seed, self.rank, self.world, self.first = count, profile.seed, rank, world, first
        self.size = profile.training.micro_batch
        self.an_epoch = count // (self.size * world)
        if not self.an_epoch:
            raise ValueError(f"{count} training rows do not fill one micro-batch of {self.size} on {world} processes")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skip = divmod(self.first, self.an_epoch)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            order = order[: self.an_epoch * self.world * self.size].reshape(self.an_epoch, self.world, self.size)
            for batch in order[skip:, self.rank]:
                yield [(epoch, int(number)) for number in batch]
            epoch, skip = epoch + 1, 0
