import errno
import fcntl
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from framseg import annotations, config, download, predictions
from framseg.download import DownloadError

VIDS = [f"video{i:06d}_60.0_210.0" for i in range(6)]
BIG = random.Random(1).randbytes(5_000_000)


@dataclass
class Site:
    """A server on the loopback address; its files, how it misbehaves, and what it was asked and has sent."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    sent: dict[str, int] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers end
    errors: list[int] = field(default_factory=list)  # statuses of the next answers
    ranges: bool = True
    if_range: bool = True
    version: str | None = '"one"'
    pause: float = 0.0  # seconds before every 64 KiB
    length: int | None = None  # named instead of the true length
    address: str = ""

    def ranges_of(self, name: str) -> list[str | None]:
        return [asked for path, asked in self.asked if path == name]


@pytest.fixture
def site(monkeypatch):
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, asked = self.path[1:], self.headers["Range"]
            site.asked.append((name, asked))
            if site.errors:
                return self.send_error(site.errors.pop(0))
            if name not in site.files:
                return self.send_error(404)
            whole, first = site.files[name], 0
            if asked and site.ranges and (not site.if_range or self.headers["If-Range"] == site.version):
                first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(whole) > 0:
                return self.send_error(416)
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
            self.send_header("Content-Length", str(site.length or len(whole) - first))
            if site.version:
                self.send_header("ETag", site.version)
            self.end_headers()
            body = whole[first:]
            body = body[: site.cuts.pop(0)] if site.cuts else body
            for start in range(0, len(body), 1 << 16):
                time.sleep(site.pause)
                piece = body[start : start + (1 << 16)]
                site.sent[name] = site.sent.get(name, 0) + len(piece)  # before the other end can have them all
                try:
                    self.wfile.write(piece)
                except OSError:  # the other end is gone
                    return

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def row(number: int, vid: str) -> annotations.Row:
    return annotations.LabelledRow(number, "a query", 150, vid, ((0, 4),), (0, 1), ((1, 2, 3), (4, 4, 4)))


def tar_gz(members: dict[str, bytes | tarfile.TarInfo], level: int = 1) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="w", compresslevel=level) as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in members.items():
                if isinstance(content, tarfile.TarInfo):
                    archive.addfile(content)
                else:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def content(vid: str) -> bytes:
    return random.Random(vid).randbytes(300_000)


@pytest.fixture
def data(site, monkeypatch, tmp_path):
    """The whole data set in small at the site; returns the folder to fill."""
    for number, name in enumerate(download.SHA256):
        annotations.write(tmp_path / name, [row(number, VIDS[number]), row(10 + number, VIDS[number + 1])])
        site.files[name] = (tmp_path / name).read_bytes()
    site.files["videos.tar.gz"] = tar_gz({f"some/videos/{vid}.mp4": content(vid) for vid in VIDS})
    monkeypatch.setattr(download, "ANNOTATIONS", site.address)
    monkeypatch.setattr(download, "ARCHIVE", site.address + "videos.tar.gz")
    digests = {name: hashlib.sha256(site.files[name]).hexdigest() for name in download.SHA256}
    monkeypatch.setattr(download, "SHA256", digests)
    return tmp_path / "data"


def released(qid: int, duration: float = 150) -> dict:
    """A row as the paper's authors published it."""
    scores = {"score": [0.25] * 25, "preds": "0" * 24 + "1", "pred_saliency_scores": [0.25] * 75}
    return {"qid": qid, "duration": duration, "pred_relevant_windows": [[144, 150, 0.25]]} | scores


@pytest.fixture
def reference(site, data, monkeypatch):
    """The authors' predictions for the small data set, at the site too; returns the folder to fill."""
    for split, number in (("val", 1), ("test", 3)):
        content = json.dumps([released(number), released(10 + number)], indent=2)
        site.files[f"hl_{split}_predictions.json"] = content.encode()
    monkeypatch.setattr(download, "RELEASED", site.address)
    return data.parent / "a reference"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


def test_the_names_are_the_paper_profile_s():
    section = config.load("paper").data
    assert list(download.SHA256) == [section.train, section.val, section.test, section.test_labels]
    assert download.VIDEOS == section.videos


