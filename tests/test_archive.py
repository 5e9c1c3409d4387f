"""The published frames: fetched from a server that answers as the hub does, read into the frame store, shown."""

import collections
import gzip
import hashlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import SHORT
from hub_server import environment, serving
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framseg import FramsegError, annotations, config, dataset, download, frames, predictions
from framseg.download import DownloadError
from framseg.run import archive, preflight, released, stamps
from framseg.run.paths import Run

NAMES = config.load("released").data.frames
BOTH, TEST = NAMES["val"], NAMES["test"]
PHI = config.load("paper").model.tokenizers[1]
ONE_COPY = """
import sys
from framseg import config, dataset
report = dataset.extract(config.load(sys.argv[1]))
print(report.done, report.skipped, len(report.failed))
"""


def profile_of(folder: Path, *splits: str, **changes) -> config.Profile:
    """The demo's model on published frames whose annotations are in `folder`; without splits, val and test."""
    settings = SHORT | {"data.source": "frames", "data.frames": NAMES, "data.folder": folder, "training.epochs": 0}
    settings |= {"data.splits": splits or ("val", "test"), "frames.neighbour_distance": 0.125}
    return config.load("demo", settings | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="session")
def pictures(small_set) -> dict[str, dict[str, bytes]]:
    """As they are published: by split, the JPEG files of a few of the demo's videos, by member name."""
    out = {}
    for split in ("train", "val", "test"):
        out[split] = {}
        for row in dataset.rows(config.load("demo", {"data.folder": small_set}), split):
            video = frames.Video(small_set / "videos" / f"{row.vid}.mp4")
            numbers = video.numbers(row.duration, 25, 1, 0.125)
            shown = {number: Image.fromarray(picture) for number, picture in video._pictures(set(numbers.flat))}
            for frame, variation in np.ndindex(25, 3):
                content = io.BytesIO()
                shown[numbers[frame, variation]].save(content, "JPEG")
                out[split][f"{row.vid}_frame{frame + 1:03}_var{variation + 1}.jpg"] = content.getvalue()
    return out


def packed(members: dict[str, bytes], *extra: tarfile.TarInfo, shuffled: bool = False) -> bytes:
    """A tar.gz of these members."""
    out, entries = io.BytesIO(), []
    for name, content in members.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        entries.append((entry, io.BytesIO(content)))
    entries += [(entry, None) for entry in extra]
    if shuffled:
        random.Random(3).shuffle(entries)
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for entry, content in entries:
            tar.addfile(entry, content)
    return out.getvalue()


@pytest.fixture
def hub(pictures, monkeypatch, tmp_path):
    """The server with both data sets on it, asked from this process, too; its cache is in `tmp_path`."""
    with serving() as server:
        labels = {"p1/val_v1.json": b"[]", "p2/val_v2.json": b"[]", "README.md": b"words"}
        server.files[BOTH] = labels | {
            archive.ARCHIVE: packed(pictures["train"] | pictures["val"], shuffled=True),
            "p2/train_v1.json": b"[1]",
            "p2/val_v1.json": b"[2]",
        }
        server.files[TEST] = {archive.ARCHIVE: packed(pictures["test"]), "p2/test.json": b"[3]"}
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, place),
        )
        monkeypatch.setattr(constants, "ENDPOINT", place)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(download, "PAUSE", 0)
        yield server


@pytest.fixture
def folder(small_set, tmp_path):
    """A data folder with the annotations alone."""
    (tmp_path / "data").mkdir()
    for file in small_set.glob("*.jsonl"):
        shutil.copy(file, tmp_path / "data")
    return tmp_path / "data"


def vids(profile, *splits: str) -> set[str]:
    return {row.vid for split in splits for row in dataset.rows(profile, split)}


def by_hand(content: bytes, store: frames.Store) -> np.ndarray:
    picture = Image.open(io.BytesIO(content)).resize((store.image_size,) * 2, Image.Resampling.BICUBIC)
    again = io.BytesIO()
    picture.save(again, "JPEG", quality=store.quality, subsampling=0)
    return np.asarray(Image.open(again))


