import numpy as np
import pytest

from framseg import annotations, evaluate
from framseg.annotations import LabelledRow, Row
from framseg.predictions import PredictionError
from framseg.viz import error_analysis

SHORT = LabelledRow(1, "a cat sleeps", 150, "a", ((10, 14),), (5, 6), ((2, 3, 4),) * 2)
TWO = LabelledRow(
    2, "a dog runs", 150, "b", ((0, 30), (60, 120)), tuple([*range(15), *range(30, 60)]), ((4, 4, 4),) * 45
)


def prediction(row: Row, probability: np.ndarray) -> dict:
    return {"qid": row.qid, "pred_relevant_windows": [[0, 30, 0.9]], "probability": probability.tolist()}


def test_frames_know_their_label_and_the_way_to_a_moments_end():
    probability = np.linspace(0, 1, 25)
    columns = error_analysis.by_frame([TWO, SHORT], [prediction(SHORT, probability), prediction(TWO, probability)])
    assert columns["label"].tolist() == [*annotations.frame_labels(TWO, 25), *annotations.frame_labels(SHORT, 25)]
    # Frames stand at 3, 9, 15, 21, ... seconds; the ends are 0, 30, 60 and 120.
    assert columns["distance"][:8].tolist() == [3, 9, 15, 9, 3, 3, 9, 15]
    assert columns["digit"].tolist() == [int(p >= 0.5) for p in columns["probability"]]
    with pytest.raises(PredictionError, match="1 predictions have no frame probabilities"):
        error_analysis.by_frame([SHORT], [{"qid": 1, "pred_relevant_windows": [[0, 30, 1]]}])


def test_calibration_by_hand():
    mean, true, count, error = error_analysis.calibration(np.array([0.0, 0.05, 0.95, 1.0]), np.array([0, 1, 1, 1]))
    np.testing.assert_allclose(mean, [0.025, 0.975])
    np.testing.assert_allclose(true, [0.5, 1.0])
    assert count.tolist() == [2, 2] and error == pytest.approx((0.475 + 0.025) / 2)


def test_precision_and_recall_by_hand():
    precision, recall, average = error_analysis.precision_recall(np.array([0.9, 0.8, 0.8, 0.1]), np.array([1, 0, 1, 1]))
    np.testing.assert_allclose(precision, [1, 2 / 3, 3 / 4])  # the two of 0.8 enter together
    np.testing.assert_allclose(recall, [1 / 3, 2 / 3, 1])
    assert average == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_what_a_grid_can_say():
    answers = error_analysis.reachable([SHORT, TWO], 25)
    # No frame stands between 10 and 14 s, so the labels have no 1; the best run of 6-second frames is two of them.
    assert answers["true labels"][0]["pred_relevant_windows"][0][:2] == [0, 150]
    assert answers["best digits"][0]["pred_relevant_windows"] == [[6.0, 18.0, pytest.approx(4 / 12)]]
    assert [window[:2] for window in answers["best digits"][1]["pred_relevant_windows"]] == [[0, 30], [60, 120]]
    for predictions in answers.values():
        assert evaluate.evaluate(predictions, [SHORT, TWO])["brief"]["MR-full-R1@0.7"] >= 50


def test_no_mask_beats_the_best_digits(shared):
    rows = annotations.read(shared / "qvhighlights" / "highlight_val_release.jsonl")
    best = []
    for frames in (10, 25, 50):
        scores = {name: evaluate.evaluate(best, rows) for name, best in error_analysis.reachable(rows, frames).items()}
        labels, digits = scores["true labels"]["brief"], scores["best digits"]["brief"]
        assert all(labels[key] <= digits[key] for key in ("MR-full-R1@0.5", "MR-full-R1@0.7", "MR-full-mAP"))
        best.append(digits["MR-full-mAP"])
    assert best == sorted(best) and best[1] > 43.74  # far above what the paper's model reaches


def test_figures_draw_what_was_counted():
    rows, probability = [SHORT, TWO], np.where(np.arange(25) < 5, 0.9, 0.1)
    predictions = [prediction(row, probability) for row in rows]
    picture = error_analysis.figure(rows, predictions)
    spread, length = picture.axes[:2]
    share, edges, _ = spread.patches[0].get_data()
    assert share.sum() == 1 and share[-1] == 0.5  # the second query's first window is exact
    assert [text.get_text() for text in length.get_xticklabels()] == [
        "≤ 10\n(1)",
        "≤ 30\n(0)",
        "≤ 60\n(1)",
        "> 60\n(0)",
    ]
    assert any("error 0." in text.get_text() for text in picture.axes[4].texts)
    without = [{key: value for key, value in record.items() if key != "probability"} for record in predictions]
    texts = [text.get_text() for axes in error_analysis.figure(rows, without).axes for text in axes.texts]
    assert texts == ["These predictions have no frame probabilities."]
    metrics = {
        f: {name: evaluate.evaluate(best, rows) for name, best in error_analysis.reachable(rows, f).items()}
        for f in (10, 25)
    }
    drawn = error_analysis.reach(metrics, evaluate.evaluate(predictions, rows)).axes[0]
    assert [line.get_label() for line in drawn.lines] == ["best digits", "true labels", "reached"]
