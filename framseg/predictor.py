"""Your own video: ask about any video file, of any length."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from framseg import moments, prompt
from framseg.annotations import USUAL_SECONDS, Row, frame_times
from framseg.backbones.blip3 import Blip3
from framseg.decode import answers, encoded, loaded
from framseg.frames import read_apart
from framseg.predictions import SALIENCY, WINDOWS, answer_record, prediction_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to one query about one video of `duration` seconds.

    windows: moments [[start, end, score], ...] in seconds, best first. saliency: float64 [int(duration / 2)], one
    score for each 2-second clip. mask: n characters 0 and 1. probability: float64 [n], of each frame; n is f, or more
    for a video longer than 150 s (see `predict`). valid: False if the model marked no frame, in which case the mask is
    all ones. frames, times: f of the n frames, evenly spread, uint8 [f, H, W, 3], and their seconds [f].
    """

    video: str
    query: str
    duration: float
    windows: list[list[float]]
    saliency: np.ndarray
    mask: str
    probability: np.ndarray
    valid: bool
    frames: np.ndarray = field(repr=False)
    times: np.ndarray = field(repr=False)

    @property
    def row(self) -> Row:
        """The question as a row without labels; -1 as qid says that it is of no set."""
        return Row(-1, self.query, self.duration, Path(self.video).name)

    @property
    def record(self) -> dict:
        """The answer as a prediction in the dataset's format."""
        answer = {"mask": self.mask, "probability": self.probability.tolist(), "valid": self.valid}
        return prediction_record(self.row, self.windows, self.saliency) | answer

    def show(self) -> "Figure":
        """The qualitative figure: frames, predicted windows, curve; the last line of a cell shows it."""
        from framseg.viz import figures  # here, because drawing takes a second to import

        return figures.qualitative(self.row, self.record, self.frames, self.times)


def predict(
    video: Path | str,
    query: str | Sequence[str],
    checkpoint: Path | str,
    windows: moments.Policy = moments.BEST_WINDOWS,
    saliency: moments.Method = moments.BEST_SALIENCY,
) -> Prediction | list[Prediction]:
    """Moments and highlights for one's own video file, of any length.

    query: one text, or several about the same video (which is then decoded and encoded once); several give a list of
    Predictions in their order. checkpoint: the folder a training run has written (``runs/<profile>/checkpoint``), or
    the name of a hub's repository that holds one. windows, saliency: policy and method of framseg.moments, by default
    the best ones, whatever the checkpoint's profile says; ``"mask"`` and ``"overlap"`` are the authors'. The model
    stays loaded for the next call.

    The model has learned from f frames of 150 s. A longer video has n = t * f / 150 frames, rounded, so that they
    stand as densely; where n is more than f, the model is asked about f of them at a time, each time half of f (rounded
    down) further on and at last about the last f. A frame's probability is then the mean over the answers it is in,
    weighted by its place there: 1 at either end, 2 beside it, and so on towards the middle. Its digit is 1 if the
    answers that say 1 have at least half of the weight. Windows and clip scores follow from the two as for a short
    video. The frames of a long video wait in a temporary file, so memory does not grow with the length. The video is
    decoded in a process of its own, which is ended when no new frame has come for the profile's `frames.time_limit`.

    Raises VideoError if the video cannot be decoded, PromptError for an empty query or a tokenizer that cannot serve
    the model, CheckpointError for a folder that is no checkpoint, ValueError for an unknown policy or method.
    """
    model, profile, tokenizer = loaded(checkpoint)
    count = profile.frames.count
    inference = profile.inference.model_copy(update={"windows": windows, "saliency": saliency})
    queries = [query] if isinstance(query, str) else list(query)
    for text in queries:  # an empty one is to be known before the video is read
        prompt.prompt_ids(tokenizer, profile.model.tokens, text, count)
    section, size = profile.frames, profile.model.vision.image_size
    with tempfile.TemporaryFile() as file:  # all frames first: decord decodes ahead of a slow reader without limit
        images, length = read_apart(video, count, USUAL_SECONDS / count, size, section.time_limit, file)
        total = len(images)
        begins = [*range(0, total - count, max(1, count // 2)), total - count]
        weight = np.minimum(np.arange(count) + 1, count - np.arange(count))
        weights = np.zeros(total, int)
        for begin in begins:
            weights[begin : begin + count] += weight
        votes, probabilities = np.zeros((len(queries), total), int), np.zeros((len(queries), total))
        kept = np.linspace(0, total - 1, count).round().astype(int)
        frames = np.array(images[kept])
        parts = _encoded_along(model, images, begins, count)
        for begin, vision in tqdm(parts, "asking", len(begins), unit="part", disable=len(begins) == 1):
            there = slice(begin, begin + count)
            for first in range(0, len(queries), inference.batch):
                some = slice(first, first + inference.batch)
                texts = queries[some]
                masks, probability = answers(model, tokenizer, profile, texts, vision.expand(len(texts), -1, -1, -1))
                votes[some, there] += weight * [[int(digit) for digit in mask] for mask in masks]
                probabilities[some, there] += weight / weights[there] * probability
    out = []
    for text, ones, probability in zip(queries, 2 * votes >= weights, probabilities, strict=True):
        row, mask = Row(-1, text, length, Path(video).name), "".join("01"[digit] for digit in ones.astype(int))
        record = answer_record(row, mask, probability, inference)
        answer = record[WINDOWS], np.array(record[SALIENCY]), record["mask"], probability, record["valid"]
        out.append(Prediction(str(video), text, length, *answer, frames, frame_times(length, total)[kept]))
    return out[0] if isinstance(query, str) else out


def _encoded_along(model: Blip3, images: np.ndarray, begins: Sequence[int], count: int) -> Iterator[tuple[int, Tensor]]:
    """Every begin with the vision tokens [1, count, latents, width] of images [n, H, W, 3] from there on, in order.

    Each image is encoded once. Neither more images nor more tokens than `count` are held.
    """
    tokens, last = encoded(model, np.array(images[:count])[None]), 0
    for begin in begins:
        if begin > last:
            found = encoded(model, np.array(images[last + count : begin + count])[None])
            tokens, last = torch.cat([tokens[:, begin - last :], found], dim=1), begin
        yield begin, tokens
