"""QVHighlights rows: read, check, count, and the frame labels that follow from them.

A row is a query on a video. Its labels are *moments* (windows in seconds) and, for every 2-second *clip* that
a moment touches, the saliency three annotators gave it (0..4). The test split comes without labels; what needs them
raises AnnotationError for a row that has none.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framseg import FramsegError, jsonl
from framseg.jsonl import is_integer, is_number, is_text

CLIP_SECONDS = 2
USUAL_SECONDS = 150  # length of nearly every video of the dataset
ANNOTATORS = 3
TOP_SALIENCY = 4
LONGEST = 100_000  # seconds; a longer duration is probably in milliseconds, and memory grows with the clips
VID_BYTES = 200  # the vid with an ending is a file name, and file systems allow 255 bytes
FIELDS = ("qid", "query", "duration", "vid")
LABELS = ("relevant_clip_ids", "saliency_scores", "relevant_windows")


class AnnotationError(FramsegError, ValueError):
    """Rows that cannot be used; the message has a line for each: file:line, qid, every reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """A query on a video of `duration` seconds: everything that a split without labels has."""

    qid: int
    query: str
    duration: float
    vid: str


@dataclass(frozen=True, slots=True)
class LabelledRow(Row):
    """A row with its labels."""

    relevant_windows: tuple[tuple[float, float], ...]  # (start, end) in seconds, ordered, without overlap
    relevant_clip_ids: tuple[int, ...]  # the 2-second clips that the windows touch
    saliency_scores: tuple[tuple[int, int, int], ...]  # for each of these clips the scores 0..4 of three annotators


class ClassBalance(NamedTuple):
    """Frames of a split by their label; the paper reports ratio 2.3378 and background share 70.04 %."""

    ratio: float  # background frames per foreground frame
    background_share: float
    foreground: int
    background: int


class AnnotatorDistance(NamedTuple):
    """Shares of pairs of annotators whose scores of a clip are 0, 1, ... 4 points apart, float64 [5] each."""

    measured: np.ndarray
    chance: np.ndarray  # for scores drawn independently from all scores given


def clips(duration: float) -> int:
    """Number of whole 2-second clips in a video of `duration` seconds, as the evaluation protocol counts them."""
    return int(duration / CLIP_SECONDS)


def read(path: str | Path) -> list[Row]:
    """Checked rows of a file of one JSON object per line; other fields are ignored. Raises AnnotationError."""
    records, bad = jsonl.checked_records(jsonl.parsed(jsonl.numbered_lines(path)), f"{path}:", _reasons)
    if bad:
        raise AnnotationError("\n".join(bad))
    return [_row(record) for record in records]


def from_dict(record: dict) -> Row:
    """The row of a decoded JSON object, checked; raises AnnotationError with the qid and every reason."""
    if reasons := list(_reasons(record)):
        raise AnnotationError(f"qid {record.get('qid', 'unknown')}: {'; '.join(reasons)}")
    return _row(record)


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as `read` reads them, fields in the order of the public files; AnnotationError if JSON cannot."""
    records = ({name: getattr(row, name) for name in FIELDS + LABELS if hasattr(row, name)} for row in rows)
    jsonl.write_lines(path, records, AnnotationError)


def frame_times(duration: float, frames: int, whole_seconds: bool = False) -> np.ndarray:
    """Times of the frames in seconds, float64 [frames]: the middles of `frames` equal parts of the video, or these cut
    to whole seconds, as the authors' labels have them."""
    # Multiplied before divided: this rounds once, so a time that is a whole second comes out exactly.
    times = duration * (np.arange(frames) + 0.5) / frames
    return np.floor(times) if whole_seconds else times


def frame_labels(row: LabelledRow, frames: int, whole_seconds: bool = False) -> np.ndarray:
    """The answer string as int8 [frames]: 1 where the frame's time lies in a relevant window, ends included."""
    return labels_at(row, frame_times(row.duration, frames, whole_seconds))[0]


