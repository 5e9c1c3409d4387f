import csv
import json
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from framseg import annotations, codalab, evaluate, moments
from framseg.annotations import AnnotationError, LabelledRow, Row
from framseg.codalab import SubmissionError
from framseg.predictions import PredictionError, read_predictions, write_predictions

VAL, TEST = "hl_val_submission.jsonl", "hl_test_submission.jsonl"
WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"
REPOSITORY = Path(__file__).parent.parent


def _row(qid):
    return LabelledRow(qid, f"query {qid}", 10, f"v{qid}", ((2, 6),), (1, 2), ((4, 3, 2), (4, 4, 4)))


def _prediction(qid, **change):
    fields = {"qid": qid, "query": f"query {qid}", "vid": f"v{qid}", "duration": 10, "mask": "01100", "valid": True}
    return fields | {WINDOWS: [[2, 6, 0.9], [0, 10, 0.1]], SALIENCY: [0.1, 0.9, 0.8, 0.1, 0]} | change


def _text(*qids, **change):
    return "".join(json.dumps(_prediction(qid, **change)) + "\n" for qid in qids)


@pytest.fixture
def folder(tmp_path):
    annotations.write(tmp_path / "highlight_val_release.jsonl", [_row(1), _row(2)])
    annotations.write(tmp_path / "highlight_test_with_gt.jsonl", [_row(3), _row(4), _row(5)])
    write_predictions(tmp_path / "val.jsonl", [_prediction(1), _prediction(2)])
    write_predictions(tmp_path / "test.jsonl", [_prediction(q) for q in (3, 4, 5)])
    return tmp_path