def test_val_and_test_are_stored_without_neighbours(hub, folder, pictures, capsys):
    profile = profile_of(folder)
    report = dataset.extract(profile)
    store = dataset.store(profile)
    assert store.folder.name == "frames_25x1_48px_q95" and store.neighbours == 0
    there = vids(profile, "val", "test")
    assert report.done == len(there) == 5 and not report.skipped and not report.failed and not report.late
    assert report.readers == dict.fromkeys(there, "published")
    assert {path.stem for path in store.folder.glob("*.zip")} == there
    for split in ("val", "test"):
        for row in dataset.rows(profile, split):
            stored, about = store.read(row.vid), store.about(row.vid)
            assert (about["duration"], about["offset"]) == (row.duration, 0.0)
            for frame in range(25):
                picture = pictures[split][f"{row.vid}_frame{frame + 1:03}_var2.jpg"]
                np.testing.assert_array_equal(stored[frame], by_hand(picture, store))
    told = capsys.readouterr()
    size = download.words(len(hub.files[BOTH][archive.ARCHIVE]))
    assert f"{BOTH}: fetching " in told.err and f"to free its {size}" in told.out
    assert {name for name, _ in hub.fetched} == {
        f"{BOTH}/{archive.ARCHIVE}", f"{TEST}/{archive.ARCHIVE}", f"{BOTH}/p2/train_v1.json",
        f"{BOTH}/p2/val_v1.json", f"{TEST}/p2/test.json",
    }  # fmt: skip
    labels = {split: archive.labels_file(profile, split) for split in NAMES}
    assert {split: file.read_bytes() for split, file in labels.items()} == {
        "train": b"[1]",
        "val": b"[2]",
        "test": b"[3]",
    }
    assert archive.labels_file(config.load("demo"), "val") is None


def test_all_variations_are_stored_for_training(hub, folder, pictures):
    profile = profile_of(folder, "train", "val", "test")
    report = dataset.extract(profile)
    store = dataset.store(profile)
    assert store.folder.name == "frames_25x3_48px_q95" and report.done == 11 and not report.failed
    [row, *_] = dataset.rows(profile, "train")
    for variation in range(3):
        stored = store.read(row.vid, np.full(25, variation))
        for frame in (0, 12, 24):
            picture = pictures["train"][f"{row.vid}_frame{frame + 1:03}_var{variation + 1}.jpg"]
            np.testing.assert_array_equal(stored[frame], by_hand(picture, store))
    np.testing.assert_array_equal(store.read(row.vid), store.read(row.vid, np.ones(25, int)))


def test_a_second_call_asks_for_nothing_and_the_archive_may_be_deleted(hub, folder, tmp_path, monkeypatch):
    profile = profile_of(folder)
    dataset.extract(profile)
    for blob in (tmp_path / "cache/hub").rglob("blobs/*"):
        if blob.stat().st_size > 1000:
            blob.unlink()
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(download, "read", None)
    again = dataset.extract(profile)
    assert (again.done, again.skipped, again.failed) == (0, 5, {})
    assert archive.to_fetch(profile) == 0


def test_the_order_of_the_members_does_not_matter(hub, folder, pictures, tmp_path):
    one, other = profile_of(folder), profile_of(tmp_path / "other")
    shutil.copytree(folder, tmp_path / "other")
    dataset.extract(one)
    hub.files[BOTH][archive.ARCHIVE] = packed(pictures["train"] | pictures["val"])
    shutil.rmtree(tmp_path / "cache")
    dataset.extract(other)
    for vid in vids(one, "val", "test"):
        np.testing.assert_array_equal(dataset.store(one).read(vid), dataset.store(other).read(vid))


def test_annotations_are_fetched_if_they_are_not_there(hub, folder, tmp_path, monkeypatch):
    asked = []

    def fetch(address, path, checksum):
        asked.append(address)
        shutil.copy(folder / path.name, path)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(download, "fetch", fetch)
    archive.prepare(profile_of(folder))
    archive.prepare(config.load("demo", {"data.folder": tmp_path / "new"}))
    assert not asked
    archive.prepare(profile_of(tmp_path / "new"))
    assert asked == [download.ANNOTATIONS + name for name in download.SHA256]


