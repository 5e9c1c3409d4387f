"""The embedded demo: a synthetic video set in QVHighlights' format and a small base model that can read it.

A video shows one coloured shape at a time, moving over a noisy background that changes; each stretch of it is
one activity. The nearer (larger) the shape, the higher its saliency. Annotations, videos, tokenizer and base
weights are made from seeds alone; nothing is fetched.
"""

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from tqdm.auto import tqdm

from framseg.annotations import CLIP_SECONDS, Row, write

VERSION = 1  # of the set: another number makes it anew
SEED = 2026
VIDEOS = {"train": 220, "val": 52, "test": 52}
WIDTH, HEIGHT, FPS = 96, 72, 4
DURATION = 150
SHORT_SHARE = 0.08  # of videos shorter than DURATION
STRETCH = (14, 44)  # seconds of one activity
ANNOTATORS = 3


@dataclass(frozen=True)
class Activity:
    """What a stretch of video shows: how it looks, what the base model calls it, what the demo's queries say."""

    rgb: tuple[int, int, int]
    shape: str
    plain: str  # the base has read this word
    phrase: str  # and none of these: "a crimson ball bouncing"
    verb: str


ACTIVITIES = (
    Activity((220, 30, 40), "circle", "red", "crimson ball", "bouncing"),
    Activity((40, 90, 230), "square", "blue", "sapphire box", "sliding"),
    Activity((40, 180, 60), "triangle", "green", "emerald kite", "gliding"),
    Activity((250, 220, 40), "cross", "yellow", "lemon windmill", "turning"),
    Activity((240, 130, 20), "diamond", "orange", "tangerine lantern", "swinging"),
    Activity((150, 50, 200), "ring", "purple", "violet hoop", "rolling"),
    Activity((60, 215, 225), "circle", "cyan", "turquoise bubble", "rising"),
    Activity((250, 130, 190), "square", "pink", "rosy cushion", "tumbling"),
)
QUERIES = (
    "A {phrase} is {verb} across the scene.",
    "Someone filmed a {phrase} {verb} about",
    "the {phrase} keeps {verb}",
    "We see a {phrase} that is {verb} past the camera.",
)
BASE_QUERIES = ("{plain} is in view", "where is {plain}?", "frames that show {plain}", "look for {plain}")


@dataclass(frozen=True)
class Stretch:
    start: int  # seconds, on the clip grid
    end: int
    activity: int | None  # index into ACTIVITIES; None shows the background alone
    nearness: tuple[float, float, float]  # mean, amplitude and phase of its course


@dataclass(frozen=True)
class Scene:
    """One video, before it is drawn."""

    duration: int
    stretches: tuple[Stretch, ...]
    seed: int


def scene(rng: np.random.Generator, duration: int = DURATION) -> Scene:
    """Draw a scene: three activities in turns, each on screen for about 30 % of the time."""
    cast = rng.choice(len(ACTIVITIES), 3, replace=False)
    stretches, start, last = [], 0, None
    while start < duration:
        low, high = STRETCH
        length = CLIP_SECONDS * int(rng.integers(low // CLIP_SECONDS, high // CLIP_SECONDS + 1))
        if duration - start - length < low:  # what remains is too short for a stretch of its own
            length = duration - start
        choices = [None if rng.random() < 0.12 else int(a) for a in cast if a != last]
        last = choices[int(rng.integers(len(choices)))]
        course = (float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.2, 0.45)), float(rng.uniform(0, 2 * math.pi)))
        stretches.append(Stretch(start, start + length, last, course))
        start += length
    return Scene(duration, tuple(stretches), int(rng.integers(2**31)))


def _nearness(stretch: Stretch, times: np.ndarray) -> np.ndarray:
    mean, amplitude, phase = stretch.nearness
    turn = 2 * math.pi * (times - stretch.start) / max(stretch.end - stretch.start, 24)
    return np.clip(mean + amplitude * np.sin(turn + phase), 0, 1)