def test_the_checksums_are_those_of_the_real_files(shared):
    for name, digest in download.SHA256.items():
        assert hashlib.sha256((shared / "qvhighlights" / name).read_bytes()).hexdigest() == digest


def test_one_command_brings_everything_and_a_second_one_asks_for_nothing(site, data, capsys):
    data.mkdir()  # it may be there already
    download.main([str(data)])
    output = capsys.readouterr().out
    for name in download.SHA256:
        assert (data / name).read_bytes() == site.files[name]
        assert f"{name}: 2 rows, as published" in output
    wanted = VIDS[:5]  # the sixth is in the archive, but in no annotation file
    assert listing(data / "videos") == [f"{vid}.mp4" for vid in wanted]
    assert all((data / "videos" / f"{vid}.mp4").read_bytes() == content(vid) for vid in wanted)
    assert f"1 members that are no annotated videos were left out: some/videos/{VIDS[5]}.mp4" in output
    assert "5 of 5 videos are there" in output and f"--set data.folder={data}" in output
    assert listing(data) == sorted([*download.SHA256, "not_in_archive.txt", "videos", "videos.tar.gz"])
    assert len(site.asked) == 5
    (data / "videos.tar.gz").unlink()  # as the message allows
    download.main([str(data)])
    assert len(site.asked) == 5


def test_files_that_are_there_are_not_fetched(site, data):
    data.mkdir()
    names = list(download.SHA256)
    for name in names[:2]:
        (data / name).write_bytes(site.files[name])
    download.main([str(data), "--annotations-only"])
    assert [name for name, _ in site.asked] == names[2:]
    assert not (data / "videos").exists()


def test_a_cut_connection_is_resumed_where_it_ended(site, tmp_path):
    site.files["big"], site.cuts = BIG, [2_000_000, 1_000_000]
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert site.ranges_of("big") == [None, "bytes=2000000-", "bytes=3000000-"]
    assert site.sent["big"] == len(BIG)  # no byte twice
    assert listing(tmp_path) == ["big"]


def test_after_cuts_in_vain_what_came_is_kept_and_the_next_call_goes_on(site, tmp_path):
    site.files["big"], site.cuts = BIG, [2_000_000, *[0] * download.TRIES]
    with pytest.raises(DownloadError, match=r"big: the connection was cut .* 2\.00MB are kept: give the same command"):
        download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big.part").read_bytes() == BIG[:2_000_000] and not (tmp_path / "big").exists()
    assert len(site.asked) == 1 + download.TRIES
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert site.sent["big"] == len(BIG)


def test_a_server_that_knows_no_ranges_sends_everything_again(site, tmp_path):
    site.files["big"], site.cuts, site.ranges = BIG, [2_000_000], False
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert site.sent["big"] == len(BIG) + 2_000_000


def test_a_server_without_ranges_that_always_cuts_is_given_up(site, tmp_path):
    site.files["big"], site.cuts, site.ranges = BIG, [2_000_000] * 50, False
    with pytest.raises(DownloadError, match="was cut after 2000000 of 5000000 bytes"):
        download.fetch(site.address + "big", tmp_path / "big")
    assert len(site.asked) == 1 + download.TRIES


@pytest.mark.parametrize("if_range", [True, False], ids=["200", "206 all the same"])
def test_a_file_that_has_changed_is_not_glued(site, tmp_path, if_range):
    site.files["big"], site.cuts = BIG, [2_000_000, *[0] * download.TRIES]
    with pytest.raises(DownloadError):
        download.fetch(site.address + "big", tmp_path / "big")
    site.files["big"], site.version, site.if_range = BIG[::-1], '"two"', if_range
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG[::-1]
    assert site.ranges_of("big")[-2 + if_range] == "bytes=2000000-"


def test_a_file_that_has_become_shorter_is_fetched_anew(site, tmp_path):
    site.files["big"], site.cuts = BIG, [2_000_000, *[0] * download.TRIES]
    with pytest.raises(DownloadError):
        download.fetch(site.address + "big", tmp_path / "big")
    site.files["big"], site.version, site.if_range = BIG[:1000], '"two"', False  # it answers 416
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG[:1000]