def test_a_cut_connection_goes_on(hub, folder):
    hub.cut = 200_000
    assert dataset.extract(profile_of(folder)).done == 5
    begins = [begin for name, begin in hub.fetched if name == f"{BOTH}/{archive.ARCHIVE}"]
    assert len(begins) > 2 and begins == sorted(set(begins))


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_hub_that_refuses(hub, folder, status):
    hub.status = status
    with pytest.raises(DownloadError, match=f"^{BOTH}: the published frames cannot be fetched .*{status}"):
        dataset.extract(profile_of(folder))
    assert not hub.fetched


def test_no_archive_in_the_repository(hub, folder):
    del hub.files[BOTH][archive.ARCHIVE]
    with pytest.raises(DownloadError, match=f"{BOTH} is no set of frames: the repository has no videos.tar.gz file"):
        dataset.extract(profile_of(folder))
    assert not hub.fetched


def test_a_wrong_hash_is_told_and_the_file_not_kept(hub, folder, tmp_path, monkeypatch):
    class Other:
        def __init__(self, content):
            self.content = content

        def hexdigest(self):
            return "0" * 64 if self.content[:2] == b"\x1f\x8b" else hashlib.sha1(self.content).hexdigest() + "0" * 24

    monkeypatch.setattr("hub_server.hashlib", type("Hashes", (), {"sha256": Other}))
    with pytest.raises(DownloadError, match=f"{BOTH}: .*SHA-256 .* expected is 000.* give the same command again"):
        dataset.extract(profile_of(folder))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]


@pytest.mark.parametrize("offline", [True, False])
def test_nobody_answers(hub, folder, monkeypatch, offline):
    """With the archive in the cache that is no matter; without it, one sentence."""
    profile = profile_of(folder)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(DownloadError, match=f"^{BOTH}: the published frames cannot be fetched"):
        dataset.extract(profile)


@pytest.mark.parametrize("offline", [True, False])
def test_a_warm_cache_needs_nobody(hub, folder, monkeypatch, offline):
    profile = profile_of(folder)
    dataset.extract(profile)
    shutil.rmtree(dataset.store(profile).folder)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert dataset.extract(profile).done == 5


def test_labels_alone_in_the_cache_are_no_archive(hub, folder, monkeypatch):
    archives = {name: hub.files[name].pop(archive.ARCHIVE) for name in (BOTH, TEST)}
    from huggingface_hub import snapshot_download

    snapshot_download(BOTH, repo_type="dataset")
    hub.files[BOTH][archive.ARCHIVE] = archives[BOTH]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=f"{BOTH}: videos.tar.gz has not been fetched yet, and the hub cannot be"):
        dataset.extract(profile_of(folder))


def test_a_full_disk_is_told_before_anything_is_fetched(hub, folder, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 100_000))
    profile = profile_of(folder)
    assert archive.to_fetch(profile) == sum(len(files[archive.ARCHIVE]) for files in hub.files.values())
    with pytest.raises(DownloadError, match=r"^disk: .* needed \(frames about .*, archive about .* make room"):
        dataset.extract(profile)
    assert not hub.fetched
    [sentence] = preflight.missing(profile, trains=False)
    assert "archive about" in sentence


def test_the_store_cannot_be_written(hub, folder, monkeypatch):
    profile, write, room = profile_of(folder), frames.Store.described, iter([True, True])

    def described(*arguments):
        if next(room, False):
            return write(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames.Store, "described", described)
    with pytest.raises(FramsegError, match="No space left.*make room"):
        dataset.extract(profile)
    monkeypatch.undo()
    assert len(list(dataset.store(profile).folder.glob("*.zip"))) == 2
    assert not (dataset.store(profile).folder / archive.ASIDE).exists()


def edited(hub, folder, pictures, **changes: bytes | None):
    """Extract from a test archive with other members: a content, or None for a member that is left out."""
    members = dict(pictures["test"])
    for number, content in changes.items():
        name = list(members)[int(number[1:])]
        members[name] = content
    hub.files[TEST][archive.ARCHIVE] = packed(
        {name: content for name, content in members.items() if content is not None}
    )
    return dataset.extract(profile_of(folder)), list(members)


