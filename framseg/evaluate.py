"""The dataset's metrics for moments and highlights, and the trivial answers to hold a model against.

`python -m framseg.evaluate PREDICTIONS.jsonl ANNOTATIONS.jsonl` prints them as JSON in the official layout.

A prediction is a dict: qid, pred_relevant_windows [[start, end, score], ...] in seconds, pred_saliency_scores
with one number for each 2-second clip; ours have frame probabilities too, probability [f]. Other fields pass unread.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from framseg import moments
from framseg.annotations import (
    ANNOTATORS,
    LabelledRow,
    Row,
    clips,
    frame_labels,
    from_dict,
    labelled,
    read,
    soft_targets,
)
from framseg.predictions import (
    SALIENCY,
    WINDOWS,
    PredictionError,
    all_have,
    matched,
    prediction_record,
    read_predictions,
)

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))  # IoU
LENGTHS = {"full": (0, np.inf), "long": (30, np.inf), "middle": (10, 30), "short": (0, 10)}  # (more than, up to] s
# What tables and figures show, by the official names.
METRICS = {
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
    and MR-R1 by IoU threshold. Where no prediction has saliency scores (or none has windows) the entries that need
    them are left out.

    Raises PredictionError for malformed records and for doubled, missing and unknown qids, all named; with
    `intersection` queries that only one side knows are left aside instead. Raises AnnotationError for rows without
    labels.
    """
    predictions, rows = matched(predictions, _labelled(annotations), intersection)
    brief, highlights, lengths = {}, {}, {}
    if all_have(predictions, WINDOWS):
        pairs = _Pairs(predictions, rows)
        for name, bounds in LENGTHS.items():
            lengths[name] = _moment_metrics(pairs, *bounds)
        full = lengths["full"]
        brief |= {f"MR-full-R1@{t}": full["MR-R1"][t] for t in ("0.5", "0.7")}
        brief |= {"MR-full-mAP": full["MR-mAP"]["average"]}
        brief |= {f"MR-full-mAP@{t}": full["MR-mAP"][t] for t in ("0.5", "0.75")}
        brief |= {f"MR-{name}-mAP": lengths[name]["MR-mAP"]["average"] for name in ("long", "middle", "short")}
    if all_have(predictions, SALIENCY):
        truth = _truth(rows)
        precision, best = _highlight_precision(predictions, rows, truth), _best_clip(predictions, rows, truth)
        for i, (name, least) in enumerate(LEVELS.items()):
            found = {"HL-mAP": _percent(precision[:, i]), "HL-Hit1": _percent(best >= least)}
            highlights[f"HL-min-{name}"] = found
            brief |= {f"HL-min-{name}-{key.removeprefix('HL-')}": value for key, value in found.items()}
    return {"brief": brief} | highlights | lengths


def per_query(predictions: Iterable[dict], annotations: Iterable[Row | dict], intersection: bool = False) -> list[dict]:
    """What `evaluate` averages for R1 and VeryGood HIT@1, a query each, in the order of the annotations.

    [{"qid": int, "iou": float, "hit": bool}, ...]: IoU of the first listed window with the true window it overlaps
    best; whether any annotator called the best-scored clip very good. A field whose predictions are absent is left
    out. Raises as `evaluate` does.
    """
    predictions, rows = matched(predictions, _labelled(annotations), intersection)
    out = [{"qid": row.qid} for row in rows]
    if all_have(predictions, WINDOWS):
        for record, iou in zip(out, _Pairs(predictions, rows).first.tolist(), strict=True):
            record["iou"] = iou
    if all_have(predictions, SALIENCY):
        for record, best in zip(out, _best_clip(predictions, rows, _truth(rows)).tolist(), strict=True):
            record["hit"] = best >= LEVELS["VeryGood"]
    return out


