"""JSON lines: files of one JSON object per line, and the checks that their readers share."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for a finite int or float that is no bool."""
    if type(value) is int:
        return abs(value) < 2**53  # larger ones are no seconds and would not fit a float
    return isinstance(value, float) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """True for text that can be written; JSON's escapes can spell halves of a character, which cannot."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def numbered_lines(path: str | Path, error: type[ValueError]) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line of a UTF-8 file that is not blank; raises `error` if unreadable."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{path}:{number}: is not UTF-8 text ({reason.reason} at byte {reason.start})") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None


def parse_object(text: str | bytes) -> tuple[dict | None, list[str]]:
    """A line's JSON object and no reasons, or None and the reason why there is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, [f"not JSON ({' '.join(str(error).split())})"]
    if not isinstance(record, dict):
        return None, [f"expected a JSON object, found {type(record).__name__}"]
    return record, []


def write_lines(path: str | Path, records: Iterable[dict], error: type[ValueError]) -> None:
    """One JSON object a line, written aside and renamed, so that a cut-off run leaves no half file.

    Raises `error` with the qid of a record that JSON cannot hold (NaN, a foreign type).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for record in records:
                try:
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")
                except (TypeError, ValueError, RecursionError) as reason:
                    raise error(f"{path}: qid {record.get('qid')}: cannot be written: {reason}") from None
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")