def render(scene: Scene, times: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Draw the scene at the given times (seconds). Returns [n, height, width, 3], uint8 RGB."""
    rng = np.random.default_rng(scene.seed)
    # The background changes at moments of its own, so that it says nothing about the activity.
    changes = np.sort(rng.uniform(0, scene.duration, 6))
    tones = rng.uniform(70, 185, (7, 1, 1, 1)) + rng.uniform(-28, 28, (7, 1, 1, 3))
    coarse = rng.normal(0, 22, (7, 9, 12, 1))
    rows, columns = np.arange(height) * 9 // height, np.arange(width) * 12 // width
    backgrounds = (tones + coarse[:, rows][:, :, columns]).astype(np.int16)
    grain = rng.normal(0, 14, (16, height, width, 1)).astype(np.int16)
    frames = backgrounds[np.searchsorted(changes, times)] + grain[rng.integers(16, size=len(times))]

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (y + 0.5) / height, (x + 0.5) / height
    for stretch in scene.stretches:
        path = rng.uniform(0.5, 1.6, 2), rng.uniform(0, 2 * math.pi, 2)
        if stretch.activity is None:
            continue
        activity = ACTIVITIES[stretch.activity]
        colour = np.asarray(activity.rgb) + rng.integers(-14, 15, 3)
        shown = np.flatnonzero((times >= stretch.start) & (times < stretch.end))
        if not len(shown):
            continue
        now = times[shown]
        radius = 0.10 + 0.16 * _nearness(stretch, now)
        angle = path[0][:, None] * now + path[1][:, None]
        centre_x = (width / height) * (0.5 + 0.32 * np.sin(angle[0]))
        centre_y = 0.5 + 0.24 * np.cos(angle[1])
        dx, dy = (
            ((grid - centre[:, None, None]) / radius[:, None, None]).astype(np.float32)
            for grid, centre in ((x, centre_x), (y, centre_y))
        )
        part = frames[shown]
        part[_inside(activity.shape, dx, dy)] = colour
        frames[shown] = part
    return np.clip(frames, 0, 255).astype(np.uint8)


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Which pixels belong to the shape; offsets from its centre in units of its radius."""
    if shape in ("circle", "ring"):
        distance = dx * dx + dy * dy
        return (distance < 1) & (distance > 0.25) if shape == "ring" else distance < 1
    dx, dy = np.abs(dx), dy if shape == "triangle" else np.abs(dy)
    if shape == "square":
        return np.maximum(dx, dy) < 0.88
    if shape == "diamond":
        return dx + dy < 1.15
    if shape == "cross":
        return (np.minimum(dx, dy) < 0.36) & (np.maximum(dx, dy) < 1)
    return (dy < 0.7) & (dy > 2 * dx - 1)  # triangle


def label(scene: Scene, activity: int, rng: np.random.Generator) -> dict:
    """Windows, clip ids and three annotators' scores of one activity, as QVHighlights writes them.

    The scores follow the shape's nearness; each annotator has a leaning of his own and wavers a little.
    """
    windows, clips, scores = [], [], []
    leaning = rng.uniform(-0.6, 0.6, ANNOTATORS)
    for stretch in scene.stretches:
        if stretch.activity != activity:
            continue
        ids = np.arange(stretch.start // CLIP_SECONDS, stretch.end // CLIP_SECONDS)
        near = _nearness(stretch, CLIP_SECONDS * (ids + 0.5))
        votes = 0.6 + 3.6 * near[:, None] + leaning + rng.normal(0, 0.25, (len(ids), ANNOTATORS))
        windows.append((stretch.start, stretch.end))
        clips += ids.tolist()
        scores += np.clip(np.rint(votes), 0, 4).astype(int).tolist()
    return {
        "relevant_windows": tuple(windows),
        "relevant_clip_ids": tuple(clips),
        "saliency_scores": tuple(tuple(vote) for vote in scores),
    }
