import json

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib import pyplot
from matplotlib.container import BarContainer
from PIL import Image

from framseg import annotations, evaluate, moments
from framseg.annotations import LabelledRow, Row
from framseg.viz import figures, paper_results

F = 25


def labelled_row(
    qid: int, start: float, end: float, query: str = "a cat sleeps", duration: float = 150, vid: str = ""
) -> Row:
    clips = tuple(range(int(start) // 2, int(-(-end // 2))))
    scores = tuple((2, 3, 4) for _ in clips)
    return LabelledRow(qid, query, duration, vid or f"video {qid}", ((start, end),), clips, scores)


def prediction(row: Row, probability: np.ndarray, **more) -> dict:
    mask = (probability >= 0.5).astype(int)
    return {
        "qid": row.qid,
        "query": row.query,
        "vid": row.vid,
        "duration": row.duration,
        "pred_relevant_windows": moments.windows(mask, probability, row.duration),
        "pred_saliency_scores": moments.saliency(probability, row.duration).tolist(),
        "probability": probability.tolist(),
        "valid": bool(mask.any()),
    } | more


def inside(start: float, end: float, high: float = 0.9, low: float = 0.05) -> np.ndarray:
    times = annotations.frame_times(150, F)
    return np.where((times >= start) & (times <= end), high, low)


def texts(figure) -> list[str]:
    shown = [text.get_text() for axes in figure.axes for text in axes.texts]
    return shown + [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]


def bars(axes) -> list:
    return [bar for container in axes.containers if isinstance(container, BarContainer) for bar in container]


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (F, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = dict(pyplot.rcParams)
    yield
    assert pyplot.get_fignums() == []
    assert dict(pyplot.rcParams) == before


@pytest.fixture
def steps() -> list[dict]:
    return [
        {
            "step": step,
            "lm": 1 / step,
            "bce": 2 / step,
            "tversky": 3 / step,
            "dice": 4 / step,
            "weights": [1 - step / 100, step / 300, step / 300, step / 300],
            "learning_rate": 1e-4 * step,
        }
        for step in range(1, 51)
    ]


def test_saved_as_png_and_pdf_the_same_each_time(tmp_path):
    row = labelled_row(1, 0, 60)
    answer = prediction(row, inside(0, 60))
    first = figures.save(figures.qualitative(row, answer), tmp_path / "new" / "one", "q")
    second = figures.save(figures.qualitative(row, answer), tmp_path / "two", "q")
    assert [path.name for path in first] == ["q.png", "q.pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[1].read_bytes().startswith(b"%PDF")
    with Image.open(first[0]) as picture:
        assert picture.width == round(figures.WIDTH * 2 * figures.DPI)


def test_a_figure_shows_itself_in_a_notebook(steps):
    data, _ = DisplayFormatter().format(figures.schedule(steps))
    assert data["image/png"][:4] == b"\x89PNG"


def test_overview_counts(pictures):
    train = [labelled_row(1, 0, 60, vid="a"), labelled_row(2, 30, 60, vid="a"), labelled_row(3, 0, 150, vid="b")]
    test = [Row(9, "who knows", 150, "c")]
    figure = figures.data_overview({"train": train, "test": test}, F)
    videos, windows, lengths, saliency, apart, position, sizes, words, balance = figure.axes
    # One of train's two videos has a query and the other has two; test's only video has a query.
    assert [bar.get_height() for bar in bars(videos)] == [0.5, 0.5, 1, 0]
    assert [bar.get_height() for bar in bars(windows)] == [1]
    share, edges, _ = lengths.patches[0].get_data()
    assert {int(edges[i]): share[i] for i in share.nonzero()[0]} == pytest.approx({30: 1 / 3, 60: 1 / 3, 140: 1 / 3})
    assert saliency.lines[0].get_ydata()[9] == 1  # (2 + 3 + 4) / 3
    np.testing.assert_allclose(apart.lines[0].get_ydata(), annotations.annotator_distance(train).measured)
    assert sizes.patches[1].get_data().values[2] == 1  # "who knows" has two words
    assert {label.get_text() for label in words.get_yticklabels()} >= {"knows"}
    expected = np.mean([annotations.frame_labels(row, F) for row in train], axis=0)
    np.testing.assert_array_equal(position.lines[0].get_ydata(), expected)
    counted = annotations.class_balance(train, F)
    assert [bar.get_width() for bar in bars(balance)] == [counted.background_share, paper_results.BACKGROUND_SHARE]
    assert "70.04%\n2.3378 : 1" in texts(figure)
    with pytest.raises(ValueError, match="none of the splits test has labels"):
        figures.data_overview({"test": test}, F)


def test_overview_of_the_real_splits(shared):
    folder = shared / "qvhighlights"
    splits = {name: annotations.read(folder / f"highlight_{name}_release.jsonl") for name in ("train", "val", "test")}
    figure = figures.data_overview(splits, F)
    assert {"70.22%\n2.3582 : 1", "71.90%\n2.5583 : 1"} <= set(texts(figure))
    assert {"70.19%\n2.3550 : 1"} <= set(texts(figures.data_overview({"train": splits["train"]}, F, True)))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["train (7,218 queries)", "val (1,550 queries)", "test (1,542 queries)"]


def test_frame_strip_has_every_frame_its_time_and_its_digit(pictures):
    labels = [0] * 20 + [1] * 5
    figure = figures.frame_strip(pictures, annotations.frame_times(150, F), labels)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == F
    np.testing.assert_array_equal(shown[7].images[0].get_array(), pictures[7])
    assert shown[0].get_xlabel() == "3 s  0" and shown[24].get_xlabel() == "147 s  1"
    framed = [axes.spines["left"].get_visible() for axes in shown]
    assert framed == [bool(label) for label in labels]


def test_soft_targets_are_the_mean_of_the_annotators_points():
    row = labelled_row(7, 30, 90, query="costs $5 & $6")
    axes = figures.soft_targets(row, F).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5] * 30, [0.75] * 30, [1.0] * 30]
    assert axes.lines[0].get_xdata()[[0, -1]].tolist() == [31, 89]  # the middles of the first and the last clip
    assert [bar.get_height() for bar in bars(axes)] == annotations.soft_targets(row, F).tolist()
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars(axes)]
    np.testing.assert_allclose(centres, annotations.frame_times(150, F))
    moment = next(patch for patch in axes.patches if patch not in bars(axes))
    assert (moment.get_x(), moment.get_width()) == (30, 60)
    assert axes.get_title("left") == "costs $5 & $6"
    with pytest.raises(annotations.AnnotationError, match="no labels"):
        figures.soft_targets(Row(9, "who knows", 150, "c"), F)


def test_variations_frame_the_drawn_ones(pictures):
    stacked = np.stack([pictures, pictures[::-1], pictures])
    choice = np.arange(F) % 3
    figure = figures.variations(stacked, annotations.frame_times(150, F), 0.1, choice, columns=5)
    grid = np.reshape(figure.axes, (3, 5))
    assert [line[0].get_ylabel() for line in grid] == ["-0.1 s", "frame $v_i$", "+0.1 s"]
    positions = [0, 6, 12, 18, 24]
    np.testing.assert_array_equal(grid[1, 1].images[0].get_array(), pictures[::-1][6])
    drawn = [[axes.spines["top"].get_visible() for axes in line] for line in grid]
    assert drawn == [[choice[p] == variation for p in positions] for variation in range(3)]


def test_tokens_are_boxes_in_lines_with_their_kinds():
    spelled = ["<|user|>", "▁Frame", "0", ":", "<image>", "<0x0A>", "$x$", "<|end|>", "<|assistant|>", "0", "1"]
    figure = figures.tokens(list(enumerate(spelled)), columns=30)
    axes = figure.axes[0]
    boxes, words = axes.patches, axes.texts
    assert [word.get_text() for word in words] == [s.replace("<0x0A>", "↵") for s in spelled]
    right = max(box.get_x() + box.get_width() for box in boxes)
    assert right <= 30 and len({box.get_y() for box in boxes}) == 2
    colour = dict(enumerate(box.get_facecolor() for box in boxes))
    assert colour[0] == colour[7] == colour[8]  # control tokens
    assert len({colour[0], colour[4], colour[9], colour[10], colour[1]}) == 5
    assert colour[2] != colour[9]  # a digit of the text is text, a digit of the answer is not


def test_average_weighs_by_time():
    np.testing.assert_allclose(figures.ema([0, 1, 2], [5, 5, 5]), 5)
    # Half-life 1 on a range of 4: the second point is 1 later, the third 3 later.
    expected = [8, (0.5 * 8 + 2) / 1.5, (0.125 * (0.5 * 8 + 2) + 4) / (0.125 * 1.5 + 1)]
    np.testing.assert_allclose(figures.ema([0, 1, 4], [8, 2, 4], half_life=0.25), expected)
    assert figures.ema([3], [7]).tolist() == [7]


def test_losses_raw_under_average(steps):
    steps[10]["bce"] = float("nan")
    figure = figures.losses(steps)
    assert [axes.get_title("left") for axes in figure.axes] == ["LM", "BCE", "Tversky", "generalized Dice"]
    raw, average = figure.axes[0].lines
    assert raw.get_alpha() < 1 and raw.get_ydata()[4] == 1 / 5
    np.testing.assert_allclose(average.get_ydata(), figures.ema(raw.get_xdata(), raw.get_ydata()))
    assert len(figure.axes[1].lines[1].get_ydata()) == 49
    assert len(figures.losses(steps[:1]).axes) == 4
    for draw in (figures.losses, figures.schedule, figures.validation):
        with pytest.raises(ValueError, match="train first"):
            draw([])


def test_schedule(steps):
    rate, weights = figures.schedule(steps).axes
    assert rate.lines[0].get_ydata()[-1] == pytest.approx(50e-4)
    assert [line.get_label() for line in weights.lines] == ["LM", "BCE", "Tversky", "generalized Dice"]
    assert [line.get_ydata()[-1] for line in weights.lines] == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])


