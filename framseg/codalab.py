"""Submission files of the QVHighlights competition: write them, check them, score them offline.

`framseg codalab pack --val V.jsonl --test T.jsonl --out submission.zip`
`framseg codalab check submission.zip --annotations DIR`

The competition's server is shut down and the test labels are public now, so `check` does what the server did: it
refuses what the server refused and gives the metrics of both splits. Archives are not trusted: they are not
unpacked to disk, and no more is read than a submission may have.
"""

import argparse
import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from framseg import FramsegError, command_line
from framseg.annotations import LabelledRow, Row, clips, read
from framseg.evaluate import evaluate
from framseg.jsonl import decoded_lines, parsed, shortlist, whole_file
from framseg.moments import LISTED
from framseg.predictions import SALIENCY, WINDOWS, PredictionError, checked, matched, read_predictions

VAL_NAME, TEST_NAME = "hl_val_submission.jsonl", "hl_test_submission.jsonl"
VAL_ANNOTATIONS, TEST_ANNOTATIONS = "highlight_val_release.jsonl", "highlight_test_with_gt.jsonl"
FIELDS = ("qid", "query", "vid", WINDOWS, SALIENCY)

FILE_BYTES = 16 * 2**20  # of the archive and of each file in it; a split takes 2 to 4 MiB
LINE_BYTES = 2**20  # a query takes 2 to 4 KiB
# What zipfile raises for damaged archives.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError)


class SubmissionError(FramsegError, ValueError):
    """A submission that would not count; the message has a line for every reason."""


def pack(val: str | Path, test: str | Path, out: str | Path) -> Path:
    """Write two prediction files as a competition archive and return its path.

    Only the official fields go in; the same predictions always give the same bytes. Raises PredictionError for
    predictions that cannot be scored or lack windows or saliency scores.
    """
    files = {VAL_NAME: _official(val), TEST_NAME: _official(test)}
    with whole_file(out) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # always dated 1980, so that the bytes do not depend on the time
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return Path(out)


def check(
    submission: str | Path, annotations: str | Path, val: str = VAL_ANNOTATIONS, test: str = TEST_ANNOTATIONS
) -> dict:
    """Check an archive against the annotations in folder `annotations` and score both splits.

    Returns {"val": split, "test": split}, a split being {"file", "queries", "windows": how many in all, "metrics": as
    `evaluate` gives them, or None for annotations without labels, "notes": list of what the protocol tolerates: a clip
    count off by one, windows beyond the video's end, more than ten windows}. Raises SubmissionError for whatever is
    wrong with the archive, the text, a record or the set of qids; AnnotationError for annotations that cannot be read.
    """
    splits = {"val": (VAL_NAME, read(Path(annotations) / val)), "test": (TEST_NAME, read(Path(annotations) / test))}
    contents = _contents(Path(submission))
    report, bad = {}, []
    for split, (name, rows) in splits.items():
        try:
            report[split] = _split_report(name, contents[name], rows)
        except (PredictionError, SubmissionError) as error:
            bad.append(str(error) if name in str(error) else f"{name}: {error}")
    if bad:
        raise SubmissionError("\n".join(bad))
    return report


def _official(path: str | Path) -> str:
    lines = []
    for record in read_predictions(path):
        if reason := _lacking(record):
            raise PredictionError(f"{path}: qid {record['qid']}: {reason}; a submission needs both")
        lines.append(json.dumps({field: record[field] for field in FIELDS if field in record}) + "\n")
    return "".join(lines)


def _lacking(record: dict) -> str:
    lacking = [field for field in (WINDOWS, SALIENCY) if field not in record]
    return f"has no {' and no '.join(lacking)}" if lacking else ""