def test_a_picture_that_is_missing_or_damaged_is_named(hub, folder, pictures, monkeypatch):
    names = list(pictures["test"])
    damaged = pictures["test"][names[76]][:400]
    report, _ = edited(hub, folder, pictures, _1=None, _76=damaged)
    profile = profile_of(folder)
    first, second = (names[number].rsplit("_", 2)[0] for number in (1, 76))
    assert first != second and report.done == 3
    assert report.failed == {
        first: f"{TEST}: {names[1]} is not in videos.tar.gz",
        second: f"{TEST}: {names[76]} in videos.tar.gz is damaged, or no JPEG picture of a usual size",
    }
    store = dataset.store(profile)
    assert store.failures() == report.failed and first not in store and second not in store
    assert not (store.folder / archive.ASIDE).exists()
    monkeypatch.setattr(download, "read", None)  # known already: no archive is read for them again
    again = dataset.extract(profile)
    assert (again.done, again.skipped, again.failed) == (0, 3, report.failed)


def picture_of(size: tuple[int, int], kind: str = "JPEG", mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, 1).save(content, kind)
    return content.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["empty", "text", "png", "large", "bomb"])
def test_a_picture_of_another_kind(hub, folder, pictures, kind):
    contents = {
        "empty": b"",
        "text": b"words",
        "png": picture_of((64, 48), "PNG"),
        "large": picture_of((8200, 8200), mode="L"),
    }
    contents["bomb"] = pictures["test"][next(iter(pictures["test"]))]
    place = contents["bomb"].index(b"\xff\xc0") + 5
    contents["bomb"] = contents["bomb"][:place] + b"\xff\xff\xff\xff" + contents["bomb"][place + 4 :]
    report, names = edited(hub, folder, pictures, _1=contents[kind])
    assert list(report.failed.values()) == [
        f"{TEST}: {names[1]} in videos.tar.gz is damaged, or no JPEG picture of a usual size"
    ]


def test_a_grey_picture_is_a_picture(hub, folder, pictures):
    report, names = edited(hub, folder, pictures, _1=picture_of((64, 48), mode="L"))
    assert not report.failed and report.done == 5


def test_members_that_are_no_pictures_are_left_alone(hub, folder, pictures, tmp_path):
    names = list(pictures["test"])
    extra = []
    for number, kind in enumerate(
        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    ):
        entry = tarfile.TarInfo(names[number])
        entry.type, entry.linkname = kind, "/etc/passwd"
        extra.append(entry)
    vid = names[0].rsplit("_", 2)[0]
    odd = {
        "../../" + names[1]: b"no picture",
        f"/{vid}_frame026_var2.jpg": b"no picture",
        f"{vid}_frame001_var4.jpg": b"no picture",
        f"{vid}_frame1_var2.jpg": b"no picture",
        f"{vid}.mp4": b"no picture",
        "another_60.0_210.0_frame001_var2.jpg": b"no picture",
    }
    content = packed(odd | {f"./{name}": content for name, content in pictures["test"].items()}, *extra)
    # A second member of a name is left out, too.
    twice = packed(dict.fromkeys(names, b"no picture"))
    stream = gzip.decompress(content).rstrip(b"\0")
    stream += b"\0" * (-len(stream) % 512) + gzip.decompress(twice)
    before = {path for path in tmp_path.rglob("*")}
    hub.files[TEST][archive.ARCHIVE] = gzip.compress(stream)
    report = dataset.extract(profile_of(folder))
    assert report.done == 5 and not report.failed
    new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new == {"cache", "data"} and not list(tmp_path.rglob("*.jpg"))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_archive_is_named_and_what_was_complete_is_kept(hub, folder, pictures, monkeypatch, share):
    monkeypatch.setattr(download, "CHUNK", 4096)  # less than a picture is read ahead, as of a large archive
    monkeypatch.setattr(archive, "AHEAD", 4)
    whole = packed(pictures["val"])
    hub.files[BOTH][archive.ARCHIVE] = whole[: int(len(whole) * share)]
    profile = profile_of(folder)
    sentence = r"gz: is damaged .*what was complete is kept: delete .*/blobs/\w+, and give the same command again"
    with pytest.raises(DownloadError, match=sentence):
        dataset.extract(profile)
    kept = list(dataset.store(profile).folder.glob("*.zip"))
    assert len(kept) == {0.3: 0, 0.9: 2}[share] and not dataset.store(profile).failures()
    hub.files[BOTH][archive.ARCHIVE] = whole
    [blob] = [p for p in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if p.stat().st_size == int(len(whole) * share)]
    blob.unlink()  # as the sentence says
    again = dataset.extract(profile)
    assert again.skipped == len(kept) and again.done == 5 - len(kept)


