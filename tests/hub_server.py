"""A server on the loopback address that answers as the Hugging Face hub does, with models and data sets."""

import hashlib
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from framseg import config

LARGE = (".safetensors", ".tar.gz")  # what `cut` and `elsewhere` are for


class Hub(BaseHTTPRequestHandler):
    """The repositories in `server.files`, by name; a connection ends after `server.cut` bytes, if that is set."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cut is not None and self.path.endswith(LARGE):
            content, self.close_connection = content[: self.server.cut], True
        self.wfile.write(content)

    def do_GET(self):
        server = self.server
        name = next((name for name in server.files if f"/{name}/" in f"{self.path.partition('?')[0]}/"), None)
        if server.status or name is None:
            code = "GatedRepo" if server.status == 401 else "RepoNotFound"
            return self.reply(b"{}", server.status or 404, X_Error_Code=code)
        files, path = server.files[name], self.path.partition("?")[0].partition("/resolve/")[2].partition("/")[2]
        if path in files:
            content = files[path]
            begin = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if server.elsewhere and path.endswith(LARGE):
                about = {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content)), "X_Repo_Commit": "1" * 40}
                return self.reply(b"", 302, Location=f"{server.elsewhere}{self.path}?signature=1", **about)
            if self.command == "GET":
                server.fetched.append((f"{name}/{path}", begin))
                content = bytes(len(content)) if server.damaged and path.endswith(LARGE) else content
                server.tokens.append(self.headers["Authorization"])
            about = {"ETag": etag, "X_Repo_Commit": "1" * 40}
            if begin:
                about["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            return self.reply(content[begin:], 206 if begin else 200, **about)
        if not self.path.startswith(("/api/models/", "/api/datasets/")):
            return self.reply(b"{}", 404, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        about = {"id": name, "sha": "1" * 40, "siblings": siblings, "tags": [], "private": False}
        about["cardData"] = {"license": "cc-by-sa-4.0"} if server.licence else None
        tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": "1" * 40} for path in files]
        self.reply(json.dumps(tree if "/tree/" in self.path else about).encode(), Content_Type="application/json")

    do_HEAD = do_GET


@contextmanager
def serving(handler: type[Hub] = Hub):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.files, server.fetched, server.tokens, server.cut, server.status = {}, [], [], None, 0
        server.damaged, server.licence = False, False  # large files are zeros; the card names a licence
        server.elsewhere = ""  # the address of a server to which whoever asks for large files is sent
        server.handle_error = lambda *_: None  # who asks may be killed
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment(server, tmp_path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(config.REPOSITORY),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_nobody",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
