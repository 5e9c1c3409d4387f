"""The prediction record: read, check, build and write it.

A record is a dict: qid, pred_relevant_windows [[start, end, score], ...] in seconds, pred_saliency_scores with one
number per 2-second clip. Ours also have query, vid, duration, mask, probability [f] of the frames, and valid. Fields
of other names are ignored.
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
from framseg.jsonl import Entry, LinesError, is_integer, is_number, numbered_lines, parse_json, parse_object, shortlist

WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"
NUMBERS = (float, int, np.floating, np.integer)
AnyRow = TypeVar("AnyRow", bound=Row)


class PredictionError(FramsegError, ValueError):
    """Predictions that cannot be used; the message has a line for each: file:line, qid, every reason."""


def read_predictions(path: str | Path) -> list[dict]:
    """Read and check a prediction file; raises PredictionError with file, line and qid of the bad records."""
    return parse_predictions(numbered_lines(path), str(path))


def parse_predictions(lines: Iterable[tuple[int, str]], name: str) -> list[dict]:
    """Check numbered lines of JSON as `read_predictions` does; `name` stands for the file in the messages."""
    records = _checked(((number, *parse_object(text)) for number, text in lines), f"{name}:")
    if not records:
        raise PredictionError(f"{name}: holds no predictions; expected one JSON object per line")
    return records


def reference(folder: str | Path, split: str) -> Path:
    """The file with the authors' predictions for `split` (val or test) in a folder of reference material.

    Raises PredictionError if the folder has neither the CSV nor the authors' JSON.
    """
    places = [
        Path(folder, f"golden/released_{split}_scores.csv"),
        Path(folder, f"released/hl_{split}_predictions.json"),
    ]
    for place in places:
        if place.is_file():
            return place
    get = f"framseg download --reference {folder}"
    raise PredictionError(f"neither {places[0]} nor {places[1]} exists; `{get}` fetches the latter")


def read_released(path: str | Path) -> list[dict]:
    """The predictions that the paper's authors published, from their JSON (if the name ends so) or a CSV of it.

    JSON: a list of objects with qid, duration (s), score (frame probabilities [f]), preds (the mask, f digits) and
    pred_relevant_windows. CSV: columns qid, duration, windows (start/end/score, several joined by |), p0, p1, ...

    The windows are put best first and filled up to ten, and clip saliency follows from the probabilities (`overlap`),
    as the authors submitted them. Records from the JSON also have mask and valid. Raises PredictionError with the
    file, line (or row of the list) and qid of the bad records.
    """
    if Path(path).suffix == ".json":
        records = _checked(_json_rows(path), f"{path}: row ", _released_reasons)
    else:
        records = _checked(_csv_rows(path), f"{path}:", _released_reasons)
    if not records:
        raise PredictionError(f"{path}: holds no predictions")
    for record in records:
        duration, probability = record["duration"], record["probability"]
        record[WINDOWS] = moments.filled(sorted(record[WINDOWS], key=lambda window: -window[2]), duration)
        record[SALIENCY] = moments.saliency(probability, duration).tolist()
        if "mask" in record:
            record["valid"], record["mask"] = _counted(record["mask"], len(probability))
    return records


def write_predictions(path: str | Path, predictions: Iterable[dict]) -> None:
    """Check and write predictions, one JSON object per line; the file appears whole or not at all."""
    predictions = check(predictions)
    try:
        jsonl.write_lines(path, predictions)
    except LinesError as error:
        raise PredictionError(str(error)) from None


def check(predictions: Iterable[dict]) -> list[dict]:
    """The predictions as a list; raises PredictionError with the place in the list and qid of the bad records."""
    entries: Iterator[Entry] = (
        (place, record, [])
        if isinstance(record, dict)
        else (place, None, [f"expected a dict, not {type(record).__name__}"])
        for place, record in enumerate(predictions, 1)
    )
    return _checked(entries, "prediction ")


def matched(
    predictions: Iterable[dict], rows: Sequence[AnyRow], intersection: bool = False
) -> tuple[list[dict], list[AnyRow]]:
    """Checked predictions and their rows, in pairs, in the order of the rows; labels are not needed.

    Raises PredictionError as `evaluate.evaluate` does.
    """
    by_qid = {record["qid"]: record for record in check(predictions)}
    times = Counter(row.qid for row in rows)
    problems = {"annotated twice": [qid for qid in times if times[qid] > 1]}
    if not intersection:
        problems["without a prediction"] = [qid for qid in times if qid not in by_qid]
        problems["predicted but not annotated"] = [qid for qid in by_qid if qid not in times]
    reasons = [f"queries {problem}: {len(qids)} (qid {shortlist(qids)})" for problem, qids in problems.items() if qids]
    if reasons:
        raise PredictionError("; ".join(reasons))
    pairs = [(by_qid[row.qid], row) for row in rows if row.qid in by_qid]
    if not pairs:
        raise PredictionError("no query is both predicted and annotated; take the annotations of the same split")
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
    valid, mask = _counted(mask, len(probability))
    windows = moments.windows(mask, probability, row.duration, inference.windows)
    saliency = moments.saliency(probability, row.duration, inference.saliency)
    answer = {"mask": mask, "probability": probability.tolist(), "valid": valid}
    return prediction_record(row, windows, saliency) | answer


def _counted(mask: str, frames: int) -> tuple[bool, str]:
    """Whether the mask is valid, and the mask that counts: all ones for an invalid one."""
    valid = moments.valid(mask, frames)
    return valid, mask if valid else "1" * frames


def _json_rows(path: str | Path) -> Iterator[Entry]:
    """The objects of the authors' JSON under the names of our records."""
    listed, reasons = parse_json("".join(text for _, text in numbered_lines(path)))
    if reasons or not isinstance(listed, list):
        raise LinesError(f"{path}: {'; '.join(reasons) or 'expected a JSON list of predictions'}")
    for number, row in enumerate(listed, 1):
        if not isinstance(row, dict):
            yield number, None, [f"expected a JSON object, found {type(row).__name__}"]
            continue
        lacking = [name for name in ("duration", "score", "preds", WINDOWS) if row.get(name) is None]
        record = {"qid": row.get("qid"), "duration": row.get("duration"), WINDOWS: row.get(WINDOWS)}
        record |= {"probability": row.get("score"), "mask": row.get("preds")}
        yield number, record, [f"lacks {', '.join(lacking)}"] if lacking else []