def test_an_archive_whose_checksum_is_wrong(hub, folder, pictures, monkeypatch):
    """Then a picture in it that is damaged is no final failure, either."""
    monkeypatch.setattr(download, "CHUNK", 4096)  # less than a picture is read ahead, as of a large archive
    monkeypatch.setattr(archive, "AHEAD", 4)
    first = min(pictures["val"], key=lambda name: "_var2" not in name)
    whole = bytearray(packed(pictures["val"] | {first: b"no picture"}))
    whole[-6] ^= 1
    hub.files[BOTH][archive.ARCHIVE] = bytes(whole)
    with pytest.raises(DownloadError, match="is damaged .*CRC"):
        dataset.extract(profile_of(folder))
    store = dataset.store(profile_of(folder))
    assert len(list(store.folder.glob("*.zip"))) == 1 and not store.failures()  # one is damaged, one not stored yet


def test_an_archive_of_another_set(hub, folder, pictures):
    hub.files[TEST][archive.ARCHIVE] = packed(pictures["train"])
    profile = profile_of(folder)
    with pytest.raises(
        DownloadError, match=r"is of another set: it has no picture of the 2 videos .* check data.frames"
    ):
        dataset.extract(profile)
    assert {path.stem for path in dataset.store(profile).folder.glob("*.zip")} == vids(profile, "val")
    assert not dataset.store(profile).failures()


def test_a_store_made_with_other_settings(hub, folder):
    dataset.extract(profile_of(folder))
    hub.fetched.clear()
    with pytest.raises(frames.StoreError, match=r"was made with .*neighbour_distance 0\.125"):
        dataset.extract(profile_of(folder, frames__neighbour_distance=0.1))
    assert not hub.fetched


def test_a_damaged_file_in_the_store_is_made_anew(hub, folder):
    profile = profile_of(folder)
    dataset.extract(profile)
    store = dataset.store(profile)
    path = sorted(store.folder.glob("*.zip"))[0]
    path.write_bytes(path.read_bytes()[:1000])
    report = dataset.extract(profile)
    assert (report.done, report.skipped) == (1, 4) and store.read(path.stem).any()


