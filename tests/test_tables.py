"""The notebooks' tables: numbers, titles, and what stands for values that a set does not have."""

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from small import unlabelled

from framseg import annotations, config, evaluate, predictions, prompt
from framseg.demo import synthetic
from framseg.viz import paper_results, parity, tables

ROWS = {split: synthetic.rows(split)[:20] for split in ("train", "val")}


def cells(style) -> list[list[str]]:
    """The text of a shown table's cells, a list per line."""
    lines = BeautifulSoup(style.to_html(), "html.parser").tbody.find_all("tr")
    return [[cell.get_text() for cell in line.find_all("td")] for line in lines]


def test_shown_numbers():
    frame = pd.DataFrame({"count": [1234, 5], "percent": [12.345, None], "text": ["a", "<b>"]}, dtype=object)
    assert cells(tables.shown(frame)) == [["1,234", "12.35", "a"], ["5", "–", "<b>"]]
    assert cells(tables.shown(frame, floats="{:.1f}"))[0][1] == "12.3"
    assert "a caption" in tables.shown(frame, "a caption").to_html()
    assert cells(tables.shown(pd.DataFrame({"x": [1.0, float("nan")]}))) == [["1.00"], ["–"]]


def test_text_and_its_title_are_on_the_left():
    html = tables.shown(pd.DataFrame({"number": [1], "text": ["a"]})).to_html()
    assert html.count("text-align: left") == 1 and ".col1" in html and ".col0 {" not in html


def test_splits():
    test = [unlabelled(row) for row in ROWS["val"]]
    table = tables.splits({"test": test, **ROWS})
    assert list(table) == ["test", "train", "val"]
    assert table.loc["queries"].tolist() == [20, 20, 20] and isinstance(table["val"]["queries"], int)
    moments = [len(row.relevant_windows) for row in ROWS["val"]]
    assert table["val"]["moments per query"] == pytest.approx(sum(moments) / 20)
    same = annotations.annotator_distance(ROWS["val"]).measured[0]
    assert table["val"]["annotators give equal scores, %"] == pytest.approx(100 * same)
    line = list(table.index).index("moments per query")
    assert cells(tables.shown(table))[0] == ["20"] * 3 and cells(tables.shown(table))[line][0] == "–"


def test_digit_positions():
    profile = config.load("demo")
    report = prompt.check(prompt.load(profile.model.tokenizer), profile.model, 4, "a red ball")
    table = tables.digit_positions(report, "0110")
    assert table.loc["position"].tolist() == [str(place) for place in report.digit_positions]
    assert table.loc["token there"].tolist() == ["<|assistant|>", "0", "1", "1"]
    assert table.loc["digit predicted there"].tolist() == list("0110")


def test_parameters_of_the_published_model():
    table = tables.parameters(config.load("demo"), config.load("paper"))["paper"]
    assert table.loc["vision encoder"].tolist() == [428_225_600, 0]
    assert table.loc["resampler"].tolist() == [109_901_568, 109_901_568]
    assert table.loc["language model"].tolist() == [3_821_130_051, 25_165_824]
    assert table.loc["all"].tolist() == [4_359_257_219, 135_067_392]


def test_settings_next_to_the_published_ones():
    table = tables.settings(config.load("demo", {"training.epochs": 3}), tables.TABLE_II | tables.TABLE_III)
    assert list(table) == ["published", "this run (demo)", "differs"]
    assert table.loc["training.epochs"].tolist() == ["11", "3", "≠"]
    assert table.loc["training.betas"].tolist() == ["0.9, 0.999", "0.9, 0.999", ""]
    assert table.loc["adapter.targets"]["published"] == "qkv_proj, o_proj, gate_up_proj, down_proj"
    assert table.loc["losses.pos_weight"].tolist() == ["2.3378", "2.3378", ""]
    own = tables.settings(config.load("paper"), tables.TABLE_II | tables.TABLE_III)
    assert (own["differs"] == "").all()


def test_work_of_the_published_sizes():
    table = tables.work((config.load("paper"), 3621))
    assert list(table) == ["paper, 3621 positions"] and "language backward" in table.index
    assert table.sum().item() == pytest.approx(110, abs=1)  # TFLOP: 81, and 29 to recompute


@pytest.fixture(scope="module")
def metrics() -> dict:
    answers = evaluate.trivial(ROWS["val"], ROWS["train"], 0)
    return {name: evaluate.evaluate(some, ROWS["val"]) for name, some in answers.items()}