def test_validation_by_epoch():
    brief = dict.fromkeys(figures.METRICS, 10.0)
    records = [{"epoch": epoch, "metrics": {"brief": {key: 10.0 * epoch for key in brief}}} for epoch in range(3)]
    axes = figures.validation(records).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0, 10, 20]] * 4
    assert axes.get_legend().get_texts()[1].get_text() == "R1@0.7  20.00"


def test_intervals_are_drawn_where_they_lie():
    high = {"scores": {"mAP": 40.0, "HIT@1": 60.0}, "interval": {"mAP": [38.0, 43.0], "HIT@1": [57.0, 62.0]}}
    low = {"scores": {"mAP": 35.0, "HIT@1": 58.0}, "interval": {"mAP": [33.0, 36.0], "HIT@1": [55.0, 60.5]}}
    figure = figures.intervals({"a": low, "b": high})
    assert [axes.get_title("left") for axes in figure.axes] == ["mAP", "HIT@1"]
    first = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert first == [([33, 36], [0, 0]), ([35], [0]), ([38, 43], [1, 1]), ([40], [1])]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_progress_from_the_first_step_on(steps):
    with pytest.raises(ValueError, match="no steps are logged yet"):
        figures.progress([], [])
    for count, epochs in ((1, 0), (len(steps), 3)):
        logged = [
            {"epoch": e, "metrics": {"brief": {"MR-full-R1@0.7": 10.0 * e, "MR-full-mAP": 5.0}}} for e in range(epochs)
        ]
        fall, rate, answers = figures.progress(steps[:count], logged).axes
        assert [line.get_xydata().tolist() for line in rate.lines] == [
            [[line["step"], line["learning_rate"]] for line in steps[:count]]
        ]
        raw, average = fall.lines[:2]
        assert raw.get_ydata().tolist() == [line["lm"] for line in steps[:count]]
        assert average.get_label() == f"LM {steps[count - 1]['lm']:.3f}"
        assert answers.lines[0].get_ydata().tolist() == [10.0 * e for e in range(epochs)]


