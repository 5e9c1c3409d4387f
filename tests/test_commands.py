"""What a user can cause ends every command with one sentence and a code that is not 0, never with a traceback."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small import SCORES, make_video
from test_faults import without_override

from framseg import FramsegError, __main__, command_line, config, prompt
from framseg.checkpoint import load_base, save_trained

# Every case runs in a process of its own, forked from one that has loaded everything already, and ends as Python does.
FORKING = """
import os, sys, traceback
from importlib import import_module
from framseg.__main__ import COMMANDS, main

for name, _ in COMMANDS.values():
    import_module(name)
for number, line in enumerate(sys.argv[1:]):
    if not (child := os.fork()):
        for stream in (1, 2):
            os.dup2(os.open(f"{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# What lies at these names: see `places`. Those of the second line cannot be written to, nor can a folder be made there.
UNREADABLE = ("none", "folder", "binary", "latin", "shut", "closed/file", "good/file", "loop", "a:b", "n" * 300)
NO_FOLDER = ("good", "good/x", "closed/x", "read_only/x", "loop", "n" * 300)
STATUSES = (401, 403, 404, 429, 500, 503)

LOCAL = [  # a command line, and what its sentence names
    *((f"evaluate {name} good", name) for name in UNREADABLE),
    *((f"evaluate good {name}", name) for name in UNREADABLE),
    *((f"codalab pack --val {name} --test good --out o.zip", name) for name in UNREADABLE),
    *((f"codalab pack --val good --test {name} --out o.zip", name) for name in UNREADABLE),
    *(
        (f"codalab pack --val good --test good --out {name}", name)
        for name in ("folder", "closed/x", "read_only/x", "n" * 300)
    ),
    *((f"codalab check {name} --annotations data", name) for name in UNREADABLE),
    *((f"codalab check good --annotations {name}", name) for name in ("none", "folder", "good", "closed", "loop")),
    *((f"download --annotations-only {name}", name) for name in (*NO_FOLDER, "read_only")),
    *((f"download --reference {name}", name) for name in (*NO_FOLDER, "read_only")),
    *((f"download new --from {name}", name) for name in ("none", "folder", "good", "closed", "loop", "a:b")),
    *((f"download {name} --from data", name) for name in NO_FOLDER),
    *((f"hub push {name} somebody/moments", name) for name in ("none", "folder", "good", "closed", "loop", "n" * 300)),
    *((f"demo make-base --out {name}", name) for name in (*NO_FOLDER, "read_only")),
    *((f"demo make-base --out new --seed {seed}", seed) for seed in ("-1", "9" * 30, "one")),
    *((f"run {name}", name) for name in ("none.yaml", "folder.yaml", "binary.yaml", "shut.yaml", "papre", "a:b")),
    *((f"run demo --run-dir {name}", name) for name in (*NO_FOLDER, "read_only")),
    ("run demo --only 99", "99"),
    ("run demo --set training.epochs", "training.epochs"),
    ("run demo --set training.epoch=1", "training.epoch"),
    ("run demo --set training.epochs=[", "training.epochs"),
    *((f"predict {name} -q dog --checkpoint trained", name) for name in UNREADABLE if name != "latin"),
    *((f"predict video.mp4 -q dog --checkpoint {name}", name) for name in ("none", "folder", "good", "closed", "loop")),
    *((f"predict video.mp4 -q dog --checkpoint {name}", name) for name in ("a:b/c", "n" * 300, "damaged")),
]
HUB = [
    *((f"hub push trained somebody/s{status}", f"somebody/s{status}") for status in STATUSES),
    *((f"hub push trained {name}", name) for name in ("a:b/c", "a!", "a/b/c", "n" * 300)),
    *((f"predict video.mp4 -q dog --checkpoint somebody/s{status}", f"somebody/s{status}") for status in STATUSES),
]


class Refusing(BaseHTTPRequestHandler):
    """A hub that answers with the status which the asked name holds."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        [status] = re.findall(r"\bs(\d{3})\b", self.path + body)[:1] or [400]
        self.send_response(int(status))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    for name in ("folder", "folder.yaml", "closed", "read_only", "data"):
        (folder / name).mkdir()
    (folder / "good").write_text('{"qid": 1, "pred_relevant_windows": [[0, 2, 1]], "pred_saliency_scores": [1.0]}\n')
    row = {"qid": 1, "query": "a dog", "duration": 2, "vid": "a"}
    for name in ("highlight_val_release.jsonl", "highlight_test_with_gt.jsonl"):
        (folder / "data" / name).write_text(json.dumps(row) + "\n")
    for name in ("binary", "binary.yaml"):
        (folder / name).write_bytes(bytes(range(128, 256)))
    (folder / "latin").write_bytes('{"qid": 1, "query": "Straße"}\n'.encode("latin-1"))
    for name in ("shut", "shut.yaml"):
        (folder / name).touch(mode=0)
    (folder / "loop").symlink_to("loop")
    make_video(folder / "video.mp4", 4)
    profile = config.load("demo")
    model = load_base(profile)
    start = model.adapt(profile.adapter, 0)
    for name in ("trained", "damaged"):
        save_trained(folder / name, model, start, profile, prompt.load(profile.model.tokenizer), SCORES)
    (folder / "damaged/profile.yaml").write_text("name: [")
    (folder / "closed").chmod(0)
    (folder / "read_only").chmod(0o555)
    return folder


def ended(places: Path, cases: list[tuple[str, str]], **environment: str) -> dict[str, tuple[int, str, str]]:
    """Code, standard output and standard error of every command line."""
    own = {"PYTHONPATH": str(config.REPOSITORY), "HF_HOME": str(places / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*without_override(), sys.executable, "-c", FORKING, *(line for line, _ in cases)]
    done = subprocess.run(
        command, cwd=places, env=os.environ | own | environment, stdout=subprocess.PIPE, text=True, timeout=300
    )
    out = {}
    for number, ((line, _), code) in enumerate(zip(cases, map(int, done.stdout.split()), strict=True)):
        files = [places / f"{number}.{stream}" for stream in (1, 2)]
        out[line] = (code, *(file.read_text() for file in files))
        for file in files:
            file.unlink()
    return out


def assert_told(told: dict[str, tuple[int, str, str]], cases: list[tuple[str, str]]) -> None:
    wrong = []
    for line, names in cases:
        code, out, text = told[line]
        [*_, sentence] = text.split("error: ")
        one = text.count("error: ") == 1 and "Traceback" not in text
        if code not in (1, 2) or out or not one or names not in sentence:
            wrong.append(f"{line}: {code} {out}\n{text}")
    assert not wrong, "\n".join(wrong)


def test_places_that_cannot_be_used(places):
    assert_told(ended(places, LOCAL, HF_HUB_OFFLINE="1"), LOCAL)


def test_a_hub_that_refuses(places, hub):
    assert_told(ended(places, HUB, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_TOKEN="hf_nobody"), HUB)


def test_a_hub_that_is_not_asked(places):
    cases = [case for case in HUB if case[1].startswith("somebody/s401")]
    told = ended(places, cases, HF_HUB_OFFLINE="1")
    assert_told(told, cases)
    assert all("HF_HUB_OFFLINE" in text for _, _, text in told.values())


# Each of them by itself, as `python -m` starts it, and as a shell does.

MODULES = {
    "framseg": "evaluate none none",
    "framseg.predictor": "video.mp4 -q dog --checkpoint none",
    "framseg.evaluate": "none none",
    "framseg.codalab": "pack --val none --test none --out o.zip",
    "framseg.download": "new --from none",
    "framseg.hub": "push none a/b",
    "framseg.run": "none.yaml",
    "framseg.demo": "make-base --out none/x --seed none",
    "framseg.train": "--profile none.yaml",
    "framseg.decode": "--profile none.yaml --split val",
}


def started(*command: str | Path, **more) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY), "HF_HUB_OFFLINE": "1"}
    for name in ("FRAMSEG_WATCHER", "PYTHONUNBUFFERED"):
        environment.pop(name, None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command], env=environment, **pipes | more)


def test_every_module_with_a_command_is_in_the_table():
    """framseg.frames is started by framseg alone, with a request that no user writes."""
    by_name = {path for path, _ in __main__.COMMANDS.values()}
    package = config.REPOSITORY / "framseg"
    mains = {path for path in package.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(config.REPOSITORY).with_suffix("").parts) for path in mains}
    names = {name.removesuffix(".__main__") for name in names} - {"framseg.frames"}
    assert names == MODULES.keys() and {name.removesuffix(".__main__") for name in by_name} - names <= {
        "framseg.run.notebooks"
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_the_same_as_its_command(places, module):
    process = started(sys.executable, "-m", module, *MODULES[module].split(), cwd=places)
    out, text = process.communicate(timeout=120)
    assert process.returncode in (1, 2) and not out
    assert text.count("error: ") == 1 and "Traceback" not in text and "none" in text.split("error: ")[1], text


@pytest.mark.parametrize("module", ["framseg.train", "framseg.decode"])
def test_one_process_by_itself_says_who_starts_it(places, module):
    line = "--profile demo --run-dir x --split val".split()[: 6 if module == "framseg.decode" else 4]
    process = started(sys.executable, "-m", module, *line, cwd=places)
    assert process.communicate(timeout=120)[1].startswith("error: this process has no rank: `deepspeed --module`")
    assert process.returncode == 1


@pytest.mark.parametrize("line", ["--only 04 none.yaml", "papre", "demo --run-dir good", "--set"])
def test_the_script_says_it_too(places, line):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ("env", f"PATH={path}", config.REPOSITORY / "run_all.sh", *line.split())
    process = started(*command, cwd=places)
    out, text = process.communicate(timeout=120)
    assert process.returncode == 2 and not out
    assert text.count("error: ") == 1 and "Traceback" not in text, text


PRINTING = ["evaluate --help", "--version", "codalab check o.zip --annotations data", "codalab pack --help"]


@pytest.mark.parametrize("line", PRINTING)
@pytest.mark.parametrize("taker", ["a closed pipe", "a full disk"])
def test_nobody_takes_what_is_printed(places, line, taker):
    """As after `| head`, where the reader is gone."""
    if not (places / "o.zip").exists():
        done = started(
            sys.executable, "-m", "framseg", *"codalab pack --val good --test good --out o.zip".split(), cwd=places
        )
        assert done.communicate(timeout=120) == ("o.zip\n", "")
    if taker == "a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    process = started(sys.executable, "-m", "framseg", *line.split(), cwd=places, stdout=out)
    os.close(out)
    _, text = process.communicate(timeout=120)
    reason = os.strerror(errno.EPIPE if taker == "a closed pipe" else errno.ENOSPC)
    assert (process.returncode, text) == (1, f"error: cannot write to standard output ({reason})\n")


@pytest.mark.parametrize("name", [b"\xff.zip", "ä 源.zip".encode()])
def test_names_that_the_terminal_cannot_show(places, name):
    line = "codalab pack --val good --test good --out".split()
    command = ("env", "PYTHONIOENCODING=ascii", sys.executable, "-m", "framseg", *line)
    process = started(*command, name, cwd=places)
    out, text = process.communicate(timeout=120)
    assert (process.returncode, text) == (0, "") and out.startswith("\\")
    process = started(*command, b"none/" + name + b"/x", cwd=places / "data")
    assert process.communicate(timeout=120)[1].startswith("error: good: cannot be read")


def test_ctrl_c_ends_without_a_traceback(tmp_path):
    process = started(sys.executable, "-m", "framseg", "demo", "make-base", "--out", tmp_path / "base")
    while not (tmp_path / "base/tokenizer.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 130 and text.endswith("interrupted\n") and "Traceback" not in text


def test_ctrl_c_while_modules_are_loaded(tmp_path):
    (tmp_path / "papermill.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    process = started(sys.executable, "-m", "framseg.run", "demo", cwd=tmp_path)
    assert process.communicate(timeout=120) == ("", "interrupted\n") and process.returncode == 130


def test_a_fault_of_the_code_keeps_its_traceback(capsys):
    with pytest.raises(KeyError, match="odd"), command_line():
        raise KeyError("odd")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize(
    "error, sentence",
    [
        (FramsegError("no frames"), "no frames"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("a: it needs 150 MB"), "a: it needs 150 MB"),
    ],
)
def test_what_a_user_can_cause_is_one_sentence(capsys, error, sentence, code):
    with pytest.raises(SystemExit) as end, command_line(code):
        raise error
    told = (end.value.code, capsys.readouterr().err)
    assert told == ((f"error: {sentence}", "") if code == 1 else (2, f"error: {sentence}\n"))
