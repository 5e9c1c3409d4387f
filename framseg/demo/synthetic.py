"""The demo's video set: synthetic, in QVHighlights' format, made from seeds alone.

A video shows at most one coloured shape at a time, moving over a noisy background that changes; each stretch of the
video is one activity. The nearer (larger) the shape, the higher its saliency.
"""

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import yaml
from tqdm.auto import tqdm

from framseg.annotations import ANNOTATORS, CLIP_SECONDS, LabelledRow, Row, write
from framseg.config import Profile, data_folder
from framseg.jsonl import whole_file

VERSION = 1  # of the set: another number makes it anew
SEED = 2026
VIDEOS = {"train": 220, "val": 60, "test": 60}
WIDTH, HEIGHT, FPS = 96, 72, 4
DURATION = 150
SHORT_SHARE = 0.08  # of videos shorter than DURATION
STRETCH = (14, 44)  # seconds of one activity


class Activity(NamedTuple):
    """What a stretch of video shows, and how queries name it."""

    rgb: list[int]
    shape: str
    phrase: str
    verb: str

    def query(self, wording: str) -> str:
        """A wording, such as those of QUERIES, with this activity's phrase and verb."""
        return wording.format(phrase=self.phrase, verb=self.verb)


WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
ACTIVITIES = [Activity(**activity) for activity in WORDS["activities"]]
QUERIES: list[str] = WORDS["queries"]
# Which pixels belong to a shape; x, y: their offsets from its centre in units of its radius.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y < 1,
    "ring": lambda x, y: (x * x + y * y < 1) & (x * x + y * y > 0.25),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.88,
    "diamond": lambda x, y: abs(x) + abs(y) < 1.15,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.36) & (np.maximum(abs(x), abs(y)) < 1),
    "triangle": lambda x, y: (y < 0.7) & (y > 2 * abs(x) - 1),
}


class Stretch(NamedTuple):
    """A part of a video during which one activity is shown, or the background alone."""

    start: int  # seconds, on the clip grid
    end: int
    activity: int | None  # index into ACTIVITIES; None shows the background alone
    nearness: tuple[float, float, float]  # mean, amplitude and phase of its course


class Scene(NamedTuple):
    """One video, before it is drawn."""

    duration: int
    stretches: tuple[Stretch, ...]
    seed: int  # of the background and of the shapes' paths

    @property
    def activities(self) -> list[int]:
        """Indices into ACTIVITIES of what the video shows, ascending."""
        return sorted({stretch.activity for stretch in self.stretches if stretch.activity is not None})


def scene(rng: np.random.Generator, duration: int = DURATION) -> Scene:
    """Draw a scene: three activities in turns, each on screen for about 30 % of the time."""
    low, high = STRETCH
    cast = rng.choice(len(ACTIVITIES), 3, replace=False)
    stretches, start, last = [], 0, None
    while start < duration:
        length = CLIP_SECONDS * int(rng.integers(low // CLIP_SECONDS, high // CLIP_SECONDS + 1))
        if duration - start - length < low:  # what remains is too short for a stretch of its own
            length = duration - start
        choices = [None if rng.random() < 0.12 else int(a) for a in cast if a != last]
        last = choices[int(rng.integers(len(choices)))]
        course = (float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.2, 0.45)), float(rng.uniform(0, 2 * math.pi)))
        stretches.append(Stretch(start, start + length, last, course))
        start += length
    return Scene(duration, tuple(stretches), int(rng.integers(2**31)))


def nearness(stretch: Stretch, times: np.ndarray) -> np.ndarray:
    """How near the shape is at each time (seconds), 0..1, in the shape of `times`."""
    mean, amplitude, phase = stretch.nearness
    turn = 2 * math.pi * (times - stretch.start) / max(stretch.end - stretch.start, 24)
    return np.clip(mean + amplitude * np.sin(turn + phase), 0, 1)