def _contents(path: Path) -> dict[str, bytes]:
    """The bytes of the two files; raises SubmissionError for an archive that is not exactly these two files."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES:  # the list of names alone could fill the memory
            raise SubmissionError(f"{path}: has {size} bytes, more than the {FILE_BYTES} a submission may have")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            reasons = [f"{path}: {reason}" for entry in entries if (reason := _entry_reason(entry))]
            for name in (VAL_NAME, TEST_NAME):
                if (times := [entry.orig_filename for entry in entries].count(name)) != 1:
                    reasons.append(f"{path}: holds {times} files named {name}, expected 1")
            if reasons:
                raise SubmissionError(shortlist(reasons, "\n"))
            return {entry.orig_filename: _bounded(archive, entry) for entry in entries}
    except SubmissionError:
        raise
    except OSError as error:
        raise SubmissionError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DAMAGE as error:
        raise SubmissionError(f"{path}: is damaged or not a zip archive: {error}") from None


def _entry_reason(entry: zipfile.ZipInfo) -> str | None:
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    if name not in (VAL_NAME, TEST_NAME):
        return f"holds {name[:100]!r}; expected only {VAL_NAME} and {TEST_NAME}, without folders"
    if kind not in (0, stat.S_IFREG):
        return f"{name} is a link or another special file, expected a plain file"
    if entry.flag_bits & 1:
        return f"{name} is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"{name} is compressed by method {entry.compress_type}; write it stored or deflated"
    return None


def _bounded(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        content = file.read(FILE_BYTES + 1)
    if len(content) > FILE_BYTES:
        raise SubmissionError(f"{entry.filename}: unpacks to more than the {FILE_BYTES} bytes a split may have")
    return content


def _split_report(name: str, content: bytes, rows: list[Row]) -> dict:
    lines = content.split(b"\n")
    if len(lines) > 2 * len(rows) + 1:
        raise SubmissionError(f"{name}: has {len(lines)} lines for {len(rows)} queries")
    if long := [number for number, line in enumerate(lines, 1) if len(line) > LINE_BYTES]:
        raise SubmissionError(f"{name}:{long[0]}: is longer than the {LINE_BYTES} bytes that a query may have")
    predictions, rows = matched(checked(parsed(decoded_lines(lines, name)), f"{name}:"), rows)
    pairs = zip(predictions, rows, strict=True)
    odd = [(fine, f"qid {row.qid}: {what}") for record, row in pairs for fine, what in _against_row(record, row)]
    if wrong := [f"{name}: {what}" for fine, what in odd if not fine]:
        raise SubmissionError(shortlist(wrong, "\n"))
    counts = {"queries": len(rows), "windows": sum(len(record[WINDOWS]) for record in predictions)}
    metrics = evaluate(predictions, rows) if all(isinstance(row, LabelledRow) for row in rows) else None
    return {"file": name, **counts, "metrics": metrics, "notes": [what for _, what in odd]}


def _against_row(record: dict, row: Row) -> Iterator[tuple[bool, str]]:
    """What is odd about a record, each with whether the protocol tolerates it."""
    if reason := _lacking(record):
        yield False, reason
        return
    for field, right in (("vid", row.vid), ("query", row.query)):
        if record.get(field, right) != right:
            yield False, f"{field} is {record[field]!r}, the annotation has {right!r}"
    ends = [f"[{start:g}, {end:g}]" for start, end, _ in record[WINDOWS] if start < 0 or end > row.duration]
    if any(start > row.duration or end < 0 for start, end, _ in record[WINDOWS]):
        yield False, f"windows lie outside the video's {row.duration} s: {', '.join(ends[:5])}"
    elif ends:
        yield True, f"windows go beyond the video's {row.duration} s: {', '.join(ends[:5])}"
    given, expected = len(record[SALIENCY]), clips(row.duration)
    if given != expected:
        yield abs(given - expected) <= 1, f"{given} saliency scores for {expected} clips"
    if len(record[WINDOWS]) > LISTED:
        yield True, f"{len(record[WINDOWS])} windows, of which the first {LISTED} count"


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command `framseg codalab`."""
    parser = argparse.ArgumentParser(prog="framseg codalab", description="Competition files of QVHighlights.")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write two prediction files as a submission")
    for option, name in (("--val", "V.jsonl"), ("--test", "T.jsonl"), ("--out", "submission.zip")):
        packing.add_argument(option, type=Path, required=True, metavar=name)
    checking = commands.add_parser("check", help="check a submission and score it offline")
    checking.add_argument("submission", type=Path)
    checking.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of annotations")
    checking.add_argument("--val", default=VAL_ANNOTATIONS, help="name of the val annotations in DIR (%(default)s)")
    checking.add_argument("--test", default=TEST_ANNOTATIONS, help="name of the test annotations in DIR (%(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.command == "pack":
        print(pack(chosen.val, chosen.test, chosen.out))
    else:
        print(json.dumps(check(chosen.submission, chosen.annotations, chosen.val, chosen.test), indent=4))


if __name__ == "__main__":
    main()
