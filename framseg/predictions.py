"""The prediction record: read, check, build and write it.

A record is a dict: qid, pred_relevant_windows [[start, end, score], ...] in seconds, pred_saliency_scores with one
number per 2-second clip. Ours also have query, vid, duration, mask, probability [f], valid. Other fields are ignored.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from sys import float_info
from typing import TypeVar

import numpy as np

from framseg import FramsegError, config, jsonl, moments
from framseg.annotations import LONGEST, Row
from framseg.jsonl import Entry, LinesError, is_integer, is_number, numbered_lines, shortlist

WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"
NUMBERS = (float, int, np.floating, np.integer)
AnyRow = TypeVar("AnyRow", bound=Row)


class PredictionError(FramsegError, ValueError):
    """Predictions that cannot be used; the message has a line for each: file:line, qid, every reason."""


def read_predictions(path: str | Path) -> list[dict]:
    """The checked records of a prediction file; raises PredictionError."""
    return checked(jsonl.parsed(numbered_lines(path)), f"{path}:")


def checked(entries: Iterable[Entry], place: str, reasons: Callable[[dict], Iterable[str]] | None = None) -> list[dict]:
    """The records of `jsonl.checked_records`; raises PredictionError with the bad ones, or if there are no records.

    reasons: everything that is wrong with a record, by default what keeps `framseg.evaluate` from using it.
    """
    records, bad = jsonl.checked_records(entries, place, reasons or _reasons)
    if bad:
        raise PredictionError(shortlist(bad, "\n"))
    return records


def reference(folder: str | Path, split: str) -> Path:
    """The CSV or JSON of the authors' predictions for `split` in a folder of reference material, or PredictionError."""
    folder = Path(folder)
    table, original = folder / f"golden/released_{split}_scores.csv", folder / f"released/hl_{split}_predictions.json"
    if not table.is_file() and not original.is_file():
        get = f"framseg download --reference {folder}"
        raise PredictionError(f"neither {table} nor {original} exists; `{get}` fetches the latter")
    return table if table.is_file() else original


def read_released(path: str | Path) -> list[dict]:
    """The predictions that the paper's authors published, from their JSON (if the name ends so) or a CSV of it.

    JSON: a list of objects with qid, duration (s), score (frame probabilities [f]), preds (the mask, f digits) and
    pred_relevant_windows. CSV: columns qid, duration, windows (start/end/score, several joined by |), p0, p1, ...
    The windows are put best first and filled up to ten, and clip saliency follows from the probabilities (`overlap`),
    as the authors submitted them. Records from the JSON also have mask and valid. Raises PredictionError.
    """
    rows = _json_rows(path) if Path(path).suffix == ".json" else _csv_rows(path)
    records = checked(rows, f"{path}:", _released_reasons)
    for record in records:
        duration, probability = record["duration"], record["probability"]
        record[WINDOWS] = moments.filled(sorted(record[WINDOWS], key=lambda window: -window[2]), duration)
        record[SALIENCY] = moments.saliency(probability, duration).tolist()
        if "mask" in record:
            record["valid"] = moments.valid(record["mask"], len(probability))
            record["mask"] = moments.counted(record["mask"], len(probability))
    return records


def write_predictions(path: str | Path, predictions: Iterable[dict]) -> None:
    """Check and write predictions, one JSON object per line; the file appears whole or not at all."""
    jsonl.write_lines(path, _valid(predictions), PredictionError)


def matched(
    predictions: Iterable[dict], rows: Sequence[AnyRow], intersection: bool = False
) -> tuple[list[dict], list[AnyRow]]:
    """Checked predictions and their rows, in the order of the rows. Raises PredictionError as `evaluate` does."""
    by_qid = {record["qid"]: record for record in _valid(predictions)}
    times = Counter(row.qid for row in rows)
    problems = {"annotated twice": [qid for qid in times if times[qid] > 1]}
    if not intersection:
        problems["without a prediction"] = [qid for qid in times if qid not in by_qid]
        problems["predicted but not annotated"] = [qid for qid in by_qid if qid not in times]
    reasons = [f"queries {problem}: {len(qids)} (qid {shortlist(qids)})" for problem, qids in problems.items() if qids]
    pairs = [(by_qid[row.qid], row) for row in rows if row.qid in by_qid]
    if not pairs:
        reasons.append("no query is both predicted and annotated; take the annotations of the same split")
    if reasons:
        raise PredictionError("; ".join(reasons))
    return [record for record, _ in pairs], [row for _, row in pairs]


def all_have(predictions: list[dict], field: str) -> bool:
    """True if every prediction has the field, False if none has; raises PredictionError with the qids if some have."""
    lacking = [record["qid"] for record in predictions if field not in record]
    if lacking and len(lacking) < len(predictions):
        raise PredictionError(f"{len(lacking)} predictions lack {field} that others have: qid {shortlist(lacking)}")
    return not lacking


def prediction_record(row: Row, windows: Sequence[Sequence[float]], saliency: Sequence[float] | np.ndarray) -> dict:
    """The record of a query: windows [[start, end, score], ...] in seconds, saliency of each 2-second clip."""
    question = {"qid": row.qid, "query": row.query, "vid": row.vid, "duration": row.duration}
    return question | {WINDOWS: [list(window) for window in windows], SALIENCY: np.asarray(saliency).tolist()}