def test_a_whole_file_that_has_not_been_checked_yet_is_not_asked_for_again(site, tmp_path, monkeypatch):
    site.files["big"] = BIG
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "checksum", lambda path: signal.raise_signal(signal.SIGINT))
        download.fetch(site.address + "big", tmp_path / "big", "a checksum")
    assert listing(tmp_path) == ["big.part", "big.part.json"]
    download.fetch(site.address + "big", tmp_path / "big", hashlib.sha256(BIG).hexdigest())
    assert listing(tmp_path) == ["big"] and len(site.asked) == 1


@pytest.mark.parametrize("version", ['W/"one"', None], ids=["weak ETag", "no ETag"])
def test_without_a_sure_version_nothing_is_resumed(site, tmp_path, version):
    site.files["big"], site.cuts, site.version = BIG, [2_000_000], version
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert site.ranges_of("big") == [None, None]


def test_an_error_of_the_moment_is_tried_again(site, tmp_path):
    site.files["big"], site.errors = BIG, [500, 503]
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG and len(site.asked) == 3


def test_a_missing_file_is_named_at_once(site, data, tmp_path):
    del site.files["videos.tar.gz"]
    with pytest.raises(SystemExit, match=f"^error: {site.address}videos.tar.gz: the server answers 404 .*--from$"):
        download.main([str(data)])
    assert len(site.ranges_of("videos.tar.gz")) == 1
    assert sorted(download.SHA256) == listing(data)  # what could be had is kept


def test_a_host_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 1000.0)  # it is not waited for
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        assert download.ANSWER < 10
        monkeypatch.setattr(download, "ANSWER", 0.2)
        with pytest.raises(
            DownloadError, match=f"^{address}: no answer within 0.2 s; give the same command again .*--from$"
        ):
            download.fetch(address, tmp_path / "x")
    monkeypatch.setattr(download, "ANSWER", 9.0)
    with pytest.raises(DownloadError, match=f"^{address}: cannot be reached .*refused.*--from$"):
        download.fetch(address, tmp_path / "x")
    assert listing(tmp_path) == []


def test_a_wrong_checksum_is_named_and_the_file_not_kept(site, data):
    name = next(iter(download.SHA256))
    right, site.files[name] = site.files[name], site.files[name].replace(b"query", b"quarry")
    for call in (1, 2):  # a repeat asks once more, and no more than once
        with pytest.raises(SystemExit) as caught:
            download.main([str(data)])
        for what in (name, download.SHA256[name], hashlib.sha256(site.files[name]).hexdigest(), "--from"):
            assert what in str(caught.value)
        assert listing(data) == [] and len(site.asked) == call
    site.files[name] = right
    download.main([str(data)])


COMMAND = """
import sys
from framseg import download
download.ANNOTATIONS, download.ARCHIVE = sys.argv[2], sys.argv[2] + "videos.tar.gz"
download.SHA256 = dict(pair.split("=") for pair in sys.argv[3:])
download.main([sys.argv[1]])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "Ctrl-C"])
def test_a_run_that_was_ended_goes_on(site, data, how):
    site.files["videos.tar.gz"] = tar_gz({f"{vid}.mp4": BIG[i:] for i, vid in enumerate(VIDS)}, level=0)
    size, site.pause = len(site.files["videos.tar.gz"]), 0.01
    pairs = [f"{name}={digest}" for name, digest in download.SHA256.items()]
    environment = os.environ | {"PYTHONPATH": str(Path(download.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, data, site.address, *pairs], env=environment, stderr=subprocess.PIPE, text=True
    )
    part = data / "videos.tar.gz.part"
    try:
        limit = time.monotonic() + 60
        while not (part.is_file() and part.stat().st_size > 3_000_000) and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(how)
        output = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    kept = part.stat().st_size
    assert 3_000_000 < kept < size
    if how == signal.SIGINT:
        assert output.splitlines()[-1] == "interrupted: what has arrived is kept, the same command goes on"
        assert process.returncode == 130
    site.pause = 0.0
    download.main([str(data)])
    assert site.ranges_of("videos.tar.gz") == [None, f"bytes={kept}-"]
    assert (data / "videos.tar.gz").read_bytes() == site.files["videos.tar.gz"]
    assert (data / "videos" / f"{VIDS[1]}.mp4").read_bytes() == BIG[1:]
    assert len(site.asked) == len(download.SHA256) + 2


def test_two_runs_in_one_folder_do_not_mix(site, data):
    site.files["videos.tar.gz"], site.pause = tar_gz({f"{vid}.mp4": BIG for vid in VIDS}, level=0), 0.02
    first = threading.Thread(target=download.get, args=(data,))
    first.start()
    while first.is_alive() and not (data / "videos.tar.gz.part").is_file():
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="another process is filling it"):
        download.get(data)
    site.pause = 0.0
    first.join()
    assert not download.missing(data, set(VIDS[:5]))


@contextmanager
def room_for(size: int):
    """No file can be longer: a disk without room, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_has_come(site, tmp_path):
    site.files["big"] = BIG
    with (
        room_for(1_000_000),
        pytest.raises(DownloadError, match=r"big.part: no room \(.*\): 4\.00MB more are needed, .* are free"),
    ):
        download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big.part").read_bytes() == BIG[:1_000_000]
    download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert site.ranges_of("big") == [None, "bytes=1000000-"]


