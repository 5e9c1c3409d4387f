"""Nothing executes what it reads: files with code in them are refused, or their code is taken as text."""

import json
import os
import pathlib
import pickle
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psutil
import pytest
import torch
import yaml
from lab import serve
from safetensors import SafetensorError
from test_codalab import TEST, VAL, folder  # noqa: F401
from test_fuzz import checkpoint  # noqa: F401
from test_run import notebooks, shell, start  # noqa: F401

from framseg import codalab, config, dataset, frames, prompt
from framseg.backbones import CheckpointError, blip3
from framseg.checkpoint import load_trained
from framseg.run import resume


@pytest.fixture
def marker(tmp_path):
    """The file that exists as soon as anything has been executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


class Harm:
    """An object whose pickle makes the file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.fixture(params=["pickle", "torch"])
def harm(request, marker, tmp_path):
    """A file of harm, tried out."""
    path = tmp_path / "harm"
    with path.open("wb") as file:
        pickle.dump(Harm(marker), file) if request.param == "pickle" else torch.save(Harm(marker), file)
    pickle.loads(path.read_bytes()) if request.param == "pickle" else torch.load(path, weights_only=False)
    marker.unlink()
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_pickle_among_base_weights(checkpoint, harm, tmp_path, name):  # noqa: F811
    profile = config.load(checkpoint / "trained" / "profile.yaml")
    (tmp_path / "base").mkdir()
    shutil.copy(harm, tmp_path / "base" / name)
    with pytest.raises(CheckpointError, match=str(tmp_path / "base")):
        blip3.Blip3.load_published(profile.model, tmp_path / "base")


@pytest.mark.parametrize("name", ["resampler.safetensors", "adapter/adapter_model.safetensors"])
def test_a_pickle_in_a_checkpoint(checkpoint, harm, tmp_path, name):  # noqa: F811
    shutil.copytree(checkpoint / "trained", tmp_path / "trained")
    right = load_trained(tmp_path / "trained")[1]
    for extra in (f"{name.rpartition('.')[0]}.bin", "training_args.bin"):  # never looked at
        shutil.copy(harm, tmp_path / "trained" / extra)
    assert load_trained(tmp_path / "trained")[1] == right
    shutil.copy(harm, tmp_path / "trained" / name)
    with pytest.raises(CheckpointError, match=f"{name}: damaged or not a safetensors file"):
        load_trained(tmp_path / "trained")
    (tmp_path / "trained" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} missing"):
        load_trained(tmp_path / "trained")


def test_a_pickle_as_tokenizer_features_or_state(harm, tmp_path):
    for name in ("tokenizer.json", "video.safetensors", "start.safetensors", "process_0.safetensors"):
        shutil.copy(harm, tmp_path / name)
    with pytest.raises(prompt.PromptError, match="not a tokenizer"):
        prompt.load(tmp_path)
    with pytest.raises(frames.VideoError, match="is damaged"):
        dataset.Features(tmp_path).read("video", np.zeros(2, int))
    (tmp_path / "state.json").write_text('{"step": 1, "world": 1}')
    with pytest.raises(SafetensorError):
        resume.load_weights(tmp_path, torch.nn.Module(), {}, processes=1)
    with pytest.raises(SafetensorError):
        resume.load_process(tmp_path, rank=0, optimizer=None)