def test_comparison_shows_what_was_scored():
    rows = [labelled_row(1, 0, 60), labelled_row(2, 60, 90)]
    full = evaluate.evaluate([prediction(row, inside(*row.relevant_windows[0])) for row in rows], rows)
    windows = evaluate.evaluate([{"qid": row.qid, "pred_relevant_windows": [[0, 150, 1]]} for row in rows], rows)
    figure = figures.comparison({"model": full, "all ones": windows})
    first, hit = figure.axes[0], figure.axes[-1]
    assert [axes.get_title("left") for axes in figure.axes] == list(figures.METRICS.values())
    assert [bar.get_width() for bar in bars(first)] == [full["brief"]["MR-full-R1@0.5"], 0]
    assert hit.texts[1].get_text() == "–" and hit.texts[0].get_text() == f"{full['brief']['HL-min-VeryGood-Hit1']:.1f}"
    first_colour, other = (bar.get_facecolor() for bar in bars(first))
    assert first_colour != other


def test_qualitative_draws_frames_windows_and_curves(pictures):
    row = labelled_row(7, 30, 90, query="costs $5 & $6 <b>")
    answer = prediction(row, inside(36, 84))
    figure = figures.qualitative(row, answer, pictures)
    strip, spans, curve = figure.axes
    assert figure.get_suptitle() == "“costs $5 & $6 <b>”"
    # Nine slots of 150 / 9 s; the frame nearest to each middle is in it, with its own time.
    assert len(strip.images) == 9 and strip.texts[0].get_text() == "9 s"
    np.testing.assert_array_equal(strip.images[4].get_array(), pictures[12])
    assert [(bar.get_x(), bar.get_width()) for bar in bars(spans)] == [(30, 60), (36, 48)]
    assert [label.get_text() for label in spans.get_yticklabels()] == ["true", "predicted"]
    np.testing.assert_allclose(curve.lines[0].get_xdata(), annotations.frame_times(150, F))
    np.testing.assert_allclose(curve.lines[0].get_ydata(), answer["probability"])
    values, edges, _ = curve.patches[0].get_data()
    assert values[14:17].tolist() == [0, 0.75, 0.75] and edges[-1] == 150
    assert curve.get_xlim() == spans.get_xlim() == (0, 150)
    assert "qid 7 · video 7 · IoU 0.80 · highlight hit · window score 0.90" in texts(figure)


