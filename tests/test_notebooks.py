"""The notebooks: as they are committed, and executed one after the other with a shortened training."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from conftest import SHORT, small_profile, start
from jupyter_client.manager import start_new_kernel
from PIL import Image

from framseg import annotations, codalab, config, dataset, decode, evaluate, moments, predict, train
from framseg.predictions import read_predictions, read_released
from framseg.run import cost, notebooks, stamps
from framseg.run.paths import Run
from framseg.viz import figures, paper_results, parity, tables

NOTEBOOKS = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
CHAPTERS = ["01_data", "02_prompt_tokenizer", "03_training", "04_evaluation_codalab", "05_figures"]


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == CHAPTERS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_committed(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == notebooks.KERNEL
    assert 13 <= len(notebook.cells) <= 17
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith(f"# {int(path.stem[:2])} ·")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 20, cell.id
        functions = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.FunctionDef)]
        assert all(node.end_lineno - node.lineno < 8 for node in functions), cell.id
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1]
    assert 'profile = "demo"' in tagged[0].source and "run_dir = None" in tagged[0].source
    # No path of a run but those that Run gives.
    assert not [cell.id for cell in code if re.search(r"""["']runs/|["']data/""", cell.source)]


def executed(chain: Run, chapter: int) -> nbformat.NotebookNode:
    return nbformat.read(chain.notebooks / f"{CHAPTERS[chapter - 1]}.ipynb", as_version=4)


def text_of(notebook: nbformat.NotebookNode, name: str) -> str:
    """Everything that a cell printed or showed as text, markup taken out."""
    outputs = next(cell for cell in notebook.cells if cell.id == name).outputs
    texts = [out.text if out.output_type == "stream" else out.data.get("text/html", "") for out in outputs]
    texts += [out.data.get("text/plain", "") for out in outputs if "data" in out]
    return re.sub(r"<style.*?</style>|<[^>]+>", " ", "\n".join(texts), flags=re.DOTALL)


def output(chain: Run, chapter: int, cell: str) -> str:
    """What a cell of an executed chapter printed or showed."""
    return text_of(executed(chain, chapter), cell)


def run_alone(run: Run, chapter: int, folder: Path, shared: Path | None = None, **parameters) -> nbformat.NotebookNode:
    """A chapter executed once more in a copy of a finished run, with parameters of its own."""
    copy = Run("demo", folder / "copy of the run")
    if not copy.root.exists():
        shutil.copytree(run.root, copy.root)
    out = folder / f"{CHAPTERS[chapter - 1]}.ipynb"
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS[chapter - 1]), str(out), "-k", notebooks.KERNEL]
    for name, value in {"profile": copy.profile, "run_dir": copy.root, **parameters}.items():
        command += ["-p", name, str(value)]
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment.pop("FRAMSEG_SHARED", None)
    environment |= {"FRAMSEG_SHARED": str(shared)} if shared else {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return nbformat.read(out, as_version=4)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


@pytest.mark.parametrize("chapter", range(1, 6))
def test_every_cell_ran_with_the_runs_parameters(chain, chapter):
    notebook = executed(chain, chapter)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    given = {"profile": str(chain.profile), "run_dir": str(chain.root)}
    assert notebook.metadata.papermill.parameters == given | ({"live": False} if chapter == 3 else {})
    assert str(chain.root) in "".join(out.text for out in code[-1].outputs)  # it ends with what it wrote


def test_chapter_1_counts_the_set(chain, small_set):
    profile = config.load(chain.profile)
    written = json.loads((chain.metrics / "data.json").read_text())
    for split in ("train", "val"):
        rows = annotations.read(small_set / getattr(profile.data, split))
        balance = annotations.class_balance(rows, profile.frames.count)
        assert written["splits"][split]["queries"] == len(rows)
        assert written["background to one foreground"][split] == balance.ratio
        assert f"{balance.ratio:.4f}".rstrip("0") in output(chain, 1, "balance")
        assert f"{100 * balance.background_share:.2f}%" in output(chain, 1, "balance")
    assert {"2.3378", "70.04"} <= numbers(output(chain, 1, "balance"))
    shown = output(chain, 1, "splits")
    assert "–" in shown and "nan" not in shown and "17.00" not in shown  # test has no labels; counts are whole
    assert "11 of 11 videos" in output(chain, 1, "extract")


def test_chapter_2_finds_the_digits(chain):
    written = json.loads((chain.metrics / "prompt.json").read_text())["demo"]
    assert (written["zero"], written["one"]) == (29900, 29896)
    assert {"29900", "29896", str(written["sample_positions"])} <= numbers(output(chain, 2, "check"))
    assert {str(position) for position in written["digit_positions"]} <= numbers(output(chain, 2, "positions"))


def test_chapter_3_trains_and_shows_it(chain):
    counts = output(chain, 3, "trained")
    assert "4,359,257,219" in counts and "135,067,392" in counts and "428,225,600" in counts
    log = train.read_log(chain.validation_log)
    assert [record["epoch"] for record in log] == [0, 1, 2]
    table = numbers(output(chain, 3, "validation"))
    for record in log:
        assert f"{record['metrics']['brief']['MR-full-mAP']:.2f}" in table
    assert "paper, " in counts  # what a sample costs with the published sizes
    assert re.search(r"of the \d+\.\d+ TFLOP/s of matrix products: \d+%", output(chain, 3, "curves"))
    assert "43.74" in table and "2.22" in table  # Table IV's ends
    settings = output(chain, 3, "settings")
    assert json.loads(settings[settings.index("{") : settings.rindex("}") + 1])["zero_optimization"]["stage"] == 2
    assert "Table II:" in settings and "Table III:" in settings
    for name in [f"{section}.{key}" for table in (tables.TABLE_II, tables.TABLE_III) for section in table
                 for key in table[section].split()]:  # fmt: skip
        assert name in settings
    assert re.search(r"training\.epochs\s+11\s+2\s+≠", settings)  # the published value, this run's, the mark
    assert re.search(r"training\.floor\s+0\.1\s+0\.1\s+training", settings)  # no mark
    assert (chain.checkpoint / "adapter/adapter_model.safetensors").is_file()


def test_chapter_3_logs_plainly_where_nobody_looks_on(chain):
    launch = next(cell for cell in executed(chain, 3).cells if cell.id == "launch")
    assert {out.output_type for out in launch.outputs} == {"stream"}
    lines = output(chain, 3, "launch").strip().splitlines()
    assert [line.split(":")[0] for line in lines if line] == ["epoch 0", "epoch 1", "epoch 2"]


def test_chapter_3_is_shown_live_interrupted_and_resumed(small_set, tmp_path):
    """Its own cells in a kernel, as JupyterLab executes them; interrupted after two steps, then run again."""
    # Long enough that a busy machine, too, has not finished it when the first picture is shown.
    config.save(small_profile(small_set, training__epochs=6), tmp_path / "profile.yaml")
    made = Run("demo", tmp_path / "run")
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOKS[2], as_version=4).cells}
    manager, client = start_new_kernel(
        kernel_name=notebooks.KERNEL, cwd=str(tmp_path), env=os.environ | {"PYTHONPATH": str(config.REPOSITORY)}
    )

    def execute(source: str, interrupt_after: int | None = None) -> tuple[str, list[dict], str]:
        """How it ended, what was shown as picture (new or in place), and what was printed."""
        asked, ended, shown, printed = client.execute(source), "ok", [], ""
        while True:
            message = client.get_iopub_msg(timeout=300)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != asked:
                continue
            if kind in ("display_data", "update_display_data") and "image/png" in content["data"]:
                shown.append({"kind": kind, "id": content["transient"]["display_id"]})
            printed += content["text"] if kind == "stream" else ""
            ended = content["ename"] if kind == "error" else ended
            if shown and interrupt_after and len(train.read_log(made.step_log)) >= interrupt_after:
                manager.interrupt_kernel()
                interrupt_after = None
            if kind == "status" and content["execution_state"] == "idle":
                return ended, shown, printed

    try:
        given = f"profile, run_dir = {str(tmp_path / 'profile.yaml')!r}, {str(made.root)!r}"
        for source in (cells["parameters"], given, cells["setup"], "train.REDRAW = 0.1"):
            assert execute(source)[0] == "ok"
        status, shown, printed = execute(cells["launch"], interrupt_after=2)
        assert status == "KeyboardInterrupt" and "with a state to go on from" in printed
        assert shown[0]["kind"] == "display_data"
        assert list(made.resume.glob("step_*/state.json")) and not made.checkpoint.exists()
        before = train.read_log(made.step_log)
        status, shown, printed = execute(cells["launch"])
        assert status == "ok" and "epoch 6: R1@0.5" in printed and "epoch 0" not in printed
        assert [one["kind"] for one in shown] == ["display_data"] + ["update_display_data"] * (len(shown) - 1)
        assert len(shown) > 2 and len({one["id"] for one in shown}) == 1
        assert train.read_log(made.step_log)[: len(before)] == before and made.checkpoint.is_dir()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_chapter_4_scores_what_it_decoded(chain, small_set):
    profile = config.load(chain.profile)
    written = json.loads((chain.metrics / "comparison.json").read_text())
    assert list(written)[:3] == ["this model", "base model, untouched", "query ignored (shuffled)"]
    assert list(written)[3:] == ["all ones", "best constant window", "random masks"]
    assert written["this model"] == json.loads((chain.metrics / "val.json").read_text())
    for split, labels in (("val", profile.data.val), ("test", profile.data.test_labels)):
        predictions = read_predictions(chain.predicted(split))
        metrics = evaluate.evaluate(predictions, annotations.read(small_set / labels))
        assert metrics == json.loads((chain.metrics / f"{split}.json").read_text())
    shown = output(chain, 4, "metrics")
    for name, metrics in written.items():
        assert name in shown and f"{metrics['brief']['MR-full-mAP']:.2f}" in {f"{float(n):.2f}" for n in numbers(shown)}
    table = output(chain, 4, "reported")
    assert "reported, real QVHighlights" in table and "measured here" in table
    for row in (*paper_results.TEST.values(), *paper_results.BY_EPOCH):  # Tables I and IV
        assert {f"{value:.2f}" for value in row.values()} <= numbers(table)
    for record in train.read_log(chain.validation_log):
        assert f"{record['metrics']['brief']['MR-full-mAP']:.2f}" in numbers(table)