def trivial(rows: Sequence[Row], train_rows: Sequence[Row], seed: int, frames: int = 25) -> dict[str, list[dict]]:
    """Answers that never look at a video, as predictions for `rows`, by name. Learns from `train_rows` only.

    `all ones`: one window, the whole video; flat saliency.
    `best constant window`: the window [a, b] * duration, a and b multiples of 1 / frames, with the best R1@0.7 on
    the train rows; saliency is the train rows' mean by relative position.
    `random masks`: a random train query's mask turned by a random number of frames, which keeps the train share of
    ones and lengths of runs; probabilities are uniform in 0.5..1 for a one and 0..0.5 for a zero.

    Raises AnnotationError where train rows have no labels.
    """
    random = np.random.default_rng(seed)
    labels = np.stack([frame_labels(row, frames) for row in train_rows])
    prior = np.mean([soft_targets(row, frames) for row in train_rows], axis=0)
    start, end = _constant_window(train_rows, frames)
    drawn = labels[labels.any(axis=1)]  # a moment between two frames leaves no one, and an answer needs one
    answers: dict[str, list[dict]] = {"all ones": [], "best constant window": [], "random masks": []}
    for row in rows:
        mask = np.roll(drawn[random.integers(len(drawn))], random.integers(frames))
        probability = (mask + random.random(frames)) / 2
        flat, t = np.ones(frames), row.duration
        made = (
            ([[0.0, t, 1.0]], moments.saliency(flat, t)),
            ([[start * t, end * t, 1.0]], moments.saliency(prior, t)),
            (moments.windows(mask, probability, t), moments.saliency(probability, t)),
        )
        for answer, (found, scores) in zip(answers.values(), made, strict=True):
            answer.append(prediction_record(row, found, scores.tolist()))
    return answers


def shuffled(predictions: Sequence[dict], rows: Sequence[Row], seed: int) -> list[dict]:
    """The same predictions with the query ignored: each query of `rows` gets one made for another video.

    Every prediction is used once. Windows and clip scores are stretched to the new video's duration. Raises
    PredictionError where the qids do not match, windows or clip scores lack, or one video has more than half of the
    queries.
    """
    predictions, rows = matched(predictions, rows)
    if not (all_have(predictions, WINDOWS) and all_have(predictions, SALIENCY)):
        raise PredictionError(f"a shuffle needs predictions with {WINDOWS} and {SALIENCY}")
    random = np.random.default_rng(seed)
    videos = sorted({row.vid for row in rows})
    place = dict(zip(videos, random.permutation(len(videos)).tolist(), strict=True))
    # In an order where a video's queries stand together, a turn by the largest group leaves no one in their own.
    order = sorted(range(len(rows)), key=lambda i: place[rows[i].vid])
    turn = int(np.bincount([place[row.vid] for row in rows]).max())
    if 2 * turn > len(rows):
        raise PredictionError("one video has more than half of the queries, so they cannot all get another video's")
    out: dict[int, dict] = {}
    for at, source in zip(order, np.roll(order, turn).tolist(), strict=True):
        row, scale = rows[at], rows[at].duration / rows[source].duration
        found = [[start * scale, end * scale, score] for start, end, score in predictions[source][WINDOWS]]
        scores, count = predictions[source][SALIENCY], clips(row.duration)
        if len(scores) != count:
            middles, old = (np.arange(count) + 0.5) / count, (np.arange(len(scores)) + 0.5) / len(scores)
            scores = np.interp(middles, old, scores).tolist()
        out[at] = prediction_record(row, found, list(scores))
    return [out[at] for at in range(len(rows))]


