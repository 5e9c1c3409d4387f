"""The dataset's metrics for moments and highlights, and trivial answers to compare a model with.

`framseg evaluate PREDICTIONS.jsonl ANNOTATIONS.jsonl` prints them as JSON in the official layout.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from framseg import annotations, command_line, moments, predictions
from framseg.annotations import ANNOTATORS, LabelledRow, Row, clips, from_dict, labelled
from framseg.predictions import SALIENCY, WINDOWS, PredictionError, all_have, matched, prediction_record

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))  # IoU
LENGTHS = {"full": (0, np.inf), "long": (30, 150), "middle": (10, 30), "short": (0, 10)}  # (more than, up to] s
METRICS = {  # what tables and figures show: official name and short title
    "MR-full-R1@0.5": "R1@0.5",
    "MR-full-R1@0.7": "R1@0.7",
    "MR-full-mAP": "mAP",
    "HL-min-VeryGood-mAP": "HL mAP",
    "HL-min-VeryGood-Hit1": "HIT@1",
}
LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}  # least saliency of a highlight


def evaluate(predictions: Iterable[dict], annotations: Iterable[Row | dict], intersection: bool = False) -> dict:
    """Scores in the official layout, percentages rounded to two decimals.

    Keys: `brief`; `HL-min-Fair/Good/VeryGood` with HL-mAP and HL-Hit1; `full`, `long`, `middle`, `short` with MR-mAP
    and MR-R1 by IoU threshold. Entries are left out if no prediction has the windows or saliency that they need.
    Raises PredictionError for malformed records and for doubled, missing and unknown qids, all named; with
    `intersection` queries that only one side has are ignored instead. Raises AnnotationError for rows without labels.
    """
    records, rows = _matched(predictions, annotations, intersection)
    brief: dict[str, float] = {}
    highlights, lengths = {}, {}
    if all_have(records, WINDOWS):
        pairs = _Pairs(records, rows)
        lengths = {name: _moment_metrics(pairs, *bounds) for name, bounds in LENGTHS.items()}
        full = lengths["full"]
        brief |= {f"MR-full-R1@{t}": full["MR-R1"][t] for t in ("0.5", "0.7")}
        brief |= {"MR-full-mAP": full["MR-mAP"]["average"]}
        brief |= {f"MR-full-mAP@{t}": full["MR-mAP"][t] for t in ("0.5", "0.75")}
        brief |= {f"MR-{name}-mAP": lengths[name]["MR-mAP"]["average"] for name in ("long", "middle", "short")}
    if all_have(records, SALIENCY):
        truth = _truth(rows)
        precision, best = _highlight_precision(records, rows, truth), _best_clip(records, rows, truth)
        for i, (name, least) in enumerate(LEVELS.items()):
            mean, hits = _percent(precision[:, i]), _percent(best >= least)
            highlights[f"HL-min-{name}"] = {"HL-mAP": mean, "HL-Hit1": hits}
            brief |= {f"HL-min-{name}-mAP": mean, f"HL-min-{name}-Hit1": hits}
    return {"brief": brief} | highlights | lengths


def per_query(predictions: Iterable[dict], annotations: Iterable[Row | dict], intersection: bool = False) -> list[dict]:
    """What `evaluate` averages for R1 and VeryGood HIT@1, for each query in the order of the annotations.

    [{"qid": int, "iou": float, "hit": bool}, ...]: IoU of the first listed window with the true window it overlaps
    best; whether any annotator called the best-scored clip very good. `iou` or `hit` is left out if no prediction
    has windows or saliency. Raises as `evaluate` does.
    """
    records, rows = _matched(predictions, annotations, intersection)
    columns = {"qid": [row.qid for row in rows]}
    if all_have(records, WINDOWS):
        pairs = _Pairs(records, rows)
        columns["iou"] = _first_iou(pairs.first, pairs.true, pairs.is_true).tolist()
    if all_have(records, SALIENCY):
        columns["hit"] = (_best_clip(records, rows, _truth(rows)) >= LEVELS["VeryGood"]).tolist()
    return [dict(zip(columns, numbers, strict=True)) for numbers in zip(*columns.values(), strict=True)]


def trivial(rows: Sequence[Row], train_rows: Sequence[Row], seed: int, frames: int = 25) -> dict[str, list[dict]]:
    """Answers that never look at a video, as predictions for `rows`, by name; they are learned from `train_rows` only.

    `all ones`: a window over the whole video; constant saliency.
    `best constant window`: the window [a, b] * duration, a and b multiples of 1 / frames, with the best R1@0.7 on
    the train rows; saliency is the train rows' mean by relative position.
    `random masks`: a random train query's mask, rotated by a random number of frames, which keeps the share of ones;
    probabilities are uniform in 0.5..1 for a one and 0..0.5 for a zero. AnnotationError if train rows have no labels.
    """
    random, train = np.random.default_rng(seed), labelled(train_rows)
    masks = np.stack([annotations.frame_labels(row, frames) for row in train])
    masks = masks[masks.any(axis=1)]  # a moment between two frames gives a mask of zeros, which is no valid answer
    prior = np.mean([annotations.soft_targets(row, frames) for row in train], axis=0)
    start, end = _constant_window(train, frames)
    answers: dict[str, list[dict]] = {"all ones": [], "best constant window": [], "random masks": []}
    for row in rows:
        mask = np.roll(masks[random.integers(len(masks))], random.integers(frames))
        probability = (mask + random.random(frames)) / 2
        t = row.duration
        pairs = (
            ([[0.0, t, 1.0]], np.ones(frames)),
            ([[start * t, end * t, 1.0]], prior),
            (moments.windows(mask, probability, t), probability),
        )
        for answer, (windows, curve) in zip(answers.values(), pairs, strict=True):
            answer.append(prediction_record(row, windows, moments.saliency(curve, t)))
    return answers


def shuffled(predictions: Sequence[dict], rows: Sequence[Row], seed: int) -> list[dict]:
    """The same predictions with the query ignored: each query of `rows` gets the answer to one about another video.

    Every prediction is used once. Windows and clip scores are stretched to the new video's duration. Raises
    PredictionError if qids do not match, fields are missing, or one video has more than half of the queries.
    """
    predictions, rows = matched(predictions, rows)
    if not (all_have(predictions, WINDOWS) and all_have(predictions, SALIENCY)):
        raise PredictionError(f"a shuffle needs predictions with {WINDOWS} and {SALIENCY}")
    videos = sorted({row.vid for row in rows})
    place = dict(zip(videos, np.random.default_rng(seed).permutation(len(videos)).tolist(), strict=True))
    # With each video's queries next to each other, a rotation by the largest group moves every query to another video.
    order = sorted(range(len(rows)), key=lambda i: place[rows[i].vid])
    largest = int(np.bincount([place[row.vid] for row in rows]).max())
    if 2 * largest > len(rows):
        raise PredictionError("one video has more than half of the queries, so they cannot all get another video's")
    out = []
    for target, source in sorted(zip(order, np.roll(order, largest).tolist(), strict=True)):
        row, scale = rows[target], rows[target].duration / rows[source].duration
        windows = [[start * scale, end * scale, score] for start, end, score in predictions[source][WINDOWS]]
        scores = predictions[source][SALIENCY]
        middles, old = ((np.arange(n) + 0.5) / n for n in (clips(row.duration), len(scores)))
        out.append(prediction_record(row, windows, np.interp(middles, old, scores)))
    return out


class _Pairs:
    """mAP's IoU [queries, listed, true] of every listed window with every true window, 0 past the end of the lists."""

    def __init__(self, predictions: list[dict], rows: list[LabelledRow]):
        self.true, self.is_true = _padded([row.relevant_windows for row in rows], 2)
        listed, is_listed = _padded([record[WINDOWS][: moments.LISTED] for record in predictions], 3)
        self.lengths = self.true[..., 1] - self.true[..., 0]
        self.iou = moments.iou(listed[:, :, None, :2], self.true[:, None], "lengths") * is_listed[:, :, None]
        # mAP goes by the scores, and by the list where they are equal; R1 takes the first of the list.
        self.rank = np.argsort(np.where(is_listed, -listed[..., 2], np.inf), axis=1, kind="stable")
        self.first = listed[:, 0, :2]


