"""Long runs and large amounts: memory stays flat, readers next to a writer see whole frames, long lists stay usable."""

import ctypes
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import psutil
import pytest
from benchmarks.browser import make
from conftest import small_profile
from ipywidgets import Widget
from small import SCORES
from test_frames import make_video, run, small_store

import framseg
from framseg import config, dataset, decode, evaluate, frames, prompt
from framseg.checkpoint import load_base, save_trained
from framseg.predictions import read_predictions
from framseg.viz import browser

QUERIES = 2000


def megabytes() -> float:
    """Memory that this process has in use: not files mapped into it, nor what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e6


def grown(measured: Sequence[float]) -> float:
    """Megabytes from the first quarter of the measurements to the last one, medians."""
    quarter = len(measured) // 4
    first, last = np.median(measured[:quarter]), np.median(measured[-quarter:])
    print(f"memory: {first:.1f} MB in the first quarter, {last:.1f} MB in the last, of {len(measured)} measurements")
    return last - first


@pytest.mark.slow
def test_memory_stays_flat_over_2000_queries_and_their_metrics(small_set, tmp_path, monkeypatch):
    """About 400 videos, which are the small set's own under many names; every fortieth is damaged."""
    profile = small_profile(tmp_path / "data")
    source, store = dataset.store(small_profile(small_set)), dataset.store(profile)
    store.folder.mkdir(parents=True)
    known = [row for split in ("train", "val", "test_labels") for row in dataset.rows(small_profile(small_set), split)]
    rows = []
    for video in range(QUERIES // 5):
        row = known[video % len(known)]
        vid = f"{video} {row.vid}"
        rows += [replace(row, qid=5 * video + n, query=f"{row.query} {n}", vid=vid) for n in range(5)]
        if video % 40:
            store.path(vid).symlink_to(source.path(row.vid))
        else:
            store.path(vid).write_bytes(source.path(row.vid).read_bytes()[:-100])

    measured, records = [], decode.records

    def watched(*arguments):
        for record in records(*arguments):
            if record["qid"] % 50 == 49:
                measured.append(megabytes())
            yield record

    monkeypatch.setattr(decode, "records", watched)
    path = tmp_path / "val.jsonl"
    model, tokenizer = load_base(profile), prompt.load(profile.model.tokenizer)
    predictions = decode.split(model, tokenizer, profile, rows, path)
    assert len(measured) == QUERIES // 50 and grown(measured) < 20  # 2,000 records themselves take 8
    assert [record["qid"] for record in predictions] == list(range(QUERIES))
    assert {record["qid"] // 5 for record in predictions if "error" in record} == set(range(0, QUERIES // 5, 40))

    measured.clear()
    for _ in range(20):
        assert len(evaluate.per_query(read_predictions(path), rows)) == QUERIES
        evaluate.evaluate(predictions, rows)
        measured.append(megabytes())
    assert grown(measured) < 16


@pytest.mark.slow
def test_memory_and_handles_stay_flat_over_many_videos(small_set, tmp_path):
    """2,000 queries, twelve at a time about one video after the other."""
    profile = small_profile(small_set)
    model, tokenizer = load_base(profile), prompt.load(profile.model.tokenizer)
    start = model.adapt(profile.adapter, seed=0)
    save_trained(tmp_path / "checkpoint", model, start, profile, tokenizer, SCORES)
    del model, start
    videos = sorted(dataset.videos(profile).iterdir())
    (tmp_path / "bad.mp4").write_bytes(videos[0].read_bytes()[:-2000])
    measured, handles = [], set()
    for call in range(QUERIES // 12 + 1):
        queries = [f"a lantern is rising, take {12 * call + number}" for number in range(12)]
        answers = framseg.predict(videos[call % len(videos)], queries, tmp_path / "checkpoint")
        assert [answer.query for answer in answers] == queries
        if call % 4 == 0:
            with pytest.raises(frames.VideoError, match="damaged|cannot be opened"):
                framseg.predict(tmp_path / "bad.mp4", queries, tmp_path / "checkpoint")
            measured.append(megabytes())
        handles.add((psutil.Process().num_fds(), psutil.Process().num_threads(), len(psutil.Process().children())))
    assert grown(measured) < 16
    assert len(handles) == 1, handles


READER = """
import hashlib, json, sys
from pathlib import Path
from framseg.frames import Store, VideoError

store, vids = Store(Path(sys.argv[1]), 32, 5, 1, 0.1, 95), json.loads(sys.argv[2])
seen, waiting = {vid: [] for vid in vids}, vids
print("ready", flush=True)
while waiting:  # only missing ones, so that each is read while it is being written
    for vid in waiting:
        try:
            content = hashlib.sha256(store.read(vid).tobytes()).hexdigest()
        except VideoError as error:
            content = str(error)
        if content not in seen[vid]:
            seen[vid].append(content)
    waiting = [vid for vid in waiting if " " in seen[vid][-1]]
print(json.dumps(seen))
"""


def test_eight_readers_of_a_store_that_grows_see_whole_frames_or_none(tmp_path):
    for number in range(3):
        make_video(tmp_path / f"{number}.mp4", 40 + 8 * number)
    durations = {}
    for number in range(60):
        (tmp_path / f"v{number}.mp4").symlink_to(tmp_path / f"{number % 3}.mp4")
        durations[f"v{number}"] = 5.0 + number % 3
    store = small_store(tmp_path / "store")
    command = [sys.executable, "-c", READER, str(store.folder), json.dumps(list(durations))]
    readers = [
        subprocess.Popen(command, cwd=config.REPOSITORY, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(8)
    ]
    try:
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        assert run(durations, tmp_path, store, workers=2).done == len(durations)
        answers = [json.loads(reader.communicate(timeout=120)[0]) for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    absent = "{0}: is not in the frame store {1}; extract it first"
    whole = {vid: hashlib.sha256(store.read(vid).tobytes()).hexdigest() for vid in durations}
    for seen in answers:
        for vid, digest in whole.items():
            assert seen[vid] in ([digest], [absent.format(vid, store.folder), digest])
    assert any(
        len(contents) == 2 for seen in answers for contents in seen.values()
    )  # they did read during the extraction


def models() -> int:
    """Widgets of this process, each of which costs a page that shows it a model."""
    return sum(issubclass(type(thing), Widget) for thing in gc.get_objects())


@pytest.mark.slow
def test_the_browser_holds_20000_predictions(tmp_path):
    for count in (10, 20_000):
        make(tmp_path, count)
    before = models()
    browser.Browser(tmp_path / "10.jsonl", tmp_path / "rows_10.jsonl")
    of_ten = models() - before
    page = browser.Browser(tmp_path / "20000.jsonl", tmp_path / "rows_20000.jsonl", folder=tmp_path)
    assert models() - before == 2 * of_ten
    assert len(page.selection()) == 20_000 and len(page.list.options) == browser.PAGE

    page.search.value = "number 123"
    assert [entry["qid"] for entry in page.selection()] == [qid for qid in range(20_000) if "123" in str(qid)]
    page.search.value = ""
    page.filter.value = list(browser.FILTERS)[2]
    missed = page.selection()
    page.sort.value = "IoU, worst first"
    assert 0 < len(missed) == len(page.selection()) < 20_000
    page.filter.value = "all"
    worst = [entry.iou for entry in page.shown]
    assert worst == sorted(worst) and len(page.list.options) == browser.PAGE

    page.sort.value = "query id"
    page.show(browser.PAGE - 1)
    assert page.list.options[-1][1] == page.list.value == browser.PAGE - 1
    page.next()
    assert page.list.options[0][1] == page.list.value == browser.PAGE and f"query {browser.PAGE} " in page.picture.value
    assert len(read_predictions(page.export())) == 20_000

    measured = []
    for number in range(400):
        page.next()
        if number % 20 == 0:
            measured.append(megabytes())
    assert page.list.value == browser.PAGE + 400
    assert models() - before == 2 * of_ten and grown(measured) < 8