def _archive(folder, files=None, **change) -> Path:
    """An archive of [(name or ZipInfo, content)]; by default a right one in which `change` replaces files."""
    path = folder / "made.zip"
    right = {VAL: _text(1, 2), TEST: _text(3, 4, 5)} | {{"val": VAL, "test": TEST}[k]: v for k, v in change.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files if files is not None else right.items():
            archive.writestr(name, content, archive.compression)
    return path


def _refused(folder, submission) -> str:
    with pytest.raises(SubmissionError) as error:
        codalab.check(submission, folder)
    return str(error.value)


def test_packed_files_hold_the_official_fields_and_are_scored(folder):
    packed = codalab.pack(folder / "val.jsonl", folder / "test.jsonl", folder / "new" / "submission.zip")
    with zipfile.ZipFile(packed) as archive:
        assert archive.namelist() == [VAL, TEST] and archive.testzip() is None
        lines = [json.loads(line) for line in archive.read(TEST).decode().splitlines()]
    assert [line["qid"] for line in lines] == [3, 4, 5]
    assert all(list(line) == ["qid", "query", "vid", WINDOWS, SALIENCY] for line in lines)

    report = codalab.check(packed, folder)
    rows = annotations.read(folder / "highlight_val_release.jsonl")
    assert report["val"]["metrics"] == evaluate.evaluate(read_predictions(folder / "val.jsonl"), rows)
    assert {k: v for k, v in report["test"].items() if k != "metrics"} == {
        "file": TEST,
        "queries": 3,
        "windows": 6,
        "notes": [],
    }
    assert report["test"]["metrics"]["brief"]["MR-full-R1@0.7"] == 100


def test_the_same_predictions_give_the_same_bytes(folder, monkeypatch):
    first = codalab.pack(folder / "val.jsonl", folder / "test.jsonl", folder / "a.zip").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert codalab.pack(folder / "val.jsonl", folder / "test.jsonl", folder / "b.zip").read_bytes() == first


def test_only_whole_predictions_are_packed_and_no_half_archive_stays(folder):
    out = codalab.pack(folder / "val.jsonl", folder / "test.jsonl", folder / "s.zip")
    before, present = out.read_bytes(), set(folder.iterdir())
    (folder / "test.jsonl").write_text(json.dumps({"qid": 3, WINDOWS: [[0, 1, 1]]}))
    with pytest.raises(PredictionError, match="test.jsonl: qid 3: has no pred_saliency_scores"):
        codalab.pack(folder / "val.jsonl", folder / "test.jsonl", out)
    (folder / "test.jsonl").write_text(_text(3, 3))
    with pytest.raises(PredictionError, match="test.jsonl:2: qid 3: the query is at .*test.jsonl:1 already"):
        codalab.pack(folder / "val.jsonl", folder / "test.jsonl", out)
    assert out.read_bytes() == before and set(folder.iterdir()) == present


def test_command_line(folder):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "framseg.codalab", *arguments], capture_output=True, text=True, cwd=REPOSITORY
        )

    out = folder / "submission.zip"
    done = run("pack", "--val", folder / "val.jsonl", "--test", folder / "test.jsonl", "--out", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    done = run("check", out, "--annotations", folder)
    assert done.returncode == 0 and json.loads(done.stdout) == codalab.check(out, folder)
    done = run("check", folder / "val.jsonl", "--annotations", folder)
    assert done.returncode == 1 and done.stdout == "" and "not a zip archive" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("pack", "--val", folder / "val.jsonl", "--test", folder / "test.jsonl", "--out", folder)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_the_papers_predictions_packed_and_scored_offline(shared, tmp_path):
    lines = list(csv.DictReader((shared / "golden/released_val_scores.csv").read_text().splitlines()))
    rows = {row.qid: row for row in annotations.read(shared / "qvhighlights/highlight_val_release.jsonl")}
    predictions = []
    for line in lines:
        row, probability = rows[int(line["qid"])], np.array([float(line[f"p{i}"]) for i in range(25)])
        windows = moments.windows("1" * 25, probability, row.duration, "thresholds", "nearest")
        scores = moments.saliency(probability, row.duration).tolist()
        predictions.append({"qid": row.qid, "vid": row.vid, "query": row.query, WINDOWS: windows, SALIENCY: scores})
    write_predictions(tmp_path / "val.jsonl", predictions)
    test_rows = annotations.read(shared / "qvhighlights/highlight_test_with_gt.jsonl")
    train = annotations.read(shared / "qvhighlights/highlight_val_release.jsonl")
    trivial = evaluate.trivial(test_rows, train, seed=0)["best constant window"]
    write_predictions(tmp_path / "test.jsonl", trivial)

    out = codalab.pack(tmp_path / "val.jsonl", tmp_path / "test.jsonl", tmp_path / "submission.zip")
    report = codalab.check(out, shared / "qvhighlights")
    brief = report["val"]["metrics"]["brief"]
    assert (brief["MR-full-R1@0.7"], brief["MR-full-mAP"], brief["HL-min-VeryGood-Hit1"]) == (38.19, 36.17, 58.52)
    assert report["test"]["metrics"] == evaluate.evaluate(trivial, test_rows)
    assert (report["val"]["queries"], report["val"]["windows"], report["test"]["queries"]) == (1550, 15500, 1542)
    assert report["val"]["notes"] == report["test"]["notes"] == []


def test_anothers_predictions_pass_with_notes_on_what_the_protocol_tolerates(shared, tmp_path):
    official = (shared / "golden/official_val_predictions.jsonl").read_text()
    labels = shared / "qvhighlights/highlight_val_release.jsonl"
    submission = _archive(tmp_path, [(VAL, official), (TEST, official)])
    report = codalab.check(submission, labels.parent, test=labels.name)
    assert (
        report["val"]["metrics"]
        == report["test"]["metrics"]
        == json.loads((shared / "golden/official_val_metrics.json").read_text())
    )
    notes = report["val"]["notes"]
    assert len(notes) == 15 and sum("saliency scores for" in note for note in notes) == 13


def test_a_test_split_without_labels_is_checked_but_not_scored(folder):
    bare = [Row(q, f"query {q}", 10, f"v{q}") for q in (3, 4, 5)]
    annotations.write(folder / "highlight_test_release.jsonl", bare)
    report = codalab.check(_archive(folder), folder, test="highlight_test_release.jsonl")
    assert report["test"]["metrics"] is None and report["val"]["metrics"] is not None
    with pytest.raises(AnnotationError, match="absent.jsonl: cannot be read"):
        codalab.check(_archive(folder), folder, test="absent.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({WINDOWS: [[2, 6]]}, "qid 1: window 1 is not [start, end, score]"),
        ({WINDOWS: [[2, 6, float("nan")]]}, "qid 1: window 1 is not three finite numbers"),
        ({WINDOWS: [[6, 2, 1]]}, "qid 1: window 1 ends before it starts"),
        ({WINDOWS: [[2, 6, 1], [11, 13, 1]]}, "qid 1: windows lie outside the video's 10 s: [11, 13]"),
        ({WINDOWS: [[-3, -1, 1]]}, "qid 1: windows lie outside the video's 10 s: [-3, -1]"),
        ({WINDOWS: []}, "qid 1: pred_relevant_windows is empty: give at least one window"),
        ({SALIENCY: [0.1] * 7}, "qid 1: 7 saliency scores for 5 clips"),
        ({SALIENCY: [0.1] * 3}, "qid 1: 3 saliency scores for 5 clips"),
        ({SALIENCY: [0.1, None, 0, 0, 0]}, "qid 1: pred_saliency_scores: clip 1 has 'None', not a finite number"),
        ({SALIENCY: [[0.1] * 5]}, "qid 1: pred_saliency_scores: clip 0"),
        ({"vid": "other"}, "qid 1: vid is 'other', the annotation has 'v1'"),
    ],
)
def test_a_wrong_record_is_named(folder, change, reason):
    told = _refused(folder, _archive(folder, val=_text(1, **change) + _text(2)))
    assert told.startswith(VAL) and reason in told


