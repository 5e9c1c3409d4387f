import csv
import json

import numpy as np
import pytest

from framseg import annotations, config, evaluate, moments, predictions
from framseg.annotations import AnnotationError, LabelledRow, Row
from framseg.predictions import PredictionError, read_predictions, read_released, write_predictions

WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"


def _row(qid):
    return LabelledRow(qid, "q", 20, f"v{qid}", ((4, 8),), (2, 3), ((4, 4, 4), (4, 4, 4)))


def _prediction(qid):
    return {"qid": qid, WINDOWS: [[4, 8, 0.5]], SALIENCY: [0.0, 0.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qid": "1"}, "qid must be an integer, not '1'"),
        ({WINDOWS: []}, "pred_relevant_windows is empty: give at least one window, e.g. the whole video"),
        ({WINDOWS: None}, "pred_relevant_windows must be a list of [start, end, score], not None"),
        ({WINDOWS: {"start": 1}}, "pred_relevant_windows must be a list of [start, end, score], not {'start': 1}"),
        ({WINDOWS: [4, 8, 0.5]}, "window 1 is not [start, end, score]: 4"),
        ({WINDOWS: [[1, 2, 0.5], [1, 2]]}, "window 2 is not [start, end, score]: [1, 2]"),
        ({WINDOWS: [[1, 2, float("nan")]]}, "window 1 is not three finite numbers: [1, 2, nan]"),
        ({WINDOWS: [[1, "2", 0.5]]}, "window 1 is not three finite numbers: [1, '2', 0.5]"),
        ({WINDOWS: [[3, 2, 0.5]]}, "window 1 ends before it starts"),
        ({SALIENCY: []}, "pred_saliency_scores is empty: give one number for each clip"),
        ({SALIENCY: None}, "pred_saliency_scores must be a list of numbers, one for each clip, not None"),
        ({SALIENCY: [0.1, None]}, "pred_saliency_scores: clip 1 has 'None', not a finite number"),
        ({SALIENCY: ["0.1", 0.2]}, "pred_saliency_scores: clip 0 has the text '0.1', not a finite number"),
        ({SALIENCY: [float("nan")]}, "pred_saliency_scores: clip 0 has 'nan', not a finite number"),
        ({SALIENCY: [0.1, float("inf")]}, "pred_saliency_scores: clip 1 has 'inf', not a finite number"),
        ({SALIENCY: [[0.1], 0.2]}, "pred_saliency_scores: clip 0 has '[0.1]', not a finite number"),
        ({SALIENCY: [0.1, True]}, "clip 1 has 'True', not a finite number"),
        ({SALIENCY: [0.1, 10**400]}, "not a finite number"),
        ({"probability": [0.5, 1.5]}, "probability: frame 1 has '1.5', not a number in 0..1"),
        ({"probability": "0.5"}, "probability must be a list of numbers, one for each frame"),
    ],
)
def test_a_malformed_record_is_named_by_file_line_and_qid(tmp_path, change, reason):
    path = tmp_path / "predictions.jsonl"
    bad = _prediction(2) | change
    path.write_text(f"{json.dumps(_prediction(1))}\n\n{json.dumps(bad)}\n")
    with pytest.raises(PredictionError) as error:
        read_predictions(path)
    assert str(error.value).startswith(f"{path}:3: qid {bad['qid']}: ") and reason in str(error.value)
    with pytest.raises(PredictionError) as error:
        evaluate.evaluate([_prediction(1), bad], [_row(1), _row(2)])
    assert str(error.value).startswith(f"prediction 2: qid {bad['qid']}: ") and reason in str(error.value)
    with pytest.raises(PredictionError):
        write_predictions(tmp_path / "new.jsonl", [bad])
    assert not (tmp_path / "new.jsonl").exists()


def test_reading_lists_every_bad_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        "\n".join(["{3", "3", json.dumps({"qid": 4}), json.dumps(_prediction(1)), json.dumps(_prediction(1))])
    )
    with pytest.raises(PredictionError) as error:
        read_predictions(path)
    told = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in told] == [f"{path}:{n}" for n in (1, 2, 3, 5)]
    assert "has neither pred_relevant_windows nor pred_saliency_scores" in told[2] and f"{path}:4 already" in told[3]
    path.write_text("\n")
    with pytest.raises(PredictionError, match="holds no records"):
        read_predictions(path)


