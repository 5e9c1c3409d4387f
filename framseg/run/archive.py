"""Frames that others published: fetched from the Hugging Face hub, read from their archive into the frame store.

Its members are pictures, {vid}_frame{001..025}_var{1..3}.jpg: variation 2 is the frame itself, 1 and 3 its neighbours.
"""

import io
import os
import shutil
import tarfile
import time
import zipfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from framseg import config, dataset, download, frames
from framseg.jsonl import write_lines
from framseg.run import preflight
from framseg.run.paths import Run

ARCHIVE = "videos.tar.gz"
LABELS = {"train": "p2/train_v1.json", "val": "p2/val_v1.json", "test": "p2/test.json"}
ASIDE = ".reading"  # folder in the store with the videos of which pictures are still to come
LARGEST = 2**25  # bytes or pixels of a picture: one with more is no frame of a video
AHEAD = 64  # pictures that are read while threads resize others

Videos = dict[str, float]  # their annotated seconds by vid


def prepare(profile: config.Profile) -> None:
    """Fetch the annotations of published frames, unless they are there. Raises DownloadError, AnnotationError."""
    files = (dataset.annotation_file(profile, split) for split in ("train", "val", "test", "test_labels"))
    if profile.data.source == "frames" and not all(file.is_file() for file in files):
        with download.locked(folder := config.data_folder(profile)):
            download.get_annotations(folder)


def labels_file(profile: config.Profile, split: str) -> Path | None:
    """The authors' own labels of a split (train, val or test), None if they have not been fetched."""
    name = profile.data.frames.get(split)
    return preflight.cached(name, LABELS[split], "dataset") if name else None


def to_fetch(profile: config.Profile) -> int:
    """Bytes that are still to be fetched of the archives of the profile's splits, as far as the hub tells in time."""
    splits = profile.data.splits
    names = {profile.data.frames[split] for split in splits}
    if all(dataset.annotation_file(profile, split).is_file() for split in splits):
        sets, waiting = _videos(profile, splits)
        names = {name for name in names if waiting & sets[name].keys()}
    return sum(preflight.to_fetch(name, ARCHIVE, "dataset") or 0 for name in names)


def extract(profile: config.Profile, splits: tuple[str, ...]) -> frames.Report:
    """Fetch and read the archives that hold the splits' videos, as far as these are not in the frame store.

    A video fails if its archive lacks one of its pictures or holds a damaged one: `failures.jsonl` in the store's
    folder then names the picture, and while it does, no archive is read again for that video. Raises DownloadError for
    an archive that cannot be fetched, is damaged or of another set, or for a full disk, and StoreError for a store made
    with other settings; whatever is stored by then is kept.
    """
    begin, store = time.monotonic(), dataset.store(profile)
    prepare(profile)
    with download.locked(store.folder):
        (sets, waiting), failed = _videos(profile, splits), store.failures()
        try:
            for name, videos in sets.items():
                if asked := waiting & videos.keys():
                    _read(_fetch(name, profile), name, store, videos, asked, failed)
        finally:
            rows = [{"vid": vid, "reason": reason} for vid, reason in sorted(failed.items())]
            write_lines(store.folder / frames.FAILURES, rows)
    vids = sorted(set[str]().union(*sets.values()))
    readers = {vid: "published" for vid in vids if vid not in failed}
    done, failed = len(waiting & readers.keys()), {vid: failed[vid] for vid in vids if vid in failed}
    return frames.Report(done, len(readers) - done, failed, time.monotonic() - begin, readers)


def _videos(profile: config.Profile, splits: tuple[str, ...]) -> tuple[dict[str, Videos], set[str]]:
    """The splits' videos by data set; those of them that are neither stored nor known to be incomplete there."""
    store, sets, waiting = dataset.store(profile), dict[str, Videos](), set()
    failed = store.failures()
    for split in splits:
        name = profile.data.frames[split]
        videos = {row.vid: row.duration for row in dataset.rows(profile, split)}
        sets.setdefault(name, {}).update(videos)
        final = {vid for vid in videos if failed.get(vid, "").startswith(f"{name}: ")}
        waiting |= {vid for vid in videos.keys() - final if not frames.stored_already(store, vid)}
    return sets, waiting