def labels_at(row: LabelledRow, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels, int8 [n], and soft targets, float64 [n], of n times in seconds; past the video's end both are 0."""
    windows = np.array(labelled([row])[0].relevant_windows, dtype=np.float64).reshape(-1, 2)
    inside = np.any((times >= windows[:, :1]) & (times <= windows[:, 1:]), axis=0).astype(np.int8)
    saliency = np.append(clip_saliency(row), 0.0)
    return inside, saliency[np.minimum(times // CLIP_SECONDS, len(saliency) - 1).astype(np.int64)]


def clip_saliency(row: LabelledRow) -> np.ndarray:
    """Mean of the annotators' scores over 4 of every clip, float64 [ceil(duration / 2)] in 0..1.

    It is 0 outside the relevant clips; a last clip shorter than 2 seconds has its place too.
    """
    [row] = labelled([row])
    saliency = np.zeros(math.ceil(row.duration / CLIP_SECONDS))
    sums = np.reshape(row.saliency_scores, (-1, ANNOTATORS)).sum(axis=1)
    saliency[list(row.relevant_clip_ids)] = sums / (ANNOTATORS * TOP_SALIENCY)
    return saliency


def soft_targets(row: LabelledRow, frames: int) -> np.ndarray:
    """Segmentation targets, float64 [frames] in 0..1: the annotators' saliency of the clip that the frame lies in."""
    # Cut to whole seconds, a time lies in the same clip of 2 seconds: the targets are the same.
    return labels_at(row, frame_times(row.duration, frames))[1]


def class_balance(rows: Iterable[LabelledRow], frames: int, whole_seconds: bool = False) -> ClassBalance:
    """Count background and foreground frames over labelled rows. Raises AnnotationError if either is missing."""
    labels = np.stack([frame_labels(row, frames, whole_seconds) for row in rows])
    foreground = int(labels.sum())
    background = labels.size - foreground
    if not foreground or not background:
        raise AnnotationError(f"{len(labels)} rows have {foreground} foreground and {background} background frames")
    return ClassBalance(background / foreground, background / labels.size, foreground, background)


def annotator_distance(rows: Iterable[Row]) -> AnnotatorDistance:
    """How far two annotators of a clip are apart, over all relevant clips of labelled rows; AnnotationError if none."""
    votes = np.array([votes for row in rows if isinstance(row, LabelledRow) for votes in row.saliency_scores])
    if not len(votes):
        raise AnnotationError("no row has a relevant clip, so no annotators can be compared")
    first, second = (votes[:, pair].ravel() for pair in ([0, 0, 1], [1, 2, 2]))
    points = TOP_SALIENCY + 1
    measured = np.bincount(np.abs(first - second), minlength=points) / len(first)
    share = np.bincount(votes.ravel(), minlength=points) / votes.size
    distance = np.abs(np.subtract.outer(np.arange(points), np.arange(points)))
    chance = np.bincount(distance.ravel(), weights=np.outer(share, share).ravel())
    return AnnotatorDistance(measured, chance)


def labelled(rows: Iterable[Row]) -> list[LabelledRow]:
    """The rows, as rows with labels. Raises AnnotationError with the qids of those that have none."""
    rows = list(rows)
    if without := [row.qid for row in rows if not isinstance(row, LabelledRow)]:
        qids = jsonl.shortlist(without)
        raise AnnotationError(f"{len(without)} rows have no labels (qid {qids}); take a split with relevant_windows")
    return [row for row in rows if isinstance(row, LabelledRow)]


def _row(record: dict) -> Row:
    question = record["qid"], record["query"], record["duration"], record["vid"]
    if record.get("relevant_windows") is None:
        return Row(*question)
    windows, ids, scores = record["relevant_windows"], record["relevant_clip_ids"], record["saliency_scores"]
    return LabelledRow(*question, tuple(map(tuple, windows)), tuple(ids), tuple(map(tuple, scores)))


def _reasons(record: dict) -> Iterator[str]:
    """Everything that is wrong with a decoded row."""
    if missing := [name for name in FIELDS if name not in record]:
        yield f"{', '.join(missing)} missing"
        return
    qid, query, duration, vid = (record[name] for name in FIELDS)
    if not is_integer(qid):
        yield f"qid must be an integer, not {qid!r}"
    if not is_text(query) or not query.strip():
        yield f"query must be text, not {_short(query)}"
    # The vid becomes a file name, so it must not lead to another folder.
    if not is_text(vid) or vid in ("", ".", "..") or any(c in vid for c in "/\\\0") or len(vid.encode()) > VID_BYTES:
        yield f"vid must be a plain file name of up to {VID_BYTES} bytes, not {_short(vid)}"
    if not is_number(duration) or duration <= 0:
        yield f"duration must be a positive number of seconds, not {_short(duration)}"
    elif duration > LONGEST:
        yield f"duration must be at most {LONGEST} seconds, not {_short(duration)}"
    elif given := [name for name in LABELS if record.get(name) is not None]:
        if missing := [name for name in LABELS if name not in given]:
            yield f"{', '.join(missing)} missing, although {', '.join(given)} are given"
        else:
            yield from _label_reasons(record)


def _label_reasons(record: dict) -> Iterator[str]:
    ids, scores, windows = (record[name] for name in LABELS)
    wrong = [*_window_reasons(windows, record["duration"]), *_clip_reasons(ids, record["duration"])]
    yield from wrong or _agreement_reasons(windows, ids)
    if not isinstance(scores, list):
        yield f"saliency_scores must be a list, not {_short(scores)}"
        return
    for votes in scores:
        integers = isinstance(votes, list) and len(votes) == ANNOTATORS and all(map(is_integer, votes))
        if not integers or not all(0 <= vote <= TOP_SALIENCY for vote in votes):
            yield f"saliency scores {_short(votes)} are not {ANNOTATORS} integers 0..{TOP_SALIENCY}"
    if isinstance(ids, list) and len(scores) != len(ids):
        yield f"{len(scores)} saliency scores for {len(ids)} relevant clips"


def _window_reasons(windows: object, duration: float) -> Iterator[str]:
    if not isinstance(windows, list) or not windows:
        yield f"relevant_windows must list at least one [start, end], not {_short(windows)}"
        return
    last = 0.0
    for window in windows:
        if not isinstance(window, list) or len(window) != 2 or not all(map(is_number, window)):
            yield f"window {_short(window)} is not [start, end] in seconds"
        elif not 0 <= window[0] < window[1] <= duration:
            yield f"window {window} is not ordered inside 0..{duration} s"
        elif window[0] < last:
            yield f"window {window} starts before the one listed before it ends ({last} s)"
        else:
            last = window[1]


def _clip_reasons(ids: object, duration: float) -> Iterator[str]:
    if not isinstance(ids, list) or not all(map(is_integer, ids)):
        yield f"relevant_clip_ids must be a list of integers, not {_short(ids)}"
        return
    if outside := [i for i in ids if not 0 <= i * CLIP_SECONDS < duration]:
        yield f"clip ids {_short(outside)} lie outside the video of {duration} s"
    if twice := sorted(i for i, times in Counter(ids).items() if times > 1):
        yield f"clip ids {_short(twice)} are listed twice"


def _agreement_reasons(windows: list, ids: list[int]) -> Iterator[str]:
    """Clips wholly inside a window must be listed, clips outside all windows must not; a window may cut a clip."""
    touched, inside = set[int](), set[int]()
    for start, end in windows:
        touched.update(range(math.floor(start / CLIP_SECONDS), math.ceil(end / CLIP_SECONDS)))
        inside.update(range(math.ceil(start / CLIP_SECONDS), math.floor(end / CLIP_SECONDS)))
    if missing := sorted(inside - set(ids)):
        yield f"clips {_short(missing)} lie in the relevant windows but are not in relevant_clip_ids"
    if foreign := sorted(set(ids) - touched):
        yield f"clips {_short(foreign)} are in relevant_clip_ids but in no relevant window"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