def test_qualitative_without_frames_labels_or_probability():
    row = Row(7, "who knows " * 20, 61, "video 7")
    answer = {"qid": 7, "pred_relevant_windows": [[0, 10, 0.5]], "pred_saliency_scores": [-1.0, *[3.0] * 29]}
    figure = figures.qualitative(row, answer)
    assert any("No frames are shown" in text for text in texts(figure)) and not figure.axes[0].images
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["predicted"]
    assert len(figure.axes[2].patches) == 0
    assert figure.axes[2].lines[0].get_ydata().tolist() == [0, *[1] * 29]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["clip score, stretched to 0..1"]
    assert figure.get_suptitle().count("\n") == 2


def test_qualitative_compared_with_another_prediction():
    row = labelled_row(7, 30, 90)
    earlier = prediction(row, inside(0, 60, high=0.6), valid=False)
    figure = figures.qualitative(row, prediction(row, inside(30, 90)), against=("epoch 1", earlier))
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["true", "predicted", "epoch 1"]
    assert [line.get_label() for line in figure.axes[2].lines] == ["frame probability", "epoch 1: frame probability"]
    assert "invalid mask, read as all ones" in figures.scores(row, earlier)


def test_overlapping_windows_get_lanes_and_padding_is_dropped():
    listed = [[0, 50, 0.9], [60, 90, 0.8], [40, 70, 0.7], [0, 150, 0.2], [10, 20, 0.1], [0, 150, 0.0]]
    filled, left_out = figures.lanes({"pred_relevant_windows": listed}, 150, most=3)
    assert [[window[0] for window in lane] for lane in filled] == [[1, 2], [3, 5], [4]] and left_out == 0
    filled, left_out = figures.lanes({"pred_relevant_windows": listed}, 150, most=1)
    assert [window[0] for window in filled[0]] == [1, 2] and left_out == 3
    # An answer that is nothing but the whole video at score 0 is still shown.
    assert figures.lanes({"pred_relevant_windows": [[0, 150, 0.0]] * 2}, 150) == ([[(1, 0, 150, 0.0)]], 0)