def _fetch(name: str, profile: config.Profile) -> Path:
    """The archive of the data set `name` in the hub's cache."""
    from framseg.run import released  # loads the model's code

    if short := preflight.disks(profile, False, Run(profile)):
        raise download.DownloadError(short[0])
    with released.hub_errors(f"{name}: the published frames cannot be fetched", kind=download.DownloadError):
        archive = released.fetch(name, [ARCHIVE, *LABELS.values()], "dataset", ARCHIVE) / ARCHIVE
    if not archive.is_file():
        raise download.DownloadError(f"{name}: {ARCHIVE} has not been fetched yet, and the hub cannot be reached")
    return archive


def _read(
    archive: Path, name: str, store: frames.Store, videos: Videos, waiting: set[str], failed: dict[str, str]
) -> None:
    """Store the waiting ones of the set's videos, and say in `failed` which of their pictures cannot be had."""
    members = {
        f"_frame{frame + 1:03}_var{variation + 2 - store.neighbours}.jpg": frames.MEMBER.format(frame, variation)
        for frame, variation in np.ndindex(store.count, 2 * store.neighbours + 1)
    }
    left, awaited = dict.fromkeys(waiting, len(members)), {vid + ending for vid in waiting for ending in members}
    aside, jobs = store.folder / ASIDE, deque[tuple[str, Future[bytes]]]()
    bad: dict[str, str] = {}  # final only when the archive is known to be whole

    def take(member: tarfile.TarInfo, source: IO[bytes] | None) -> None:
        picture = PurePosixPath(member.name).name
        if source is not None and picture in awaited and "../" not in member.name:
            awaited.remove(picture)  # a second member of this name is left out
            jobs.append((picture, pool.submit(_resized, source.read(LARGEST), store)))
        if len(jobs) > AHEAD:
            keep()

    def keep() -> None:
        picture, job = jobs.popleft()
        vid = picture.rsplit("_", 2)[0]
        unfinished, left[vid] = aside / f"{vid}.zip", left[vid] - 1
        try:
            content = job.result()
        except Exception:  # Pillow raises a dozen kinds
            bad.setdefault(vid, f"{name}: {picture} in {ARCHIVE} is damaged, or no JPEG picture of a usual size")
        if vid in bad:
            unfinished.unlink(missing_ok=True)
            return
        with zipfile.ZipFile(unfinished, "a") as file:
            file.writestr(zipfile.ZipInfo(members[picture.removeprefix(vid)]), content)
            if not left[vid]:
                about = {"duration": videos[vid], "length": videos[vid], "offset": 0.0, "reader": "published"}
                file.writestr(zipfile.ZipInfo(frames.ABOUT), store.described(vid, about))
        if not left[vid]:
            os.replace(unfinished, store.path(vid))

    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        aside.mkdir()
        with ThreadPoolExecutor() as pool:
            download.read(archive, store.folder, f"what was complete is kept: delete {archive.resolve()}", take)
            while jobs:
                keep()
    except OSError as error:
        raise frames.StoreError(f"{store.folder}: {error.strerror or error}; make room and try again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if len(awaited) == len(videos) * len(members):
        lacking = f"it has no picture of the {len(videos)} videos that are asked for"
        raise download.DownloadError(f"{archive}: is of another set: {lacking}; check data.frames")
    for picture in sorted(awaited):
        bad.setdefault(picture.rsplit("_", 2)[0], f"{name}: {picture} is not in {ARCHIVE}")
    for vid in waiting:
        failed.pop(vid, None)
    failed.update(bad)
    size = download.words(archive.stat().st_size)
    print(f"{name}: what is needed is in {store.folder}; delete {archive.resolve()} to free its {size}")


def _resized(content: bytes, store: frames.Store) -> bytes:
    """A published picture as the store keeps it. Raises whatever Pillow does, and ValueError for one too large."""
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
        if picture.width * picture.height > LARGEST:
            raise ValueError
        size = store.image_size, store.image_size
        return frames.jpeg(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), store.quality)