def test_an_adapter_s_settings_name_no_code(checkpoint, marker, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "harmful.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(checkpoint / "trained", tmp_path / "trained")
    file = tmp_path / "trained/adapter/adapter_config.json"
    mapping = {"base_model_class": "harmful", "parent_library": "harmful"}
    harmful = {"auto_mapping": mapping, "megatron_config": {"a": 1}, "megatron_core": "harmful", "peft_type": "harmful"}
    file.write_text(json.dumps(json.loads(file.read_text()) | harmful))
    load_trained(tmp_path / "trained")
    assert "harmful" not in sys.modules


TAGS = [
    "!!python/object/apply:builtins.open ['{0}', w]",
    "!!python/object/apply:os.system ['touch {0}']",
    "!!python/object/new:os.system ['touch {0}']",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_yaml(marker, tmp_path, tag):
    text = tag.format(marker)
    yaml.unsafe_load(text)
    marker.unlink()  # so it does harm where it is let
    (tmp_path / "some.yaml").write_text(f"extends: demo\nname: {text}\n")
    with pytest.raises(config.ProfileError, match="some.yaml: not plain YAML"):
        config.load(tmp_path / "some.yaml")
    with pytest.raises(config.ProfileError, match="data.videos: not plain YAML"):
        config.load("demo", {"data.videos": text})


CODE = [
    "x'; import os; os.system('touch executed') #",
    'x"; import os; os.system("touch executed") #',
    'x\\"; open("executed", "w") #',
    "x\nopen('executed', 'w')\n#",
    "{run_dir.__class__} {none} {0} { %(touch executed)s $(touch executed) `touch executed`",
]


@pytest.mark.parametrize("code", CODE)
def test_code_in_the_name_of_a_run_folder_is_a_name(notebooks, tmp_path, code):  # noqa: F811
    assert start(tmp_path, "--run-dir", str(tmp_path / code), "--only", "01") == 0
    assert (tmp_path / code / "one.txt").read_text() == sys.executable  # the notebook wrote where it was told to
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("code", CODE)
def test_code_in_a_setting_is_text(notebooks, tmp_path, code):  # noqa: F811
    assert start(tmp_path, "--set", f"data.videos={json.dumps(code)}", "--only", "02") == 0
    assert config.load(tmp_path / "a run" / "profile.yaml").data.videos == code
    assert start(tmp_path, "--set", f"name={json.dumps(code)}", "--only", "02") == 2  # it names a folder
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("name", ["../outside", "..", "/outside", "a/b", ""])
def test_a_profile_s_name_leads_nowhere_else(name):
    with pytest.raises(config.ProfileError, match="name: "):
        config.load("demo", {"name": json.dumps(name)})


def test_the_shell_passes_on_what_it_is_given(tmp_path):
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = shell("papre$(touch executed)", "--set", "'; touch executed; '", cwd=tmp_path, PATH=path, HOME=str(tmp_path))
    assert done.returncode == 2 and "write KEY=VALUE" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../executed", "/tmp/../{0}", "{0}", "..\\executed"])
def test_a_submission_that_leads_elsewhere(folder, marker, name):  # noqa: F811
    inside = folder / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "made.zip", "w") as archive:
        for entry in (VAL, TEST, name.format(marker)):
            archive.writestr(entry, "harm")
    before = sorted(folder.rglob("*"))
    with pytest.raises(codalab.SubmissionError, match="expected only"):
        codalab.check(inside / "made.zip", folder)
    assert sorted(folder.rglob("*")) == before


def test_jupyter_listens_on_loopback_and_wants_its_token(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("nothing"), tmp_path_factory.mktemp("jupyter")) as address:
        whole = urlsplit(address)
        token = parse_qs(whole.query)["token"][0]

        def status(path: str, method: str = "GET", **headers: str) -> int:
            asked = urllib.request.Request(f"http://{whole.netloc}/{path}", method=method, headers=headers)
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

        for path in ("api/status", "api/contents", "api/kernels", f"api/contents?token={token[:-1]}x"):
            assert status(path) == 403
        assert status("api/kernels", "POST") == 403
        assert status("api/contents", Authorization=f"token {token}") == 200
        assert status("api/kernels", "POST", Authorization=f"token {token}") == 201  # it listens, too
        listening: set = set()
        until = time.monotonic() + 60
        while len(listening) < 6 and time.monotonic() < until:  # the server's port, and the five of a kernel
            time.sleep(0.2)
            listening = {
                connection.laddr
                for process in psutil.Process().children(recursive=True)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
        assert len(listening) >= 6 and whole.port in {where.port for where in listening}
        assert {where.ip for where in listening} == {"127.0.0.1"}