def test_chapter_4_packs_a_submission_that_scores_the_same(chain, small_set):
    profile = config.load(chain.profile)
    checked = codalab.check(chain.submission, small_set, profile.data.val, profile.data.test_labels)
    for split, report in checked.items():
        assert report["metrics"] == json.loads((chain.metrics / f"{split}.json").read_text())
    assert output(chain, 4, "codalab").count("scores as above: True") == 2


def test_tables_have_short_names_and_no_gaps(chain):
    for chapter in range(1, 6):
        for cell in executed(chain, chapter).cells:
            for out in cell.get("outputs", []):
                html = out.get("data", {}).get("text/html", "")
                if "<table" in html:
                    assert not re.search(r"MR-full|HL-min|>nan<|>None<|>NaN<", html), (chapter, cell.id)


def test_chapter_4_shows_the_better_policies_as_recorded(chain):
    record = json.loads((config.REPOSITORY / "tests/benchmarks/records/ranked_policy.json").read_text())
    shown = output(chain, 4, "ranked")
    assert all(name in shown for name in [*record["systems"], *record["trials"]])
    for one in [*record["systems"].values(), *record["difference of ranked, out of fold, to"].values()]:
        assert {f"{abs(value):.2f}" for value in one["scores"].values()} <= numbers(shown)
    assert (chain.figures / "ranked.png").is_file()