def answer_record(row: Row, mask: str, probability: np.ndarray, inference: config.Inference) -> dict:
    """The record of a model's answer.

    mask: its characters; an invalid mask counts, and is stored, as all ones (`valid` is False then). probability:
    float64 [f], of foreground. inference: names the policy for the windows and the method for clip saliency.
    """
    frames = len(probability)
    windows = moments.windows(mask, probability, row.duration, inference.windows, inference.rounding)
    saliency = moments.saliency(probability, row.duration, inference.saliency)
    answer = {"mask": moments.counted(mask, frames), "probability": probability.tolist()}
    return prediction_record(row, windows, saliency) | answer | {"valid": moments.valid(mask, frames)}


def _json_rows(path: str | Path) -> Iterator[Entry]:
    names = {"qid": "qid", "duration": "duration", WINDOWS: WINDOWS, "score": "probability", "preds": "mask"}
    for place, row, reasons in jsonl.listed(path):
        if isinstance(row, dict):
            reasons = [f"lacks {name}" for name in names if row.get(name) is None]
            row = {ours: row.get(name) for name, ours in names.items()}
        yield place, row, reasons


def _csv_rows(path: str | Path) -> Iterator[Entry]:
    names: list[str] = []
    for number, text in numbered_lines(path):
        try:
            fields = next(csv.reader([text]))
        except csv.Error as error:
            raise LinesError(f"{path}:{number}: not a line of CSV ({error})") from None
        cells = dict(zip(names, fields, strict=False))
        if not names:
            names = fields
            if lacking := {"qid", "duration", "windows", "p0"} - set(names):
                raise LinesError(f"{path}:{number}: lacks the columns {', '.join(sorted(lacking))}")
        elif len(fields) != len(names):
            yield number, cells, [f"has {len(fields)} fields, and the first line names {len(names)}"]
        else:
            try:
                record = {"qid": int(cells["qid"]), "duration": float(cells["duration"])}
                windows = [[float(part) for part in window.split("/")] for window in cells["windows"].split("|")]
                probability = [float(cell) for name, cell in cells.items() if re.fullmatch(r"p\d+", name)]
                yield number, record | {WINDOWS: windows, "probability": probability}, []
            except ValueError as error:
                yield number, cells, [str(error)]


def _released_reasons(record: dict) -> Iterator[str]:
    duration, mask = record["duration"], record.get("mask", "")
    yield from _reasons(record)
    if not is_number(duration) or not 0 < duration <= LONGEST:
        yield f"duration must be seconds above 0 and at most {LONGEST}, not {str(duration)[:60]}"
    if not isinstance(mask, str):
        yield f"preds must be text, not {str(mask)[:60]}"


def _valid(predictions: Iterable[dict]) -> list[dict]:
    return checked(((number, record, []) for number, record in enumerate(predictions, 1)), "prediction ")


def _reasons(record: dict) -> Iterator[str]:
    """Everything that is wrong with a record."""
    if not is_integer(record.get("qid")):
        yield f"qid must be an integer, not {record.get('qid')!r}"
    if WINDOWS not in record and SALIENCY not in record:
        yield f"has neither {WINDOWS} nor {SALIENCY}"
    if WINDOWS in record:
        yield from _window_reasons(record[WINDOWS])
    if SALIENCY in record:
        yield from _list_reasons(SALIENCY, record[SALIENCY], "clip", "finite number")
    if record.get("probability") is not None:
        yield from _list_reasons("probability", record["probability"], "frame", "number in 0..1", 0, 1)


def _window_reasons(windows: object) -> Iterator[str]:
    if not isinstance(windows, list | tuple):
        yield f"{WINDOWS} must be a list of [start, end, score], not {str(windows)[:60]}"
        return
    if not windows:
        yield f"{WINDOWS} is empty: give at least one window, e.g. the whole video"
    for number, window in enumerate(windows, 1):
        if not isinstance(window, list | tuple | np.ndarray) or len(window) != 3:
            yield f"window {number} is not [start, end, score]: {str(window)[:60]}"
        elif _odd(window) is not None:
            yield f"window {number} is not three finite numbers: {str(list(window))[:60]}"
        elif window[1] < window[0]:
            yield f"window {number} ends before it starts: {list(window)}"


def _list_reasons(name: str, values: object, item: str, kind: str, *bounds: float) -> Iterator[str]:
    if not isinstance(values, list | tuple | np.ndarray):
        yield f"{name} must be a list of numbers, one for each {item}, not {str(values)[:60]}"
    elif not len(values):
        yield f"{name} is empty: give one number for each {item}"
    elif (place := _odd(values, *bounds)) is not None:
        text = "the text " if isinstance(values[place], str) else ""
        yield f"{name}: {item} {place} has {text}{str(values[place])[:60]!r}, not a {kind}"


def _odd(values: Sequence | np.ndarray, least: float = -float_info.max, most: float = float_info.max) -> int | None:
    """The place of the first value that is not a number from `least` to `most`; None if all are."""
    fine = (not isinstance(value, bool) and isinstance(value, NUMBERS) and least <= value <= most for value in values)
    return next((place for place, number in enumerate(fine) if not number), None)