def test_predictions_survive_writing_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "predictions.jsonl"
    record = _prediction(1) | {"query": "ein Hügel", "mask": "01", "probability": np.array([0.25, 0.5])}
    write_predictions(path, [record | {SALIENCY: np.array([0.5, 0.1])}])
    read = read_predictions(path)
    assert read == [record | {SALIENCY: [0.5, 0.1], "probability": [0.25, 0.5]}]
    with pytest.raises(PredictionError, match="qid 1: cannot be written"):
        write_predictions(path, [record | {"mask": float("nan")}])
    assert read_predictions(path) == read and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "layout",
    [
        lambda lines: "\ufeff" + "\n".join(lines),
        lambda lines: "\n\n" + "\r\n\r\n".join(lines) + "\r\n",
        "\n\ufeff".join,
    ],
    ids=["byte order mark", "CRLF and empty lines", "byte order mark in the middle"],
)
def test_layouts_of_other_programs_are_read(shared, tmp_path, layout):
    for name in ("p.jsonl", "rows.jsonl", "released.csv", "published.json"):
        path = tmp_path / name
        if name == "p.jsonl":
            lines, read = [json.dumps(_prediction(qid)) for qid in (1, 2)], read_predictions
        elif name == "rows.jsonl":
            annotations.write(path, [_row(1), _row(2)])
            lines, read = path.read_text().splitlines(), annotations.read
        elif name == "released.csv":
            lines, read = ["qid,duration,windows,p0,p1", "7,10,0/10/0.5|5/10/1.0,0.5,1.0"], read_released
        else:
            lines, read = json.dumps([PUBLISHED, PUBLISHED | {"qid": 8}], indent=1).splitlines(), read_released
        path.write_bytes("\n".join(lines).encode())
        plain = read(path)
        path.write_bytes(layout(lines).encode())
        assert read(path) == plain and plain


def test_windows_that_score_although_they_are_odd():
    def score(*windows):
        brief = evaluate.evaluate([_prediction(1) | {WINDOWS: [*map(list, windows)]}], [_row(1)])["brief"]
        return brief["MR-full-R1@0.5"], brief["MR-full-mAP@0.5"]

    assert score((0, 1, 0.1), (4, 8, 0.9)) == (0, 100)  # not sorted: R1 takes the first, mAP goes by the scores
    assert score((4, 8, 0.1), (0, 1, 0.9)) == (100, 50)
    assert score((4, 8, -2.0), (0, 1, -3.0)) == (100, 100)
    assert score(*[(0, 1, 0.1)] * 9, (4, 8, 0.5)) == (0, 100)  # the tenth counts, the eleventh does not
    assert score(*[(0, 1, 0.1)] * 10, (4, 8, 0.5)) == (0, 0)
    assert score((6, 6, 1.0)) == (0, 0) == score((4, 8000, 1.0))  # no length; far beyond the video of 20 s
    assert score((-1, 8, 1.0)) == (0, 0) and score((4, 11.5, 1.0)) == (100, 100)  # never cut to the video


def test_qids_must_match_and_are_named():
    rows = [_row(1), _row(2), _row(3)]
    with pytest.raises(PredictionError) as error:
        evaluate.evaluate([_prediction(1), _prediction(9)], rows)
    assert "without a prediction: 2 (qid 2, 3)" in str(error.value)
    assert "predicted but not annotated: 1 (qid 9)" in str(error.value)
    alone = evaluate.evaluate([_prediction(1)], rows[:1])
    assert evaluate.evaluate([_prediction(1), _prediction(9)], rows, intersection=True) == alone
    assert len(evaluate.per_query([_prediction(1), _prediction(9)], rows, intersection=True)) == 1
    for switch in (False, True):
        with pytest.raises(PredictionError, match="prediction 2: qid 1: the query is at prediction 1 already"):
            evaluate.evaluate([_prediction(1), _prediction(1)], rows, intersection=switch)
        with pytest.raises(PredictionError, match=r"annotated twice: 1 \(qid 3\)"):
            evaluate.evaluate([_prediction(q) for q in (1, 2, 3)], [*rows, rows[2]], intersection=switch)
        with pytest.raises(PredictionError, match="no query is both predicted and annotated; take the .* same split"):
            evaluate.evaluate([_prediction(9)], rows, intersection=switch)
    with pytest.raises(AnnotationError, match=r"1 rows have no labels \(qid 4\)"):
        evaluate.evaluate([_prediction(4)], [Row(4, "q", 10, "v")])


