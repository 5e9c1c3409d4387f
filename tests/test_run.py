import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

from framseg import config
from framseg.run import notebooks as driver
from framseg.run import stamps
from framseg.run.paths import Run, hold

RUN_ALL = config.REPOSITORY / "run_all.sh"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
TOOLS = "bash awk cat cmp df dirname grep mkdir rm tail".split()


def notebook(folder, name, *cells):
    parameters = nbformat.v4.new_code_cell("profile = 'paper'\nrun_dir = None", metadata={"tags": ["parameters"]})
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    kernel = {"name": driver.KERNEL, "display_name": "Python 3", "language": "python"}
    content = nbformat.v4.new_notebook(cells=[parameters, *code], metadata={"kernelspec": kernel})
    nbformat.write(content, folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Three small notebooks in place of the real ones, and a machine that has all they need."""
    folder = tmp_path / "note books"
    folder.mkdir()
    write = "from pathlib import Path; import sys; from framseg import config\n"
    notebook(folder, "01_one", write + "(Path(run_dir) / 'one.txt').write_text(sys.executable)")
    notebook(
        folder,
        "02_two",
        write + "(Path(run_dir) / 'two.txt').write_text(str(config.load(profile).training.epochs))",
    )
    notebook(folder, "03_three", write + "(Path(run_dir) / 'three.txt').write_text('')")
    monkeypatch.setattr(driver, "NOTEBOOKS", folder)
    monkeypatch.setenv("JUPYTER_PATH", "")  # these two are changed by the run: put back after the test
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("framseg.run.preflight.missing", lambda profile, trains, root: [])
    return folder


def run(*arguments):
    """The exit code of the command."""
    try:
        return driver.main(arguments)
    except SystemExit as end:
        return end.code


def start(tmp_path, *options):
    return run("paper", "--run-dir", str(tmp_path / "a run"), *options)


def test_all_notebooks_with_one_profile_in_this_interpreter(notebooks, tmp_path, capfd):
    assert start(tmp_path, "--set", "training.epochs=3") == 0
    folder = tmp_path / "a run"
    assert (folder / "one.txt").read_text() == sys.executable
    assert (folder / "two.txt").read_text() == "3"
    assert config.load(folder / "profile.yaml").training.epochs == 3
    copy = nbformat.read(folder / "notebooks/01_one.ipynb", as_version=4)
    assert copy.cells[-1].execution_count is not None
    printed = capfd.readouterr()
    assert "[2/3] 02_two" in printed.out and "3 notebooks in" in printed.out
    assert "Executing" in printed.err  # papermill's bar


def test_a_notebook_looks_names_up_where_the_run_was_started_and_loads_nothing_there(notebooks, tmp_path, monkeypatch):
    work = _made(tmp_path / "work")
    _made(work / "weights")
    (work / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    monkeypatch.chdir(work)
    cell = (
        "import numpy; from framseg import config\nweights = config.local_weights(config.load(profile).model.weights)"
    )
    notebook(notebooks, "01_one", cell, f"assert str(weights.resolve()) == {str(work / 'weights')!r}")
    assert start(tmp_path, "--only", "01", "--set", "model.weights=weights") == 0


def test_a_notebook_imports_the_repository_from_within_it(notebooks, tmp_path, monkeypatch):
    monkeypatch.chdir(config.REPOSITORY)
    notebook(notebooks, "01_one", f"import sys; assert {str(config.REPOSITORY)!r} in sys.path")
    assert start(tmp_path, "--only", "01") == 0


def test_a_part_goes_on_with_the_runs_own_profile(notebooks, tmp_path):
    config.save(config.load("paper", {"training.epochs": 4}), _made(tmp_path / "a run") / "profile.yaml")
    assert start(tmp_path, "--only", "2") == 0
    assert (tmp_path / "a run/two.txt").read_text() == "4"
    assert not (tmp_path / "a run/one.txt").exists() and not (tmp_path / "a run/three.txt").exists()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((None, None), ["01_one", "02_two", "03_three"]),
        (("02", None), ["02_two"]),
        (("03_three", None), ["03_three"]),
        ((None, "2"), ["02_two", "03_three"]),
    ],
)
def test_chosen(notebooks, options, expected):
    assert [path.stem for path in driver.chosen(*options)] == expected


def test_a_failing_cell_is_shown_and_finished_steps_stay(notebooks, tmp_path, capfd):
    notebook(notebooks, "02_two", "good = 1", "raise ValueError('the frames are gone')")
    assert start(tmp_path) == 1
    printed = capfd.readouterr().err
    assert "ValueError: the frames are gone" in printed and "\x1b" not in printed.split("Traceback")[-1]
    assert f"The executed copy is {tmp_path / 'a run/notebooks/02_two.ipynb'}" in printed and "--from 02" in printed
    assert (tmp_path / "a run/one.txt").exists() and (tmp_path / "a run/notebooks/02_two.ipynb").exists()
    assert not (tmp_path / "a run/three.txt").exists()


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (
            "from framseg import prompt; raise prompt.PromptError('the query is empty')",
            "PromptError: the query is empty",
        ),
        ("open('none')", "FileNotFoundError: [Errno 2] No such file or directory: 'none'"),
    ],
)
def test_what_a_user_can_cause_in_a_chapter_is_one_sentence(notebooks, tmp_path, capfd, cell, sentence):
    notebook(notebooks, "02_two", cell)
    assert start(tmp_path) == 1
    printed = capfd.readouterr().err
    assert f"error: 02_two: cell 3 failed with {sentence}. The executed copy is" in printed
    assert "Traceback" not in printed and printed.count("error: ") == 1


@pytest.mark.parametrize("whom", ["all", "the command"])
def test_ctrl_c_while_a_chapter_runs(notebooks, tmp_path, whom):
    """A terminal sends it to the kernel, too."""
    notebook(
        notebooks, "01_one", "from pathlib import Path; import time; Path(run_dir, 'here').touch(); time.sleep(99)"
    )
    code = (
        "import sys; from pathlib import Path; from framseg.run import notebooks, preflight;"
        "preflight.missing = lambda *_: []; notebooks.NOTEBOOKS = Path(sys.argv.pop());"
        "sys.exit(notebooks.main())"
    )
    command = [sys.executable, "-c", code, "paper", "--run-dir", str(tmp_path / "a run"), str(notebooks)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(config.REPOSITORY)}, start_new_session=True, **PIPES
    )
    while not (tmp_path / "a run/here").exists() and process.poll() is None:
        time.sleep(0.05)
    (os.killpg if whom == "all" else os.kill)(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "error: 01_one: interrupted. The executed copy is" in text and "Traceback" not in text


def test_a_dead_kernel_is_reported(notebooks, tmp_path, capfd):
    notebook(notebooks, "01_one", "import os; os._exit(9)")
    assert start(tmp_path) == 1
    assert "01_one: its kernel died" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papre"], "did you mean 'paper'"),
        (["paper", "--set", "training.epochs"], "write KEY=VALUE"),
        (["paper", "--set", "training.epoch=1"], "the nearest is 'epochs'"),
        (["paper", "--profile", "demo"], "two profiles were named, paper and demo"),
        (["paper", "--only", "07"], "no notebook '07': there are 01_one, 02_two, 03_three"),
        (["paper", "--run-dir", "/dev/null/x"], "/dev/null"),
    ],
)
def test_nothing_starts_with_wrong_options(notebooks, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_nothing_starts_while_something_is_missing(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "framseg.run.preflight.missing", lambda profile, trains, root: ["weights of the model", "a GPU"]
    )
    assert start(tmp_path) == 2
    printed = capsys.readouterr().err
    assert "'paper' cannot run here yet" in printed and "- weights of the model\n- a GPU" in printed
    assert not (tmp_path / "a run").exists()


def test_a_second_run_in_the_same_folder_is_refused(notebooks, tmp_path, capsys):
    with hold(tmp_path / "a run"):
        assert start(tmp_path, "--only", "01") == 2
    assert f"process {os.getpid()} works in {tmp_path / 'a run'}" in capsys.readouterr().err
    assert start(tmp_path, "--only", "01") == 0


# what is finished is skipped


@pytest.fixture
def inputs(notebooks, tmp_path, monkeypatch):
    """A first run that has finished, on a data folder and a folder of code that a test may change.

    In place of papermill, which takes a second a notebook, this process executes the cells.
    """

    def execute(notebook, made):
        content = nbformat.read(notebook, as_version=4)
        nbformat.write(content, made.notebooks / notebook.name)
        exec("\n".join(cell.source for cell in content.cells[1:]), {"run_dir": made.root, "profile": made.profile})

    monkeypatch.setattr(driver, "execute", execute)
    for name in ("code", "data/videos"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "code/module.py").write_text("one = 1\n")
    (tmp_path / "data/highlight_val_release.jsonl").write_text("{}\n")
    (tmp_path / "data/videos/a.mp4").write_bytes(b"a")
    monkeypatch.setattr(stamps, "CODE", tmp_path / "code")
    assert again(tmp_path) == 0
    return tmp_path


def again(tmp_path, *options):
    return start(tmp_path, "--set", f"data.folder={tmp_path / 'data'}", *options)


def announced(capfd) -> dict[str, str]:
    """What the driver printed about each notebook, by its name."""
    return dict(re.findall(r"^\[\d/\d\] (\w+): (.*)$", capfd.readouterr().out, re.MULTILINE))


SKIPPED = "unchanged, skipped (--force runs it again)"
EARLIER = "an earlier chapter changed"
NAMES = ("01_one", "02_two", "03_three")


def test_what_is_finished_is_skipped(inputs, capfd, monkeypatch):
    monkeypatch.setattr(driver, "execute", None)  # nothing may be executed
    page = (inputs / "a run/report.html").stat().st_mtime_ns
    assert again(inputs) == 0
    out = capfd.readouterr().out
    assert out.count(SKIPPED) == 3 and "0 notebooks in" in out and "3 skipped" in out
    assert (inputs / "a run/report.html").stat().st_mtime_ns == page


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("code/module.py", dict.fromkeys(NAMES, "the code changed")),
        ("data/highlight_val_release.jsonl", dict.fromkeys(NAMES, "the data changed")),
        ("data/videos/a.mp4", dict.fromkeys(NAMES, "the data changed")),
        ("a run/two.txt", {"01_one": SKIPPED, "02_two": "two.txt is gone", "03_three": EARLIER}),
        ("a run/notebooks/03_three.ipynb", {"01_one": SKIPPED, "02_two": SKIPPED, "03_three": "not finished yet"}),
    ],
)
def test_what_has_changed_runs_again_with_all_after_it(inputs, capfd, file, expected):
    path = inputs / file
    path.unlink() if file.startswith("a run") else path.write_bytes(path.read_bytes() + b" ")
    assert again(inputs) == 0
    causes = announced(capfd)
    assert list(causes) == list(NAMES)
    assert all(cause in causes[name] for name, cause in expected.items()), causes
    assert again(inputs) == 0 and announced(capfd) == dict.fromkeys(NAMES, SKIPPED)


def test_a_changed_cell_and_a_changed_profile_run_again(inputs, capfd):
    notebook(inputs / "note books", "02_two", "more = 2")
    assert again(inputs) == 0
    assert announced(capfd) == {"01_one": SKIPPED, "02_two": "the notebook changed", "03_three": EARLIER}
    assert again(inputs, "--set", "training.epochs=3") == 0
    assert all("the profile changed" in reason for reason in announced(capfd).values())


@pytest.mark.parametrize("name", ["~/model", "model", "../home/model", "{home}/model"])
@pytest.mark.parametrize("key, file", [("model.weights", "a.safetensors"), ("model.tokenizer", "tokenizer.json")])
def test_changed_weights_and_tokenizers_run_again_wherever_their_name_leads(
    inputs, capfd, monkeypatch, name, key, file
):
    """From the home folder, from the folder in which the run is started, or from the root."""
    home, work = _made(inputs / "home"), _made(inputs / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    path = _made((work if name == "model" else home) / "model") / file
    path.write_text("{}")
    changes = ["--set", f"{key}={name.format(home=home)}"]
    again(inputs, *changes)
    announced(capfd)
    assert again(inputs, *changes) == 0 and announced(capfd) == dict.fromkeys(NAMES, SKIPPED)
    path.write_text("{ }")
    assert again(inputs, *changes) == 0
    assert all("the model's files changed" in reason for reason in announced(capfd).values())


def test_a_tokenizer_may_be_named_by_its_file(inputs, capfd):
    path = inputs / "own.json"
    for text in ("{}", "{ }"):
        path.write_text(text)
        assert again(inputs, "--set", f"model.tokenizer={path}") == 0
        assert all("the model's files changed" in reason for reason in announced(capfd).values())


def test_what_is_asked_for_runs_finished_or_not(inputs, capfd):
    assert again(inputs, "--force") == 0
    assert announced(capfd) == dict.fromkeys(NAMES, "asked for by --force")
    assert again(inputs, "--only", "02") == 0
    assert announced(capfd) == {"02_two": "asked for by --only"}
    assert again(inputs) == 0  # the third is older than the second now
    assert announced(capfd) == {"01_one": SKIPPED, "02_two": SKIPPED, "03_three": EARLIER}
    assert again(inputs, "--from", "02") == 0
    assert announced(capfd) == dict.fromkeys(NAMES[1:], "asked for by --from")


def test_a_failed_step_is_not_finished(inputs, capfd):
    cells = nbformat.read(inputs / "note books/02_two.ipynb", as_version=4)
    notebook(inputs / "note books", "02_two", "raise OSError('not this time')")
    assert again(inputs) == 1
    announced(capfd)
    nbformat.write(cells, inputs / "note books/02_two.ipynb")  # as it was when it had ended well
    assert again(inputs) == 0
    assert announced(capfd) == {"01_one": SKIPPED, "02_two": "not finished yet", "03_three": EARLIER}


def test_what_the_first_chapter_makes_is_no_change(notebooks, tmp_path, capfd):
    folder = tmp_path / "made"
    notebook(
        notebooks,
        "01_one",
        f"from pathlib import Path; Path({str(folder)!r}).mkdir(exist_ok=True)",
        f"(Path({str(folder)!r}) / 'highlight_val_release.jsonl').write_text('{{}}')",
    )
    for expected in ("not finished yet", SKIPPED):
        options = ["--profile", "demo", "--run-dir", str(tmp_path / "a run"), "--set", f"data.folder={folder}"]
        assert run(*options) == 0
        assert announced(capfd) == dict.fromkeys(NAMES, expected)


# a run's profile.yaml has the settings that its results were made with


@pytest.fixture
def finished(inputs, monkeypatch):
    """A run whose training is finished, and whose fourth chapter has decoded; nothing may be executed from here on."""
    notebook(inputs / "note books", "04_four")
    assert again(inputs) == 0
    made = Run("paper", inputs / "a run")
    for path in (made.train, made.checkpoint):
        path.mkdir()
        shutil.copy(made.profile, path)
    monkeypatch.setattr(driver, "execute", None)
    return made


def refused(run: Run, capsys, *options: str) -> str:
    before = run.profile.read_bytes()
    capsys.readouterr()
    assert again(run.root.parent, *options) == 2
    assert run.profile.read_bytes() == before
    return capsys.readouterr().err


def allowed(run: Run, monkeypatch, *options: str) -> config.Profile:
    monkeypatch.setattr(driver, "failure", lambda *_: None)
    assert again(run.root.parent, *options) == 0
    return config.load(run.profile)


PARTS = [(), ("--only", "02"), ("--only", "03"), ("--from", "02"), ("--from", "04"), ("--force",)]


@pytest.mark.parametrize("part", PARTS, ids=" ".join)
@pytest.mark.parametrize("named", ["[]", "[training.learning_rate]"])
def test_a_finished_training_keeps_its_settings(finished, capsys, part, named):
    """Whichever chapters run, and even if training.may_change names the key: no step will be done with it."""
    message = refused(
        finished, capsys, *part, "--set", "training.learning_rate=1", "--set", f"training.may_change={named}"
    )
    assert (
        f"error: {finished.root} was trained with other settings (training.learning_rate: 2e-05 there, 1.0 now)"
        in message
    )
    assert "give another --run-dir" in message and "may_change" not in message


def test_a_profile_file_that_was_edited_in_between(finished, capsys):
    own = finished.root.parent / "own.yaml"
    for seed in (42, 43):
        own.write_text(
            f"extends: paper\nname: paper\nseed: {seed}\ndata: {{folder: {finished.root.parent / 'data'}}}\n"
        )
        code = run(str(own), "--run-dir", str(finished.root))
        assert code == (0 if seed == 42 else 2)
    assert "seed: 42 there, 43 now" in capsys.readouterr().err
    shutil.copy(finished.profile, finished.root / "before.yaml")
    edited = finished.profile.read_text().replace("seed: 42", "seed: 43")
    finished.profile.write_text(edited)  # by hand, in the run's own folder
    assert run("paper", "--run-dir", str(finished.root), "--only", "02") == 2
    assert "seed: 42 there, 43 now" in capsys.readouterr().err


def test_fewer_epochs_than_were_trained_are_no_change_to_go_on_with(finished, capsys, monkeypatch):
    named = ("--set", "training.may_change=[training.epochs]")
    assert "training.epochs: 11 there, 5 now" in refused(finished, capsys, *named, "--set", "training.epochs=5")
    assert "training.epochs: 11 there, 20 now" in refused(
        finished, capsys, *named, "--set", "training.epochs=20", "--only", "04"
    )
    assert allowed(finished, monkeypatch, *named, "--set", "training.epochs=20").training.epochs == 20


def test_an_unfinished_training_goes_on_with_what_is_named(finished, capsys, monkeypatch):
    shutil.rmtree(finished.checkpoint)
    change = ("--set", "training.learning_rate=1")
    assert "name the keys in training.may_change" in refused(finished, capsys, *change, "--from", "03")
    change += ("--set", "training.may_change=[training.learning_rate]")
    assert "was trained with other settings" in refused(finished, capsys, *change, "--only", "04")  # nothing trains
    assert allowed(finished, monkeypatch, *change, "--from", "03").training.learning_rate == 1


def test_where_things_lie_may_change_if_it_is_named(finished, capsys, monkeypatch):
    change = ("--only", "04", "--set", "model.weights=/elsewhere")
    assert "model.weights" in (message := refused(finished, capsys, *change)) and "training.may_change" in message
    assert (
        allowed(finished, monkeypatch, *change, "--set", "training.may_change=[model.weights]").model.weights
        == "/elsewhere"
    )


def test_a_checkpoint_alone_is_a_finished_training(finished, capsys):
    shutil.rmtree(finished.train)
    message = refused(finished, capsys, "--only", "04", "--set", "adapter.rank=8")
    assert f"{finished.root} was trained with other settings (adapter.rank: 16 there, 8 now)" in message


def test_a_checkpoint_from_before_a_training_anew_is_not_decoded_under_the_new_settings(finished, capsys, monkeypatch):
    shutil.rmtree(finished.train)
    new = ("--set", "training.learning_rate=1")
    finished.train.mkdir()
    config.save(allowed(finished, monkeypatch, *new), finished.trained_with)  # and it was interrupted
    assert "training.learning_rate: 2e-05 there, 1.0 now" in refused(finished, capsys, *new, "--only", "04")
    assert allowed(finished, monkeypatch, *new, "--from", "03").training.learning_rate == 1


def test_how_it_decodes_changes_together_with_what_was_decoded(finished, capsys, monkeypatch):
    change = ("--set", "inference.beams=1")
    for part in (("--only", "02"), ("--only", "03")):
        message = refused(finished, capsys, *change, *part)
        assert "chapter 04 in" in message and "inference.beams: 2 there, 1 now" in message and "--from 04" in message
    assert allowed(finished, monkeypatch, *change, "--from", "04").inference.beams == 1


def test_what_the_first_chapter_shows_changes_together_with_it(finished, capsys, monkeypatch):
    for path in (finished.train, finished.checkpoint):
        shutil.rmtree(path)
    change = ("--set", "frames.count=20")
    assert "chapter 01 in" in refused(finished, capsys, *change, "--from", "03")
    assert allowed(finished, monkeypatch, *change).frames.count == 20


@pytest.mark.parametrize(
    "command", [("-m", "framseg", "run"), ("-m", "framseg.run"), None], ids=["framseg", "run", "sh"]
)
def test_however_it_is_started(finished, command):
    before = finished.profile.read_bytes()
    start = [sys.executable, "-P", *command] if command else ["bash", str(RUN_ALL)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ["paper", "--run-dir", str(finished.root), "--only", "04", "--set", "seed=1"]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(config.REPOSITORY)}
    done = subprocess.run([*start, *options], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "seed: 42 there, 1 now" in done.stderr and "Traceback" not in done.stderr
    assert finished.profile.read_bytes() == before


# the report


def test_the_report_of_a_part_a_failure_and_a_truncated_copy(notebooks, tmp_path):
    page = tmp_path / "a run/report.html"
    assert start(tmp_path, "--only", "02") == 0
    assert "two.txt" in page.read_text() and "03_three" not in page.read_text()
    notebook(notebooks, "03_three", "raise ValueError('the frames are gone')")
    (tmp_path / "a run/notebooks/01_one.ipynb").write_text('{"cells": [')
    assert start(tmp_path, "--only", "03") == 1
    text = page.read_text()
    assert "the frames are gone" in text and "<td>failed</td>" in text
    assert "The executed copy cannot be read" in text


@pytest.mark.parametrize(
    "odd", [{"papermill": {"duration": "long"}}, {"papermill": {"start_time": "noon"}}, {"papermill": ["a"]}]
)
def test_the_report_says_which_copy_has_odd_records(notebooks, tmp_path, odd):
    assert start(tmp_path, "--only", "02") == 0
    path = tmp_path / "a run/notebooks/02_two.ipynb"
    content = nbformat.read(path, as_version=4)
    content.metadata.update(odd)
    nbformat.write(content, path)
    assert start(tmp_path, "--only", "01") == 0
    assert "The executed copy cannot be read" in (tmp_path / "a run/report.html").read_text()


def test_an_interactive_notebook_is_executed_without_widgets(notebooks, tmp_path):
    path = notebooks / "03_three.ipynb"
    content = nbformat.read(path, as_version=4)
    content.cells[0].source += "\nlive = True"
    content.cells[1].source = "from pathlib import Path; (Path(run_dir) / 'three.txt').write_text(str(live))"
    nbformat.write(content, path)
    assert start(tmp_path, "--only", "03") == 0
    assert (tmp_path / "a run/three.txt").read_text() == "False"


# run_all.sh


def shell(*arguments, cwd, script=RUN_ALL, **environment):
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def only_tools(folder, *more):
    """A folder for PATH with the shell's everyday tools and what is named, nothing else."""
    folder.mkdir()
    for tool in (*TOOLS, *more):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


@pytest.fixture
def repository(tmp_path):
    """A small repository of the same shape: one dependency, and a run.py that says how it was called."""
    root = tmp_path / "a clone"
    (root / "framseg").mkdir(parents=True)
    shutil.copy(RUN_ALL, root)
    (root / "framseg/__init__.py").write_text("")
    (root / "framseg/run.py").write_text("import sys, tiny\nprint(sys.prefix, sys.argv[1:])\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(wheels / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
            info = f"tiny-{version}.dist-info"
            wheel.writestr("tiny.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    pin(root, "1.0")
    return root


def pin(root, version):
    (root / "environment.yml").write_text(f"dependencies:\n  - python\n  - pip:\n    - tiny=={version}  # a comment\n")


def outside(repository, *arguments):
    """Start the small repository's run_all.sh from another folder, with a Python that lacks its dependency."""
    environment = {
        "PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (repository.parent / "wheels").as_uri(),
    }
    script = repository / "run_all.sh"
    return shell(*arguments, cwd=repository.parent, script=script, **environment)


def test_set_up_from_nothing_then_at_once(repository):
    first = outside(repository, "demo", "--set", "a=b c")
    assert first.returncode == 0, first.stderr
    assert "Installing the dependencies" in first.stdout and "lacks tiny" in first.stdout
    assert f"{repository / '.venv'} ['demo', '--set', 'a=b c']" in first.stdout

    second = outside(repository, "--only", "04")
    assert second.returncode == 0 and "Installing" not in second.stdout
    assert "['--only', '04']" in second.stdout

    pin(repository, "3.0")
    failed = outside(repository)
    assert failed.returncode == 1 and "No matching distribution found for tiny==3.0" in failed.stderr
    assert f"the whole log is {repository / 'runs/setup.log'}" in failed.stderr

    pin(repository, "2.0")  # what failed or was interrupted is not taken for finished
    third = outside(repository)
    assert third.returncode == 0 and "Installing" in third.stdout
    assert list((repository / ".venv").rglob("tiny-2.0.dist-info"))


def test_the_users_own_venv_is_left_alone(repository):
    (repository / ".venv").mkdir()
    (repository / ".venv/mine").write_text("")
    printed = outside(repository)
    assert printed.returncode == 1 and "was not made by run_all.sh" in printed.stderr
    assert (repository / ".venv/mine").exists()


def test_active_environment_is_used(tmp_path):
    """As `conda activate` or a venv's activate leave it, from any folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = shell("papre", cwd=tmp_path, PATH=path, HOME=str(tmp_path))
    assert printed.returncode == 2 and "did you mean 'paper'" in printed.stderr, printed
    assert "Installing" not in printed.stdout


def test_help_needs_nothing(tmp_path):
    printed = shell("--help", cwd=tmp_path, PATH=only_tools(tmp_path / "bin"))
    assert printed.returncode == 0 and "[demo|paper|test|PROFILE] [options]" in printed.stdout


def test_no_compiler(tmp_path):
    printed = shell(cwd=tmp_path, PATH=only_tools(tmp_path / "bin"))
    assert printed.returncode == 1 and "no C++ compiler found" in printed.stderr
    assert len(printed.stderr.splitlines()) == 1


def test_no_python(repository, tmp_path):
    path = only_tools(tmp_path / "bin", "g++")
    old = tmp_path / "bin/python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    printed = shell(cwd=tmp_path, script=repository / "run_all.sh", PATH=path)
    assert printed.returncode == 1 and "no Python >= 3.11 found" in printed.stderr
    assert not (repository / ".venv").exists()


def test_no_space(repository, tmp_path):
    path = only_tools(tmp_path / "bin", "g++")
    (tmp_path / "bin/df").unlink()
    (tmp_path / "bin/df").write_text("#!/bin/sh\necho head\necho /dev/x 100 99 1048576 99% /\n")
    (tmp_path / "bin/df").chmod(0o755)
    (tmp_path / "bin/python3").symlink_to(f"{sys.base_prefix}/bin/python3")
    printed = shell(cwd=tmp_path, script=repository / "run_all.sh", PATH=path)
    assert printed.returncode == 1 and "1 GiB free" in printed.stderr and "takes 4 GiB" in printed.stderr


def test_environment_file_is_condas_and_pins_everything():
    content = yaml.safe_load((config.REPOSITORY / "environment.yml").read_text())
    assert content["name"] == "framseg" and content["channels"] == ["conda-forge"]
    *conda, pip = content["dependencies"]
    assert [requirement.split("=")[0] for requirement in conda] == ["python", "pip"]
    assert all("==" in requirement or requirement == "-e ." for requirement in pip["pip"])
    lists = subprocess.run(
        ["bash", "-c", f'ROOT="{config.REPOSITORY}"; {_function("requirements")}; requirements'],
        capture_output=True,
        text=True,
    )
    assert lists.stdout.splitlines() == pip["pip"]


def _function(name: str) -> str:
    text = RUN_ALL.read_text()
    begin = text.index(f"{name}() {{")
    return text[begin : text.index("\n}\n", begin) + 2]