def render(scene: Scene, times: np.ndarray, noise: float = 1.0) -> np.ndarray:
    """Draw the scene at the given times (seconds). Returns [n, HEIGHT, WIDTH, 3], uint8 RGB.

    noise: how far the background strays from a plain grey, 1 for the demo set.
    """
    rng = np.random.default_rng(scene.seed)
    # The background changes at moments of its own, so that it says nothing about the activity.
    changes = np.sort(rng.uniform(0, scene.duration, 6))
    tones = rng.uniform(-58, 57, (7, 1, 1, 1)) + rng.uniform(-28, 28, (7, 1, 1, 3))
    coarse = rng.normal(0, 22, (7, 9, 12, 1)).repeat(HEIGHT // 9, 1).repeat(WIDTH // 12, 2)
    backgrounds = (128 + noise * (tones + coarse)).astype(np.int16)
    grain = rng.normal(0, 8 * noise, (16, HEIGHT, WIDTH, 1)).astype(np.int16)
    frames = backgrounds[np.searchsorted(changes, times)] + grain[rng.integers(16, size=len(times))]

    y, x = (np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32) + 0.5) / HEIGHT
    for stretch in scene.stretches:
        speeds, phases = rng.uniform(0.5, 1.6, 2), rng.uniform(0, 2 * math.pi, 2)
        if stretch.activity is None:
            continue
        activity = ACTIVITIES[stretch.activity]
        colour = np.asarray(activity.rgb) + rng.integers(-14, 15, 3)
        shown = (times >= stretch.start) & (times < stretch.end)
        now = times[shown][:, None, None]
        radius = 0.10 + 0.16 * nearness(stretch, now)
        centre_x = (WIDTH / HEIGHT) * (0.5 + 0.32 * np.sin(speeds[0] * now + phases[0]))
        centre_y = 0.5 + 0.24 * np.cos(speeds[1] * now + phases[1])
        dx, dy = ((x - centre_x) / radius).astype(np.float32), ((y - centre_y) / radius).astype(np.float32)
        frames[shown] = np.where(SHAPES[activity.shape](dx, dy)[..., None], colour, frames[shown])
    return np.clip(frames, 0, 255).astype(np.uint8)


def labelled_row(
    scene: Scene, activity: int, rng: np.random.Generator, qid: int = 0, query: str = "", vid: str = ""
) -> LabelledRow:
    """The row of a query about one activity, with windows, clip ids and three annotators' scores.

    The scores follow the shape's nearness; each annotator is more or less generous throughout, and varies a little.
    """
    windows, clips, scores = [], [], []
    generosity = rng.uniform(-0.6, 0.6, ANNOTATORS)
    for stretch in scene.stretches:
        if stretch.activity != activity:
            continue
        ids = np.arange(stretch.start // CLIP_SECONDS, stretch.end // CLIP_SECONDS)
        near = nearness(stretch, CLIP_SECONDS * (ids + 0.5))
        votes = 0.6 + 3.6 * near[:, None] + generosity + rng.normal(0, 0.25, (len(ids), ANNOTATORS))
        windows.append((stretch.start, stretch.end))
        clips += ids.tolist()
        scores += [(a, b, c) for a, b, c in np.clip(np.rint(votes), 0, 4).astype(int).tolist()]
    return LabelledRow(qid, query, scene.duration, vid, tuple(windows), tuple(clips), tuple(scores))


def scenes(split: str) -> dict[str, Scene]:
    """All scenes of a split by video id."""
    rng = np.random.default_rng([SEED, list(VIDEOS).index(split)])
    out = {}
    for number in range(VIDEOS[split]):
        duration = CLIP_SECONDS * int(rng.integers(40, 74)) if rng.random() < SHORT_SHARE else DURATION
        out[f"shapes-{split}-{number:03d}_0.0_{duration:.1f}"] = scene(rng, duration)
    return out


def rows(split: str) -> list[LabelledRow]:
    """Annotations of a split: one query for each activity that a video shows, worded in one of four ways."""
    number = list(VIDEOS).index(split)
    rng = np.random.default_rng([SEED, 10 + number])  # not the scenes' generator: the videos do not depend on the rows
    out: list[LabelledRow] = []
    for vid, scene in scenes(split).items():
        for activity in scene.activities:
            query = ACTIVITIES[activity].query(QUERIES[int(rng.integers(len(QUERIES)))])
            out.append(labelled_row(scene, activity, rng, 10_000 * (1 + number) + len(out), query, vid))
    return out


def write_video(path: Path, scene: Scene) -> None:
    """Encode a scene as H.264 mp4; the bytes depend on the scene alone."""
    frames = render(scene, np.arange(scene.duration * FPS) / FPS)
    with whole_file(path) as unfinished, av.open(unfinished, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "36", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def prepare(profile: Profile) -> None:
    """Make the demo set, once, if the profile uses it; videos that are already there are kept.

    Raises OSError, saying how much room it needs, when the disk is full.
    """
    data, folder = profile.data, data_folder(profile)
    stamp = folder / "made.json"
    made = {"version": VERSION, "seed": SEED, "videos": VIDEOS, "size": [WIDTH, HEIGHT, FPS]}
    if data.source != "demo" or stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == made:
        return
    videos = folder / data.videos
    try:
        videos.mkdir(parents=True, exist_ok=True)
        paths = {videos / f"{vid}.mp4": scene for split in VIDEOS for vid, scene in scenes(split).items()}
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
            jobs = [pool.submit(write_video, path, scene) for path, scene in paths.items() if not path.is_file()]
            for job in tqdm(as_completed(jobs), "demo videos", len(jobs), disable=not jobs, unit="video"):
                job.result()
        for name, split in ((data.train, "train"), (data.val, "val"), (data.test_labels, "test")):
            write(folder / name, rows(split))
        write(folder / data.test, [Row(row.qid, row.query, row.duration, row.vid) for row in rows("test")])
        stamp.write_text(json.dumps(made) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"{folder}: the demo set could not be written ({error}); it needs 150 MB") from error