def _as_published(shared):
    """The released val predictions in the layout of the authors' JSON, masks inferred from the windows."""
    out = []
    for line in csv.DictReader((shared / "golden/released_val_scores.csv").read_text().splitlines()):
        windows = [[float(n) for n in window.split("/")] for window in line["windows"].split("|")]
        duration, mask = int(line["duration"]), ["0"] * 25
        starts = [round(i * duration / 25) for i in range(26)]
        for start, end, _ in windows:
            first, after = starts.index(start), starts.index(end)
            mask[first:after] = "1" * (after - first)
        row = {"qid": int(line["qid"]), "duration": duration, "score": [float(line[f"p{i}"]) for i in range(25)]}
        scores = moments.saliency(row["score"], duration).tolist()
        out.append(row | {"preds": "".join(mask), WINDOWS: windows, SALIENCY: scores})
    return out


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_the_papers_released_predictions(shared, tmp_path, suffix):
    path = shared / "golden/released_val_scores.csv"
    if suffix == "json":
        path = tmp_path / "hl_val_predictions.json"
        path.write_text(json.dumps(_as_published(shared), indent=1))
    released = read_released(path)
    assert len(released) == 1550 and {len(record["probability"]) for record in released} == {25}
    first = released[0]
    assert (first["qid"], first[WINDOWS][:2]) == (2579, [[90, 150, 0.91199], [0, 150, 0]])
    rows = annotations.read(shared / "qvhighlights/highlight_val_release.jsonl")
    reported = json.loads((shared / "golden/reported_scores.json").read_text())["val_released_scores_mask_policy"]
    brief = evaluate.evaluate(released, rows)["brief"]
    assert brief | {key: value for key, value in reported.items() if key != "what"} == brief


def test_the_authors_json_gives_what_the_csv_gives_and_the_masks(shared, tmp_path):
    published = _as_published(shared)
    (tmp_path / "p.json").write_text(json.dumps(published))
    records = read_released(tmp_path / "p.json")
    assert [record.pop("mask") for record in records] == [row["preds"] for row in published]
    assert all(record.pop("valid") for record in records)
    assert records == read_released(shared / "golden/released_val_scores.csv")
    assert [record[SALIENCY] for record in records] == [row[SALIENCY] for row in published]


def test_nine_real_predictions_as_json(shared, tmp_path):
    sample = [
        json.loads(line) for line in (shared / "golden/released_val_scores_sample.jsonl").read_text().splitlines()
    ]
    fields = ("qid", "duration", "score")
    rows = [{f: row[f] for f in fields} | {"preds": row["mask"], WINDOWS: [row["window"]]} for row in sample]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for record, row in zip(read_released(tmp_path / "p.json"), sample, strict=True):
        assert record[SALIENCY] == row["saliency_2s"] and record["probability"] == row["score"]
        assert (record["mask"], record["valid"]) == (row["mask"], True)
        assert record[WINDOWS] == [row["window"]] + [[0, row["duration"], 0]] * 9


PUBLISHED = {"qid": 7, "duration": 10, "score": [0.5, 1.0], "preds": "01", WINDOWS: [[0, 10, 0.5], [5, 10, 1.0]]}


def test_an_invalid_mask_of_the_authors_counts_as_all_ones(tmp_path):
    rows = [PUBLISHED, PUBLISHED | {"qid": 8, "preds": "0a"}, PUBLISHED | {"qid": 9, "preds": "0"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    records = read_released(tmp_path / "p.json")
    assert [(r["mask"], r["valid"]) for r in records] == [("01", True), ("11", False), ("11", False)]
    assert records[0][WINDOWS] == [[5, 10, 1.0], [0, 10, 0.5]] + [[0, 10, 0.0]] * 8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preds": None}, "row 2: qid 7: lacks preds"),
        ({"score": None, WINDOWS: None}, f"row 2: qid 7: lacks {WINDOWS}; lacks score"),
        ({"qid": None}, "row 2: qid None: lacks qid"),
        ({"qid": "7"}, "row 2: qid 7: qid must be an integer, not '7'"),
        ({"qid": 6}, "row 2: qid 6: the query is at .*p.json:row 1 already; keep one of them"),
        ({"duration": "10"}, "row 2: qid 7: duration must be seconds above 0 and at most 100000, not 10"),
        ({"duration": 1e9}, "row 2: qid 7: duration must be seconds above 0"),
        ({"score": [0.5, 2]}, "row 2: qid 7: probability: frame 1 has '2', not a number in 0..1"),
        ({"score": []}, "row 2: qid 7: probability is empty: give one number for each frame"),
        ({"preds": 11}, "row 2: qid 7: preds must be text, not 11"),
        ({WINDOWS: [[0, 1]]}, r"row 2: qid 7: window 1 is not \[start, end, score\]: \[0, 1\]"),
        ({WINDOWS: [[0, "x", 1]]}, "row 2: qid 7: window 1 is not three finite numbers"),
    ],
)
def test_a_bad_row_of_the_authors_json_is_named_by_position_and_qid(tmp_path, change, message):
    (tmp_path / "p.json").write_text(json.dumps([PUBLISHED | {"qid": 6}, PUBLISHED | change]))
    with pytest.raises(PredictionError, match=f"p.json:{message}"):
        read_released(tmp_path / "p.json")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[{}]", "p.json:row 1: qid None: lacks qid; lacks duration"),
        (b"[[]]", "p.json:row 1: qid unknown: expected a JSON object, found list"),
        (b"[]", "p.json: holds no records"),
        (b"", "p.json: not JSON"),
        (b'{"qid": 7}', "p.json: expected a JSON list"),
        (b'[{"qid": 7', "p.json: not JSON"),
        (b"\xff", "p.json:1: is not UTF-8 text"),
        (None, "p.json: cannot be read: No such file"),
    ],
)
def test_a_bad_json_of_the_authors_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PredictionError, match=message):
        read_released(tmp_path / "p.json")