def test_two_at_once(hub, folder):
    with download.locked(dataset.store(profile_of(folder)).folder):
        with pytest.raises(DownloadError, match="another process is filling it"):
            dataset.extract(profile_of(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_reading_goes_on(hub, folder, pictures, tmp_path, number):
    profile = profile_of(folder)
    config.save(profile, tmp_path / "profile.yaml")
    hub.files[BOTH][archive.ARCHIVE] = packed(pictures["val"] | pictures["train"])
    slow = "import time, framseg.run.archive as a\nresized = a._resized\n"
    slow += "a._resized = lambda *x: (time.sleep(0.05), resized(*x))[1]\n"
    command = [sys.executable, "-c", slow + ONE_COPY, str(tmp_path / "profile.yaml")]
    run = subprocess.Popen(
        command, env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    store = dataset.store(profile)
    for _ in range(600):
        if list(store.folder.glob("*.zip")) or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(number)
    told = run.communicate(timeout=60)[1]
    assert run.returncode == -number or (number == signal.SIGINT and "KeyboardInterrupt" in told), told
    kept = len(list(store.folder.glob("*.zip")))
    assert 0 < kept < 5
    assert (store.folder / archive.ASIDE).exists() == (number == signal.SIGKILL)
    again = dataset.extract(profile)
    assert (again.done, again.skipped) == (5 - kept, kept) and not (store.folder / archive.ASIDE).exists()
    assert [name for name, _ in hub.fetched].count(f"{BOTH}/{archive.ARCHIVE}") == 1


def test_memory_stays_bounded(hub, folder, pictures, monkeypatch):
    """However the members lie, few pictures wait, and the reader forgets the members behind it."""
    remembered, waiting, most = [], set(), []
    following = tarfile.TarFile.next

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments):
            future = super().submit(*arguments)
            result = future.result
            waiting.add(future)
            most.append(len(waiting))
            future.result = lambda: waiting.discard(future) or result()
            return future

    monkeypatch.setattr(tarfile.TarFile, "next", lambda tar: remembered.append(len(tar.members)) or following(tar))
    monkeypatch.setattr(archive, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(archive, "AHEAD", 4)
    assert dataset.extract(profile_of(folder)).done == 5
    assert len(most) == 5 * 25 and max(most) == 5 and not waiting
    assert len(remembered) > 600 and max(remembered) <= 1


VID = st.text("abcXYZ019_.-", min_size=1, max_size=20).map("".join)


@given(st.sets(VID, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_vid_finds_its_pictures(tmp_path_factory, names, order):
    folder = tmp_path_factory.mktemp("names")
    store = frames.Store(folder / "store", 8, 2, 1, 0.1, 95)
    store.folder.mkdir()
    shades = {}
    for vid in names:
        for frame, variation in np.ndindex(2, 3):
            shades[f"{vid}_frame{frame + 1:03}_var{variation + 1}.jpg"] = order.randrange(256)
    members = list(shades.items())
    order.shuffle(members)
    contents = {}
    for name, shade in members:
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (shade,) * 3).save(content, "JPEG")
        contents[name] = content.getvalue()
    file = folder / archive.ARCHIVE
    file.write_bytes(packed(contents))
    failed: dict[str, str] = {}
    archive._read(file, "a/b", store, dict.fromkeys(names, 9.0), set(names), failed)
    assert not failed
    for vid in names:
        for frame, variation in np.ndindex(2, 3):
            stored = store.read(vid, np.full(2, variation))[frame]
            assert np.abs(stored.astype(int) - shades[f"{vid}_frame{frame + 1:03}_var{variation + 1}.jpg"]).max() <= 1


def test_profiles_that_make_no_sense(folder):
    for changes, words in (
        ({"frames__count": 24}, "25 frames"),
        ({"frames__neighbours": 2}, "1 neighbour or none"),
        ({"data__splits": ["val"], "training__epochs": 1}, "data.splits: without train"),
        ({"data__splits": ["val", "tset"]}, "data.splits.1"),
    ):
        with pytest.raises(config.ProfileError, match=words):
            profile_of(folder, **changes)
    with pytest.raises(config.ProfileError, match="data.frames: name the data sets"):
        config.load("demo", {"data.source": "frames"})
    assert dataset.store(config.load("released")).neighbours == 0
    assert dataset.store(config.load("released_train")).neighbours == 1
    assert dataset.store(config.load("released", {"data.splits": ["train", "val", "test"]})).neighbours == 1
    assert dataset.store(config.load("paper", {"data.splits": ["val"], "training.epochs": 0})).neighbours == 1


def test_nothing_is_missing_before_the_data_are_fetched_and_changed_data_are_seen(hub, tmp_path, folder):
    fresh = profile_of(tmp_path / "nothing here")
    assert preflight.missing(fresh, trains=False) == []
    assert archive.to_fetch(fresh) > 0
    profile = profile_of(folder)
    run = Run(profile, tmp_path / "run")
    chapter = stamps.Chapter(config.REPOSITORY / "notebooks/02_prompt_tokenizer.ipynb", profile, run)
    before = chapter.inputs()["the data"]
    dataset.extract(profile)
    extracted = chapter.inputs()["the data"]
    assert extracted != before
    dataset.extract(profile)
    assert chapter.inputs()["the data"] == extracted
    next(dataset.store(profile).folder.glob("*.zip")).unlink()
    assert chapter.inputs()["the data"] != extracted


def run_released(
    hub, folder: Path, tmp_path: Path, *options: str, **settings
) -> tuple[subprocess.CompletedProcess, Run]:
    """Profile `released` through `framseg run`, with the demo's model and settings and data that are served here.

    `options` choose chapters; without any, all five run, with the demo's base model, from its folder, as the weights.
    With `hub.files[released.MERGED] = contents(folder)` and that name as `model.weights`, they are fetched, too.
    """
    demo = config.load("demo")
    changes = {f"model.{name}": value for name, value in demo.model.model_dump(mode="json").items()}
    changes |= {"data.folder": str(folder), "training.threads": 1, "training.device": "cpu", "training.compile": False}
    changes |= {"training.offload_optimizer": False, "inference.batch": 32} | settings
    command = [sys.executable, "-P", "-m", "framseg.run", "released", "--run-dir", str(tmp_path / "run"), *options]
    command += [text for key, value in changes.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    environ = environment(hub, tmp_path) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600)
    return done, Run("released", tmp_path / "run")


@pytest.mark.parametrize("splits", [("val", "test"), ("train", "val", "test")])
def test_chapter_01_with_the_profile_released(hub, folder, tmp_path, splits):
    done, run = run_released(hub, folder, tmp_path, "--only", "01", **{"data.splits": list(splits)})
    assert done.returncode == 0, done.stderr[-4000:]
    text = (run.notebooks / "01_data.ipynb").read_text(encoding="utf-8")
    count = 5 if len(splits) == 2 else 11
    assert f"{count} of {count} videos are in " in text and f"read by published: {count}" in text
    assert "val: not compared with the authors' labels: " in text and "p2/val_v1.json" in text  # served: no labels
    assert (run.figures / "figure_4_variations.png").is_file()
    name = f"frames_25x{1 if count == 5 else 3}_48px_q95"
    assert len(list((folder / name).glob("*.zip"))) == count
    fetched = len(hub.fetched)
    again, _ = run_released(hub, folder, tmp_path, "--only", "01", **{"data.splits": list(splits)})
    assert again.returncode == 0 and len(hub.fetched) == fetched, again.stderr[-4000:]


def labels_of(folder: Path, split: str) -> bytes:
    """The authors' JSON of a split, with the labels that its annotations give, but for the first digit of all."""
    out = []
    for row in annotations.labelled(dataset.rows(profile_of(folder), split)):
        digits = annotations.frame_labels(row, 25).tolist()
        digits[0] ^= not out
        turns = [{"from": "human", "value": row.query}, {"from": "gpt", "value": "".join(map(str, digits))}]
        times = annotations.frame_times(row.duration, 25, whole_seconds=True).tolist()
        targets = annotations.soft_targets(row, 25).tolist()
        out.append({"id": row.qid, "vid": row.vid, "duration": row.duration, "conversations": turns})
        out[-1] |= {"video_timestamps": times, "saliency_scores": targets}
    return json.dumps(out).encode()


@pytest.mark.slow
def test_all_five_chapters_with_everything_from_the_hub(hub, folder, tmp_path, small_set):
    base = config.local_path("framseg/demo/base")
    hub.files[released.MERGED] = {"model.safetensors": (base / "model.safetensors").read_bytes()}
    hub.files[PHI] = {"tokenizer.json": (base / "tokenizer.json").read_bytes()}
    hub.files[BOTH] |= {f"p2/{split}_v1.json": labels_of(folder, split) for split in ("train", "val")}
    largest = max(len(content) for files in hub.files.values() for content in files.values())
    hub.cut = largest // 3  # every connection is cut: large files come in three parts or more
    settings = {"model.weights": released.MERGED, "model.tokenizer": list(config.load("paper").model.tokenizers)}
    done, run = run_released(hub, folder, tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    assert any(begin for _, begin in hub.fetched)

    def shown(chapter: int) -> str:
        [path] = run.notebooks.glob(f"0{chapter}_*.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return "".join(map(str, (output for cell in cells for output in cell.get("outputs", ()))))

    assert "val: the authors' labels next to ours" in shown(1) and "not compared with" not in shown(1)
    asked = len(dataset.rows(profile_of(folder), "val"))
    assert f"{100 - 100 / 25 / asked:.4f}" in shown(1)  # one digit of all rows is another
    assert "trained on QVHighlights, real videos" in shown(3) and "nothing is trained" in shown(3)
    assert "read in three ways" in shown(4) and run.submission.is_file() and "scores as above: True" in shown(4)
    assert "so there is nothing to ask about" in shown(5) and run.report.is_file()
    for split, count in {"val": 3, "test": 2}.items():
        answers = predictions.read_predictions(run.predicted(split))
        assert len({answer["vid"] for answer in answers}) == count and not any("error" in a for a in answers)

    fetched = len(hub.fetched)
    hub.shutdown()  # everything is there: a second run needs nobody, and has nothing to do
    hub.server_close()
    again, _ = run_released(hub, folder, tmp_path, **settings)
    assert again.returncode == 0 and again.stdout.count("unchanged, skipped") == 5, again.stdout + again.stderr[-4000:]
    assert len(hub.fetched) == fetched
