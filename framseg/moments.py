"""From a mask and its frame probabilities to moments (ranked windows) and highlights (clip saliency).

Frame i of f stands for the seconds [i * t/f, (i+1) * t/f] of a video of t seconds.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from framseg.annotations import CLIP_SECONDS, clips, frame_times

Policy = Literal["mask", "thresholds"]
Rounding = Literal["floor", "nearest"]
Method = Literal["overlap", "interpolation"]

LISTED = 10  # windows of a query that count for the protocol's mAP
CUTS = (0.25, 0.5, 0.75)  # probabilities at which the policy `thresholds` cuts


def valid(mask: str | Sequence[int] | np.ndarray, frames: int) -> bool:
    """True if the answer is `frames` characters (or numbers) 0 and 1 with at least one 1."""
    characters = _characters(mask)
    return len(characters) == frames and set(characters) <= {"0", "1"} and "1" in characters


def windows(
    mask: str | Sequence[int] | np.ndarray,
    probability: Sequence[float] | np.ndarray,
    duration: float,
    policy: Policy = "mask",
    rounding: Rounding = "floor",
) -> list[list[float]]:
    """Moments [[start, end, score], ...] in seconds, best score first, earlier first on ties.

    mask: the answer, f characters or numbers 0 and 1; an invalid one (see `valid`) counts as all ones.
    probability: [f], of foreground, 0..1. duration: t in seconds.

    Frames a to b give [floor(a * t/f), floor((b+1) * t/f)] and their mean probability as score; a run so short that
    nothing is left between its whole seconds keeps its exact ends. Policies:
    `mask`: every run of ones in the mask.
    `thresholds`: the authors' competition entry. Every run of frames with a probability of at least .25, .5 or .75,
    each pair of ends once, the first ten, filled up to ten with [0, t, 0]; the mask is not used.

    `rounding`: the paper's formula and the authors' masks of epoch 11 have `floor`; the windows they released for
    their final predictions are rounded to the `nearest` second, which differs in 19 of 1,561 (none of a 150-s video).

    Raises ValueError for probabilities of another shape or out of range, a duration <= 0, an unknown policy or
    rounding.
    """
    probability, frames = _checked(probability, duration), len(probability)
    _known("windows policy", policy, Policy)
    _known("rounding", rounding, Rounding)
    if policy == "thresholds":
        runs = [run for cut in CUTS for run in _runs(probability >= cut)]
    else:
        runs = _runs(np.array([c == "1" for c in _characters(mask)]) if valid(mask, frames) else probability >= 0)
    found = []
    for first, after in sorted(set(runs)):
        exact = first * duration / frames, after * duration / frames
        start, end = (math.floor(x if rounding == "floor" else x + 0.5) for x in exact)
        ends = (start, min(end, duration)) if end > start else exact
        found.append([*ends, float(probability[first:after].mean())])
    found.sort(key=lambda window: -window[2])
    return filled(found, duration) if policy == "thresholds" else found


def filled(windows: list[list[float]], duration: float) -> list[list[float]]:
    """The first ten windows, filled up to ten with the whole video at score 0, as the authors submitted them."""
    return windows[:LISTED] + [[0, duration, 0.0] for _ in range(LISTED - len(windows))]


def saliency(probability: Sequence[float] | np.ndarray, duration: float, method: Method = "overlap") -> np.ndarray:
    """Saliency of the video's 2-second clips, float64 [int(duration / 2)], 0..1.

    probability: [f], of foreground. `overlap`: mean of the frames' probabilities weighted by the seconds each
    shares with the clip (the released code; gave the paper's Table I). `interpolation`: linear between the
    frames' times, read at the clip's middle, flat before the first and after the last (the paper's text).

    Raises ValueError for probabilities of another shape or out of range, a duration <= 0, an unknown method.
    """
    probability, count = _checked(probability, duration), clips(duration)
    _known("saliency method", method, Method)
    starts = np.arange(count) * float(CLIP_SECONDS)
    if method == "interpolation":
        return np.interp(starts + CLIP_SECONDS / 2, frame_times(duration, len(probability)), probability)
    edges = np.arange(len(probability) + 1) * (duration / len(probability))
    shared = np.minimum(starts[:, None] + CLIP_SECONDS, edges[1:]) - np.maximum(starts[:, None], edges[:-1])
    shared = shared.clip(min=0)
    return shared @ probability / shared.sum(axis=1)


def _characters(mask: str | Sequence[int] | np.ndarray) -> str:
    # A number of several digits would pass for several characters, so it stands as a foreign one.
    return mask if isinstance(mask, str) else "".join("01"[int(n)] if n in (0, 1) else "?" for n in mask)


def _known(what: str, name: str, names: object) -> None:
    if name not in get_args(names):
        raise ValueError(f"no {what} named {name!r}: there are {', '.join(get_args(names))}")


def _checked(probability: Sequence[float] | np.ndarray, duration: float) -> np.ndarray:
    probability = np.asarray(probability, dtype=np.float64)
    if probability.ndim != 1 or not len(probability):
        raise ValueError(f"frame probabilities must be one list [f], not of shape {list(probability.shape)}")
    good = (probability >= 0) & (probability <= 1)  # False for NaN
    if not good.all():
        raise ValueError(f"probability of frame {good.argmin()} is {probability[good.argmin()]}, not in 0..1")
    if not 0 < duration < math.inf:
        raise ValueError(f"duration must be a positive number of seconds, not {duration}")
    return probability


def _runs(ones: np.ndarray) -> list[tuple[int, int]]:
    """First frame and the one after the last of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], ones, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
