"""Your own video: ask about any video file, of any length."""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from framseg import backbones, command_line, moments, prompt
from framseg.annotations import USUAL_SECONDS, Row, frame_times
from framseg.backbones.blip3 import Blip3
from framseg.checkpoint import loaded
from framseg.decode import answers, encoded
from framseg.frames import VideoError, read_apart
from framseg.predictions import SALIENCY, WINDOWS, answer_record, prediction_record
from framseg.run import released

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to one query about one video of `duration` seconds.

    windows: moments [[start, end, score], ...] in seconds, best first. saliency: float64 [int(duration / 2)], one
    score for each 2-second clip. mask: n characters 0 and 1. probability: float64 [n], of each frame; n is f, or more
    for a video longer than 150 s (see `predict`). valid: False if the model marked no frame, in which case the mask is
    all ones. frames, times: f of the n frames, evenly spread, uint8 [f, H, W, 3], and their seconds [f]. notes: what to
    know, a sentence each: which published weights answered, that the picture starts late, that the end is missing or
    may be.
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
    notes: list[str] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """The question as a row without labels; its qid is -1, as it belongs to no data set."""
        return Row(-1, self.query, self.duration, Path(self.video).name)

    @property
    def record(self) -> dict:
        """The answer as a prediction record (see framseg.predictions)."""
        answer = {"mask": self.mask, "probability": self.probability.tolist(), "valid": self.valid, "notes": self.notes}
        return prediction_record(self.row, self.windows, self.saliency) | answer

    def show(self) -> "Figure":
        """The qualitative figure: frames, predicted windows, curve; the last line of a cell shows it."""
        from framseg.viz import figures  # here, because drawing takes a second to import

        return figures.qualitative(self.row, self.record, self.frames, self.times)