def test_a_record_needs_both_kinds_of_prediction(folder):
    content = json.dumps({"qid": 1, WINDOWS: [[0, 1, 1]]}) + "\n" + _text(2)
    assert f"{VAL}: qid 1: has no pred_saliency_scores" in _refused(folder, _archive(folder, val=content))


def test_small_oddities_are_notes(folder):
    odd = json.dumps(_prediction(1, **{WINDOWS: [[2, 11.5, 1]] * 12, SALIENCY: [0.5] * 6})) + "\n"
    assert codalab.check(_archive(folder, val=odd + _text(2)), folder)["val"]["notes"] == [
        "qid 1: windows go beyond the video's 10 s: " + ", ".join(["[2, 11.5]"] * 5),
        "qid 1: 6 saliency scores for 5 clips",
        "qid 1: 12 windows, of which the first 10 count",
    ]


def test_every_query_once_in_both_splits(folder):
    told = _refused(folder, _archive(folder, val=_text(1, 9), test=_text(3, 4, 4)))
    assert f"{VAL}: queries without a prediction: 1 (qid 2); queries predicted but not annotated: 1 (qid 9)" in told
    assert f"{TEST}:3: qid 4: the query is at {TEST}:2 already" in told
    swapped = _refused(folder, _archive(folder, val=_text(3, 4, 5), test=_text(1, 2)))
    assert "(qid 1, 2)" in swapped and "(qid 3, 4, 5)" in swapped


@pytest.mark.parametrize(
    "name",
    [
        f"../{VAL}", f"/{VAL}", f"folder/{VAL}", f"folder\\{VAL}", "folder/", f"C:{VAL}", f"{VAL}\0.txt",
        f"__MACOSX/._{VAL}", "extra.txt", VAL.upper(), "hl_vаl_submission.jsonl",
    ],
)  # fmt: skip
def test_other_names_and_folders_are_refused(folder, name):
    entry = zipfile.ZipInfo()
    entry.filename = entry.orig_filename = name
    told = _refused(folder, _archive(folder, [(VAL, _text(1, 2)), (TEST, _text(3, 4, 5)), (entry, "")]))
    assert "expected only" in told and "without folders" in told
    told = _refused(folder, _archive(folder, [(entry, _text(1, 2)), (TEST, _text(3, 4, 5))]))
    assert f"holds 0 files named {VAL}, expected 1" in told


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_missing_and_doubled_files_are_refused(folder):
    assert f"holds 0 files named {TEST}, expected 1" in _refused(folder, _archive(folder, [(VAL, _text(1, 2))]))
    doubled = [(VAL, _text(1, 2)), (TEST, _text(3, 4, 5)), (VAL, _text(1, 2))]
    assert f"holds 2 files named {VAL}, expected 1" in _refused(folder, _archive(folder, doubled))
    assert _refused(folder, _archive(folder, [])).count("holds 0 files") == 2


def test_links_and_special_files_are_refused(folder):
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR):
        entry = zipfile.ZipInfo(VAL)
        entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
        told = _refused(folder, _archive(folder, [(entry, "/etc/passwd"), (TEST, _text(3, 4, 5))]))
        assert f"{VAL} is a link or another special file" in told