def test_what_does_not_fit_is_not_begun(site, tmp_path):
    site.files["big"], site.length = BIG, 10**18
    with pytest.raises(DownloadError, match="no room .* 1.00EB more are needed"):
        download.fetch(site.address + "big", tmp_path / "big")
    assert (tmp_path / "big.part").stat().st_size == 0


def test_a_disk_that_fills_while_unpacking_keeps_what_is_out(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(tar_gz({"a.mp4": BIG[:1000], "b.mp4": BIG, "c.mp4": BIG[:2000]}))
    with room_for(1_000_000), pytest.raises(DownloadError, match="no room .* more are needed"):
        download.unpack(archive, tmp_path / "videos", {"a", "b", "c"})
    assert not (tmp_path / "videos" / "b.mp4").exists()
    before = (tmp_path / "videos" / "a.mp4").stat()
    download.unpack(archive, tmp_path / "videos", {"a", "b", "c"})
    assert listing(tmp_path / "videos") == ["a.mp4", "b.mp4", "c.mp4"]
    after = (tmp_path / "videos" / "a.mp4").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)  # not written again
    assert (tmp_path / "videos" / "b.mp4").read_bytes() == BIG


def test_a_video_of_another_size_is_replaced(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"cut off")
    (tmp_path / "archive.tar.gz").write_bytes(tar_gz({"x/a.mp4": BIG[:1000]}))
    assert download.unpack(tmp_path / "archive.tar.gz", tmp_path / "videos", {"a"}) == []
    assert (tmp_path / "videos" / "a.mp4").read_bytes() == BIG[:1000]


def test_hostile_members_stay_in_the_archive(tmp_path):
    def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    members = {
        "videos": special("videos", tarfile.DIRTYPE),
        "../../a.mp4": b"flattened",
        "videos/a.mp4": b"a second one",
        "b.mp4": special("b.mp4", tarfile.SYMTYPE, str(outside)),
        "c.mp4": special("c.mp4", tarfile.LNKTYPE, str(outside)),
        "d.mp4": special("d.mp4", tarfile.CHRTYPE),
        "e.mp4": special("e.mp4", tarfile.FIFOTYPE),
        "../outside": b"theirs",
        "/tmp/evil.sh": b"theirs",
        "videos/._a.mp4": b"a file manager's",
        "videos/..": b"?",
        "videos/f.MP4": b"?",
        "g.mp4": b"wanted",
    }
    (tmp_path / "archive.tar.gz").write_bytes(tar_gz(members))
    ignored = download.unpack(tmp_path / "archive.tar.gz", tmp_path / "videos", set("abcdefg") | {"..", ""})
    assert listing(tmp_path) == ["archive.tar.gz", "outside", "videos"]
    assert listing(tmp_path / "videos") == ["a.mp4", "g.mp4"]
    assert (tmp_path / "videos" / "a.mp4").read_bytes() == b"flattened" and outside.read_bytes() == b"mine"
    assert len(ignored) == 10