def predict(
    video: Path | str,
    query: str | Sequence[str],
    checkpoint: Path | str | Sequence[Path | str],
    windows: moments.Policy = moments.BEST_WINDOWS,
    saliency: moments.Method = moments.BEST_SALIENCY,
    allow_partial: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Prediction | list[Prediction]:
    """Moments and highlights of your own video file, of any length.

    query: one text, or several about the same video (which is then decoded and encoded once); several give a list of
    Predictions in their order. checkpoint: the folder that a training has written (``runs/<profile>/checkpoint``), or
    the name of a repository on the Hugging Face hub that holds one. ``"paper"`` is the paper's own model: about 8.7 GB,
    fetched once. Other weights in the layout of the base model are read as well, and so is the authors' pair of
    resampler and PiSSA adapter with its ``pissa_init``: both in one folder, or a tuple of two. windows, saliency:
    policy and method of framseg.moments, whatever the checkpoint's profile says; ``"mask"`` and ``"overlap"`` are the
    authors'.
    allow_partial: answer about the part that is there of a file that is cut off, instead of refusing it.
    device: "auto" (the GPU if there is one), "cpu", "cuda" or "mps" (Apple's; never tried). dtype: "float32",
    "float16", "bfloat16", "auto" (the checkpoint's own, see `run.precision.chosen`), or "int8", which halves the
    language model's layers once more (needs torchao).

    Seconds, of the answer as of the frames that the model sees, are those of a player: second 0 is the start of the
    file, also where the picture starts later than the sound; until then the first frame counts.

    The model has learned from f frames of 150 s. A longer video of t seconds gives n = t * f / 150 frames (rounded),
    which are as dense, and the model is asked about f of them at a time: each time half of f (rounded down) further
    on, at last about the last f. A frame's probability is the mean over the answers that include it, weighted by its
    place there: 1 for the first and last frame, 2 for the next ones, and so on. Its digit is 1 if the answers that say
    1 have at least half of the weight. Frames wait in a temporary file: memory does not grow with the length.

    Raises VideoError if the video cannot be decoded or is cut off, PromptError for an empty query or a tokenizer that
    does not fit the model, CheckpointError for a folder that is no checkpoint, ValueError for an unknown policy or
    method.
    """
    queries = [query] if isinstance(query, str) else list(query)
    for text in queries:  # what is mistyped is refused before gigabytes are fetched or read
        prompt.user_text(text, 1)
    moments.windows("1", [1], 1, windows)
    moments.saliency([1], 2, saliency)
    if not os.path.exists(video):
        raise VideoError(f"{video}: no such video file")
    model, profile, tokenizer = loaded(checkpoint, device, dtype)
    count = profile.frames.count
    inference = profile.inference.model_copy(update={"windows": windows, "saliency": saliency})
    section, size = profile.frames, profile.model.vision.image_size
    with tempfile.TemporaryFile() as file:  # all frames first: decord decodes ahead of a slow reader without limit
        interval, limit = USUAL_SECONDS / count, section.time_limit
        images, length, notes = read_apart(video, count, interval, size, limit, file, allow_partial)
        notes = [model.origin, *notes] if model.origin else notes
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
            span = slice(begin, begin + count)
            for first in range(0, len(queries), inference.batch):
                batch = slice(first, first + inference.batch)
                texts = queries[batch]
                masks, probability = answers(model, tokenizer, profile, texts, vision.expand(len(texts), -1, -1, -1))
                votes[batch, span] += weight * [[int(digit) for digit in mask] for mask in masks]
                probabilities[batch, span] += weight / weights[span] * probability
    out = []
    for text, ones, probability in zip(queries, 2 * votes >= weights, probabilities, strict=True):
        row, mask = Row(-1, text, length, Path(video).name), "".join("01"[digit] for digit in ones.astype(int))
        record = answer_record(row, mask, probability, inference)
        answer = record[WINDOWS], np.array(record[SALIENCY]), record["mask"], probability, record["valid"]
        out.append(Prediction(str(video), text, length, *answer, frames, frame_times(length, total)[kept], notes))
    return out[0] if isinstance(query, str) else out


def _encoded_along(model: Blip3, images: np.ndarray, begins: Sequence[int], count: int) -> Iterator[tuple[int, Tensor]]:
    """Every begin with the vision tokens [1, count, latents, width] of images [n, H, W, 3] from there on, in order.

    Each image is encoded once. Neither more images nor more tokens than `count` are held.
    """
    tokens, last = encoded(model, np.array(images[:count])[None]), 0
    for begin in begins:
        if begin > last:
            new = encoded(model, np.array(images[last + count : begin + count])[None])
            tokens, last = torch.cat([tokens[:, begin - last :], new], dim=1), begin
        yield begin, tokens


def _table(prediction: Prediction) -> str:
    """The answer as a person reads it: windows in seconds with their scores, and the best clip."""
    lines = [f"{prediction.query!r} in {prediction.video} ({prediction.duration:.1f} s)"]
    lines += [f"  note: {note}" for note in prediction.notes]
    if not prediction.valid:
        return "\n".join([*lines, f"  nothing found (highest frame probability {prediction.probability.max():.2f})"])
    lines += ["  start (s)  end (s)  score"]
    lines += [f"{start:11.1f}{end:9.1f}{score:7.2f}" for start, end, score in prediction.windows]
    if len(prediction.saliency):
        best = int(prediction.saliency.argmax())
        lines += [f"  best clip: {2 * best} to {2 * best + 2} s, score {prediction.saliency[best]:.2f}"]
    return "\n".join(lines)


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command `framseg predict`."""
    parser = argparse.ArgumentParser(prog="framseg predict", description="Moments and highlights of your own video.")
    parser.add_argument("video", type=Path, help="a video file, of any length")
    parser.add_argument("-q", "--query", action="append", required=True, help="what to look for; may be given again")
    parser.add_argument(
        "--checkpoint",
        action="append",
        help="a trained checkpoint's folder or a repository's name on the hub; `paper` is the paper's model, fetched "
        "once; given twice, the authors' pair",
    )
    parser.add_argument("--yes", action="store_true", help="without --checkpoint: fetch the paper's model unasked")
    parser.add_argument("--device", choices=backbones.DEVICES, default="auto", help="mps was never tried")
    parser.add_argument("--dtype", choices=backbones.DTYPES, default="auto", help="int8 takes the least memory")
    parser.add_argument("--allow-partial", action="store_true", help="answer about the part of a file that is cut off")
    parser.add_argument("--json", action="store_true", help="print prediction records, one JSON object per line")
    options = parser.parse_args(arguments)
    names = options.checkpoint or [released.offer(options.yes)]
    more = {"allow_partial": options.allow_partial, "device": options.device, "dtype": options.dtype}
    answer = predict(options.video, options.query, names, **more)
    predictions = answer if isinstance(answer, list) else [answer]
    if options.json:
        print(*(json.dumps(prediction.record) for prediction in predictions), sep="\n")
    else:
        print(*map(_table, predictions), sep="\n\n")


if __name__ == "__main__":
    main()