class _Pairs:
    """IoU of every listed window with every true one, queries first, padded to the longest lists."""

    def __init__(self, predictions: list[dict], rows: list[Row]):
        true, self.there = _padded([row.relevant_windows for row in rows], 2)
        listed, given = _padded([record[WINDOWS][: moments.LISTED] for record in predictions], 3)
        self.lengths = true[..., 1] - true[..., 0]
        iou = _iou(listed[:, :, None, :2], true[:, None])
        self.iou = np.where(given[:, :, None], iou, 0.0)
        # The order of the scores decides for mAP, ties by the list; R1 takes the list's first.
        self.rank = np.argsort(np.where(given, -listed[..., 2], np.inf), axis=1, kind="stable")
        self.first = self.iou[:, 0].max(axis=1)


def _moment_metrics(pairs: _Pairs, above: float, up_to: float) -> dict:
    """MR-mAP and MR-R1 over true windows longer than `above` and at most `up_to` seconds; queries without drop out."""
    kept = pairs.there & (pairs.lengths > above) & (pairs.lengths <= up_to)
    queries = kept.any(axis=1)
    if not queries.any():
        nothing = {str(t): 0.0 for t in THRESHOLDS}
        return {"MR-mAP": nothing | {"average": 0.0}, "MR-R1": dict(nothing)}
    kept = kept[queries]
    iou = np.where(kept[:, None], pairs.iou[queries], 0.0)
    first = iou[:, 0].max(axis=1)
    iou = np.take_along_axis(iou, pairs.rank[queries][:, :, None], axis=1)
    precision = _moment_precision(iou, kept.sum(axis=1))
    mean = {str(t): _percent(precision[:, i]) for i, t in enumerate(THRESHOLDS)}
    recall = {str(t): _percent(first >= t) for t in THRESHOLDS}
    return {"MR-mAP": mean | {"average": _percent(precision)}, "MR-R1": recall}