@pytest.mark.parametrize("harm", ["cut off", "one bit", "one bit, long end", "end missing", "no archive"])
def test_a_damaged_archive_is_named(tmp_path, harm):
    whole = tar_gz({"a.mp4": BIG, "b.mp4": BIG}, level=0)
    if harm == "one bit, long end":  # tar does not read as far as gzip's checksum
        whole = gzip.compress(gzip.decompress(whole) + bytes(3_000_000), 0)
    harmed = {
        "cut off": whole[:7_000_000],
        "end missing": whole[:-4],
        "no archive": b"<html>please log in</html>",
    }.get(harm, whole[:50_000] + bytes([whole[50_000] ^ 1]) + whole[50_001:])  # a bit of a video
    (tmp_path / "archive.tar.gz").write_bytes(harmed)
    with pytest.raises(DownloadError, match=r"archive.tar.gz: is damaged \(.*\); delete it"):
        download.unpack(tmp_path / "archive.tar.gz", tmp_path / "videos", {"a", "b"})


def test_videos_that_the_archive_lacks_are_named_and_not_fetched_for_again(site, data, capsys):
    site.files["videos.tar.gz"] = tar_gz({f"{vid}.mp4": content(vid) for vid in VIDS[:3]})
    download.main([str(data)])
    output = capsys.readouterr().out
    assert "3 of 5 videos are there" in output and f"without a video: {VIDS[3]}, {VIDS[4]}\n" in output
    (data / "videos.tar.gz").unlink()
    download.main([str(data)])
    assert len(site.ranges_of("videos.tar.gz")) == 1
    (data / "videos" / f"{VIDS[0]}.mp4").unlink()  # one that the archive does hold
    download.main([str(data)])
    assert len(site.ranges_of("videos.tar.gz")) == 2 and (data / "videos" / f"{VIDS[0]}.mp4").is_file()


@pytest.fixture
def have(site, data, tmp_path):
    """A folder that the user has already, not to be written to."""
    folder = tmp_path / "have"
    (folder / "videos").mkdir(parents=True)
    for name in download.SHA256:
        (folder / name).write_bytes(site.files[name])
    for vid in VIDS[:4]:
        (folder / "videos" / f"{vid}.mp4").write_bytes(content(vid))
    return folder


def test_a_folder_that_the_user_has_is_linked_and_checked(site, data, have, capsys):
    for _ in (1, 2):
        download.main([str(data), "--from", str(have)])
        output = capsys.readouterr().out
        assert output.count("as published") == 4
        assert "4 of 5 videos are there" in output and f"without a video: {VIDS[4]}\n" in output
    assert site.asked == []
    assert all((data / name).samefile(have / name) for name in [*download.SHA256, "videos"])
    assert listing(have) == sorted([*download.SHA256, "videos"])


def test_annotations_that_are_not_the_published_ones_are_named(data, have, capsys):
    first, second, third, _ = download.SHA256
    annotations.write(have / first, [row(7, VIDS[0])])
    (have / third).unlink()
    download.main([str(data), "--from", str(have)])
    output = capsys.readouterr().out
    assert f"{first}: 1 rows, usable, but NOT the published file" in output
    assert f"{third}: is not there; --annotations-only fetches it" in output
    (have / second).write_text('{"qid": 1}\n')
    with pytest.raises(SystemExit, match=f"error: .*{second}:1: qid 1: "):
        download.main([str(data), "--from", str(have)])


def test_a_folder_of_bare_videos_is_taken_too(site, data, have, capsys):
    download.main([str(data), "--annotations-only"])
    download.main([str(data), "--from", str(have / "videos")])
    assert "4 of 5 videos are there" in capsys.readouterr().out
    assert (data / "videos").samefile(have / "videos")
    (have / "videos").rename(have / "clips")  # now the link leads nowhere
    download.main([str(data), "--from", str(have / "clips")])
    assert (data / "videos").samefile(have / "clips")


