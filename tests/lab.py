"""A JupyterLab with its own settings on the loopback address, and Chromium, driven by playwright, to look at it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipykernel.kernelspec import write_kernel_spec

from framseg import config
from framseg.run import notebooks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def serve(folder: Path, own: Path) -> Iterator[str]:
    """Address of a JupyterLab on the notebooks of `folder`, with its token and {0} for a notebook's name.

    Its settings are in `own`, so none of the person who runs it count.
    """
    write_kernel_spec(str(own / "data" / "kernels" / notebooks.KERNEL))
    settings = own / "config" / "labconfig"
    settings.mkdir(parents=True)
    disabled = {"@jupyterlab/apputils-extension:announcements": True}  # it asks about news from the network
    (settings / "page_config.json").write_text(json.dumps({"disabledExtensions": disabled}))
    environment = os.environ | {
        "PYTHONPATH": str(config.REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTER_TOKEN": secrets.token_hex(16),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--allow-root", f"--ServerApp.root_dir={folder}"]
    with (own / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/{{}}?token={environment['JUPYTER_TOKEN']}"
    try:
        _wait(server, address.format("api/status"), own / "log")
        yield address.format("lab/workspaces/{0}/tree/{0}.ipynb")
    finally:
        server.terminate()
        server.wait(30)


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended:\n{log.read_text()[-3000:]}")
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()[-3000:]}")


@contextmanager
def launched():
    """Chromium without a window, as a playwright browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root; shared memory is small in containers.
        arguments = ["--disable-dev-shm-usage"] + (["--no-sandbox"] if os.geteuid() == 0 else [])
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
