"""How long does the prediction browser take to open and to move on, in the kernel and in a real page?

python tests/benchmarks/browser.py [--counts 1550 20000]      (about two minutes on two cores)

Writes records/browser.json. The predictions are made up: 25 probabilities and 75 clip scores each, and a store with the
paper's picture size (25 JPEG frames of 384 pixels per video); half of the queries have none. In the page,
JupyterLab in headless Chromium: from running the cell to the first picture, from a click on "next" to the next picture.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from lab import CHROMIUM, launched, serve

from framseg import annotations, frames, moments
from framseg.predictions import SALIENCY, WINDOWS, write_predictions
from framseg.viz import browser

RECORD = Path(__file__).parent / "records" / "browser.json"
VIDEOS, MOVES = 20, 30

CELL = """
from pathlib import Path
from framseg import frames
from framseg.viz import browser
print("re" + "ady")
store = frames.Store(Path({folder!r}) / "store", 384, 25, 0, 0.1, 90)
"""
MOVE = """button => new Promise(done => {
    const player = button.closest(".framseg").querySelector(".framseg-player > div"), began = performance.now();
    new MutationObserver((_, seen) => {
        seen.disconnect();
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
    }).observe(player, { childList: true });
    button.click();
})"""


def make(folder: Path, count: int) -> None:
    """`count` rows and predictions; every second query's video has frames."""
    random = np.random.default_rng(1)
    rows, predictions = [], []
    for qid in range(count):
        vid = f"v{qid // 2 % VIDEOS}" if qid % 2 else f"missing {qid}"
        start = int(random.integers(0, 50)) * 2
        clips = tuple(range(start // 2, start // 2 + 10))
        saliency = tuple(tuple(random.integers(0, 5, 3).tolist()) for _ in clips)
        query = f"a person number {qid} talks to the camera while walking"
        rows.append(annotations.LabelledRow(qid, query, 150, vid, ((start, start + 20),), clips, saliency))
        probability = random.random(25)
        windows = moments.windows((probability > 0.6).astype(int), probability, 150)
        answer = {"probability": probability.tolist(), "mask": "1" * 25, "valid": True, "query": query, "vid": vid}
        scores = moments.saliency(probability, 150).tolist()
        predictions.append({"qid": qid, WINDOWS: windows, SALIENCY: scores} | answer)
    annotations.write(folder / f"rows_{count}.jsonl", rows)
    write_predictions(folder / f"{count}.jsonl", predictions)


def fill(store: frames.Store) -> None:
    """Pictures as hard to compress as photographs are: noise at every scale."""
    random = np.random.default_rng(2)
    store.folder.mkdir(parents=True)
    for video in range(VIDEOS):
        images = np.zeros((25, 384, 384, 3))
        for size in (3, 12, 48, 192):
            coarse = random.normal(0, 30, (25, size, size, 3))
            images += coarse.repeat(384 // size, axis=1).repeat(384 // size, axis=2)
        store.write(f"v{video}", (images + 128).clip(0, 255).astype(np.uint8)[:, None], {})


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def spread(values: list[float]) -> dict:
    return {"median": round(statistics.median(values), 3), "slowest": round(max(values), 3)}


def in_kernel(folder: Path, count: int, store: frames.Store) -> dict:
    opened = []
    opening = seconds(
        lambda: opened.append(browser.Browser(folder / f"{count}.jsonl", folder / f"rows_{count}.jsonl", store))
    )
    widget = opened[0]
    moves = [seconds(widget.next) for _ in range(MOVES)]
    searching = [seconds(lambda text=text: setattr(widget.search, "value", text)) for text in ("1", "12", "123", "")]
    sorting = [seconds(lambda name=name: setattr(widget.sort, "value", name)) for name in browser.SORTS]
    return {
        "open": round(opening, 3),
        "next, with frames": spread(moves[0::2]),
        "next, without": spread(moves[1::2]),
        "search": spread(searching),
        "sort": spread(sorting),
    }


def growth(kernel: dict[int, dict]) -> dict:
    """How many times as long with the most predictions as with the fewest, medians."""
    few, many = kernel[min(kernel)], kernel[max(kernel)]
    middle = {name: (few[name]["median"], many[name]["median"]) for name in few if name != "open"}
    times = {"predictions": (min(kernel), max(kernel)), "open": (few["open"], many["open"])} | middle
    return {name: round(after / before, 1) for name, (before, after) in times.items()}


def in_page(folder: Path, counts: list[int]) -> dict:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [nbformat.v4.new_code_cell(CELL.format(folder=str(folder)))] + [
        nbformat.v4.new_code_cell(
            f"browser.browse({str(folder / f'{count}.jsonl')!r}, {str(folder / f'rows_{count}.jsonl')!r}, store)"
        )  # fmt: skip
        for count in [counts[0], *counts]
    ]
    (folder / "lab").mkdir()
    nbformat.write(notebook, folder / "lab" / "browser.ipynb")
    measured = {}
    with serve(folder / "lab", folder / "own") as address, launched() as chromium:
        page = chromium.new_page(viewport={"width": 1700, "height": 1100})
        page.set_default_timeout(120_000)
        page.goto(address.format("browser"))
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.locator(".jp-Notebook .jp-Cell").first.locator(".jp-InputArea").click()
        page.keyboard.press("Shift+Enter")
        page.get_by_text("ready").wait_for()
        for place, count in enumerate([counts[0], *counts], start=1):
            page.locator(".jp-Notebook .jp-Cell").nth(place).locator(".jp-InputArea").click()
            began = time.perf_counter()
            page.keyboard.press("Shift+Enter")
            cell = page.locator(".jp-Notebook .jp-Cell").nth(place)
            cell.locator(".framseg-player svg").first.wait_for()
            opening = time.perf_counter() - began
            button = cell.get_by_role("button", name="next ▶")
            moves = [button.evaluate(MOVE) / 1000 for _ in range(MOVES)]
            # Once a page, JupyterLab loads the scripts that widgets need.
            first = {"open, as the page's first widget": round(opening, 3)}
            measured[count] = first if place == 1 else measured.get(count, {}) | {"open": round(opening, 3)}
            measured[count] |= {"next, with frames": spread(moves[0::2]), "next, without": spread(moves[1::2])}
    return measured


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1550, 20000])
    counts = parser.parse_args().counts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = frames.Store(folder / "store", 384, 25, 0, 0.1, 90)
        fill(store)
        for count in counts:
            make(folder, count)
        kernel = {count: in_kernel(folder, count, store) for count in counts}
        record = {
            "device": f"{processor()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("jupyterlab", "ipywidgets", "anywidget", "playwright")},
            "load before (1 min)": round(os.getloadavg()[0], 2),
            "bytes of a video's frames": int(np.mean([store.bytes(f"v{video}") for video in range(VIDEOS)])),
            "seconds in the kernel": kernel,
            "growth in the kernel, times": growth(kernel),
            "seconds in the page": in_page(folder, counts) if CHROMIUM else "no chromium here",
        }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(RECORD.read_text())


if __name__ == "__main__":
    main()