def test_a_folder_that_cannot_be_taken_is_named(data, have, tmp_path):
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        with pytest.raises(SystemExit, match=f"{nothing}: holds neither an annotation file .* nor videos"):
            download.main([str(data), "--from", str(tmp_path / nothing)])
    (data / "videos").mkdir()
    with pytest.raises(SystemExit, match="videos: is there already; move it away"):
        download.main([str(data), "--from", str(have)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: .*file: File exists"):
        download.main([str(tmp_path / "file")])


def test_a_reason_other_than_room_is_not_called_room(tmp_path):
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    assert str(download._unwritable(tmp_path / "x", 1, error)) == f"{tmp_path / 'x'}: Input/output error"


def test_the_reference_is_fetched_checked_and_named(site, reference, capsys):
    download.main(["--reference", str(reference)])
    output = capsys.readouterr().out
    assert output.count("2 rows, as published") == 4
    assert output.count("2 predictions, one for each query of highlight_") == 2
    assert "CC BY-NC-SA 4.0" in output
    assert output.endswith(f"\nexport FRAMSEG_SHARED='{reference}'\n")
    assert listing(reference / "qvhighlights") == sorted(download.SHA256)
    assert listing(reference / "released") == ["hl_test_predictions.json", "hl_val_predictions.json"]
    assert len(site.asked) == 6 and "videos.tar.gz" not in site.sent
    for split, number in (("val", 1), ("test", 3)):  # where the notebooks and benchmarks look for them
        path = predictions.reference(reference, split)
        assert path.read_bytes() == site.files[path.name]
        assert [record["qid"] for record in predictions.read_released(path)] == [number, 10 + number]
    download.main(["--reference", str(reference)])
    assert capsys.readouterr().out == output and len(site.asked) == 6


def test_the_reference_has_a_usual_place_and_is_no_data_folder(site, reference, monkeypatch):
    monkeypatch.setattr(download, "REFERENCE", reference)
    download.main(["--reference"])
    assert listing(reference) == ["qvhighlights", "released"]
    with pytest.raises(SystemExit, match="2"):
        download.main(["--reference", "--annotations-only"])


def test_a_cut_connection_of_the_reference_is_resumed(site, reference):
    size = len(site.files["hl_val_predictions.json"])
    site.cuts = [*[10**9] * 4, size - 100]  # the annotation files come first
    download.main(["--reference", str(reference)])
    assert site.ranges_of("hl_val_predictions.json") == [None, f"bytes={size - 100}-"]
    assert site.sent["hl_val_predictions.json"] == size


def test_a_reference_that_is_gone_is_named_and_the_rest_kept(site, reference):
    del site.files["hl_test_predictions.json"]
    with pytest.raises(SystemExit, match="^error: .*hl_test_predictions.json: the server answers 404 "):
        download.main(["--reference", str(reference)])
    assert listing(reference / "released") == ["hl_val_predictions.json"]
    assert listing(reference / "qvhighlights") == sorted(download.SHA256)


WRONG_PREDICTIONS = {
    "not JSON": (b"<html>please log in</html>", "not JSON"),
    "cut off": (json.dumps([released(1), released(11)])[:-9].encode(), "not JSON"),
    "no list": (json.dumps(released(1)).encode(), "expected a JSON list"),
    "other fields": (json.dumps([{"qid": 1}, released(11)]).encode(), "qid 1: lacks duration"),
    "rows missing": (json.dumps([released(1)]).encode(), "other queries or durations than highlight_val_release"),
    "other rows": (json.dumps([released(1), released(3)]).encode(), "other queries or durations"),
    "other durations": (json.dumps([released(1), released(11, 126)]).encode(), "other queries or durations"),
}


@pytest.mark.parametrize("kind", WRONG_PREDICTIONS)
def test_predictions_that_are_not_the_authors_are_refused(site, reference, kind):
    name = "hl_val_predictions.json"
    right, (site.files[name], reason) = site.files[name], WRONG_PREDICTIONS[kind]
    path = reference / "released" / name
    for _ in (1, 2):  # a second call does not take the file for checked
        with pytest.raises(SystemExit, match=f"(?s)^error: {path}:.*{reason}.*delete {path} and give the same command"):
            download.main(["--reference", str(reference)])
    site.files[name] = right
    path.unlink()
    download.main(["--reference", str(reference)])
    assert path.read_bytes() == right


def test_predictions_that_changed_at_the_server_between_two_calls_are_not_mixed(site, reference):
    name = "hl_val_predictions.json"
    site.cuts = [*[10**9] * 4, 100, *[0] * download.TRIES]
    with pytest.raises(SystemExit, match="are kept: give the same command again"):
        download.main(["--reference", str(reference)])
    site.files[name], site.version = json.dumps([released(11), released(1)]).encode(), '"two"'
    download.main(["--reference", str(reference)])
    assert (reference / "released" / name).read_bytes() == site.files[name]


def test_two_references_in_one_folder_do_not_mix(site, reference):
    reference.mkdir()
    with (reference / ".download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="^error: .*another process is filling it"):
            download.main(["--reference", str(reference)])
    assert site.asked == []
