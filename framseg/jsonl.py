"""JSON lines: files of one JSON object per line, and the checks that their readers share."""

import codecs
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

import numpy as np

from framseg import FramsegError

# What a file is that is no UTF-8 text, and the command that makes text of it, by its first bytes, the longest first.
FOREIGN: dict[bytes | tuple[bytes, ...], str] = {
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, b"{\0\0"): "UTF-32: convert it, `iconv -f UTF-32 -t UTF-8 OLD > NEW`",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0"): "UTF-16: convert it, `iconv -f UTF-16 -t UTF-8 OLD > NEW`",
    b"\x1f\x8b": "compressed by gzip: unpack it, `gunzip -c OLD > NEW`",
    b"PK\3\4": "a zip archive: unpack it, `unzip OLD`",
}
Entry = tuple[int | str, object, list[str]]  # a line's number, its decoded value, what is wrong with it so far


class LinesError(FramsegError, ValueError):
    """A file that cannot be read, or a record that cannot be written; the message names the file."""


def is_integer(value: object) -> TypeGuard[int]:
    """True for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a finite int or float that is no bool."""
    if is_integer(value):
        return abs(value) < 2**53  # larger integers are no seconds and would not fit a float
    return isinstance(value, float) and math.isfinite(value)


def is_text(value: object) -> TypeGuard[str]:
    """True for text that can be written; JSON's escapes can spell halves of a character, which cannot."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def shortlist(items: Sequence, separator: str = ", ", most: int = 20) -> str:
    """The first `most` items as text, and how many more there are: "a, b, and 3 more"."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([str(item) for item in items[:most]] + more)


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line of a UTF-8 file that is not blank; raises LinesError if unreadable."""
    try:
        with open(path, "rb") as file:
            # Byte order marks are left out; files that were joined have them in the middle too.
            yield from decoded_lines((line.removeprefix(codecs.BOM_UTF8) for line in file), str(path))
    except OSError as error:
        raise LinesError(f"{path}: cannot be read: {error.strerror}") from None


def decoded_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank; raises LinesError, with the name, if not UTF-8."""
    for number, line in enumerate(lines, 1):
        for begin, kind in FOREIGN.items():
            if number == 1 and line.startswith(begin):
                raise LinesError(f"{name}: is not UTF-8 text but {kind}")
        try:
            if line.strip():
                yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise LinesError(f"{name}:{number}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def parse_json(text: str | bytes) -> tuple[object, list[str]]:
    """A decoded JSON value and no reasons, or None and the reason why the text is not JSON."""
    try:
        return json.loads(text), []
    except (ValueError, RecursionError) as error:
        return None, [f"not JSON ({' '.join(str(error).split())})"]


def parse_object(text: str | bytes) -> tuple[dict | None, list[str]]:
    """A decoded JSON object and no reasons, or None and the reason why the text has none."""
    value, reasons = parse_json(text)
    return (value, []) if isinstance(value, dict) else (None, reasons or _no_object(value))


def parsed(lines: Iterable[tuple[int, str]]) -> Iterator[Entry]:
    """Numbered lines of JSON as entries for `checked_records`; a single one for JSON that is not by lines."""
    for place, (number, text) in enumerate(lines):
        if place == 0 and (text.strip() == "{" or text.lstrip().startswith("[")):
            yield number, None, ["expected one JSON object per line; `jq -c 'arrays[], objects' OLD > NEW` writes that"]
            return
        yield number, *parse_json(text)


def listed(path: str | Path) -> Iterator[Entry]:
    """The values of a file that is one JSON list, as entries for `checked_records`; raises LinesError for another."""
    values, reasons = parse_json("".join(text for _, text in numbered_lines(path)))
    if not isinstance(values, list):
        raise LinesError(f"{path}: {'; '.join(reasons) or 'expected a JSON list'}")
    yield from ((f"row {number}", value, []) for number, value in enumerate(values, 1))


def checked_records(
    entries: Iterable[Entry], place: str, check: Callable[[dict], Iterable[str]]
) -> tuple[list[dict], list[str]]:
    """The good records of a file, and for every bad one a sentence with its place, its qid and every reason.

    place: what stands in front of an entry's number in the sentences, as "rows.jsonl:". check: gives everything that
    is wrong with a record, except a qid that comes twice. The last sentence may be a LinesError, or "no records".
    """
    records: list[dict] = []
    bad: list[str] = []
    first: dict[int, int | str] = {}
    try:
        for number, value, reasons in entries:
            record = value if isinstance(value, dict) else {}
            qid = record.get("qid", "unknown")
            reasons = reasons or (list(check(record)) if isinstance(value, dict) else _no_object(value))
            if is_integer(qid) and first.setdefault(qid, number) != number:
                reasons.append(f"the query is at {place}{first[qid]} already; keep one of them")
            if reasons:
                bad.append(f"{place}{number}: qid {qid}: {'; '.join(reasons)}")
            else:
                records.append(record)
    except LinesError as error:
        bad.append(str(error))
    return records, bad if bad or records else [f"{place.strip()} holds no records"]


def write_lines(path: str | Path, records: Iterable[dict], refusal: type[Exception] = LinesError) -> None:
    """One JSON object per line; raises `refusal` with the qid of a record that JSON cannot hold (NaN, other types)."""
    with whole_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for record in records:
            try:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise refusal(f"{path}: qid {record.get('qid')}: cannot be written: {error}") from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; at the end that file takes the place of `path`, so that a cut-off run leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            yield unfinished
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)  # fails, too, in a folder that may not be written to
    except OSError as error:
        if str(error.filename) != str(unfinished):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the user knows


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_object(value: object) -> list[str]:
    return [f"expected a JSON object, found {type(value).__name__}"]


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")