def _first_iou(windows: np.ndarray, true: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """R1's IoU [queries] of windows [queries, 2] with that kept one of true [queries, true, 2] they overlap best."""
    # If two are equal up to the last bit, no golden file decides which one that is: here the first by mAP's IoU.
    best = np.where(kept, moments.iou(windows[:, None], true, "lengths"), -1).argmax(axis=1)
    return moments.iou(windows, true[np.arange(len(true)), best])


def _moment_metrics(pairs: _Pairs, above: float, up_to: float) -> dict:
    """MR-mAP and MR-R1 of the queries with true windows longer than `above` and at most `up_to` seconds, on these."""
    kept = pairs.is_true & (pairs.lengths > above) & (pairs.lengths <= up_to)
    queries = kept.any(axis=1)
    first = _first_iou(pairs.first, pairs.true, kept)[queries]
    iou = np.where(kept[queries, None], pairs.iou[queries], 0.0)
    iou = np.take_along_axis(iou, pairs.rank[queries][:, :, None], axis=1)
    precision = _moment_precision(iou, kept[queries].sum(axis=1))
    # First over the queries, one by one, then over the thresholds; no golden file decides this order either.
    means = precision.sum(axis=0) / max(len(precision), 1)
    mean = {str(t): _percent(value) for t, value in zip(THRESHOLDS, means, strict=True)}
    recall = {str(t): _percent(first >= t) for t in THRESHOLDS}
    return {"MR-mAP": mean | {"average": _percent(means)}, "MR-R1": recall}


def _moment_precision(iou: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Average precision [queries, thresholds] from IoU [queries, listed by score, true windows]."""
    queries, listed, windows = iou.shape
    thresholds = np.array(THRESHOLDS)
    iou = iou[..., ::-1]  # of true windows with equal IoU the last is taken, which argmax now finds first
    free = np.ones((queries, len(thresholds), windows), dtype=bool)
    right = np.zeros((queries, len(thresholds), listed))
    for rank in range(listed):
        # The best free true window is taken if its IoU reaches the threshold.
        match = np.where(free, iou[:, rank, None, :], -1.0)
        reached = match.max(axis=2) >= thresholds
        right[..., rank] = reached
        free &= ~(reached[..., None] & (match.argmax(axis=2)[..., None] == np.arange(windows)))
    found = right.cumsum(axis=2)
    precision = found / np.arange(1, listed + 1)
    precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    # The area as the protocol words it, steps of recall times precision; no golden file decides the order of the sum.
    return (np.diff(found / true[:, None, None], prepend=0) * precision).cumsum(axis=2)[..., -1]


def _highlight_precision(predictions: list[dict], rows: list[LabelledRow], truth: np.ndarray) -> np.ndarray:
    """Average precision [queries, levels, annotators] of the clip scores."""
    width = truth.shape[1]
    scores = np.full((len(rows), width), -np.inf)  # past the end
    for line, record, row in zip(scores, predictions, rows, strict=True):
        given = record[SALIENCY][: clips(row.duration)]  # long lists are cut, short ones padded with zeros
        line[: clips(row.duration)] = 0
        line[: len(given)] = given
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, truth = np.take_along_axis(scores, order, axis=1), np.take_along_axis(truth, order[:, :, None], axis=1)
    # Clips of equal score count together: the curve has a point only after the last of them.
    last = scores > np.pad(scores[:, 1:], ((0, 0), (0, 1)))
    levels = np.array(list(LEVELS.values()))
    positive = truth[:, None] >= levels[:, None, None]  # [queries, levels, clips, annotators]
    hits = np.where(last[:, None, :, None], positive.cumsum(axis=2), 0)
    precision = hits / np.arange(1, width + 1)[:, None]
    precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    # Recall changes at a point if more positives are found than at any point before.
    changes = np.diff(np.maximum.accumulate(hits, axis=2), axis=2, prepend=0) > 0
    # No golden file decides the order of the sum: here the best clip first.
    return (precision * changes).sum(axis=2) / np.maximum(changes.sum(axis=2), 1)


def _best_clip(predictions: list[dict], rows: list[LabelledRow], truth: np.ndarray) -> np.ndarray:
    """The highest saliency [queries] any annotator gave the best-scored clip; 0 for a clip past the end."""
    best = np.array([np.argmax(record[SALIENCY]) for record in predictions])
    # Past the end `truth` is 0, and its last column lies past the end of every video.
    return truth.max(axis=2)[np.arange(len(rows)), best.clip(max=truth.shape[1] - 1)]


def _truth(rows: list[LabelledRow]) -> np.ndarray:
    """Saliency [queries, clips of the longest video + 1, annotators], 0 outside the relevant clips and past the end."""
    width = max(clips(row.duration) for row in rows)
    truth = np.zeros((len(rows), width + 1, ANNOTATORS), dtype=np.int8)
    for i, row in enumerate(rows):
        truth[i, list(row.relevant_clip_ids)] = np.reshape(row.saliency_scores, (-1, ANNOTATORS))
        truth[i, clips(row.duration) :] = 0  # a last clip that is shorter than two seconds does not count
    return truth


def _constant_window(rows: Sequence[LabelledRow], steps: int) -> list[float]:
    """The fractions of the duration whose window has the best R1@0.7 on `rows`; the first of equals."""
    first, after = np.triu_indices(steps + 1, k=1)
    grid = np.stack([first, after], axis=1) / steps
    true, is_true = _padded([row.relevant_windows for row in rows], 2)
    durations = np.array([[row.duration] for row in rows])
    hits = [(_first_iou(window * durations, true, is_true) >= 0.7).sum() for window in grid]
    return grid[np.argmax(hits)].tolist()


def _padded(lists: Sequence[Sequence[Sequence[float]]], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of windows as float64 [queries, most windows, columns], and which of them are no padding."""
    counts = np.array([len(windows) for windows in lists])
    given = np.arange(max(counts.max(), 1)) < counts[:, None]
    out = np.zeros((*given.shape, columns))
    out[given] = np.array([window for windows in lists for window in windows], dtype=np.float64).reshape(-1, columns)
    return out, given


def _percent(values: np.ndarray) -> float:
    return round(100 * float(np.mean(values)), 2) if values.size else 0.0


def _matched(
    predictions: Iterable[dict], annotations: Iterable[Row | dict], intersection: bool
) -> tuple[list[dict], list[LabelledRow]]:
    rows = labelled(row if isinstance(row, Row) else from_dict(row) for row in annotations)
    return matched(predictions, rows, intersection)


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command `framseg evaluate`."""
    parser = argparse.ArgumentParser(prog="framseg evaluate", description="Print the dataset's metrics.")
    parser.add_argument("predictions", type=Path, help="JSON lines: qid, pred_relevant_windows, pred_saliency_scores")
    parser.add_argument("annotations", type=Path, help="a split with labels, e.g. highlight_val_release.jsonl")
    parser.add_argument("--intersection", action="store_true", help="score only the queries that both files have")
    chosen = parser.parse_args(arguments)
    records, rows = predictions.read_predictions(chosen.predictions), annotations.read(chosen.annotations)
    print(json.dumps(evaluate(records, rows, chosen.intersection), indent=4))


if __name__ == "__main__":
    main()