def _moment_precision(iou: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Average precision [queries, thresholds] from IoU [queries, listed by score, true windows]."""
    queries, listed, windows = iou.shape
    thresholds = np.array(THRESHOLDS)
    free = np.ones((queries, len(thresholds), windows), dtype=bool)
    right = np.zeros((queries, len(thresholds), listed))
    for rank in range(listed):
        # The best free window at or above the threshold is taken; anything below counts as no match.
        match = iou[:, rank, None, :]
        match = np.where(free & (match >= thresholds[:, None]), match, -1.0)
        taken = match.argmax(axis=2)[..., None]
        matched = np.take_along_axis(match, taken, axis=2) >= 0
        right[..., rank] = matched[..., 0]
        np.put_along_axis(free, taken, np.take_along_axis(free, taken, axis=2) & ~matched, axis=2)
    precision = right.cumsum(axis=2) / np.arange(1, listed + 1)
    precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    return (precision * right).sum(axis=2) / true[:, None]


def _highlight_precision(predictions: list[dict], rows: list[Row], truth: np.ndarray) -> np.ndarray:
    """Average precision [queries, levels, annotators] of the clip scores."""
    counts = np.array([clips(row.duration) for row in rows])
    width = truth.shape[1]
    scores = np.zeros((len(rows), width))  # short lists are padded with zeros, long ones cut
    for i, record in enumerate(predictions):
        given = record[SALIENCY][: counts[i]]
        scores[i, : len(given)] = given
    past = np.arange(width) >= counts[:, None]
    order = np.argsort(np.where(past, np.inf, -scores), axis=1, kind="stable")
    scores, truth = np.take_along_axis(scores, order, axis=1), np.take_along_axis(truth, order[:, :, None], axis=1)
    # Clips of equal score enter together: only after the last of them there is a point of the curve.
    last = np.ones(scores.shape, dtype=bool)
    last[:, :-1] = scores[:, 1:] != scores[:, :-1]
    last[np.arange(len(rows)), counts - 1] = True
    last &= ~past
    levels = np.array(list(LEVELS.values()))
    positive = truth[:, None] >= levels[:, None, None]  # [queries, levels, clips, annotators]
    found = positive.cumsum(axis=2)
    precision = np.where(last[:, None, :, None], found / np.arange(1, width + 1)[:, None], 0.0)
    precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    # Recall changes at a point if it has found more than the point before, which is the highest so far.
    so_far = np.maximum.accumulate(np.where(last[:, None, :, None], found, 0), axis=2)
    changes = np.diff(so_far, axis=2, prepend=0) > 0
    return (precision * changes).sum(axis=2) / np.maximum(changes.sum(axis=2), 1)


def _best_clip(predictions: list[dict], rows: list[Row], truth: np.ndarray) -> np.ndarray:
    """The highest saliency [queries] any annotator gave the best-scored clip; 0 for one past the end."""
    scores = [list(record[SALIENCY]) for record in predictions]
    best = np.array([one.index(max(one)) for one in scores])
    counts = np.array([clips(row.duration) for row in rows])
    found = truth.max(axis=2)[np.arange(len(rows)), best.clip(max=truth.shape[1] - 1)]
    return np.where(best < counts, found, 0)


def _truth(rows: list[Row]) -> np.ndarray:
    """Saliency [queries, clips of the longest video, annotators], 0 outside the relevant clips and past the end."""
    width = max(clips(row.duration) for row in rows)
    truth = np.zeros((len(rows), width + 1, ANNOTATORS), dtype=np.int8)
    for i, row in enumerate(rows):
        truth[i, list(row.relevant_clip_ids)] = np.reshape(row.saliency_scores, (-1, ANNOTATORS))
        truth[i, clips(row.duration) :] = 0  # a last clip that is shorter than two seconds does not count
    return truth


def _constant_window(rows: Sequence[Row], steps: int) -> tuple[float, float]:
    """The fractions of the duration whose window has the best R1@0.7 on `rows`; the first of equals."""
    first, after = np.triu_indices(steps + 1, k=1)
    grid = np.stack([first, after], axis=1) / steps
    true = np.concatenate([np.divide(row.relevant_windows, row.duration) for row in rows])
    starts = np.cumsum([0] + [len(row.relevant_windows) for row in rows[:-1]])
    best = np.maximum.reduceat(_iou(grid[:, None], true), starts, axis=1)
    start, end = grid[(best >= 0.7).sum(axis=1).argmax()].tolist()
    return start, end


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over the hull of windows [..., 2]; 0 where they are apart or both empty."""
    shared = np.minimum(one[..., 1], other[..., 1]) - np.maximum(one[..., 0], other[..., 0])
    hull = np.maximum(one[..., 1], other[..., 1]) - np.minimum(one[..., 0], other[..., 0])
    return np.divide(shared.clip(min=0), hull, out=np.zeros_like(hull), where=hull > 0)


def _padded(lists: Sequence[Sequence[Sequence[float]]], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of windows as float64 [queries, most windows, columns], and which of them are there."""
    counts = np.array([len(windows) for windows in lists])
    there = np.arange(max(counts.max(), 1)) < counts[:, None]
    out = np.zeros((*there.shape, columns))
    out[there] = np.array([window for windows in lists for window in windows], dtype=np.float64).reshape(-1, columns)
    return out, there


def _percent(values: np.ndarray) -> float:
    return round(100 * float(np.mean(values)), 2)


def _labelled(annotations: Iterable[Row | dict]) -> list[LabelledRow]:
    return labelled(row if isinstance(row, Row) else from_dict(row) for row in annotations)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m framseg.evaluate", description="Print the dataset's metrics.")
    parser.add_argument("predictions", type=Path, help="JSON lines: qid, pred_relevant_windows, pred_saliency_scores")
    parser.add_argument("annotations", type=Path, help="a split with labels, e.g. highlight_val_release.jsonl")
    parser.add_argument("--intersection", action="store_true", help="score only the queries that both files have")
    chosen = parser.parse_args(arguments)
    try:
        metrics = evaluate(read_predictions(chosen.predictions), read(chosen.annotations), chosen.intersection)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(metrics, indent=4))


if __name__ == "__main__":
    main()