def test_scores_have_short_titles(metrics):
    table = tables.scores({name: one["brief"] for name, one in metrics.items()})
    assert list(table) == ["R1@0.5", "R1@0.7", "mAP", "mAP@0.5", "mAP@0.75", "HL mAP", "HIT@1"]
    assert set(evaluate.METRICS.values()) <= set(table)
    assert table.loc["all ones", "mAP@0.75"] == metrics["all ones"]["brief"]["MR-full-mAP@0.75"]
    lacking = tables.scores({"windows alone": {"MR-full-mAP": 1.0}})
    assert cells(tables.shown(lacking)) == [["–", "–", "1.00", "–", "–", "–", "–"]]


def test_table_i(metrics):
    table = tables.table_i(config.load("demo"), metrics["all ones"]["brief"])
    assert table.index[0] == ("measured here, synthetic demo set", "this model")
    assert [name for _, name in table.index[1:]] == list(paper_results.TEST)
    lines = dict(zip((name for _, name in table.index), cells(tables.shown(table)), strict=True))
    assert lines["the paper"][:5] == ["BLIP-3", "4.36 B", "135,067,392", "25", "frame segmentation"]
    assert lines["the paper"][5:] == ["60.77", "37.42", "35.28", "56.26", "35.80", "34.48", "56.74"]
    assert lines["Chrono"] == ["–"] * 5 + ["74.77", "60.51", "51.37", "68.12", "53.38", "–", "–"]
    assert lines["this model"][3] == "25" and lines["this model"][2].replace(",", "").isdigit()


def test_table_iv(metrics):
    log = [{"epoch": epoch, "metrics": metrics["all ones"], "invalid": 0.25} for epoch in (0, 1)]
    table = tables.by_epoch(log, "demo val")
    assert table.index.tolist() == list(range(12))
    assert list(table[tables.REPORTED]) == ["R1@0.7", "mAP", "mAP@0.75"]
    assert table[tables.REPORTED].loc[11].tolist() == [43.74, 35.01, 35.9]
    lines = cells(tables.shown(table))
    assert lines[0][3:] == ["25.00", "–", "–", "–"] and lines[11][:4] == ["–"] * 4


def test_lengths_that_a_set_lacks(metrics):
    rows = [row for row in ROWS["val"] if all(end - start > 10 for start, end in row.relevant_windows)]
    table = tables.lengths(rows, metrics["all ones"])
    assert table.loc["full", "true moments"] == sum(len(row.relevant_windows) for row in rows)
    assert table.loc["full", "mAP"] == metrics["all ones"]["brief"]["MR-full-mAP"]
    assert cells(tables.shown(table))[-1] == ["0", "–", "–", "–"]


def test_intervals():
    system = {"scores": {"mAP": 41.92, "HIT@1": 62.9}, "interval": {"mAP": [40.12, 43.81], "HIT@1": [60.61, 65.24]}}
    table = tables.intervals({"ranked": system})
    assert table.loc["ranked"].to_dict() == {"mAP": "41.92 (40.1 to 43.8)", "HIT@1": "62.90 (60.6 to 65.2)"}


def test_answers():
    row = ROWS["val"][0]
    listed = [[0, 10, 0.9], [10.04, 20.26, 0.8], [30, 40, 0.7], [50, 60, 0.6]]
    table = tables.answers([row, unlabelled(row)], [listed, listed])
    assert table["first three windows, s"][0] == "0–10, 10–20.3, 30–40"
    assert table["true windows, s"][1] == "" and table["query"][0] == row.query
    assert table["true windows, s"][0].startswith(f"{row.relevant_windows[0][0]:g}–")


def test_the_authors_answers_give_the_papers_table_i(shared):
    """The first of the three readings is theirs: what they report for test, but for two last digits."""
    rows = annotations.read(shared / "qvhighlights/highlight_test_with_gt.jsonl")
    answers = predictions.read_released(predictions.reference(str(shared), "test"))
    table = tables.readings("test", [answer | {"mask": parity.mask(answer)} for answer in answers], rows)
    reported, own, *_ = table.to_numpy()
    assert own[:4].tolist() == reported[:4].tolist() == [60.77, 37.42, 35.28, 56.26]
    assert abs(own - reported).max() < 0.011