def test_the_reference_is_the_csv_or_the_authors_json(shared, tmp_path):
    for split in ("val", "test"):
        assert predictions.reference(shared, split) == shared / f"golden/released_{split}_scores.csv"
        with pytest.raises(PredictionError) as error:
            predictions.reference(tmp_path, split)
        for name in (f"golden/released_{split}_scores.csv", f"released/hl_{split}_predictions.json"):
            assert str(tmp_path / name) in str(error.value)
        assert f"`framseg download --reference {tmp_path}`" in str(error.value)
        (tmp_path / "released").mkdir(exist_ok=True)
        (tmp_path / f"released/hl_{split}_predictions.json").touch()
        assert predictions.reference(str(tmp_path), split) == tmp_path / f"released/hl_{split}_predictions.json"


def test_the_record_of_an_answer_follows_the_profile():
    inference = config.load("paper").inference.model_copy(update={"windows": "thresholds", "saliency": "gaussian"})
    probability = np.array([0.1, 0.9, 0.8, 0.2, 0.6])
    row = Row(3, "a query", 10, "v3")
    question = {"qid": 3, "query": "a query", "vid": "v3", "duration": 10}
    record = predictions.answer_record(row, "01101", probability, inference)
    windows = moments.windows("01101", probability, 10, "thresholds")
    saliency = moments.saliency(probability, 10, "gaussian")
    answer = {"mask": "01101", "probability": probability.tolist(), "valid": True}
    assert record == question | {WINDOWS: windows, SALIENCY: saliency.tolist()} | answer
    assert predictions.prediction_record(row, windows, saliency) == {k: v for k, v in record.items() if k not in answer}
    invalid = predictions.answer_record(row, "00000", probability, config.load("paper").inference)
    assert (invalid["mask"], invalid["valid"], len(invalid[WINDOWS])) == ("11111", False, 1)
    json.dumps([record, invalid])


@pytest.mark.parametrize(
    "text, message",
    [
        ("qid,windows\n1,0/2/1\n", r"s.csv:1: lacks the columns duration, p0"),
        ("qid,duration,windows,p0\n7,150,0/9,0.5\n", r"s.csv:2: qid 7: window 1 is not \[start, end, score\]"),
        ("qid,duration,windows,p0\n7,150,0/9/1\n", r"s.csv:2: qid 7: has 3 fields, and the first line names 4"),
        ("qid,duration,windows,p0\n7,long,0/9/1,0.5\n", r"s.csv:2: qid 7: could not convert .*'long'"),
        (
            "qid,duration,windows,p0\n7,150,0/9/1,1.5\n",
            r"s.csv:2: qid 7: probability: frame 0 has '1.5', not a number in 0..1",
        ),
        (
            "qid,duration,windows,p0\n7,150,0/9/1,1\n7,150,0/9/1,1\n",
            r"s.csv:3: qid 7: the query is at .*s.csv:2 already",
        ),
        ("qid,duration,windows,p0\n7,inf,0/9/1,1\n", r"s.csv:2: qid 7: duration must be seconds above 0"),
        (
            "qid,duration,windows,p0\n7,1e15,0/9/1,1\n",
            r"s.csv:2: qid 7: duration must be .* at most 100000, not 1000000000000000",
        ),
        ("qid,duration,windows,p0,\n7,150,0/9/1,nan,\n", r"s.csv:2: qid 7: probability: frame 0 has 'nan'"),
        ("qid,duration,windows,p0\n7,150," + "9" * 200_000 + ",1\n", r"s.csv:2: not a line of CSV"),
        ("qid,duration,windows,p0\n", r"s.csv: holds no records"),
    ],
)
def test_a_bad_released_row_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(PredictionError, match=message):
        read_released(tmp_path / "s.csv")