def test_a_bomb_is_stopped_while_it_is_read(folder):
    path = _archive(folder, val=" " * (80 * 2**20))
    tracemalloc.start()
    told = _refused(folder, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{VAL}: unpacks to more than" in told and peak < 4 * codalab.FILE_BYTES


def test_a_bomb_that_lies_about_its_size_is_refused(folder):
    path = _archive(folder, val=" " * (40 * 2**20))
    content = path.read_bytes()
    # Local header and table of contents both say that 100 bytes come out.
    path.write_bytes(content.replace(struct.pack("<L", 40 * 2**20), struct.pack("<L", 100)))
    assert "is damaged or not a zip archive" in _refused(folder, path)


def test_big_archives_and_lines_are_refused_unread(folder):
    lines = _text(1, 2) + "\n" * 100
    assert f"{VAL}: has 103 lines for 2 queries" in _refused(folder, _archive(folder, val=lines))
    long = "[" * (codalab.LINE_BYTES + 1)
    assert f"{VAL}:1: is longer than" in _refused(folder, _archive(folder, val=long))
    big = folder / "big.zip"
    with open(big, "wb") as file:
        file.truncate(codalab.FILE_BYTES + 1)
    assert "more than the" in _refused(folder, big)


def test_an_archive_of_very_many_names_neither_fills_the_memory_nor_the_screen(folder, monkeypatch):
    monkeypatch.setattr(codalab, "FILE_BYTES", 2**20)  # for speed
    entry, end = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")
    row = entry.pack(b"PK\1\2", *[0] * 9, 1, *[0] * 6) + b"x"
    count = (codalab.FILE_BYTES - end.size) // len(row)
    table = row * count
    path = folder / "many.zip"
    path.write_bytes(table + end.pack(b"PK\5\6", 0, 0, count % 2**16, count % 2**16, len(table), 0, 0))
    tracemalloc.start()
    told = _refused(folder, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "expected only" in told and f"and {count + 2 - 20} more" in told and len(told.splitlines()) == 21
    assert peak < 25 * codalab.FILE_BYTES


def test_zip64_comments_and_trailing_bytes_are_read_or_refused_in_a_sentence(folder):
    path = _archive(folder)
    content, right = path.read_bytes(), codalab.check(path, folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment"
    assert codalab.check(path, folder) == right
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in ((VAL, _text(1, 2)), (TEST, _text(3, 4, 5))):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(text.encode())
    assert codalab.check(path, folder) == right
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(content) - 22, 1)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, 2**63, 2**63)
    for tail in (b"PK\6\7" + bytes(16) + content[-22:], record + locator + content[-22:], content[-22:] + b"more"):
        path.write_bytes(content[:-22] + tail)
        try:
            assert codalab.check(path, folder) == right
        except SubmissionError as error:
            assert len(str(error).splitlines()) == 1 and "is damaged or not a zip archive" in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_text(1, 2).encode("utf-16"), "is not UTF-8 text"),
        (_text(1, 2).encode("utf-8-sig"), f"{VAL}:1: qid unknown: not JSON (Unexpected UTF-8 BOM"),
        (_text(1, 2).replace("query 1", "Hügel").encode("latin-1"), "is not UTF-8 text"),
        (_text(1, 2).encode("utf-16-le"), f"{VAL}: is not UTF-8 text but UTF-16"),
        (_text(1, 2).replace("0.9", "NaN"), "not a finite number"),
        (_text(1, 2).replace("0.9", "1e999"), "not a finite number"),
        (_text(1, 2).replace("0.9", "9" * 5000), "not JSON"),
        ('{"qid":' * 100_000 + "\n" + _text(2), f"{VAL}:1: qid unknown: not JSON"),
        (f"[{_text(1).strip()}]\n{_text(2)}", f"{VAL}:1: qid unknown: expected one JSON object per line"),
        ("", f"{VAL}: holds no records"),
    ],
)
def test_wrong_encodings_and_json_are_refused(folder, content, reason):
    assert reason in _refused(folder, _archive(folder, val=content))


def test_encrypted_and_rarely_compressed_entries_are_refused(folder):
    path = _archive(folder)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    path.write_bytes(content)
    assert f"{VAL} is encrypted" in _refused(folder, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(VAL, _text(1, 2))
        archive.writestr(TEST, _text(3, 4, 5))
    assert "write it stored or deflated" in _refused(folder, path)


def test_damage_never_passes_and_never_crashes(folder):
    path = _archive(folder)
    content = path.read_bytes()
    right = codalab.check(path, folder)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            assert codalab.check(path, folder) == right  # a bit that means nothing to the content, as the date
        except SubmissionError:
            refused += 1
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        _refused(folder, path)
    assert refused > 150
    assert "cannot be read" in _refused(folder, folder / "absent.zip")
    assert "cannot be read" in _refused(folder, folder)