def _csv_rows(path: str | Path) -> Iterator[Entry]:
    """The rows of a CSV of the authors' predictions as records."""
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


def _released_reasons(record: dict) -> list[str]:
    duration, mask = record["duration"], record.get("mask", "")
    reasons = _reasons(record)
    if not is_number(duration) or not 0 < duration <= LONGEST:
        reasons.append(f"duration must be seconds above 0 and at most {LONGEST}, not {str(duration)[:60]}")
    if not isinstance(mask, str):
        reasons.append(f"preds must be text, not {str(mask)[:60]}")
    return reasons


def _checked(entries: Iterable[Entry], place: str, reasons: Callable[[dict], list[str]] | None = None) -> list[dict]:
    records, bad = jsonl.checked_records(entries, place, reasons or _reasons)
    if bad:
        raise PredictionError(shortlist(bad, "\n"))
    return records


def _reasons(record: dict) -> list[str]:
    """Everything that is wrong with a record; empty if nothing is."""
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
            reasons += [f"window {i} {reason}" for i, window in enumerate(listed, 1) if (reason := _window(window))]
    if SALIENCY in record:
        reasons += _list_reasons(SALIENCY, record[SALIENCY], "clip", "finite number")
    if record.get("probability") is not None:
        reasons += _list_reasons("probability", record["probability"], "frame", "number in 0..1", 0, 1)
    return reasons


def _window(window: object) -> str | None:
    """What is wrong with [start, end, score]; None if nothing is."""
    if not isinstance(window, list | tuple | np.ndarray) or len(window) != 3:
        return f"is not [start, end, score]: {str(window)[:60]}"
    if _odd(window) is not None:
        return f"is not three finite numbers: {str(list(window))[:60]}"
    return f"ends before it starts: {list(window)}" if window[1] < window[0] else None


def _list_reasons(name: str, values: object, item: str, kind: str, *bounds: float) -> list[str]:
    if not isinstance(values, list | tuple | np.ndarray) or not len(values):
        return [f"{name} must be a list of numbers, one for each {item}"]
    place = _odd(values, *bounds)
    return [] if place is None else [f"{name}: {item} {place} has {str(values[place])[:60]!r}, not a {kind}"]


def _odd(values: Sequence | np.ndarray, least: float = -float_info.max, most: float = float_info.max) -> int | None:
    """The place of the first value that is not a number from `least` to `most`; None if all are."""
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, NUMBERS) or not least <= value <= most:
            return place
    return None
