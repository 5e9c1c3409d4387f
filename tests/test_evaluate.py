import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framseg import annotations, evaluate
from framseg.annotations import LabelledRow
from framseg.predictions import PredictionError, read_predictions, write_predictions

WINDOWS, SALIENCY = "pred_relevant_windows", "pred_saliency_scores"
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["official", "rounding"])
def golden(shared, request):
    """The scores that the dataset's own evaluator gives; the IoUs of `rounding` lie on thresholds."""
    predictions = read_predictions(shared / f"golden/{request.param}_val_predictions.jsonl")
    rows = annotations.read(shared / "qvhighlights/highlight_val_release.jsonl")
    return predictions, rows, json.loads((shared / f"golden/{request.param}_val_metrics.json").read_text())


def _row(qid, duration=20, windows=((4, 8),), scores=(4, 4, 4), vid=None):
    ids = [clip for start, end in windows for clip in range(int(start // 2), int(-(-end // 2)))]
    return LabelledRow(
        qid, "q", duration, vid or f"v{qid}", tuple(windows), tuple(ids), tuple([tuple(scores)] * len(ids))
    )


def _prediction(qid, windows=((4, 8, 0.5),), scores=(0.0, 0.0, 1.0, 1.0)):
    return {"qid": qid, WINDOWS: [list(window) for window in windows], SALIENCY: list(scores)}


def test_every_official_number(golden):
    predictions, rows, metrics = golden
    ours = evaluate.evaluate(predictions, rows)
    assert ours == metrics
    assert json.dumps(ours) == json.dumps(metrics)  # the keys' order too


def test_a_val_split_is_scored_in_well_under_a_second(golden):
    predictions, rows, _ = golden
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        evaluate.evaluate(predictions, rows)
        best = min(best, time.process_time() - started)
    assert best < 0.8


def test_annotations_may_be_plain_dicts_and_any_order(golden, shared):
    predictions, _, metrics = golden
    rows = [json.loads(line) for line in (shared / "qvhighlights/highlight_val_release.jsonl").read_text().splitlines()]
    assert evaluate.evaluate(predictions[::-1], rows) == metrics


def test_per_query_numbers_average_to_the_metrics(golden):
    predictions, rows, metrics = golden
    numbers = evaluate.per_query(predictions, rows)
    assert [number["qid"] for number in numbers] == [row.qid for row in rows]
    for threshold, share in metrics["full"]["MR-R1"].items():
        assert round(100 * np.mean([number["iou"] >= float(threshold) for number in numbers]), 2) == share
    hits = [number["hit"] for number in numbers]
    assert round(100 * np.mean(hits), 2) == metrics["HL-min-VeryGood"]["HL-Hit1"] and set(map(type, hits)) == {bool}


def test_command_line(tmp_path):
    rows, predictions = [_row(1), _row(2)], [_prediction(1), _prediction(2), _prediction(3)]
    annotations.write(tmp_path / "rows.jsonl", rows)
    write_predictions(tmp_path / "predictions.jsonl", predictions)
    command = [sys.executable, "-m", "framseg.evaluate", tmp_path / "predictions.jsonl", tmp_path / "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: queries predicted but not annotated: 1 (qid 3)\n"
    done = subprocess.run([*command, "--intersection"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout) == evaluate.evaluate(predictions[:2], rows)


def _added(numbers):
    """The sum from left to right, each step rounded; `sum` carries the rounded parts along from Python 3.12 on."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def _plain_iou(window, true, union="hull"):
    shared = max(min(window[1], true[1]) - max(window[0], true[0]), 0)
    if union == "hull":
        return shared / (max(window[1], true[1]) - min(window[0], true[0]))
    return shared / ((window[1] - window[0]) + (true[1] - true[0]) - shared)


DECIMALS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Plain:
    """The protocol for moments, step by step. The defaults are right, the other values round otherwise."""

    map_union: str = "lengths"
    r1_union: str = "hull"
    thresholds: tuple = DECIMALS
    last_of_equals: bool = True

    def first_iou(self, prediction, windows):
        first = prediction[WINDOWS][0]
        return _plain_iou(first, max(windows, key=lambda true: _plain_iou(first, true, "lengths")), self.r1_union)

    def precision(self, prediction, windows):
        """Average precision of a query by threshold."""
        listed = sorted(prediction[WINDOWS][:10], key=lambda window: -window[2])
        ious = [[_plain_iou(window, true, self.map_union) for true in windows] for window in listed]
        out = []
        for threshold in self.thresholds:
            free, right = list(range(len(windows))), []
            for iou in ious:
                order = free[::-1] if self.last_of_equals else free
                best = max(order, key=iou.__getitem__, default=None)  # the first of equals in this order
                right.append(best is not None and iou[best] >= threshold)
                if right[-1]:
                    free.remove(best)
            precision = [sum(right[: k + 1]) / (k + 1) for k in range(len(right))]
            recall = [0.0] + [sum(right[: k + 1]) / len(windows) for k in range(len(right))]
            out.append(_added((recall[k + 1] - recall[k]) * max(precision[k:]) for k in range(len(right)) if right[k]))
        return out

    def moments(self, predictions, rows):
        """MR-mAP and MR-R1 by length, as `evaluate` gives them."""
        out = {}
        for name, (above, up_to) in {"full": (0, 1e9), "long": (30, 150), "middle": (10, 30), "short": (0, 10)}.items():
            kept = [[(s, e) for s, e in row.relevant_windows if above < e - s <= up_to] for row in rows]
            pairs = [(prediction, true) for prediction, true in zip(predictions, kept, strict=True) if true]
            first, precision = [self.first_iou(*pair) for pair in pairs], [self.precision(*pair) for pair in pairs]
            count, recall, mean = max(len(pairs), 1), {}, {}
            for i, (label, threshold) in enumerate(zip(map(str, DECIMALS), self.thresholds, strict=True)):
                recall[label] = round(100 * (sum(iou >= threshold for iou in first) / count), 2)
                mean[label] = _added(numbers[i] for numbers in precision) / count
            mean["average"] = float(np.mean(list(mean.values())))
            out[name] = {"MR-mAP": {label: round(100 * value, 2) for label, value in mean.items()}, "MR-R1": recall}
        return out


def _plain_average_precision(scores, positive):
    if not any(positive):
        return 0.0
    curve = []  # (positives, precision) after every group of equal scores, best first
    for score in sorted(set(scores), reverse=True):
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= score]
        curve.append((sum(taken), sum(taken) / len(taken)))
    before = [0] + [positives for positives, _ in curve]
    points = [max(p for _, p in curve[k:]) for k in range(len(curve)) if curve[k][0] > before[k]]
    return _added(points) / len(points)


def _plain_highlights(predictions, rows):
    out = {}
    for name, least in (("Fair", 2), ("Good", 3), ("VeryGood", 4)):
        precision, hits = [], []
        for prediction, row in zip(predictions, rows, strict=True):
            count = int(row.duration / 2)
            given = dict(zip(row.relevant_clip_ids, row.saliency_scores, strict=True))
            scores = (list(prediction[SALIENCY]) + [0.0] * count)[:count]
            for annotator in range(3):
                positive = [given.get(clip, (0, 0, 0))[annotator] >= least for clip in range(count)]
                precision.append(_plain_average_precision(scores, positive))
            best = prediction[SALIENCY].index(max(prediction[SALIENCY]))
            hits.append(best < count and max(given.get(best, (0, 0, 0))) >= least)
        hl_map, hit = (round(100 * float(np.mean(values)), 2) for values in (precision, hits))
        out[f"HL-min-{name}"] = {"HL-mAP": hl_map, "HL-Hit1": hit}
    return out


@given(st.integers(0, 2**32 - 1))
def test_agrees_with_the_protocol_written_out_plainly(seed):
    """Ties, lists shorter and longer than the clips, odd durations, several windows, more than ten predictions."""
    random = np.random.default_rng(seed)
    rows, predictions = [], []
    for qid in range(8):
        duration = int(random.integers(5, 90))
        cuts = np.sort(random.choice(np.arange(duration + 1), size=2 * min(3, duration // 3), replace=False)).tolist()
        windows = list(zip(cuts[::2], cuts[1::2], strict=True))[: random.integers(1, 4)]
        ids = sorted({clip for s, e in windows for clip in range(int(s // 2), int(-(-e // 2)))})
        scores = [tuple(three) for three in random.integers(0, 5, (len(ids), 3)).tolist()]
        rows.append(LabelledRow(qid, "q", duration, "v", tuple(windows), tuple(ids), tuple(scores)))
        listed = []
        for _ in range(random.integers(1, 14)):
            if random.random() < 0.5:  # near a true window
                start, end = windows[random.integers(len(windows))]
                start, end = max(0, start + int(random.integers(-1, 2))), end + int(random.integers(0, 2))
            else:
                start, end = sorted(random.choice(np.arange(duration + 1), 2, replace=False).tolist())
            listed.append([start, end, float(random.integers(0, 4)) / 4])
        count = max(1, int(duration / 2) + int(random.integers(-3, 4)))
        predictions.append({"qid": qid, WINDOWS: listed, SALIENCY: (random.integers(-3, 4, count) / 2).tolist()})
    metrics = evaluate.evaluate(predictions, rows)
    plain = Plain().moments(predictions, rows) | _plain_highlights(predictions, rows)
    assert {name: metrics[name] for name in plain} == plain and metrics.keys() - plain.keys() == {"brief"}


def _on_a_threshold(random, true, threshold):
    """A window [start, end] whose IoU with `true` is the threshold, in whole units; None where they are too coarse.

    It lies inside the true window, around it, or across one of its ends.
    """
    start, end = true
    length, percent = end - start, round(100 * threshold)
    kind = random.choice(["inside", "around", "across"])
    if kind == "inside" and length * percent % 100 == 0:
        first = start + int(random.integers(length - length * percent // 100 + 1))
        return [first, first + length * percent // 100]
    if kind == "around" and length * 100 % percent == 0:
        rest = length * 100 // percent - length
        before = min(start, int(random.integers(rest + 1)))
        return [start - before, end + rest - before]
    if kind == "across" and length * (100 - percent) % (100 + percent) == 0:  # of equal length, moved
        moved = length * (100 - percent) // (100 + percent)
        return [start + moved, end + moved]
    return None


def _random_queries(count, seed):
    """Rows and predictions with 0, 1 or 2 decimals; many listed windows have an IoU that is exactly a threshold."""
    random = np.random.default_rng(seed)
    rows, predictions = [], []
    for qid in range(count):
        unit = 10 ** int(random.integers(3))  # parts of a second
        step = int(random.choice([1, 20, 20]))  # twentieths of the lengths are whole, as the thresholds are
        cuts = random.choice(140 * unit // step, 2 * int(random.integers(1, 4)), replace=False)
        true = (np.sort(cuts).reshape(-1, 2) * step).tolist()
        listed = []
        if random.random() < 0.2:  # both halves of a window have an IoU of 0.5 with it
            start, end = true.pop()
            true += [[start, end], [end, 2 * end - start]]
            listed.append([start, 2 * end - start])
        for _ in range(int(random.integers(1, 13))):
            window = _on_a_threshold(random, true[random.integers(len(true))], random.choice(DECIMALS))
            listed.append(window or np.sort(random.integers(0, 150 * unit, 2)).tolist())
        rows.append(LabelledRow(qid, "q", 150, "v", tuple((s / unit, e / unit) for s, e in true), (), ()))
        scores = random.integers(0, 5, len(listed)) / 4
        windows = [[s / unit, e / unit, float(score)] for (s, e), score in zip(listed, scores, strict=True)]
        predictions.append({"qid": qid, WINDOWS: windows})
    return rows, predictions


def test_20_000_queries_agree_to_the_last_bit_where_ious_lie_on_thresholds():
    rows, predictions = _random_queries(20_000, seed=0)
    pairs = [(prediction, row.relevant_windows) for prediction, row in zip(predictions, rows, strict=True)]
    first = [Plain().first_iou(*pair) for pair in pairs]
    assert [number["iou"] for number in evaluate.per_query(predictions, rows)] == first
    assert (np.abs(np.subtract.outer(first, DECIMALS)).min(axis=1) < 1e-12).sum() > 5000
    otherwise = {
        "mAP by the hull": Plain(map_union="hull"),
        "R1 by the lengths": Plain(r1_union="lengths"),
        "thresholds of np.linspace": Plain(thresholds=tuple(np.linspace(0.5, 0.95, 10).tolist())),
        "the first of equals": Plain(last_of_equals=False),
    }
    seen = set()
    # Of 8 queries each moves the rounded numbers, and many a mean ends in a 5 that the order of the sums rounds.
    for start in range(0, len(rows), 8):
        group = predictions[start : start + 8], rows[start : start + 8]
        plain, metrics = Plain().moments(*group), evaluate.evaluate(*group)
        assert {name: metrics[name] for name in plain} == plain
        if start < 1000:
            seen |= {name for name, other in otherwise.items() if other.moments(*group) != plain}
    assert seen == otherwise.keys(), "these must score otherwise, or the queries above show nothing"


def test_means_of_highlights_agree_to_the_last_bit():
    random = np.random.default_rng(0)
    for _ in range(1000):
        rows, predictions = [], []
        for qid in range(8):
            count = int(random.integers(3, 7))
            scores = tuple(map(tuple, random.integers(0, 5, (count, 3)).tolist()))
            rows.append(LabelledRow(qid, "q", 2 * count, "v", ((0, 2 * count),), tuple(range(count)), scores))
            predictions.append({"qid": qid, SALIENCY: (random.integers(0, 9, count) / 8).tolist()})
        plain, metrics = _plain_highlights(predictions, rows), evaluate.evaluate(predictions, rows)
        assert {name: metrics[name] for name in plain} == plain


def test_moments_are_grouped_by_their_length():
    lengths = {"short": 10, "middle": 30, "long": 150, None: 150.5}  # the last second that counts; above it the next
    for name, seconds in lengths.items():
        metrics = evaluate.evaluate([_prediction(1, [(0, seconds, 1)])], [_row(1, 200, ((0, seconds),))])
        scored = {key for key in metrics if key[:2] not in ("br", "HL") and metrics[key]["MR-mAP"]["average"] == 100}
        assert scored == {"full", name} - {None}


def test_an_iou_on_a_threshold_counts():
    rows = [_row(1, 150, ((0, 8),)), _row(2, 150, ((0, 14),)), _row(3, 150, ((0, 60),))]
    listed = [[0.7, 7.1, 0.9]], [[0.0, 12.6, 0.9]], [[0, 60, 0.9]]
    scores = evaluate.evaluate([_prediction(qid, windows) for qid, windows in enumerate(listed, 1)], rows)["full"]
    assert (scores["MR-mAP"]["0.8"], scores["MR-mAP"]["0.9"]) == (100.0, 33.33)


def test_the_list_decides_for_r1_and_the_scores_for_map():
    listed = [(10, 20, 0.1), (4, 8, 0.9)]
    metrics = evaluate.evaluate([_prediction(1, listed)], [_row(1)])
    assert metrics["brief"]["MR-full-R1@0.5"] == 0 and metrics["brief"]["MR-full-mAP"] == 100
    equal = [(10, 20, 0.5), (4, 8, 0.5)]  # a tie keeps the list's order
    assert evaluate.evaluate([_prediction(1, equal)], [_row(1)])["brief"]["MR-full-mAP"] == 50
    late = [(10, 20, 0.0)] * 10 + [(4, 8, 1.0)]  # the eleventh does not count, whatever its score
    assert evaluate.evaluate([_prediction(1, late)], [_row(1)])["brief"]["MR-full-mAP"] == 0


def test_highlights_at_the_ends_of_the_video():
    row = _row(1, duration=9, windows=((6, 9),))  # clips 3 and 4, of which the protocol counts the first
    for scores, hit in (([0, 0, 0, 1], 100), ([0, 0, 0, 1, 2], 0), ([0, 0, 0, 1, 1], 100), ([0, 0, 2, 2], 0)):
        assert evaluate.evaluate([_prediction(1, scores=scores)], [row])["brief"]["HL-min-VeryGood-Hit1"] == hit
    # A missing fourth score is 0, the best of these.
    assert evaluate.evaluate([_prediction(1, scores=[-1, -1, -1])], [row])["brief"]["HL-min-VeryGood-mAP"] == 100
    every = _row(1, duration=8, windows=((0, 8),))
    assert evaluate.evaluate([_prediction(1)], [every])["brief"]["HL-min-VeryGood-mAP"] == 100
    none = _row(1, duration=8, windows=((0, 8),), scores=(1, 1, 1))
    assert evaluate.evaluate([_prediction(1)], [none])["brief"]["HL-min-Fair-mAP"] == 0


def test_predictions_of_one_kind_give_the_metrics_of_that_kind():
    rows = [_row(1), _row(2)]
    both = evaluate.evaluate([_prediction(1), _prediction(2)], rows)
    moments = evaluate.evaluate([{"qid": q, WINDOWS: _prediction(q)[WINDOWS]} for q in (1, 2)], rows)
    assert list(moments) == ["brief", "full", "long", "middle", "short"] and moments["full"] == both["full"]
    highlights = evaluate.evaluate([{"qid": q, SALIENCY: _prediction(q)[SALIENCY]} for q in (1, 2)], rows)
    assert highlights["brief"] == {k: v for k, v in both["brief"].items() if k.startswith("HL")}
    with pytest.raises(PredictionError, match=r"1 predictions lack pred_saliency_scores that others have: qid 2"):
        evaluate.evaluate([_prediction(1), {"qid": 2, WINDOWS: [[0, 1, 1]]}], rows)


@pytest.fixture(scope="module")
def splits():
    random = np.random.default_rng(0)

    def split(first, count):
        rows = []
        for qid in range(first, first + count):
            # Most moments lie in the last fifth.
            windows = ((80, 100),) if random.random() < 0.7 else ((20, 40),)
            rows.append(_row(qid, 100 + 20 * (qid % 2), windows, vid=f"v{qid // 4}"))
        return rows

    return split(0, 200), split(200, 40)


def test_trivial_answers_are_scored_like_predictions(splits):
    train, rows = splits
    answers = evaluate.trivial(rows, train, seed=3, frames=25)
    assert list(answers) == ["all ones", "best constant window", "random masks"]
    for predictions in answers.values():
        assert [p["qid"] for p in predictions] == [row.qid for row in rows]
        assert all(len(p[SALIENCY]) == row.duration // 2 for p, row in zip(predictions, rows, strict=True))
        evaluate.evaluate(predictions, rows)
    assert all(p[WINDOWS] == [[0, p["duration"], 1]] for p in answers["all ones"])
    assert all(len(set(p[SALIENCY])) == 1 for p in answers["all ones"])
    assert evaluate.trivial(rows, train, seed=3) == answers
    assert evaluate.trivial(rows, train, seed=4)["random masks"] != answers["random masks"]


def test_the_constant_window_is_the_best_of_the_grid_on_train(splits):
    train, rows = splits
    constant = evaluate.trivial(rows, train, seed=0, frames=10)["best constant window"]
    start, end, _ = constant[0][WINDOWS][0]
    assert all(p[WINDOWS][0][:2] == [start * p["duration"] / 100, end * p["duration"] / 100] for p in constant)

    def recall(first, after):
        windows = [[first / 10 * row.duration, after / 10 * row.duration] for row in train]
        ious = [
            max(_plain_iou(w, true) for true in row.relevant_windows) for w, row in zip(windows, train, strict=True)
        ]
        return np.mean([iou >= 0.7 for iou in ious])

    best = max(recall(first, after) for first in range(10) for after in range(first + 1, 11))
    assert recall(start / 10, end / 10) == best
    scores = constant[0][SALIENCY]
    highest = scores.index(max(scores)) * 2 / constant[0]["duration"]
    true = [any(start <= highest * row.duration < end for start, end in row.relevant_windows) for row in train]
    assert max(scores) == pytest.approx(np.mean(true)) and max(scores[:8]) == 0


def test_random_masks_have_the_train_share_of_ones(splits):
    train, rows = splits
    share = 1 - annotations.class_balance(train, 25).background_share
    drawn = evaluate.trivial(rows, train, seed=0)["random masks"]
    covered = [sum(end - start for start, end, _ in p[WINDOWS]) / p["duration"] for p in drawn]
    assert np.mean(covered) == pytest.approx(share, abs=0.01)
    assert {len(p[WINDOWS]) for p in drawn} <= {1, 2}  # one run in train, two where the turn cuts it
    assert len({p[WINDOWS][0][0] for p in drawn}) > 10


def test_a_shuffle_takes_every_prediction_to_another_video(splits):
    _, rows = splits
    predictions = []
    for row in rows:
        scores = [float(row.qid)] * (row.duration // 2)
        predictions.append(_prediction(row.qid, [(0.2 * row.duration, 0.4 * row.duration, row.qid)], scores))
    moved = evaluate.shuffled(predictions, rows, seed=0)
    assert [p["qid"] for p in moved] == [row.qid for row in rows]
    sources = [p[WINDOWS][0][2] for p in moved]
    assert sorted(sources) == [row.qid for row in rows]
    by_qid = {row.qid: row for row in rows}
    assert all(by_qid[source].vid != row.vid for source, row in zip(sources, rows, strict=True))
    for prediction, row, source in zip(moved, rows, sources, strict=True):
        assert prediction[WINDOWS][0][:2] == pytest.approx([0.2 * row.duration, 0.4 * row.duration])
        assert prediction[SALIENCY] == [source] * (row.duration // 2) and prediction["vid"] == row.vid
    assert evaluate.shuffled(predictions, rows, seed=0) == moved != evaluate.shuffled(predictions, rows, seed=1)
    with pytest.raises(PredictionError, match="more than half of the queries"):
        evaluate.shuffled(predictions[:5], rows[:5], seed=0)
    with pytest.raises(PredictionError, match="a shuffle needs predictions with"):
        evaluate.shuffled([{"qid": row.qid, WINDOWS: [[0, 1, 1]]} for row in rows], rows, seed=0)


def test_a_shuffled_model_scores_no_better_than_chance(golden):
    predictions, rows, metrics = golden
    moved = evaluate.evaluate(evaluate.shuffled(predictions, rows, seed=0), rows)["brief"]
    assert moved["MR-full-R1@0.7"] < 8 < metrics["brief"]["MR-full-R1@0.7"]
