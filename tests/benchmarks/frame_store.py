"""What the frame store costs: bytes per video and per sample, time to extract, time to read a training sample.

python tests/benchmarks/frame_store.py [--videos 6] [--before FOLDER]      (some eight minutes on two cores)

Draws videos of 150 s, 640 x 360, 30 frames per second: scenes of moving texture whose amplitudes fall with the
frequency as those of natural pictures do, shapes and noise, H.264 at 640 kbit/s with a key frame every 5 s
(QVHighlights' archive has some 757 kbit per second of video, with the sound). Bytes depend on the content, which is
synthetic: real videos will differ. Extracts them with the paper profile's settings and writes records/frame_store.json.
--before names a checkout of another commit: decoding by it and by this one then take turns, a fresh process each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import av
import common
import decord
import numpy as np
from PIL import Image

from framseg import config, frames

WIDTH, HEIGHT, FPS, SECONDS, BITS, KEYS = 640, 360, 30, 150, 640_000, 150
IN_QVHIGHLIGHTS = 10_148  # videos in its four annotation files
READS = 5  # of every video, each with other variations
ROUNDS = 4  # one worker and two take turns


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] whose amplitudes fall with the frequency; the three channels mostly vary together."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    slope = rng.uniform(1.2, 1.7)  # with slopes around 1.45 a picture takes as many bytes as a photograph
    noise = np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency**slope
    grey, *colours = np.fft.irfft2(noise, (height, width))
    picture = np.stack([grey + 0.25 * colour for colour in colours], -1)
    picture = rng.uniform(90, 160, 3) + rng.uniform(35, 60) * picture / picture.std()
    return picture.clip(0, 255).astype(np.uint8)


def write_video(path: Path, seed: int) -> None:
    """Write a video of the kind that the module's text describes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": str(KEYS)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", BITS
        left = 0
        for _ in range(SECONDS * FPS):
            if not left:  # another scene: 2 to 10 s
                left = age = int(rng.integers(2 * FPS, 10 * FPS))
                ground = texture(rng, 2 * HEIGHT, 2 * WIDTH)
                corner, drift = rng.uniform(100, 200, 2), rng.uniform(-0.3, 0.3, 2)
                shapes = [
                    (
                        rng.uniform(0, [HEIGHT, WIDTH]),
                        rng.uniform(-2, 2, 2),
                        rng.uniform(15, 70),
                        rng.integers(0, 256, 3),
                    )
                    for _ in range(rng.integers(1, 5))
                ]
            at = age - left
            y, x = (corner + drift * at).astype(int)
            picture = ground[y : y + HEIGHT, x : x + WIDTH].copy()
            for middle, speed, radius, colour in shapes:
                y, x = (middle + speed * at) % (HEIGHT, WIDTH)
                picture[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = colour
            grain = rng.integers(-4, 5, (HEIGHT, WIDTH, 1), dtype=np.int16)
            picture = (picture + grain).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            left -= 1
        container.mux(stream.encode())


def timed(call, *arguments) -> tuple[float, float]:
    """Seconds by the clock, and CPU seconds of this process and its children."""
    clock, cpu = time.perf_counter(), cpu_seconds()
    call(*arguments)
    return time.perf_counter() - clock, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """CPU seconds that this process and its finished children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def sequential(path: Path) -> int:
    """Decode every frame once, in order; returns how many frames came."""
    reader = decord.VideoReader(str(path), num_threads=1)
    return sum(reader.next().asnumpy().shape[0] > 0 for _ in range(len(reader)))


def seeks(path: Path, numbers: np.ndarray, size: int) -> list[Image.Image]:
    """The numbered frames, resized, each by a seek of its own."""
    reader = decord.VideoReader(str(path), num_threads=1)
    pictures = (Image.fromarray(reader[number].asnumpy()) for number in numbers.ravel().tolist())
    return [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]


def spread(values: list[int]) -> dict:
    """Smallest, mean and largest value."""
    return {"min": min(values), "mean": round(np.mean(values)), "max": max(values)}


def average(times: list[tuple[float, float]]) -> dict:
    """Mean of pairs from `timed`, as the record has it."""
    clock, cpu = np.mean(times, axis=0)
    return {"seconds per video": round(clock, 2), "CPU seconds per video": round(cpu, 2)}


def extract(vids: list[str], folder: Path, store: frames.Store, time_limit: float, workers: int) -> None:
    """Fill the store from the videos in `folder`; every one must succeed."""
    durations = dict.fromkeys(vids, float(SECONDS))
    with mock.patch("os.sched_getaffinity", lambda _: range(workers)):  # a worker per CPU
        report = frames.extract(durations, folder, store, time_limit=time_limit, duration_tolerance=1.0)
    assert report.done == len(vids), report.failed


ONE_PASS = """
import json, sys, time
from framseg import frames
video = frames.Video(sys.argv[1])
*sampling, size = json.loads(sys.argv[2])
pictures = video.frames(video.numbers(*sampling), size)
print(time.process_time(), int(pictures.sum(dtype="int64")))
"""


def in_turns(before: Path, paths: list[Path], settings: list) -> dict:
    """CPU seconds per video, with Python's start, of a whole pass by two checkouts; their pictures must be the same."""
    here = Path(frames.__file__).parents[1]
    seconds: dict[Path, list[float]] = {before: [], here: []}
    for path in paths:
        sums = set()
        for checkout, times in seconds.items():
            command = [sys.executable, "-P", "-c", ONE_PASS, str(path), json.dumps(settings)]
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            cpu, total = done.stdout.split()
            times.append(float(cpu))
            sums.add(total)
        assert len(sums) == 1, f"{path}: the two read other pictures"
    commit = subprocess.run(
        ["git", "-C", before, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout
    ratios = np.divide(seconds[here], seconds[before])
    return {
        f"commit {commit.strip()}, CPU seconds": round(np.median(seconds[before]), 2),
        "this commit, CPU seconds": round(np.median(seconds[here]), 2),
        "ratio": {name: round(float(f(ratios)), 3) for name, f in (("min", min), ("median", np.median), ("max", max))},
    }


def main() -> None:
    from framseg import dataset  # here, because the worker processes import this file and need no torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--before", type=Path, help="a checkout of another commit, to compare with")
    options = parser.parse_args()
    count = options.videos
    section, size = config.load("paper").frames, config.load("paper").model.vision.image_size
    pictures = f"{section.count} x {2 * section.neighbours + 1} of {size} px, JPEG quality {section.jpeg_quality}"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = {f"{seed}": folder / f"{seed}.mp4" for seed in range(count)}
        for seed, path in enumerate(paths.values()):
            write_video(path, seed)
        load = os.getloadavg()[0]
        decoding = {"plain sequential decode": [], "whole pass for 75 pictures": [], "75 single-frame seeks": []}
        for path in paths.values():  # the three ways in turn, so that other work on the machine slows all of them
            video = frames.Video(path)
            numbers = video.numbers(SECONDS, section.count, section.neighbours, section.neighbour_distance)
            calls = [(sequential, path), (video.frames, numbers, size), (seeks, path, numbers, size)]
            for seconds, call in zip(decoding.values(), calls, strict=True):
                seconds.append(timed(*call))
        extracting = {1: [], 2: []}
        for turn in range(ROUNDS):
            for workers, seconds in extracting.items():
                store = dataset.store(config.load("paper", {"data.folder": str(folder / f"{turn}{workers}")}))
                seconds.append(timed(extract, list(paths), folder, store, section.time_limit, workers))
        extraction = {}
        for workers, seconds in extracting.items():
            clock, cpu = min(seconds)
            extraction[f"workers: {workers}"] = average([(clock / count, cpu / count)]) | {
                "videos/s": round(count / clock, 3),
                "frames/s": round(count * SECONDS * FPS / clock),
                "frames per CPU second": round(count * SECONDS * FPS / cpu),
            }
        settings = [SECONDS, section.count, section.neighbours, section.neighbour_distance, size]
        turns = in_turns(options.before, 2 * [*paths.values()], settings) if options.before else None
        rng = np.random.default_rng(0)
        bytes_a_sample, reading = [], []
        for _ in range(READS):
            for vid in paths:
                choice = rng.integers(2 * section.neighbours + 1, size=section.count)
                reading.append(timed(store.read, vid, choice))
                with zipfile.ZipFile(store.path(vid)) as archive:
                    sizes = [archive.getinfo(f"{frame:03d}_{k}.jpg").file_size for frame, k in enumerate(choice)]
                bytes_a_sample.append(sum(sizes))
        stored = [store.bytes(vid) for vid in paths]
        source = [path.stat().st_size for path in paths.values()]
    clock, cpu = np.median(reading, axis=0)
    record = common.about("decord2", "pillow", "av", "numpy") | {
        "load before the timings": round(load, 1),
        "content": f"synthetic, {count} videos of {SECONDS} s, {WIDTH} x {HEIGHT}, {FPS} frames/s, H.264",
        "pictures per video": pictures,
        "source bytes per video": spread(source),
        "stored bytes per video": spread(stored),
        "stored bytes per sample": spread(bytes_a_sample),
        f"GB for {IN_QVHIGHLIGHTS} videos": round(np.mean(stored) * IN_QVHIGHLIGHTS / 1e9, 1),
        "decoding in one process": {name: average(seconds) for name, seconds in decoding.items()},
        f"extraction, best of {ROUNDS}": extraction,
        "reading a sample in one process": {
            "ms, median": round(1000 * clock, 1),
            "samples/s": round(1 / clock, 1),
            "samples per CPU second": round(1 / cpu, 1),
        },
    }
    if turns:
        record["whole pass by two commits, in turns"] = turns
    print(json.dumps(record, indent=2))
    common.write("frame_store", record)


if __name__ == "__main__":
    main()
