"""Checkpoints on a hub: a small server on the loopback address that answers as the Hugging Face hub does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small import SCORES, tiny

from framseg import config, prompt
from framseg.backbones import blip3
from framseg.checkpoint import load_base, save_trained


class Hub(BaseHTTPRequestHandler):
    """One repository: what is committed to it can be listed and fetched."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/somebody/moments"

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
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.address()}/commit/{1:040d}", "commitOid": "1" * 40}
        else:
            answer = {"url": self.address(), "name": "somebody/moments", "id": "somebody/moments"}
        self.reply(json.dumps(answer).encode(), Content_Type="application/json")

    def do_GET(self):
        files = self.server.files
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if name in files:
            etag = hashlib.sha256(files[name]).hexdigest()
            self.server.fetched.append(name)
            self.reply(files[name], ETag=f'"{etag}"', X_Repo_Commit="1" * 40)
        elif "/api/models/somebody/moments" in self.path:
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "somebody/moments", "sha": "1" * 40, "siblings": siblings, "tags": [], "private": False}
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "1" * 40} for name in files]
            self.reply(json.dumps(tree if "/tree/" in self.path else about).encode(), Content_Type="application/json")
        else:
            self.reply(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.fetched = {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


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
    environment = os.environ | {
        "PYTHONPATH": str(config.REPOSITORY),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_nobody",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=180, cwd=tmp_path
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
        server.files
    )
    assert "stray.pkl" not in server.files

    server.files["evil.py"] = b"raise SystemExit"
    load = (
        "import sys; from framseg.checkpoint import load_trained, local_folder;"
        "print(load_trained(local_folder(sys.argv[1]))[1].name)"
    )
    done = python(server, tmp_path, "-c", load, "somebody/moments")  # the relative base is found from tmp_path
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "tiny" and "evil.py" not in server.fetched

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