def test_queries_are_chosen_by_their_rules():
    rows = [labelled_row(qid, 30, 90) for qid in range(1, 9)]
    answers = {
        1: inside(30, 90, 0.75),  # excellent: 6 and 7 are as close, but 1 is the smaller qid
        2: inside(30, 90, 0.97),  # perfect moment, exceeds the true saliency
        3: inside(78, 90, 0.6),  # weak moment
        4: inside(120, 150, 0.6),  # failure
        5: inside(0, 12, 0.99),  # over-confident, and a failure as well
        6: inside(30, 90, 0.8),  # improved from nothing
        7: inside(30, 90, 0.9),
        8: inside(30, 84, 0.9),
    }
    predictions = [prediction(row, answers[row.qid]) for row in rows]
    numbers = evaluate.per_query(predictions, rows)
    earlier = [{"qid": qid, "iou": 0.1 if qid == 6 else 0.6, "hit": True} for qid in answers]
    chosen = figures.choose(rows, predictions, numbers, earlier)
    assert chosen["good highlight, weak moment"] == 3
    assert chosen["perfect moment, over-inclusive highlight"] == 2
    assert chosen["failure"] == 4 and chosen["over-confident"] == 5
    assert chosen["excellent"] == 1 and chosen["improvement"] == 6
    assert list(chosen) == list(figures.RULES)
    assert figures.choose(rows[::-1], predictions[::-1], numbers[::-1], earlier[::-1]) == chosen
    # Without an earlier epoch, and where no query meets a rule, names are left out.
    assert set(figures.choose(rows[:1], predictions[:1], numbers[:1])) == {"perfect moment, over-inclusive highlight"}


def test_chosen_from_the_papers_own_predictions(shared):
    rows = annotations.read(shared / "qvhighlights" / "highlight_val_release.jsonl")
    by_qid = {row.qid: row for row in rows}
    lines = (shared / "golden" / "released_val_scores.csv").read_text().splitlines()[1:]
    predictions = []
    for line in lines:
        qid, _, listed, *probability = line.split(",")
        windows = [[float(number) for number in window.split("/")] for window in listed.split("|")]
        answer = prediction(by_qid[int(qid)], np.array(probability, dtype=float))
        predictions.append(answer | {"pred_relevant_windows": sorted(windows, key=lambda window: -window[2])})
    numbers = {number["qid"]: number for number in evaluate.per_query(predictions, rows)}
    chosen = figures.choose(rows, predictions, list(numbers.values()))
    assert len(set(chosen.values())) == len(chosen) == 5
    answers = {answer["qid"]: answer for answer in predictions}
    confident = chosen["over-confident"]
    assert numbers[confident]["iou"] < 0.3 and answers[confident]["pred_relevant_windows"][0][2] > 0.99
    assert numbers[chosen["excellent"]] == {"qid": chosen["excellent"], "iou": 1.0, "hit": True}
    assert numbers[chosen["failure"]]["iou"] == 0 and not numbers[chosen["failure"]]["hit"]
    weak = numbers[chosen["good highlight, weak moment"]]
    assert weak["hit"] and weak["iou"] < 0.3


def test_predictions_made_elsewhere(shared):
    rows = annotations.read(shared / "qvhighlights" / "highlight_val_release.jsonl")
    with open(shared / "golden" / "official_val_predictions.jsonl") as file:
        answer = json.loads(file.readline())
    row = next(row for row in rows if row.qid == answer["qid"])
    figure = figures.qualitative(row, answer)
    assert figure.axes[2].lines[0].get_label() == "clip score, stretched to 0..1"
    assert len(figure.axes[2].lines[0].get_ydata()) == 75
    assert " +2" in [text.get_text() for text in figure.axes[1].texts]  # ten windows, eight in four lanes
