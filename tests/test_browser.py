import json
import time

import numpy as np
import pytest
from small import make_video

from framseg import annotations, frames
from framseg.annotations import LabelledRow, Row
from framseg.predictions import PredictionError, read_predictions, write_predictions
from framseg.run.paths import Run
from framseg.viz import browser


def row(qid: int, query: str, start: float, end: float) -> Row:
    clips = tuple(range(int(start) // 2, int(end) // 2))
    return LabelledRow(qid, query, 150, f"video {qid}", ((start, end),), clips, tuple((2, 3, 4) for _ in clips))


ROWS = [
    row(1, "a cat sleeps", 0, 60),
    row(2, "a dog <script>alert(1)</script> runs", 60, 66),
    row(3, "a cat & a dog", 30, 54),
]


def prediction(qid: int, start: float, end: float, score: float, valid: bool = True) -> dict:
    probability = np.linspace(0, 1, 25).tolist()
    return {
        "qid": qid,
        "query": next(r.query for r in ROWS if r.qid == qid),
        "vid": f"video {qid}",
        "pred_relevant_windows": [[start, end, score]],
        "pred_saliency_scores": np.linspace(0, 1, 75).tolist(),
        "mask": "1" * 25,
        "probability": probability,
        "valid": valid,
    }


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "some" / "val.jsonl"
    write_predictions(
        path, [prediction(1, 0, 58, 0.9), prediction(2, 100, 140, 0.95), prediction(3, 0, 150, 0.4, valid=False)]
    )
    return path


@pytest.fixture
def opened(predictions, tmp_path):
    store = frames.Store(tmp_path / "store", 32, 25, 0, 0.1, 90)
    store.folder.mkdir()
    store.write("video 1", np.full((25, 1, 32, 32, 3), 200, dtype=np.uint8), {})
    return browser.Browser(predictions, ROWS, store)


def qids(opened: browser.Browser) -> list[int]:
    return [record["qid"] for record in opened.selection()]


def test_search_filter_and_sort(opened):
    assert qids(opened) == [1, 2, 3]
    opened.search.value = "CAT"
    assert qids(opened) == [1, 3] and opened.count.value == "2 of 3 queries: IoU, query"
    opened.search.value = ""
    names = list(browser.FILTERS)
    expected = {1: [1], 2: [2, 3], 3: [2], 4: [3], 5: [2], 6: [3], 7: [1]}
    for number, kept in expected.items():
        opened.filter.value = names[number]
        assert qids(opened) == kept, names[number]
    opened.filter.value = "all"
    opened.sort.value = "IoU, best first"
    assert qids(opened) == [1, 3, 2]
    opened.sort.value = "confidence, highest first"
    assert qids(opened) == [2, 3, 1]
    opened.search.value = "no such words"
    assert qids(opened) == [] and "no query matches" in opened.picture.value


def test_next_and_previous_stay_in_the_list(opened):
    assert opened.list.value == 1
    opened.previous()
    assert opened.list.value == 1
    for expected in (2, 3, 3):
        opened.next()
        assert opened.list.value == expected
    opened.show(2)
    assert "video 2" in opened.picture.value
    with pytest.raises(KeyError, match="query 9"):
        opened.show(9)


def test_the_picture_shows_windows_curve_and_frames(opened):
    html = opened.picture.value
    assert "<title>0 to 60 s</title>" in html and "<title>0 to 58 s, rank 1, score 0.900</title>" in html
    assert html.count("<polyline") == html.count("<image") == 1 and "IoU 0.97" in html
    assert "data:image/jpeg;base64," in html
    opened.show(2)
    assert "curves only" in opened.picture.value and "<image" not in opened.picture.value


def test_a_query_is_text_and_not_markup(opened):
    opened.show(2)
    assert "<script>" not in opened.picture.value and "&lt;script&gt;" in opened.picture.value


def test_export_and_figure(opened, predictions):
    opened.filter.value = next(name for name in browser.FILTERS if name.startswith("over-confident"))
    assert [p["qid"] for p in read_predictions(opened.export())] == [2]
    files = opened.save_figure()
    assert {file.suffix for file in files} == {".png", ".pdf"}
    assert all(file.stat().st_size > 5000 for file in files)


def test_nothing_to_save_and_nowhere_to_write_are_reported(opened, monkeypatch):
    opened.search.value = "no such words"
    assert opened.save_figure() == [] and "no query is shown" in opened.message.value
    opened.search.value = ""

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "<the folder>")

    monkeypatch.setattr(browser, "write_predictions", refuse)
    opened.buttons["export selection"].click()
    assert "not done" in opened.message.value and "&lt;the folder&gt;" in opened.message.value


def test_buttons_move(opened):
    opened.buttons["next ▶"].click()
    assert opened.list.value == 2
    opened.buttons["◀ previous"].click()
    assert opened.list.value == 1


def test_the_last_clip_may_be_shorter_and_stays_on_the_axis(tmp_path):
    short = LabelledRow(5, "a short one", 9, "video 5", ((6, 9),), (3, 4), ((1, 2, 3), (4, 4, 4)))
    path = tmp_path / "val.jsonl"
    answer = {"qid": 5, "pred_relevant_windows": [[6, 9, 1.0]], "pred_saliency_scores": [0, 0, 0, 1]}
    write_predictions(path, [answer])
    shape = browser.Browser(path, [short]).picture.value.split('<path d="')[1].split('"')[0]
    ends = [float(part.split("V")[0]) for part in shape.split("H")[1:]]
    assert len(ends) == 5 and max(ends) == browser.LEFT + browser.WIDTH


def test_two_runs_are_compared(predictions, tmp_path):
    other = tmp_path / "other" / "val.jsonl"
    write_predictions(other, [prediction(1, 90, 100, 0.3)])
    opened = browser.Browser(predictions, ROWS, compare=other)
    assert opened.picture.value.count("<svg") == 2 and "90 to 100 s" in opened.picture.value
    opened.next()
    assert "no prediction for this query" in opened.picture.value


def test_what_is_missing_is_reported(predictions, tmp_path):
    with pytest.raises(annotations.AnnotationError, match="give the annotations"):
        browser.browse(predictions)
    with pytest.raises(PredictionError, match="notebook 04"):
        browser.browse(Run("demo", tmp_path / "empty"))
    with pytest.raises(PredictionError, match="no query is both predicted and annotated"):
        browser.browse(predictions, [row(7, "else", 0, 10)])


def test_keys_of_the_page_move_and_are_answered(opened, monkeypatch):
    sent = []
    monkeypatch.setattr(opened.picture, "send", sent.append)
    for by, qid in ((1, 2), (1, 3), (1, 3), (-1, 2)):
        opened.picture._receive({"kind": "move", "by": by})
        assert opened.list.value == qid and f"query {qid} " in opened.picture.value
    assert sent == [{"kind": "moved"}] * 4


def test_a_long_list_is_shown_in_pages(opened, monkeypatch):
    monkeypatch.setattr(browser, "PAGE", 2)
    opened.search.value = " "
    assert [qid for _, qid in opened.list.options] == [1, 2]
    assert opened.count.value == "3 of 3 queries, 1 to 2 are listed: IoU, query"
    opened.next()
    opened.next()
    assert [qid for _, qid in opened.list.options] == [3] and opened.list.value == 3
    opened.previous()
    assert [qid for _, qid in opened.list.options] == [1, 2] and opened.list.value == 2
    opened.list.index = 0
    assert "query 1 " in opened.picture.value


def test_a_comparison_can_be_sorted_and_ended(predictions, tmp_path):
    other = tmp_path / "other" / "val.jsonl"
    write_predictions(other, [prediction(1, 0, 60, 0.3), prediction(2, 60, 66, 0.3)])  # both perfect
    opened = browser.Browser(predictions, ROWS, compare=other)
    assert opened.compare.value == "other/val"
    opened.sort.value = "worse than the compared, most first"
    assert qids(opened) == [2, 1, 3]  # by 1 and 0.03; the third is not compared
    opened.sort.value = "better than the compared, most first"
    assert qids(opened) == [1, 2, 3]
    opened.compare.value = browser.NOTHING
    assert opened.picture.value.count("<svg") == 1
    other.write_text("{}\n")
    opened.compare.value = "other/val"
    assert "not done: " in opened.message.value and "val.jsonl:1" in opened.message.value


def test_playing_sends_a_stretch_or_says_what_is_missing(predictions, tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    make_video(videos / "video 1.mkv", 20)
    (videos / "video 2.mp4").write_text("no video")
    opened = browser.Browser(predictions, ROWS, videos=videos)
    sent = []
    monkeypatch.setattr(opened.picture, "send", lambda *message: sent.append(message))
    opened.picture._receive({"kind": "play", "second": 7.5, "end": 9})
    (content, (clip,)) = sent.pop()
    assert content == {"kind": "clip", "type": "video/mp4", "begin": content["begin"], "start": 7.5, "end": 9}
    assert content["begin"] <= 7.5 and len(clip) > 500
    assert "nothing to play" not in opened.picture.value
    opened.next()
    opened.play(3)
    assert "cannot be opened" in opened.message.value and sent == [({"kind": "no clip"},)]
    opened.next()
    assert "nothing to play" in opened.picture.value and opened.message.value == ""
    opened.play(3)
    assert "there is no video file to play" in opened.message.value


def test_predictions_of_a_folder_that_cannot_be_written_are_saved_elsewhere(predictions, tmp_path, monkeypatch):
    monkeypatch.setattr(browser.os, "access", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    assert browser.Browser(predictions, ROWS).export() == tmp_path / "selection.jsonl"
    assert browser.Browser(predictions, ROWS, folder="some/where").export().is_file()


def test_the_time_axis_of_an_hour_has_few_labels():
    hour = Row(-1, "a query", 5400, "video")
    answer = {"pred_relevant_windows": [[0, 60, 0.5]], "probability": [0.5] * 900}
    labels = [part.split("<")[0] for part in browser.sketch(hour, answer).split('text-anchor="middle">')[1:]]
    assert labels == ["0 min", "10 min", "20 min", "30 min", "40 min", "50 min", "1 h 00", "1 h 10", "1 h 20", "1 h 30"]


def test_predictions_made_elsewhere(shared):
    rows = shared / "qvhighlights" / "highlight_val_release.jsonl"
    began = time.monotonic()
    opened = browser.Browser(shared / "golden" / "official_val_predictions.jsonl", rows)
    print(f"opened {len(opened.entries)} in {time.monotonic() - began:.2f} s")
    assert len(opened.entries) == 1550
    for _ in range(20):
        opened.next()
    assert "clip score" in opened.picture.value and "predicted" in opened.picture.value
    correct = list(browser.FILTERS)[1]
    opened.filter.value = correct
    assert len(opened.selection()) == round(1550 * 0.3484)  # R1@0.7 of the golden metrics


def test_the_papers_own_predictions(shared, tmp_path):
    rows = shared / "qvhighlights" / "highlight_val_release.jsonl"
    released = shared / "golden" / "released_val_scores.csv"
    official = shared / "golden" / "official_val_predictions.jsonl"
    opened = browser.Browser(released, rows, compare=official, folder=tmp_path)
    assert len(opened.entries) == 1550 and opened.title == "golden/released_val_scores"
    assert opened.picture.value.count("<svg") == 2 and "frame probability" in opened.picture.value
    opened.filter.value = list(browser.FILTERS)[1]
    reported = json.loads((shared / "golden" / "reported_scores.json").read_text())["val_released_scores_mask_policy"]
    assert 100 * len(opened.selection()) / 1550 == pytest.approx(reported["MR-full-R1@0.7"], abs=0.005)
    assert len(read_predictions(opened.export())) == len(opened.selection())
    assert len(opened.save_figure()) == 2