def test_chapter_5_shows_chosen_queries_the_browser_and_predict(chain, small_set):
    profile = config.load(chain.profile)
    rows = annotations.read(small_set / profile.data.val)
    final, early = (read_predictions(chain.predicted("val", epoch)) for epoch in (None, 1))
    chosen = figures.choose(rows, final, *(evaluate.per_query(some, rows) for some in (final, early)))
    pictures = [path.stem for path in chain.figures.glob("qualitative_*.png")]
    assert len(pictures) == len(chosen) >= 1
    table = output(chain, 5, "choose")
    assert all(name in table and str(qid) in table for name, qid in chosen.items())
    assert all(name in table and rule in table for name, rule in figures.RULES.items())
    widget = next(cell for cell in executed(chain, 5).cells if cell.id == "browser").outputs
    assert any("application/vnd.jupyter.widget-view+json" in out.get("data", {}) for out in widget)
    asked = [row.query for row in rows if row.vid == rows[0].vid]
    assert all(query in output(chain, 5, "predict") for query in asked)


def test_chapter_5_shows_where_answers_go_wrong(chain, shared):
    names = {path.stem for path in chain.figures.glob("*.png")}
    assert {"errors_val", "reach_val", "errors_qvhighlights_val", "reach_qvhighlights_val"} <= names
    assert {"98.71", "93.68", "100.00", "98.65"} <= {
        f"{float(n):.2f}" for n in numbers(output(chain, 5, "errors-real"))
    }


