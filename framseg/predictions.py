"""The prediction record: read, check and write it."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from framseg import FramsegError, config, moments
from framseg.annotations import LONGEST, Row
from framseg.jsonl import is_integer, is_number, numbered_lines, parse_object, write_lines

WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"


class PredictionError(FramsegError, ValueError):
    """Predictions that cannot be used; the message names file, line and qid, one bad record a line."""


def read_predictions(path: str | Path) -> list[dict]:
    """Read and check a prediction file; raises PredictionError with file, line and qid of every bad record."""
    return parse_predictions(numbered_lines(path, PredictionError), str(path))


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
        raise PredictionError(some(bad, "\n"))
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
    for number, text in numbered_lines(path, PredictionError):
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
        raise PredictionError(some(bad, "\n") or f"{path}: holds no predictions")
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
    said = [f"queries {what}: {len(which)} (qid {some(which, ', ')})" for what, which in problems if which]
    if said:
        raise PredictionError("; ".join(said))
    rows = [row for row in rows if row.qid in by_qid]
    if not rows:
        raise PredictionError("no query is both predicted and annotated; take the annotations of the same split")
    return [by_qid[row.qid] for row in rows], rows


def prediction_record(row: Row, windows: list[list[float]], scores: list[float]) -> dict:
    return about(row) | {WINDOWS: windows, SALIENCY: scores}


def _check(predictions: list[dict]) -> None:
    bad = []
    for place, record in enumerate(predictions, 1):
        reasons = _reasons(record) if isinstance(record, dict) else [f"expected a dict, not {type(record).__name__}"]
        if reasons:
            qid = record.get("qid", "unknown") if isinstance(record, dict) else "unknown"
            bad.append(f"prediction {place}: qid {qid}: {'; '.join(reasons)}")
    if bad:
        raise PredictionError(some(bad, "\n"))
    doubled = _twice(record["qid"] for record in predictions)
    if doubled:
        raise PredictionError(f"queries predicted twice: {len(doubled)} (qid {some(doubled, ', ')}); keep one of each")


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


def all_have(predictions: list[dict], field: str) -> bool:
    lacking = [record["qid"] for record in predictions if field not in record]
    if lacking and len(lacking) < len(predictions):
        raise PredictionError(f"{len(lacking)} predictions lack {field} that others have: qid {some(lacking, ', ')}")
    return not lacking


def _twice(qids: Iterable[int]) -> list[int]:
    seen: set[int] = set()
    return [qid for qid in qids if qid in seen or seen.add(qid)]


def some(items: Sequence, separator: str, most: int = 20) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([str(item) for item in items[:most]] + more)


def understood(
    mask: str, probability: np.ndarray, duration: float, inference: config.Inference
) -> tuple[bool, str, list[list[float]], np.ndarray]:
    """Valid or not, the mask that counts (all ones for an invalid one), windows and clip saliency."""
    valid = moments.valid(mask, len(probability))
    mask = mask if valid else "1" * len(probability)
    windows = moments.windows(mask, probability, duration, inference.windows)
    return valid, mask, windows, moments.saliency(probability, duration, inference.saliency)


def decoded_record(row: Row, mask: str, probability: np.ndarray, inference: config.Inference) -> dict:
    valid, mask, windows, saliency = understood(mask, probability, row.duration, inference)
    answer = {"mask": mask, "probability": probability.tolist(), "valid": valid}
    return about(row) | {WINDOWS: windows, SALIENCY: saliency.tolist()} | answer


def about(row: Row) -> dict:
    return {"qid": row.qid, "query": row.query, "vid": row.vid, "duration": row.duration}
