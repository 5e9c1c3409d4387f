"""The dataset's metrics for moments and highlights, and the trivial answers to hold a model against.

`python -m framseg.evaluate PREDICTIONS.jsonl ANNOTATIONS.jsonl` prints them as JSON in the official layout.

A prediction is a dict: qid, pred_relevant_windows [[start, end, score], ...] in seconds, pred_saliency_scores
with one number for each 2-second clip; ours have frame probabilities too, probability [f]. Other fields pass unread.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from framseg import moments
from framseg.annotations import (
    ANNOTATORS,
    LONGEST,
    AnnotationError,
    Row,
    clips,
    frame_labels,
    from_dict,
    is_integer,
    is_number,
    json_lines,
    parse_object,
    read,
    soft_targets,
    write_lines,
)

WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"
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


class PredictionError(ValueError):
    """Predictions that cannot be used; the message names file, line and qid, one bad record a line."""


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
    if _all_have(predictions, WINDOWS):
        pairs = _Pairs(predictions, rows)
        for name, bounds in LENGTHS.items():
            lengths[name] = _moment_metrics(pairs, *bounds)
        full = lengths["full"]
        brief |= {f"MR-full-R1@{t}": full["MR-R1"][t] for t in ("0.5", "0.7")}
        brief |= {"MR-full-mAP": full["MR-mAP"]["average"]}
        brief |= {f"MR-full-mAP@{t}": full["MR-mAP"][t] for t in ("0.5", "0.75")}
        brief |= {f"MR-{name}-mAP": lengths[name]["MR-mAP"]["average"] for name in ("long", "middle", "short")}
    if _all_have(predictions, SALIENCY):
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
    if _all_have(predictions, WINDOWS):
        for record, iou in zip(out, _Pairs(predictions, rows).first.tolist(), strict=True):
            record["iou"] = iou
    if _all_have(predictions, SALIENCY):
        for record, best in zip(out, _best_clip(predictions, rows, _truth(rows)).tolist(), strict=True):
            record["hit"] = best >= LEVELS["VeryGood"]
    return out


def read_predictions(path: str | Path) -> list[dict]:
    """Read and check a prediction file; raises PredictionError with file, line and qid of every bad record."""
    return parse_predictions(json_lines(path, PredictionError), str(path))


def parse_predictions(lines: Iterable[tuple[int, str]], name: str) -> list[dict]:
    """Check numbered lines of JSON; `name` is the file in the messages. Raises PredictionError as above."""
    records, bad, seen = [], [], {}
    for number, text in lines:
        record, reasons = parse_object(text)
        if record is not None:
            reasons = _reasons(record)
            qid = record.get("qid")
            if is_integer(qid) and seen.setdefault(qid, number) != number:
                reasons.append(f"the query is on line {seen[qid]} already; keep one prediction")
        if reasons:
            bad.append(f"{name}:{number}: qid {(record or {}).get('qid', 'unknown')}: {'; '.join(reasons)}")
        else:
            records.append(record)
    if bad:
        raise PredictionError(_some(bad, "\n"))
    if not records:
        raise PredictionError(f"{name}: holds no predictions; expected one JSON object a line")
    return records


def read_released(path: str | Path) -> list[dict]:
    """Predictions out of a CSV as the paper's authors released theirs.

    Columns: qid, duration (s), windows (start/end/score, several joined by |), p0, p1, ... (frame probabilities). The
    windows are put best first and filled up to ten as they were submitted; clip scores follow from the probabilities.
    Raises PredictionError with file, line and qid of every row that cannot be read.
    """
    names: list[str] = []
    records, bad = [], []
    seen: dict[int, int] = {}
    for number, text in json_lines(path, PredictionError):
        try:
            fields = next(csv.reader([text]))
        except csv.Error as error:
            raise PredictionError(f"{path}:{number}: not a line of CSV ({error})") from None
        if not names:
            names = fields
            lacks = {"qid", "duration", "windows", "p0"} - set(names)
            if lacks:
                raise PredictionError(f"{path}:{number}: lacks the columns {', '.join(sorted(lacks))}")
            continue
        cells = dict(zip(names, fields, strict=False))
        try:
            if len(fields) != len(names):
                raise ValueError(f"has {len(fields)} fields, and the first line names {len(names)}")
            duration = float(cells["duration"])
            if not is_number(duration) or not 0 < duration <= LONGEST:
                raise ValueError(f"duration must be seconds above 0 and at most {LONGEST}, not {duration}")
            listed = [[float(part) for part in window.split("/")] for window in cells["windows"].split("|")]
            probability = [float(cell) for name, cell in cells.items() if re.fullmatch(r"p\d+", name)]
            record = {"qid": int(cells["qid"]), "duration": duration, WINDOWS: listed}
            reasons = _reasons(record)
            if (first := seen.setdefault(record["qid"], number)) != number:
                reasons.append(f"the query is on line {first} already; keep one prediction")
            if not reasons:
                record[WINDOWS] = moments.filled(sorted(listed, key=lambda window: -window[2]), duration)
                record[SALIENCY] = moments.saliency(probability, duration).tolist()
                record["probability"] = probability
        except ValueError as error:
            reasons = [str(error)]
        records += [] if reasons else [record]
        bad += [f"{path}:{number}: qid {cells.get('qid', 'unknown')}: {'; '.join(reasons)}"] if reasons else []
    if bad or not records:
        raise PredictionError(_some(bad, "\n") or f"{path}: holds no predictions")
    return records


def write_predictions(path: str | Path, predictions: Iterable[dict]) -> None:
    """Check and write predictions, one JSON object a line; the file appears whole or not at all."""
    predictions = list(predictions)
    _check(predictions)
    write_lines(path, predictions, PredictionError)


def matched(
    predictions: Iterable[dict], rows: Sequence[Row], intersection: bool = False
) -> tuple[list[dict], list[Row]]:
    """Checked predictions and their rows, in pairs, in the order of the rows; labels are not needed.

    Raises PredictionError as `evaluate` does.
    """
    predictions = list(predictions)
    _check(predictions)
    by_qid = {record["qid"]: record for record in predictions}
    qids = {row.qid for row in rows}
    problems = [("annotated twice", _twice(row.qid for row in rows))]
    if not intersection:
        problems.append(("without a prediction", [row.qid for row in rows if row.qid not in by_qid]))
        problems.append(("predicted but not annotated", [qid for qid in by_qid if qid not in qids]))
    said = [f"queries {what}: {len(which)} (qid {_some(which, ', ')})" for what, which in problems if which]
    if said:
        raise PredictionError("; ".join(said))
    rows = [row for row in rows if row.qid in by_qid]
    if not rows:
        raise PredictionError("no query is both predicted and annotated; take the annotations of the same split")
    return [by_qid[row.qid] for row in rows], rows


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
            answer.append(_prediction(row, found, scores.tolist()))
    return answers


def shuffled(predictions: Sequence[dict], rows: Sequence[Row], seed: int) -> list[dict]:
    """The same predictions with the query ignored: each query of `rows` gets one made for another video.

    Every prediction is used once. Windows and clip scores are stretched to the new video's duration. Raises
    PredictionError where the qids do not match, windows or clip scores lack, or one video has more than half of the
    queries.
    """
    predictions, rows = matched(predictions, rows)
    if not (_all_have(predictions, WINDOWS) and _all_have(predictions, SALIENCY)):
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
        out[at] = _prediction(row, found, list(scores))
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


def _prediction(row: Row, windows: list[list[float]], scores: list[float]) -> dict:
    record = {"qid": row.qid, "query": row.query, "vid": row.vid, "duration": row.duration}
    return record | {WINDOWS: windows, SALIENCY: scores}


def _labelled(annotations: Iterable[Row | dict]) -> list[Row]:
    rows = [row if isinstance(row, Row) else from_dict(row) for row in annotations]
    without = [row.qid for row in rows if not row.labelled]
    if without:
        raise AnnotationError(f"{len(without)} rows have no labels to score against (qid {_some(without, ', ')})")
    return rows


def _check(predictions: list[dict]) -> None:
    bad = []
    for place, record in enumerate(predictions, 1):
        reasons = _reasons(record) if isinstance(record, dict) else [f"expected a dict, not {type(record).__name__}"]
        if reasons:
            qid = record.get("qid", "unknown") if isinstance(record, dict) else "unknown"
            bad.append(f"prediction {place}: qid {qid}: {'; '.join(reasons)}")
    if bad:
        raise PredictionError(_some(bad, "\n"))
    doubled = _twice(record["qid"] for record in predictions)
    if doubled:
        raise PredictionError(f"queries predicted twice: {len(doubled)} (qid {_some(doubled, ', ')}); keep one of each")


def _reasons(record: dict) -> list[str]:
    """Everything that is wrong with one prediction; empty if nothing is."""
    reasons = []
    if not is_integer(record.get("qid")):
        reasons.append(f"qid must be an integer, not {record.get('qid')!r}")
    if WINDOWS not in record and SALIENCY not in record:
        reasons.append(f"has neither {WINDOWS} nor {SALIENCY}")
    if WINDOWS in record:
        listed = record[WINDOWS]
        if not isinstance(listed, list | tuple) or not listed:
            reasons.append(f"{WINDOWS} must be a list of [start, end, score]")
        else:
            reasons += [f"window {i + 1} {reason}" for i, w in enumerate(listed) if (reason := _window_reason(w))]
    if SALIENCY in record:
        scores = record[SALIENCY]
        if not isinstance(scores, list | tuple | np.ndarray) or not len(scores):
            reasons.append(f"{SALIENCY} must be a list of numbers, one for each clip")
        elif (at := _not_finite(scores)) is not None:
            reasons.append(f"{SALIENCY}: clip {at} has {str(scores[at])[:60]!r}, not a finite number")
    if record.get("probability") is not None and not _are_shares(record["probability"]):
        reasons.append("probability must be a list of numbers in 0..1, one for each frame")
    return reasons


def _window_reason(window: Any) -> str | None:
    if not isinstance(window, list | tuple | np.ndarray) or len(window) != 3:
        return f"is not [start, end, score]: {str(window)[:60]}"
    if _not_finite(window) is not None:
        return f"is not three finite numbers: {str(list(window))[:60]}"
    if window[1] < window[0]:
        return f"ends before it starts: {list(window)}"
    return None


def _not_finite(values: Sequence) -> int | None:
    """The place of the first entry that is not a finite number; None if all are."""
    # Whole lists of plain floats pass here at once: a split has 100,000 of them.
    kinds = set(map(type, values))
    if kinds == {float} and all(map(math.isfinite, values)):
        return None
    if kinds <= {float, int} and all(-1e300 < value < 1e300 for value in values):
        return None
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real) or not -1e300 < value < 1e300:
            return i
    return None


def _are_shares(values: Any) -> bool:
    listed = isinstance(values, list | tuple | np.ndarray)
    return listed and _not_finite(values) is None and all(0 <= value <= 1 for value in values)


def _all_have(predictions: list[dict], field: str) -> bool:
    lacking = [record["qid"] for record in predictions if field not in record]
    if lacking and len(lacking) < len(predictions):
        raise PredictionError(f"{len(lacking)} predictions lack {field} that others have: qid {_some(lacking, ', ')}")
    return not lacking


def _twice(qids: Iterable[int]) -> list[int]:
    seen: set[int] = set()
    return [qid for qid in qids if qid in seen or seen.add(qid)]


def _some(items: Sequence, separator: str, most: int = 20) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([str(item) for item in items[:most]] + more)


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
