import json
import multiprocessing
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import decord
import numpy as np
import pytest
import videos
from PIL import Image, JpegImagePlugin

from framseg import frames
from framseg.frames import Store, StoreError, Video, VideoError, extract, frame_numbers, read_apart
from framseg.run import container

WIDTH, HEIGHT, FPS = 64, 48, 8


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A frame that shows its own number: eight vertical stripes, one per bit."""
    out = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        out[:, bit * width // 8 : (bit + 1) * width // 8] = 255 * (number >> bit & 1)
    return out


def shown(image: np.ndarray) -> int:
    """The number that a (resized) `picture` shows."""
    return sum(int(stripe.mean() > 128) << bit for bit, stripe in enumerate(np.array_split(image, 8, axis=1)))


def make_video(path: Path, count: int, rate=FPS, times_ms=None, x264: str = "bframes=2:keyint=12:scenecut=0") -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "medium", "crf": "10", "x264-params": x264 + ":b-adapt=0"}
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, target: Path, keep=lambda number: True, shift: float = 0.0) -> Path:
    """Copy packets without encoding them again, as `ffmpeg -c copy` does: some left out, or all moved to the front."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and keep(number):
                packet.pts -= int(shift / packet.time_base)
                packet.dts -= int(shift / packet.time_base)
                packet.stream = stream
                new.mux(packet)
    return target


def patched(content: bytes, *fields: tuple[bytes, int, int]) -> bytes:
    """An mp4 with numbers of its header multiplied; a field is (name of its box, bytes behind the name, factor)."""
    out = bytearray(content)
    for box, behind, factor in fields:
        at = content.index(box) + 4 + behind
        out[at : at + 4] = (int.from_bytes(content[at : at + 4], "big") * factor).to_bytes(4, "big")
    return bytes(out)


HOURS = 4320  # times 10 s are 12 h
LENGTHS = [(b"mvhd", 16, HOURS), (b"tkhd", 20, HOURS), (b"mdhd", 16, HOURS), (b"elst", 8, HOURS)]
COUNT, GAP = 8, 12  # of stts: how many frames stand alike, how far apart


def whole_video(path: Path, count: int, image_size: int) -> np.ndarray:
    """`count` frames, evenly spread over the video."""
    video = Video(path)
    return video.frames(video.numbers(video.length, count)[:, 0], image_size)


def small_store(folder: Path, **changes) -> Store:
    settings = {"image_size": 32, "count": 5, "neighbours": 1, "neighbour_distance": 0.1, "quality": 95} | changes
    return Store(folder, **settings)


