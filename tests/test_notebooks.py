"""The notebooks: as they are committed, and executed one after the other with a shortened training."""

import json
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from conftest import SHORT, small_profile, start
from jupyter_client.manager import start_new_kernel
from PIL import Image

from framseg import annotations, codalab, config, evaluate, train
from framseg.predictions import read_predictions
from framseg.run import cost, notebooks
from framseg.run.paths import Run
from framseg.viz import figures, paper_results

NOTEBOOKS = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
CHAPTERS = ["01_data", "02_prompt_tokenizer", "03_training", "04_evaluation_codalab", "05_figures"]


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == CHAPTERS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_committed(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == notebooks.KERNEL
    assert 10 <= len(notebook.cells) <= 20
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith(f"# {int(path.stem[:2])} ·")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 25, cell.id
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1]
    assert 'profile = "demo"' in tagged[0].source and "run_dir = None" in tagged[0].source
    # No path of a run but those that Run gives.
    assert not [cell.id for cell in code if re.search(r"""["']runs/|["']data/""", cell.source)]


def executed(chain: Run, chapter: int) -> nbformat.NotebookNode:
    return nbformat.read(chain.notebooks / f"{CHAPTERS[chapter - 1]}.ipynb", as_version=4)


def said(chain: Run, chapter: int, cell: str) -> str:
    """Everything a cell printed or showed as text, markup taken out."""
    found = next(one for one in executed(chain, chapter).cells if one.id == cell)
    texts = [out.text if out.output_type == "stream" else out.data.get("text/html", "") for out in found.outputs]
    texts += [out.data.get("text/plain", "") for out in found.outputs if "data" in out]
    return re.sub(r"<style.*?</style>|<[^>]+>", " ", "\n".join(texts), flags=re.DOTALL)


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
        assert f"{balance.ratio:.4f}".rstrip("0") in said(chain, 1, "balance")
    assert {"2.3378", "70.0400"} <= numbers(said(chain, 1, "balance"))
    assert "11 of 11 videos" in said(chain, 1, "extract")


def test_chapter_2_finds_the_digits(chain):
    written = json.loads((chain.metrics / "prompt.json").read_text())["demo"]
    assert (written["zero"], written["one"]) == (29900, 29896)
    assert {"29900", "29896", str(written["sample_positions"])} <= numbers(said(chain, 2, "check"))
    assert {str(position) for position in written["digit_positions"]} <= numbers(said(chain, 2, "positions"))


def test_chapter_3_trains_and_shows_it(chain):
    counts = said(chain, 3, "trained")
    assert "4,359,257,219" in counts and "135,067,392" in counts and "428,225,600" in counts
    log = train.read_log(chain.validation_log)
    assert [record["epoch"] for record in log] == [0, 1, 2]
    table = numbers(said(chain, 3, "validation"))
    for record in log:
        assert f"{record['metrics']['brief']['MR-full-mAP']:.2f}" in table
    work = said(chain, 3, "schedule")
    assert "paper, " in work and re.search(r"of the \d+\.\d+ TFLOP/s of matrix products: \d+%", work)
    assert "43.74" in table and "2.22" in table  # Table IV's ends
    assert json.loads(said(chain, 3, "deepspeed"))["zero_optimization"]["stage"] == 2
    assert (chain.checkpoint / "adapter/adapter_model.safetensors").is_file()


def test_chapter_3_logs_plainly_where_nobody_looks_on(chain):
    launch = next(cell for cell in executed(chain, 3).cells if cell.id == "launch")
    assert {out.output_type for out in launch.outputs} == {"stream"}
    lines = said(chain, 3, "launch").strip().splitlines()
    assert [line.split(":")[0] for line in lines if line] == ["epoch 0", "epoch 1", "epoch 2"]


def test_chapter_3_is_shown_live_interrupted_and_resumed(small_set, tmp_path):
    """Its own cells in a kernel, as JupyterLab executes them; interrupted after two steps, then run again."""
    config.save(small_profile(small_set), tmp_path / "profile.yaml")
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
        assert status == "KeyboardInterrupt" and "with a checkpoint" in printed
        assert shown[0]["kind"] == "display_data"
        assert list(made.resume.glob("step_*/state.json")) and not made.checkpoint.exists()
        before = train.read_log(made.step_log)
        status, shown, printed = execute(cells["launch"])
        assert status == "ok" and "epoch 2: R1@0.5" in printed and "epoch 0" not in printed
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
    shown = said(chain, 4, "metrics")
    for name, metrics in written.items():
        assert name in shown and f"{metrics['brief']['MR-full-mAP']:.2f}" in {f"{float(n):.2f}" for n in numbers(shown)}
    table = said(chain, 4, "reported")
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
    assert said(chain, 4, "codalab").count("scores as above: True") == 2


def test_chapter_4_shows_the_better_policies_as_recorded(chain):
    record = json.loads((config.REPOSITORY / "tests/benchmarks/records/ranked_policy.json").read_text())
    shown = said(chain, 4, "ranked")
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
    table = said(chain, 5, "choose")
    assert all(name in table and str(qid) in table for name, qid in chosen.items())
    assert all(rule in said(chain, 5, "rules") for rule in figures.RULES)
    widget = next(cell for cell in executed(chain, 5).cells if cell.id == "browser").outputs
    assert any("application/vnd.jupyter.widget-view+json" in out.get("data", {}) for out in widget)
    asked = [row.query for row in rows if row.vid == rows[0].vid]
    assert all(query in said(chain, 5, "predict") for query in asked)


def test_chapter_5_shows_where_answers_go_wrong(chain, shared):
    names = {path.stem for path in chain.figures.glob("*.png")}
    assert {"errors_val", "reach_val", "errors_qvhighlights_val", "reach_qvhighlights_val"} <= names
    assert {"98.71", "93.68", "100.00", "98.65"} <= {f"{float(n):.2f}" for n in numbers(said(chain, 5, "errors-real"))}


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
    assert len(ids) == len(set(ids)) > 90
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
    soft = said(chain, 1, "real").split("qid 2579: ")[1].split("\n")[0]
    assert soft.split() == ["0.0"] * 14 + (
        "0.4167 0.3333 0.5833 0.5833 0.6667 0.6667 0.6667 0.6667 0.5833 0.6667 0.5833".split()
    )
    assert "420 ids of the released run, equal: True" in said(chain, 2, "published")
    assert json.loads((chain.metrics / "prompt.json").read_text())["published vocabulary"]["frames_outside"][-1] == 9
    expected = json.loads((shared / "golden/reported_scores.json").read_text())
    written = json.loads((chain.metrics / "released.json").read_text())
    for name, row in (
        ("masks of epoch 11", "val_epoch11_masks_1548_queries"),
        ("final predictions", "val_released_scores_mask_policy"),
    ):
        reference = {key: value for key, value in expected[row].items() if key != "what"}
        assert written[f"{name} measured here"] | reference == written[f"{name} measured here"]
        assert {f"{reference['MR-full-mAP']:.2f}"} <= numbers(said(chain, 4, "released-scores"))
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
    [("04", r"no trained checkpoint here .*notebook 03 writes one"), ("05", r"no predictions here; notebook 04")],
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
