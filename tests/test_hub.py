"""Checkpoints on a hub: a small server on the loopback address that answers as the Hugging Face hub does."""

import base64
import json
import subprocess
import sys

import hub_server
import pytest
from small import SCORES, tiny

from framseg import prompt
from framseg.backbones import blip3
from framseg.checkpoint import load_base, save_trained

NAME = "somebody/moments"


class Hub(hub_server.Hub):
    """One repository: what is committed to it can be listed and fetched."""

    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{NAME}"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if '"nothing"' in body:  # the name of a repository that one may not make
            return self.reply(b"{}", 401)
        if self.path.endswith("/preupload/main"):
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            answer = {"files": [one | {"shouldIgnore": False} for one in files]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[NAME][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.address()}/commit/{1:040d}", "commitOid": "1" * 40}
        else:
            answer = {"url": self.address(), "name": NAME, "id": NAME}
        self.reply(json.dumps(answer).encode(), Content_Type="application/json")


@pytest.fixture
def server():
    with hub_server.serving(Hub) as server:
        server.files[NAME] = {}
        yield server


@pytest.fixture
def checkpoint(tmp_path):
    """A trained checkpoint of a tiny model, base and all."""
    profile = tiny(model__weights=str(tmp_path / "base"), name="tiny")
    blip3.Blip3(profile.model).save_published(tmp_path / "base")
    model = load_base(profile)
    start = model.adapt(profile.adapter, 0)
    save_trained(tmp_path / "checkpoint", model, start, profile, prompt.load("framseg/demo/base"), SCORES)
    return tmp_path / "checkpoint"


def python(server, tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    """Python with the hub's address set to the server, as it is read when the hub's library is imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=hub_server.environment(server, tmp_path),
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
    )


def test_pushed_and_fetched_by_name(server, checkpoint, tmp_path):
    push = ["-m", "framseg.hub", "push", str(checkpoint), "somebody/moments"]
    refused = python(server, tmp_path, *push)
    assert refused.returncode == 1 and "its base model is a folder of this machine" in refused.stderr
    about = checkpoint / "profile.yaml"
    about.write_text(about.read_text().replace(f"weights: {tmp_path / 'base'}", "weights: base"), encoding="utf-8")
    (checkpoint / "stray.pkl").write_bytes(b"\x80\x04")
    done = python(server, tmp_path, *push)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"/commit/{1:040d}" in done.stdout
    assert {"profile.yaml", "README.md", "resampler.safetensors", "adapter/adapter_model.safetensors"} <= set(
        server.files[NAME]
    )
    assert "stray.pkl" not in server.files[NAME]

    server.files[NAME]["evil.py"] = b"raise SystemExit"
    load = (
        "import sys; from framseg.checkpoint import load_trained, local_folder;"
        "print(load_trained(local_folder(sys.argv[1]))[1].name)"
    )
    done = python(server, tmp_path, "-c", load, "somebody/moments")  # the relative base is found from tmp_path
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "tiny" and f"{NAME}/profile.yaml" in dict(server.fetched)
    assert f"{NAME}/evil.py" not in dict(server.fetched)

    missing = python(server, tmp_path, "-c", load, "somebody/else")
    assert "somebody/else: neither a folder here nor to be had from the Hugging Face hub" in missing.stderr


@pytest.mark.parametrize("name", ["somebody/nothing", "a bad name!", "somebody/moments"])
def test_what_hinders_a_push_is_said_in_one_sentence(server, checkpoint, tmp_path, name):
    """The hub refuses, the name is none, and at last nobody answers."""
    about = checkpoint / "profile.yaml"
    about.write_text(about.read_text().replace(f"weights: {tmp_path / 'base'}", "weights: base"), encoding="utf-8")
    if name == "somebody/moments":
        server.shutdown()
        server.server_close()
    done = python(server, tmp_path, "-m", "framseg.hub", "push", str(checkpoint), name)
    assert done.returncode == 1 and f"error: {name}: cannot be uploaded (" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