def run(videos: dict, folder: Path, store: Store, workers: int = 1, **changes) -> frames.Report:
    settings = {"time_limit": 30.0, "duration_tolerance": 1.0} | changes
    with mock.patch("os.sched_getaffinity", lambda _: range(workers), create=True):
        return extract(videos, folder, store, **settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sound videos: a (10 s), b (10 s), c (5 s)."""
    folder = tmp_path_factory.mktemp("videos with späce")
    make_video(folder / "a.mp4", 80)
    make_video(folder / "b.mp4", 80, x264="bframes=0:keyint=250")
    make_video(folder / "c.mp4", 40)
    return folder


# ---- which frames ----------------------------------------------------------------------------------------------------


def test_sampling_formula():
    numbers = frame_numbers(150, 30.0, 25, 1, 0.1)
    assert numbers.dtype == np.int64
    assert numbers[:, 1].tolist() == list(range(90, 4500, 180))
    assert (np.diff(numbers, axis=1) == 3).all()
    ntsc = frame_numbers(150, 30000 / 1001, 25, 1, 0.1)
    assert ntsc[:3].tolist() == [[86, 89, 92], [266, 269, 272], [446, 449, 452]]
    assert ntsc[-1].tolist() == [4402, 4405, 4408]
    assert frame_numbers(126, 25.0, 25, 0, 0.1)[:2, 0].tolist() == [63, 189]  # 5.04 * 25 * 0.5 is whole


@pytest.mark.parametrize("fps", [10.0, 24.0, 25.0, 30.0, 50.0])
@pytest.mark.parametrize("duration", [2, 30, 126, 144, 150])
@pytest.mark.parametrize("count", [1, 7, 25, 60])
def test_sampling_formula_is_exact(fps, duration, count):
    exact = [int(Fraction(duration) / count * int(fps) * (Fraction(1, 2) + i)) for i in range(count)]
    assert frame_numbers(duration, fps, count, 0, 0.1)[:, 0].tolist() == exact


def test_variations_are_clipped_and_at_least_one_frame_apart():
    assert frame_numbers(2, 8.0, 4, 2, 0.1).tolist() == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
        [12, 13, 14, 15, 16],
    ]
    assert frame_numbers(2, 8.0, 4, 2, 0.25, available=15).tolist() == [
        [0, 0, 2, 4, 6],
        [2, 4, 6, 8, 10],
        [6, 8, 10, 12, 14],
        [10, 12, 14, 14, 14],
    ]
    assert frame_numbers(4, 8.0, 2, 0, 0.1).tolist() == [[8], [24]]


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,count", [("a", 80), ("b", 80), ("c", 40)])
def test_every_frame_is_the_one_asked_for(corpus, name, count):
    video = Video(corpus / f"{name}.mp4")
    assert (video.count, video.fps, video.length, video.constant) == (count, FPS, pytest.approx(count / FPS), True)
    everything = video.frames(np.arange(count), 32)
    assert everything.dtype == np.uint8 and everything.shape == (count, 32, 32, 3)
    assert [shown(image) for image in everything] == list(range(count))
    some = np.array([[39, 3], [3, 17]])
    assert np.array_equal(video.frames(some, 32), everything[some])


def test_resized_as_pil_does(corpus):
    with av.open(str(corpus / "a.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for number in (0, 41):
        wanted = Image.fromarray(decoded[number]).resize((40, 40), Image.Resampling.BICUBIC)
        ours = Video(corpus / "a.mp4").frames(np.array([number]), 40)[0]
        assert np.abs(ours.astype(int) - np.asarray(wanted)).max() <= 2


def test_open_groups_of_pictures_do_not_shift_frames(tmp_path):
    path = make_video(tmp_path / "open.mp4", 200, x264="bframes=3:keyint=30:open-gop=1:scenecut=0")
    numbers = np.arange(1, 200, 7)
    assert [shown(image) for image in Video(path).frames(numbers, 32)] == numbers.tolist()


def test_video_cut_without_encoding_again_starts_at_the_cut(corpus, tmp_path):
    path = remux(corpus / "a.mp4", tmp_path / "cut.mp4", shift=4.25)  # frame 34; the key frame before it is 24
    video = Video(path)
    assert (video.count, video.length) == (46, pytest.approx(5.75))
    assert [shown(image) for image in video.frames(np.array([0, 1, 20, 45]), 32)] == [34, 35, 54, 79]


@pytest.mark.parametrize("late", ["file", "decoder"])
def test_times_count_from_the_first_frame(corpus, tmp_path, monkeypatch, late):
    """Also where the decoder itself tells a first timestamp above 0, as it does where a file names no start."""
    path = remux(corpus / "a.mp4", tmp_path / "late.mkv", shift=-2.0)
    if late == "decoder":
        told = decord.VideoReader.get_frame_timestamp
        monkeypatch.setattr(decord.VideoReader, "get_frame_timestamp", lambda *arguments: told(*arguments) + 2.0)
    video = Video(path)
    assert video.starts == pytest.approx(np.arange(80) / FPS, abs=0.002)
    assert video.length == pytest.approx(10, abs=0.002) and video.constant
    numbers = video.numbers(video.length, 4)[:, 0]
    assert [shown(image) for image in video.frames(numbers, 32)] == [10, 30, 50, 70]


def test_ntsc_frame_rate_is_constant(tmp_path):
    video = Video(make_video(tmp_path / "ntsc.mp4", 45, rate=Fraction(30000, 1001)))
    assert video.constant and video.fps == pytest.approx(30000 / 1001)
    assert np.array_equal(video.numbers(1.5, 5, 1), frame_numbers(1.5, 30000 / 1001, 5, 1, 0.1, available=45))


def test_variable_frame_rate_takes_the_frame_shown_at_the_time(tmp_path):
    gaps = np.random.default_rng(3).integers(30, 500, 59)
    times = np.concatenate([[0], np.cumsum(gaps)])
    video = Video(make_video(tmp_path / "variable.mp4", 60, times_ms=times.tolist()))
    assert not video.constant
    duration = 15.0
    seconds = duration / 10 * (0.5 + np.arange(10))
    middle = [max(number for number in range(60) if times[number] <= 1000 * second) for second in seconds]
    numbers = video.numbers(duration, 10, 1, 0.1)
    assert numbers[:, 1].tolist() == middle
    assert ((numbers[:, 0] < numbers[:, 1]) & (numbers[:, 1] < numbers[:, 2])).all()
    later = [max(number for number in range(60) if times[number] <= 1000 * (second + 0.1)) for second in seconds]
    assert numbers[:, 2].tolist() == [max(pair) for pair in zip(later, numbers[:, 1] + 1, strict=True)]
    assert [shown(image) for image in video.frames(numbers[:, 1], 32)] == middle


@pytest.mark.parametrize("width, height", [(1, 1), (1, 5), (2, 1), (16, 5), (47, 5), (48, 5), (63, 5)])
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv444p10le"])
def test_odd_sizes_and_ten_bits(tmp_path, width, height, pixels):
    path = tmp_path / "odd.mp4"
    flat = np.empty((3, height, width), np.uint8)
    flat[:] = np.array([128, 90, 200])[:, None, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = {"crf": "1"}
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(flat, "yuv444p").reformat(format=pixels)))
        container.mux(stream.encode())
    decoded = whole_video(path, 2, 16)
    assert np.abs(decoded.astype(int) - (245, 87, 54)).max() <= 4  # BT.601


def test_rotated_video_is_upright(corpus, tmp_path):
    content = bytearray((corpus / "c.mp4").read_bytes())
    matrix = content.find(b"tkhd") + 4 + 40
    quarter_turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter_turn)
    (tmp_path / "rotated.mp4").write_bytes(content)
    image = Video(tmp_path / "rotated.mp4").frames(np.array([0b00001111]), 32)[0]
    assert image[:15].mean() > 240 and image[17:].mean() < 15  # the stripes' left half is now on top


def test_one_frame(tmp_path):
    path = make_video(tmp_path / "one.mp4", 1)
    decoded = whole_video(path, 3, 32)
    assert Video(path).length == pytest.approx(1 / FPS)
    assert np.array_equal(decoded[0], decoded[2])


def test_frames_are_evenly_spread(corpus):
    video = Video(corpus / "a.mp4")
    assert video.length == pytest.approx(10.0)
    assert [shown(image) for image in whole_video(video.path, 4, 32)] == [10, 30, 50, 70]
    numbers = video.numbers(2.0, 2)[:, 0]
    assert [shown(image) for image in video.frames(numbers, 32)] == [4, 12]


def test_read_apart_gives_the_frames_and_refuses_more_than_the_disk_holds(corpus, tmp_path):
    with (tmp_path / "all").open("w+b") as file:
        decoded, length, _ = read_apart(corpus / "a.mp4", 4, 2.0, 32, 30, file)
        assert length == 10 and [shown(image) for image in decoded] == [8, 24, 40, 56, 72]
        with pytest.raises(VideoError, match="is 10.00 s long by its timestamps, .* 503316.5 GB of temporary files"):
            read_apart(corpus / "a.mp4", 4, 1e-6, 4096, 30, file)


APART = """
import sys
sys.path.insert(0, sys.argv[1])  # as a notebook does; the process that decodes has another search path
from framseg.frames import read_apart

with open("all", "w+b") as file:
    print(read_apart(sys.argv[2], 4, 2.0, 32, 30, file)[0].shape)
"""


def test_read_apart_works_from_any_folder(corpus, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "framseg").mkdir()  # a folder of the package's name is not taken for it
    command = [sys.executable, "-c", APART, Path(frames.__file__).parents[1], corpus / "a.mp4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "(5, 32, 32, 3)\n", done.stderr


def test_damage_behind_the_last_frame_wanted_is_found(corpus, tmp_path):
    path = remux(corpus / "a.mp4", tmp_path / "lost.mp4", keep=lambda number: number != 24)
    with pytest.raises(VideoError, match="damaged: .* get the file again, .*`ffmpeg -i"):
        Video(path).frames(np.array([3]), 32)


def bad_videos(corpus: Path, folder: Path) -> dict[str, str]:
    """Make damaged videos; vid -> part of the reason that must be given."""
    whole = (corpus / "a.mp4").read_bytes()
    reasons = {}
    for percent in (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99):
        (folder / f"cut {percent}.mp4").write_bytes(whole[: len(whole) * percent // 100])
        reasons[f"cut {percent}"] = "damaged|cannot be opened|cut off"
    remux(corpus / "b.mp4", folder / "no key frame.mp4", keep=lambda number: number > 0)
    remux(corpus / "a.mp4", folder / "key frame lost.mp4", keep=lambda number: number != 24)
    zeros = whole[: len(whole) * 2 // 3].ljust(len(whole), b"\0")
    (folder / "zeros.mp4").write_bytes(zeros)
    reasons |= {"no key frame": "damaged", "key frame lost": "damaged", "zeros": "damaged"}
    (folder / "text.mp4").write_text("no video\n" * 500)
    (folder / "empty.mp4").touch()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    reasons |= {"text": "cannot be opened", "empty": "cannot be opened", "sound": "cannot be opened"}
    make_video(folder / "short.mp4", 60)
    with av.open(str(folder / "hours.avi"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), "rgb24")))
        container.mux(stream.encode())
    (folder / "hours.avi").rename(folder / "no timestamps.mp4")
    make_video(folder / "hours.mp4", 2, times_ms=[0, 12 * 3600 * 1000])
    (folder / "hours by header.mp4").write_bytes(patched(whole, *LENGTHS, (b"stts", GAP, HOURS)))
    (folder / "all at once.mp4").write_bytes(patched(whole, (b"stts", GAP, 0)))
    (folder / "no times.mp4").write_bytes(whole.replace(b"stts", b"free"))
    (folder / "unreadable.mp4").symlink_to("/proc/self/mem")  # an input/output error
    with av.open(str(corpus / "a.mp4")) as old, av.open(str(folder / "more claimed.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.dts is not None]
        end = max(packet.pts for packet in packets)
        for number in range(1, 8):
            packets.append(av.Packet(b"no frame"))
            packets[-1].time_base = packets[0].time_base
            packets[-1].pts = packets[-1].dts = end + number * packets[0].duration
        for packet in packets:
            packet.stream = stream
            new.mux(packet)
    hours = r"annotations say 10 s \(tolerance 1 s\)"
    return reasons | {
        "short": "7.50 s can be decoded",
        "no timestamps": f"1.00 s can be decoded, but the {hours}",
        "hours": hours,
        "hours by header": f"43200.00 s can be decoded, but the {hours}",
        "all at once": "times stand still",
        "no times": "damaged or cut off: it holds not one frame",
        "unreadable": r"cannot be read \(Input/output error\)",
        "more claimed": "damaged|cut off",
        "missing": "no such",
    }


def test_bad_videos_are_reported_and_the_others_go_on(corpus, tmp_path):
    reasons = bad_videos(corpus, tmp_path)
    (tmp_path / "a.mp4").symlink_to(corpus / "a.mp4")
    store = small_store(tmp_path / "store")
    report = run(dict.fromkeys([*reasons, "a", "../a"], 10.0), tmp_path, store, workers=2)
    assert report.done == 1 and "a" in store
    assert report.failed.keys() == reasons.keys() | {"../a"}
    for vid, reason in reasons.items():
        assert str(tmp_path / f"{vid}.mp4") in report.failed[vid]
        assert re.search(reason, report.failed[vid]), (vid, report.failed[vid])
    assert store.failures() == report.failed
    assert sorted(path.name for path in store.folder.iterdir()) == ["a.zip", "failures.jsonl"]


def test_false_numbers_of_a_header_do_not_matter_where_every_frame_is_there(corpus, tmp_path):
    whole = (corpus / "a.mp4").read_bytes()
    (tmp_path / "long.mp4").write_bytes(patched(whole, *LENGTHS))
    (tmp_path / "many.mp4").write_bytes(patched(whole, (b"stts", COUNT, 2), (b"stsz", COUNT, 2)))
    (tmp_path / "a.mp4").write_bytes(whole)
    store = small_store(tmp_path / "store")
    assert run(dict.fromkeys(["a", "long", "many"], 10.0), tmp_path, store).done == 3
    for vid in ("long", "many"):
        assert store.about(vid)["length"] == 10 and np.array_equal(store.read(vid), store.read("a"))


@pytest.mark.parametrize("files", [48, pytest.param(4000, marks=pytest.mark.slow)])
def test_bytes_changed_at_random_end_in_a_stored_video_or_a_reason(corpus, tmp_path, files):
    whole = (corpus / "a.mp4").read_bytes()
    header = whole.index(b"mdat")  # the frames follow
    stretches = [(0, header), (header, len(whole)), (0, len(whole))]
    for seed in range(files):
        random = np.random.default_rng(seed)
        content = bytearray(whole)
        for place in random.integers(*stretches[seed % 3], [1, 3, 10, 100][seed % 4]).tolist():
            content[place] = random.integers(256)
        (tmp_path / f"{seed}.mp4").write_bytes(content)
    store = small_store(tmp_path / "store")
    vids = [str(seed) for seed in range(files)]
    report = run(dict.fromkeys(vids, 10.0), tmp_path, store, workers=2)
    stored = [vid for vid in vids if vid in store]
    assert len(stored) == report.done > 0 and len(report.failed) > 0
    assert stored == [vid for vid in vids if vid not in report.failed]
    assert all(reason.startswith(f"{tmp_path / vid}.mp4: ") for vid, reason in report.failed.items())
    for vid in stored:
        store.read(vid)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and file handles are read from /proc")
@pytest.mark.parametrize("cycles", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_opening_and_closing_leaks_nothing(corpus, tmp_path, cycles):
    (tmp_path / "text.mp4").write_text("no video\n" * 500)
    (tmp_path / "cut.mp4").write_bytes((corpus / "a.mp4").read_bytes()[:-2000])

    def cycle(number):
        whole_video(corpus / "c.mp4", 5, 32)
        # decord itself keeps 1.3 kB of each file that it cannot open at all, in the worker processes of an extraction.
        for name in ("cut.mp4", "text.mp4") if number % 20 == 0 else ("cut.mp4",):
            with pytest.raises(VideoError):
                whole_video(tmp_path / name, 5, 32)

    def used():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), pages

    for number in range(20):
        cycle(number)
    files, threads, pages = used()
    for number in range(cycles):
        cycle(number)
    print(f"memory grew by {(used()[2] - pages) * os.sysconf('SC_PAGE_SIZE') / 1e6:.2f} MB")
    assert used()[:2] == (files, threads)
    assert used()[2] - pages < 2000  # 8 MB


# ---- store -----------------------------------------------------------------------------------------------------------


def test_store_round_trip(corpus, tmp_path):
    store = small_store(tmp_path / "store", neighbours=2)
    report = run({"a": 10.0}, corpus, store)
    assert (report.done, report.skipped, report.failed) == (1, 0, {}) and report.seconds > 0
    about = store.about("a")
    video = Video(corpus / "a.mp4")
    numbers = frame_numbers(10.0, FPS, 5, 2, 0.1)
    assert about["numbers"] == numbers.tolist() and about["duration"] == 10.0 and about["length"] == pytest.approx(10.0)
    exact = video.frames(numbers, 32)
    assert np.abs(store.read("a").astype(int) - exact[:, 2]).mean() < 2
    choice = np.array([0, 4, 1, 3, 2])
    chosen = store.read("a", choice)
    assert chosen.dtype == np.uint8 and chosen.shape == (5, 32, 32, 3)
    assert np.abs(chosen.astype(int) - exact[np.arange(5), choice]).mean() < 2
    assert [shown(image) for image in chosen] == numbers[np.arange(5), choice].tolist()
    assert store.bytes("a") == (tmp_path / "store" / "a.zip").stat().st_size
    assert "a" in store and "b" not in store
    with zipfile.ZipFile(store.path("a")) as archive, archive.open("000_0.jpg") as member:
        assert JpegImagePlugin.get_sampling(Image.open(member)) == 0  # 4:4:4
    for wrong in ([0, 1, 2, 3, 5], [0, -1, 2, 3, 4], [0, 1]):
        with pytest.raises(ValueError, match=r"5 integers in 0\.\.4"):
            store.read("a", np.array(wrong))


def test_store_names(tmp_path):
    store = small_store(tmp_path)
    pixels = np.zeros((5, 3, 32, 32, 3), np.uint8)
    for vid in ("-a_Ü:%*?'\"<>| 1.5", ".."):
        store.write(vid, pixels, {})
        assert vid in store and store.read(vid).max() == 0
    for vid in ("", "a/b", "../a", "a\\b", "a\0"):
        with pytest.raises(VideoError, match="separators"):
            store.read(vid)


def test_missing_and_damaged_store_files(corpus, tmp_path):
    store = small_store(tmp_path)
    with pytest.raises(VideoError, match="a: is not in the frame store"):
        store.read("a")
    run({"a": 10.0}, corpus, store)
    path = tmp_path / "a.zip"
    whole = path.read_bytes()
    pictures = whole.find(b"\xff\xd8", whole.find(b"002_1.jpg"))
    broken = [b"", whole[: len(whole) // 2], whole[:-1], b"no zip" * 100]
    broken.append(whole[: pictures + 300] + bytes(50) + whole[pictures + 350 :])
    broken.append(whole.replace(b'"settings"', b'"sittings"'))
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(VideoError, match="a: its file .* is damaged; .*extract again"):
            store.read("a")
    path.write_bytes(whole[:-1])
    assert run({"a": 10.0}, corpus, store).done == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "change", [{"image_size": 16}, {"count": 4}, {"neighbours": 2}, {"neighbour_distance": 0.2}, {"quality": 80}]
)
def test_store_made_with_other_settings_is_refused(tmp_path, change):
    small_store(tmp_path).write("a", np.zeros((5, 3, 32, 32, 3), np.uint8), {})
    other = small_store(tmp_path, **change)
    with pytest.raises(StoreError, match="a.zip: was made with image_size 32, count 5, .* extract again"):
        other.read("a")
    with pytest.raises(StoreError, match="was made with"):
        run({"a": 10.0}, tmp_path, other)


# ---- extraction ------------------------------------------------------------------------------------------------------


def test_parallel_equals_serial_and_resumes(corpus, tmp_path):
    videos = {"a": 10.0, "b": 10.0, "c": 5.0}
    serial, parallel = small_store(tmp_path / "one"), small_store(tmp_path / "two")
    assert run(videos, corpus, serial).done == 3
    assert run({"a": 10.0, "x": 1.0}, corpus, parallel).failed.keys() == {"x"}
    kept = parallel.path("a").stat().st_mtime_ns
    report = run(videos, corpus, parallel, workers=2)
    assert (report.done, report.skipped, report.failed) == (2, 1, {})
    assert parallel.path("a").stat().st_mtime_ns == kept
    for vid in videos:
        assert serial.path(vid).read_bytes() == parallel.path(vid).read_bytes()
    assert parallel.failures().keys() == {"x"}  # from a call that asked for other videos
    assert run({"x": 1.0, **videos}, corpus, parallel).skipped == 3
    lines = (tmp_path / "two" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["vid"] for line in lines] == ["x"]


def test_the_report_names_the_reader_and_the_pictures_that_start_late(corpus, tmp_path, shared):
    (tmp_path / "late.mp4").symlink_to(shared / "cases/late-video/starts_at_2s.mp4")
    (tmp_path / "edits.mp4").symlink_to(shared / "cases/edit-list/two_edits.mp4")
    (tmp_path / "a.mp4").symlink_to(corpus / "a.mp4")
    store = small_store(tmp_path / "store")
    videos = {"late": 12.0, "edits": 8.6, "a": 10.0}
    report = run(videos, tmp_path, store)
    assert report.readers == {"late": "decord", "edits": "PyAV", "a": "decord"}
    assert report.late == {"late": pytest.approx(2)} and store.about("late")["offset"] == pytest.approx(2)
    again = run(videos, tmp_path, store)
    assert again.skipped == 3 and (again.readers, again.late) == (report.readers, report.late)
    numbers = store.about("late")["numbers"]
    assert [middle for _, middle, _ in numbers] == [0, 48, 120, 192, 264]  # seconds 1.2, 3.6, ... less 2, at 30 per s


def test_a_store_without_the_player_s_clock_is_extracted_again(corpus, tmp_path):
    store = small_store(tmp_path / "store")
    run({"c": 5.0}, corpus, store)
    about = store.about("c")
    store.write(
        "c", np.zeros((5, 3, 32, 32, 3), np.uint8), {name: about[name] for name in ("numbers", "fps", "length")}
    )
    assert run({"c": 5.0}, corpus, store).done == 1 and store.read("c").any() and store.about("c") == about


@pytest.mark.parametrize(
    "name", ["2024-05-01T12:30:05.mp4", "file:a.mp4", "http:a.mp4", "100%.mp4", "a%03d.mp4", "-i.mp4"]
)
def test_a_relative_name_is_a_file_whatever_it_looks_like(corpus, tmp_path, monkeypatch, name):
    (tmp_path / name).symlink_to(corpus / "c.mp4")
    monkeypatch.chdir(tmp_path)
    assert Video(name).count == 40
    assert [shown(image) for image in Video(name).frames(np.array([3, 30]), 32)] == [3, 30]


def test_the_command_of_a_refusal_can_be_typed():
    def typed(path):
        return shlex.split(container.ffmpeg(Path(path), "-r 5", "-c copy", Path(path).name).strip("`"))

    assert typed("a b/c's.mp4") == ["ffmpeg", "-r", "5", "-i", "a b/c's.mp4", "-c", "copy", "c's.mp4"]
    assert typed("1:2.mp4")[4::3] == ["./1:2.mp4", "./1:2.mp4"] and typed("-i.mp4")[4::3] == ["./-i.mp4"] * 2
    assert typed("/a/1:2.mp4")[4::3] == ["/a/1:2.mp4", "./1:2.mp4"]


# file: the source's second that a player shows at its own second 0, how many frames there are, how long it is
RIGHT = {
    "avi-bframes/xvid_b.avi": (0, 300, 10.0),
    "avi-bframes/mpeg2_b.avi": (0, 300, 10.0),
    "late-video/cut_after_input.mp4": (3.32, 480, 16.68),
    "late-video/starts_at_2s.mp4": (-2, 302, 12.13),
    "late-video/starts_at_8s.mp4": (-8, 362, 20.07),
    "ts-bframes/bframes.ts": (0, 242, 8.07),
    "ts-bframes/hevc.ts": (0, 242, 8.17),
    "edit-list/trimmed_end.mp4": (0, 360, 12.0),
    "no-duration/live.webm": (0, 150, 5.0),
    "no-timestamps/h264.avi": (0, 150, 5.0),
}


@pytest.mark.parametrize("name", RIGHT)
def test_inputs_that_went_wrong_give_the_frame_that_a_player_shows(shared, name):
    offset, count, length = RIGHT[name]
    video = Video(shared / "cases" / name)
    assert (video.count, video.length) == (count, pytest.approx(length, abs=0.01))
    images = video.frames(video.numbers(video.length, 40)[:, 0], 96)
    seconds = video.length / 40 * (0.5 + np.arange(40))
    source = np.array([videos.number(image) for image in images]) / 30
    expected = np.maximum(seconds, video.offset) + offset  # the first frame before there is one
    gaps = np.diff(np.append(video.starts, video.length)).max()
    assert ((source - expected < 0.5 / 30) & (expected - source < gaps + 1e-3)).all()


def test_palettes_are_pictures(shared):
    video = Video(shared / "cases/pal8-black/palette.avi")
    assert video.frames(video.numbers(video.length, 5)[:, 0], 32).max() >= 200


def test_titles_may_be_written_in_any_alphabet(tmp_path):
    make_video(tmp_path / "a.mp4", 8)
    with av.open(str(tmp_path / "a.mp4")) as old, av.open(str(tmp_path / "b.mp4"), "w") as new:
        new.metadata["title"] = "Kueche"
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    content = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(content.replace(b"Kueche", "Küche ".encode("latin-1")))
    assert Video(tmp_path / "b.mp4").count == 8


def test_a_playlist_leads_nowhere(tmp_path):
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError, match="a.m3u8: "):
        Video(tmp_path / "a.m3u8")


QUIET = """
import sys
from framseg import frames
for path in sys.argv[1:]:
    try:
        with open(path + ".out", "w+b") as file:
            print(*frames.read_apart(path, 5, 6.0, 32, 30.0, file)[2])
        print(path, "is read")
    except frames.VideoError as error:
        print(error)
"""


def test_the_decoders_own_lines_do_not_reach_the_user(corpus, tmp_path):
    bad = bad_videos(corpus, tmp_path)
    whole = (corpus / "a.mp4").read_bytes()
    for seed in range(12):  # one of these made decord complain about a seek
        content, random = bytearray(whole), np.random.default_rng(seed)
        for place in random.integers(0, len(whole), 30).tolist():
            content[place] = random.integers(256)
        (tmp_path / f"{seed}.mp4").write_bytes(content)
    paths = [str(tmp_path / f"{vid}.mp4") for vid in [*bad, *range(12)]]
    environment = os.environ | {"PYTHONPATH": str(Path(frames.__file__).parents[1])}
    command = [sys.executable, "-c", QUIET, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(path in done.stdout for path in paths)


def test_every_step_of_the_decoder_is_told(corpus):
    """So that a limit on the time between two steps lets a long video take as long as it needs."""
    numbers = np.arange(0, 80, 4)
    steps = []
    video = Video(corpus / "a.mp4", alive=lambda: steps.append(1))
    opened = len(steps)
    video.frames(numbers, 32)
    assert opened > 80 and len(steps) - opened > len(numbers)


def test_hanging_decoder_is_ended_and_the_others_go_on(corpus, tmp_path):
    os.mkfifo(tmp_path / "x.mp4")  # opening it waits for ever for someone who writes
    (tmp_path / "c.mp4").symlink_to(corpus / "c.mp4")
    store = small_store(tmp_path / "store")
    report = run({"x": 10.0, "c": 5.0}, tmp_path, store, time_limit=1.5)
    assert report.done == 1 and "took more than 1.5 s" in report.failed["x"]
    assert 1.5 < report.seconds < 20


def test_crashing_decoder_is_reported_and_the_others_go_on(corpus, tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    (tmp_path / "c.mp4").symlink_to(corpus / "c.mp4")
    store = small_store(tmp_path / "store")

    def crash():
        # A writer that comes shows that the worker is inside the decoder.
        with open(tmp_path / "x.mp4", "wb"):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGSEGV)

    thread = threading.Thread(target=crash)
    thread.start()
    report = run({"x": 10.0, "c": 5.0}, tmp_path, store)
    thread.join()
    assert report.done == 1 and "the decoder crashed" in report.failed["x"]


INTERRUPTED = """
import sys
from pathlib import Path
from unittest import mock
from framseg.run import container
from framseg.frames import Store, extract

if __name__ == "__main__":
    store = Store(Path(sys.argv[2]), 32, 5, 1, 0.1, 95)
    try:
        extract({"c": 5.0, "x": 5.0}, Path(sys.argv[1]), store, time_limit=60, duration_tolerance=1)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_interrupt_leaves_nothing_half_written(corpus, tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    (tmp_path / "c.mp4").symlink_to(corpus / "c.mp4")
    (tmp_path / "script.py").write_text(INTERRUPTED)
    store = small_store(tmp_path / "store")
    environment = os.environ | {"PYTHONPATH": str(Path(frames.__file__).parents[1])}
    command = [sys.executable, tmp_path / "script.py", tmp_path, store.folder]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        limit = time.monotonic() + 20
        while "c" not in store and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers too
        assert process.communicate(timeout=20)[0] == "interrupted\n"
    finally:
        process.kill()
    assert sorted(path.name for path in store.folder.iterdir()) == ["c.zip", "failures.jsonl"]
    (tmp_path / "x.mp4").unlink()
    (tmp_path / "x.mp4").symlink_to(corpus / "c.mp4")
    report = run({"c": 5.0, "x": 5.0}, tmp_path, store)
    assert (report.done, report.skipped) == (1, 1)


def test_no_room_stops_with_one_sentence_and_keeps_what_is_finished(corpus, tmp_path):
    store = small_store(tmp_path / "store")
    assert run({"c": 5.0}, corpus, store).done == 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # workers inherit it: larger files cannot be written
    try:
        with pytest.raises(StoreError, match="cannot be written .*make room .* extract again"):
            run({"a": 10.0, "b": 10.0, "c": 5.0}, corpus, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in store.folder.iterdir()) == ["c.zip", "failures.jsonl"]
    assert store.read("c").shape == (5, 32, 32, 3)


def test_the_process_of_read_apart_says_what_it_is():
    command = [sys.executable, "-m", "framseg.frames"]
    done = subprocess.run(command, cwd=Path(frames.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: this is started by framseg.predict")


def test_workers_start_without_torch():
    code = "import sys, framseg.frames; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(frames.__file__).parents[1]).returncode == 0