def test_figures_are_pictures(chain):
    names = {path.stem for path in chain.figures.iterdir()}
    assert {"figure_4_variations", "figure_10_losses", "tokens", "soft_targets", "comparison"} <= names
    for name in names:
        assert (chain.figures / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(chain.figures / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 150 and pixels.std() > 10, name


def test_the_report_holds_the_whole_run(chain):
    page = BeautifulSoup(chain.report.read_text(encoding="utf-8"), "html.parser")
    assert not page.find_all(["script", "link", "iframe"])  # nothing from elsewhere: readable without a network
    assert all(image["src"].startswith("data:image/") for image in page.find_all("img"))
    headings = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    headings = [line.lstrip("# ") for c in headings for line in c.source.splitlines() if re.match(r"##? \S", line)]
    headings = [line for line in headings if line in page.nav.get_text()]
    links = page.nav.find_all("a")
    assert [link.get_text() for link in links] == headings and len(headings) > 30
    for link in links:  # each leads to the cell with that heading
        assert page.find(id=link["href"][1:]).find(["h1", "h2"]).get_text() == link.get_text()
    ids = [tag["id"] for tag in page.find_all(id=re.compile("^cell-id="))]
    assert len(ids) == len(set(ids)) > sum(len(executed(chain, chapter).cells) for chapter in range(1, 6))
    text = page.get_text()
    assert "profile demo" in text and cost.device_name() in text and "planned_steps: 16" in text
    assert "A widget, which needs a running notebook" in text and "training.launch" not in text
    assert not [formula for formula in page.find_all("code") if "\\frac" in formula.get_text()]
    formulas = page.find_all("img", class_="math")
    assert len(formulas) > 50 and any(r"\frac{\alpha}{\sqrt{r}}" in formula["alt"] for formula in formulas)
    assert text.count("epoch 2: R1@0.5") == 1 and "%|" not in text


def test_with_the_real_annotations(chain, shared):
    """Chapters 1, 2 and 4 on the real set: class balance, golden prompt, the released predictions' scores."""
    balance = json.loads((chain.metrics / "data.json").read_text())["real QVHighlights"]
    assert balance == {"train": pytest.approx(2.3582, abs=5e-5), "val": pytest.approx(2.5583, abs=5e-5)}
    assert (chain.figures / "data_overview_qvhighlights.png").is_file()
    told = output(chain, 4, "released")
    assert all(f"{split} is not compared with the authors' own answers" in told for split in ("val", "test"))
    assert told.count("this run answers other queries") == 2
    soft = output(chain, 1, "real").split("qid 2579: ")[1].split("\n")[0]
    assert soft.split() == ["0.0"] * 14 + (
        "0.4167 0.3333 0.5833 0.5833 0.6667 0.6667 0.6667 0.6667 0.5833 0.6667 0.5833".split()
    )
    assert "420 ids of the released run, equal: True" in output(chain, 2, "published")
    assert json.loads((chain.metrics / "prompt.json").read_text())["published vocabulary"]["frames_outside"][-1] == 9
    expected = json.loads((shared / "golden/reported_scores.json").read_text())
    written = json.loads((chain.metrics / "released.json").read_text())
    for name, row in (
        ("masks of epoch 11", "val_epoch11_masks_1548_queries"),
        ("final predictions", "val_released_scores_mask_policy"),
    ):
        reference = {key: value for key, value in expected[row].items() if key != "what"}
        assert written[f"{name} measured here"] | reference == written[f"{name} measured here"]
        assert {f"{reference['MR-full-mAP']:.2f}"} <= numbers(output(chain, 4, "released-scores"))
    record = json.loads((config.REPOSITORY / "tests/benchmarks/records/ranked_policy.json").read_text())
    best = written["the same, read by the best policies measured here"]
    assert best["MR-full-mAP"] == record["in sample, as shipped"]["mAP"]
    assert best["HL-min-VeryGood-Hit1"] == record["in sample, as shipped"]["HIT@1"]


def test_a_chapter_runs_alone(small_set, tmp_path):
    done = start(tmp_path / "fresh", "--only", "02", **SHORT, **{"data.folder": small_set})
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "fresh/metrics/prompt.json").is_file()


@pytest.mark.parametrize(
    ("chapter", "message"),
    [("04", r"no trained checkpoint .*notebook 03 writes one"), ("05", r"no predictions here; notebook 04")],
)
def test_what_an_earlier_chapter_must_write_first(small_set, tmp_path, chapter, message):
    done = start(tmp_path / "empty", "--only", chapter, **SHORT, **{"data.folder": small_set})
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert not (tmp_path / "empty/metrics").exists()


def test_a_wrong_profile_name(tmp_path):
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS[1]), str(tmp_path / "out.ipynb")]
    command += ["-k", notebooks.KERNEL, "-p", "profile", "dmeo", "-p", "run_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no profile named 'dmeo': did you mean 'demo'?" in done.stderr


def test_chapter_1_looks_at_the_chosen_query(chain, small_set, tmp_path):
    row = annotations.read(small_set / config.load(chain.profile).data.val)[-1]
    notebook = run_alone(chain, 1, tmp_path, qid=row.qid)
    assert f"qid {row.qid}: “{row.query}”" in text_of(notebook, "strip")
    targets = annotations.soft_targets(row, 25).round(2)
    assert " ".join(map(str, targets)) in text_of(notebook, "soft")
    assert "FRAMSEG_SHARED is not set" in text_of(notebook, "real")


def test_chapter_2_shows_no_other_rows_answer_with_a_query_of_your_own(chain, tmp_path):
    notebook = run_alone(chain, 2, tmp_path, query="a purple elephant dances")
    text = text_of(notebook, "text")
    assert "**Activity**: a purple elephant dances" in text and "an example" in text
    whole = "".join(text_of(notebook, cell.id) for cell in notebook.cells if cell.cell_type == "code")
    assert set(re.findall(r"(?<!\d)[01]{25}(?!\d)", whole)) == {"0" * 9 + "1" * 8 + "0" * 8}
    assert "the true answer to val query" not in whole
    assert "FRAMSEG_SHARED is not set" in text_of(notebook, "published")


def test_chapter_5_compares_with_the_chosen_epoch(chain, small_set, tmp_path):
    notebook = run_alone(chain, 5, tmp_path, early_epoch=0)
    rows = annotations.read(small_set / config.load(chain.profile).data.val)
    final, early = (read_predictions(chain.predicted("val", epoch)) for epoch in (None, 0))
    chosen = figures.choose(rows, final, *(evaluate.per_query(answers, rows) for answers in (final, early)))
    table = text_of(notebook, "choose")
    assert {str(qid) for qid in chosen.values()} <= numbers(table)
    assert {name for name in figures.RULES if re.search(f"{re.escape(figures.RULES[name])}\\s+–", table)} == (
        figures.RULES.keys() - chosen.keys()
    )
    assert "FRAMSEG_SHARED is not set" in text_of(notebook, "errors-real")


def test_chapters_4_and_5_on_one_row_per_split(small_set, tmp_path):
    """All val queries are then about one video, so none of them can get the answer to a query about another one."""
    folder = tmp_path / "one row"
    shutil.copytree(small_set, folder)
    data = config.load("demo").data
    for name in (data.train, data.val, data.test, data.test_labels):
        annotations.write(folder / name, annotations.read(folder / name)[:1])
    profile = small_profile(folder, training__epochs=1, training__micro_batch=1, training__accumulation=1)
    run = Run(profile, tmp_path / "run")
    train.launch(profile, run)
    notebook = run_alone(run, 4, tmp_path)
    text = text_of(notebook, "metrics")
    assert "The row “query ignored” is left out: one video has more than half of the queries" in text
    compared = json.loads((tmp_path / "copy of the run/metrics/comparison.json").read_text())
    assert list(compared) == [
        "this model",
        "base model, untouched",
        "all ones",
        "best constant window",
        "random masks",
    ]
    assert text_of(notebook, "released").startswith("FRAMSEG_SHARED is not set")
    assert json.loads((tmp_path / "copy of the run/metrics/released.json").read_text()) == {}
    row = annotations.read(folder / data.val)[0]
    assert row.query in text_of(run_alone(run, 5, tmp_path), "predict")


@pytest.fixture
def downloaded(shared, tmp_path) -> Path:
    """A folder as `framseg download --reference` fills it: no masks of epoch 11, no vocabulary."""
    folder = tmp_path / "reference"
    (folder / "released").mkdir(parents=True)
    (folder / "qvhighlights").symlink_to(shared / "qvhighlights")
    rows = []
    for answer in read_released(shared / "golden/released_val_scores.csv"):
        windows, mask = [window for window in answer["pred_relevant_windows"] if window[2]], parity.mask(answer)
        row = {"qid": answer["qid"], "duration": answer["duration"], "score": answer["probability"], "preds": mask}
        rows.append(row | {"pred_relevant_windows": windows, "pred_saliency_scores": answer["pred_saliency_scores"]})
    (folder / "released/hl_val_predictions.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.slow
def test_with_a_downloaded_reference(chain, downloaded, tmp_path):
    assert "has no tokenizer/tokenizer.json" in text_of(run_alone(chain, 2, tmp_path, downloaded), "published")
    notebook = run_alone(chain, 4, tmp_path, downloaded)
    assert "the masks of epoch 11 are not scored" in text_of(notebook, "released-scores")
    written = json.loads((tmp_path / "copy of the run/metrics/released.json").read_text())
    before = json.loads((chain.metrics / "released.json").read_text())
    assert written == {name: scores for name, scores in before.items() if "epoch 11" not in name}
    assert len(written) == 3


def test_chapter_4_tells_a_run_from_the_authors_answers(chain, small_set, tmp_path):
    """A reference folder whose predictions are this run's own, but for one probability; none of test."""
    shared, data = tmp_path / "reference", config.load("demo").data
    for folder in ("qvhighlights", "released"):
        (shared / folder).mkdir(parents=True)
    rows = annotations.read(small_set / data.val)
    annotations.write(shared / "qvhighlights/highlight_val_release.jsonl", rows)
    authors = []
    for record in read_predictions(chain.predicted("val")):
        row = {"qid": record["qid"], "duration": record["duration"], "score": record["probability"]}
        listed = moments.windows(record["mask"], record["probability"], record["duration"], rounding="nearest")
        authors.append(row | {"preds": record["mask"], "pred_relevant_windows": listed})
    p = authors[1]["score"][5]
    authors[1]["score"][5] = 1 / (1 + (1 - p) / p * np.exp(1.5))
    (shared / "released/hl_val_predictions.json").write_text(json.dumps(authors))
    notebook = run_alone(chain, 4, tmp_path, shared)
    text = text_of(notebook, "released")
    assert re.search(rf"queries compared\s+{len(rows)}\s", text) and re.search(r"equal masks, %\s+100\s", text)
    assert re.search(r"largest difference\s+1\.5\s", text)
    shown = next(cell for cell in notebook.cells if cell.id == "released").outputs
    tables_shown = [BeautifulSoup(out.data["text/html"], "html.parser") for out in shown if "data" in out]
    worst = tables_shown[2].tbody.find("tr").get_text(" ", strip=True)
    assert rows[1].query in worst and str(rows[1].qid) in worst and " 5 " in worst
    assert ["color: red" in table.style.get_text() for table in tables_shown] == [True, False, True]
    assert "test is not compared with the authors' own answers: neither " in text


def test_chapter_4_goes_on_where_the_record_of_the_policies_is_missing(tmp_path, capsys):
    """As in an installed package, which has no tests."""
    cell = next(cell for cell in nbformat.read(NOTEBOOKS[3], as_version=4).cells if cell.id == "ranked")
    exec(cell.source, {"config": SimpleNamespace(REPOSITORY=tmp_path)})
    assert "ranked_policy.json is missing" in capsys.readouterr().out


# a model that is not trained here


def test_all_chapters_of_a_model_that_was_not_trained_here(untrained, trained, merged, small_set):
    """It answers as the training whose weights it was given does; what only a training has is left out, and said."""
    known = f"the model is {merged}: what it was trained on is not known"
    assert known in output(untrained, 3, "launch") and known in output(untrained, 4, "setup")
    for cell in ("plan", "settings", "curves", "validation"):
        assert output(untrained, 3, cell).count("Nothing is trained (training.epochs: 0)") == 1
    assert not list(untrained.root.rglob("*.safetensors")) and not untrained.train.exists()
    profile, run = trained
    rows = {"val": dataset.rows(profile, "val"), "test": dataset.rows(profile, "test_labels")}
    for split, labelled in rows.items():
        expected = decode.whole(profile, run, split)
        answers = read_predictions(untrained.predicted(split))
        for one, other in zip(answers, expected, strict=True):
            assert one["mask"] == other["mask"] and one["probability"] == pytest.approx(other["probability"], abs=1e-5)
        metrics = json.loads((untrained.metrics / f"{split}.json").read_text())
        assert metrics == evaluate.evaluate(expected, labelled)
    written = json.loads((untrained.metrics / "comparison.json").read_text())
    assert list(written)[:2] == ["weights, not trained here", "query ignored (shuffled)"]
    table = output(untrained, 4, "reported")
    assert "small set0 val" not in table and "demo val" not in table and "43.74" in table  # Table IV: the paper's alone
    assert "val_epoch_01.jsonl is not there" in output(untrained, 5, "choose")
    assert known in "".join(predict(small_set / profile.data.videos / f"{rows['val'][0].vid}.mp4", "a ball",
                                    checkpoint=untrained.checkpoint).notes)  # fmt: skip


def test_a_second_run_skips_all_and_other_weights_run_again(untrained, merged, small_set):
    given = SHORT | {"data.folder": small_set, "training.epochs": 0, "model.weights": merged}
    again = start(untrained.root, **given)
    assert again.returncode == 0 and again.stdout.count("unchanged, skipped") == 5
    file = next(merged.glob("*.safetensors"))
    os.utime(file)
    chapter = stamps.Chapter(NOTEBOOKS[3], config.load(untrained.profile), untrained)
    assert chapter.changed() == "the model's files changed"
    refused = start(untrained.root, "--from", "04", **given | {"model.weights": merged.parent})
    assert refused.returncode == 2 and f"model.weights: {merged} there, {merged.parent} now" in refused.stderr
    assert "chapter 03 in" in refused.stderr and "--from 03" in refused.stderr


def test_the_same_answers_are_read_in_three_ways(chain, small_set):
    profile = config.load(chain.profile)
    shown = output(chain, 4, "reported")
    for split, labels in (("val", profile.data.val), ("test", profile.data.test_labels)):
        answers, rows = read_predictions(chain.predicted(split)), annotations.read(small_set / labels)
        table = tables.readings(split, answers, rows)
        assert table.index[0] == "the paper (reported, real QVHighlights)" and len(table) == 4
        assert table.loc["the paper (reported, real QVHighlights)", "HIT@1"] == {"val": 58.52, "test": 56.74}[split]
        own = evaluate.evaluate(answers, rows)["brief"]  # the profile demo reads in the better way
        assert table.loc["windows ranked, saliency gaussian", "mAP"] == own["MR-full-mAP"]
        assert table.loc["windows ranked, saliency gaussian", "HIT@1"] == own["HL-min-VeryGood-Hit1"]
        given = ((answer["mask"], answer["probability"], answer["duration"]) for answer in answers)
        runs = [moments.windows(*each, rounding="nearest") for each in given]  # as the authors' final predictions
        masks = [answer | {"pred_relevant_windows": spans} for answer, spans in zip(answers, runs, strict=True)]
        mean = evaluate.evaluate(masks, rows)["brief"]["MR-full-mAP"]
        assert table.loc["windows mask, saliency overlap", "mAP"] == mean
        assert {f"{value:.2f}" for value in table["mAP"]} <= numbers(shown)


def test_chapter_5_without_videos_and_without_an_early_epoch(untrained, small_set, tmp_path):
    """As with published frames: there are pictures alone."""
    data = tmp_path / "frames alone"
    shutil.copytree(small_set, data, ignore=shutil.ignore_patterns("*.mp4"))
    changed = config.load(untrained.profile).model_copy(update={"data": small_profile(data).data})
    config.save(changed, tmp_path / "profile.yaml")
    shown = run_alone(untrained, 5, tmp_path, profile=tmp_path / "profile.yaml")
    assert "is not there, so there is nothing to ask about" in text_of(shown, "predict")
    assert "not there, so nothing is compared" in text_of(shown, "choose")
