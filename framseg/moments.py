"""From a mask and its frame probabilities to moments (ranked windows) and highlights (clip saliency).

Frame i of f stands for the seconds [i * t/f, (i+1) * t/f] of a video of t seconds.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from framseg.annotations import CLIP_SECONDS, USUAL_SECONDS, clips, frame_times

Policy = Literal["mask", "thresholds", "ranked"]
Rounding = Literal["floor", "nearest"]
Method = Literal["overlap", "interpolation", "gaussian"]

LISTED = 10  # windows of a query that count for the protocol's mAP
CUTS = (0.25, 0.5, 0.75)  # probabilities at which the policy `thresholds` cuts
BEST_WINDOWS: Policy = "ranked"  # what framseg.predict and the demo use
BEST_SALIENCY: Method = "gaussian"


class Ranking(NamedTuple):
    """Weights of the policy `ranked`."""

    runs: tuple[float, ...]  # of `run_features`
    start: tuple[float, float, float]  # frames by which a window's start moves: of `edge_features`
    end: tuple[float, float, float]


# Fitted on the 1,550 released val predictions by tests/benchmarks/ranked_policy.py, out of fold in its record.
RANKING = Ranking(
    runs=(0.293, -0.283, 1.155, 1.289, 0.672, 1.986),
    start=(0.676, -0.968, -0.736),
    end=(-1.809, -0.381, 2.159),
)
KERNEL = 0.8  # frames, width of the method `gaussian`; from the same place
LIKELY = 64  # most likely runs that the policy `ranked` looks at, for speed


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
    `ranked`: the best run of the mask first, its ends moved by what the frames beside them say; then up to nine other
    runs of frames, each the one that adds most to what the list can be expected to find (see `ranked`). Ends are
    multiples of the dataset's 2-second clips, and the score is the share of true windows that the window adds.

    `rounding`: the paper's formula and the authors' masks of epoch 11 have `floor`; the windows they released for
    their final predictions are rounded to the `nearest` second, which differs in 19 of 1,561 (none of a 150-s video).
    The policy `ranked` has its own.

    Raises ValueError for probabilities of another shape or out of range, a duration <= 0, an unknown policy or
    rounding.
    """
    probability, frames = _checked(probability, duration), len(probability)
    _known("windows policy", policy, Policy)
    _known("rounding", rounding, Rounding)
    if policy == "ranked":
        first = best_run(mask, probability)
        return ranked(moved(first, probability), run_probability(mask, probability, duration), duration)
    if policy == "thresholds":
        runs = [run for cut in CUTS for run in _runs(probability >= cut)]
    else:
        runs = _mask_runs(mask, frames)
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


def run_features(
    mask: str | Sequence[int] | np.ndarray, probability: np.ndarray, duration: float = USUAL_SECONDS
) -> np.ndarray:
    """What the policy `ranked` knows of every run of frames, float64 [f * (f + 1) / 2, 6], runs as in `run_edges`.

    With v = tanh(logit / 4) of a frame, -1..1, and lengths in 25ths of the video, of 150 s of a longer one: the sum of
    v over the run; its length; the steps of v at its two ends; how many ends are the video's; how many it shares with
    the mask's runs; its soft IoU with the probabilities.
    """
    first, after, length, ends = _geometry(len(probability))
    one, zero = np.sqrt(probability), np.sqrt(1 - probability)
    belief = (one - zero) / (one + zero)  # tanh(logit / 4), finite at 0 and 1
    # The video's ends are no steps: beside them stands the frame itself.
    sides = np.concatenate((belief[:1], belief, belief[-1:]))
    total, mass = (np.concatenate(([0.0], x.cumsum())) for x in (belief, probability))
    within, scale = mass[after] - mass[first], 25 / len(probability) * max(1.0, duration / USUAL_SECONDS)
    starts, stops = np.zeros((2, len(probability) + 1))
    for start, stop in _mask_runs(mask, len(probability)):
        starts[start] = stops[stop] = 1
    return np.stack(
        (
            (total[after] - total[first]) * scale,
            length * scale,
            sides[first + 1] - sides[first] + sides[after] - sides[after + 1],
            ends,
            starts[first] + stops[after],
            within / (length + mass[-1] - within),
        ),
        axis=1,
    )


def run_edges(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First frame and the one after the last of every run of frames, int64 [frames * (frames + 1) / 2] each."""
    return _geometry(frames)[:2]


def run_probability(
    mask: str | Sequence[int] | np.ndarray,
    probability: np.ndarray,
    duration: float = USUAL_SECONDS,
    ranking: Ranking = RANKING,
) -> np.ndarray:
    """How likely a true window of the query is each run of frames, float64 [f * (f + 1) / 2], sum 1.

    A softmax over all runs, linear in `run_features`.
    """
    score = run_features(mask, probability, duration) @ np.array(ranking.runs)
    likely = np.exp(score - score.max())
    return likely / likely.sum()


def best_run(mask: str | Sequence[int] | np.ndarray, probability: np.ndarray) -> tuple[int, int]:
    """The mask's run of the highest mean probability, the first of equals."""
    return max(_mask_runs(mask, len(probability)), key=lambda run: probability[run[0] : run[1]].mean())


def edge_features(probability: np.ndarray, first: int, after: int) -> np.ndarray:
    """1, probability outside and inside, float64 [2, 3], of the run's start and end; outside the video it is 0."""
    sides = np.concatenate(([0.0], probability, [0.0]))
    return np.array([[1, sides[first], sides[first + 1]], [1, sides[after + 1], sides[after]]])


def moved(run: tuple[int, int], probability: np.ndarray, ranking: Ranking = RANKING) -> tuple[float, float]:
    """The run's start and end in frames, moved by what `edge_features` say, inward by a quarter of the run at most."""
    (first, after), features = run, edge_features(probability, *run)
    most = (after - first) / 4  # short runs keep a body; the paper's model gives few that feel it
    start = first + min(float(features[0] @ ranking.start), most)
    end = after + max(float(features[1] @ ranking.end), -most)
    return max(start, 0.0), min(end, float(len(probability)))


def ranked(best: tuple[float, float], likely: np.ndarray, duration: float) -> list[list[float]]:
    """Up to ten windows [[start, end, score], ...], `best` first, that together find most true windows.

    best: (start, end) in frames. likely: float64 [f * (f + 1) / 2], of every run (`run_probability`). A true window
    counts as found by the share of the protocol's IoU thresholds .5 to .95 that the best listed window reaches, made
    linear; each next window is the run that adds most to its expectation (greedy, so the scores fall), which keeps
    near-duplicates away.
    """
    frames = (math.isqrt(8 * len(likely) + 1) - 1) // 2
    top = np.argsort(-likely, kind="stable")[:LIKELY]
    first, after = (x[top] for x in run_edges(frames))
    start, end = _on_clips(np.concatenate(([best[0]], first)), np.concatenate(([best[1]], after)), duration, frames)
    found = ((_iou(start[:, None], end[:, None], start[1:], end[1:]) - 0.45) / 0.5).clip(0, 1)
    weight, so_far, listed, gains = likely[top], found[0], [0], [float(found[0] @ likely[top])]
    while len(listed) < LISTED:
        gain = np.maximum(found - so_far, 0) @ weight
        at = int(gain.argmax())
        if gain[at] < 1e-6:
            break
        listed.append(at)
        gains.append(float(gain[at]))
        so_far = np.maximum(so_far, found[at])
    gains[0] = max(gains[:2])  # the mask's own window leads the list whatever the runs say
    return [[float(start[i]), float(end[i]), min(gain, 1.0)] for i, gain in zip(listed, gains, strict=True)]


def saliency(probability: Sequence[float] | np.ndarray, duration: float, method: Method = "overlap") -> np.ndarray:
    """Saliency of the video's 2-second clips, float64 [int(duration / 2)], 0..1.

    probability: [f], of foreground. `overlap`: mean of the frames' probabilities weighted by the seconds each
    shares with the clip (the released code; gave the paper's Table I). `interpolation`: linear between the
    frames' times, read at the clip's middle, flat before the first and after the last (the paper's text). `gaussian`:
    mean of the frames' probabilities weighted by a normal density of the distance between frame and clip's middle,
    0.8 frames wide (kernel regression).

    Raises ValueError for probabilities of another shape or out of range, a duration <= 0, an unknown method.
    """
    probability, count = _checked(probability, duration), clips(duration)
    _known("saliency method", method, Method)
    starts = np.arange(count) * float(CLIP_SECONDS)
    if method == "interpolation":
        return np.interp(starts + CLIP_SECONDS / 2, frame_times(duration, len(probability)), probability)
    if method == "gaussian":
        return gaussian(probability, duration)
    edges = np.arange(len(probability) + 1) * (duration / len(probability))
    shared = np.minimum(starts[:, None] + CLIP_SECONDS, edges[1:]) - np.maximum(starts[:, None], edges[:-1])
    shared = shared.clip(min=0)
    return shared @ probability / shared.sum(axis=1)


def gaussian(values: np.ndarray, duration: float, width: float = KERNEL) -> np.ndarray:
    """Kernel regression of the frames' values [f] at the clips' middles, float64 [int(duration / 2)].

    width: of the normal density, in frames.
    """
    middles = (np.arange(clips(duration)) + 0.5) * CLIP_SECONDS
    away = (frame_times(duration, len(values)) - middles[:, None]) * len(values) / duration
    power = (away / width) ** 2 / 2
    weight = np.exp(power.min(axis=1, keepdims=True) - power)  # relative to the nearest frame, so never all zeros
    return weight @ values / weight.sum(axis=1)


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


def _mask_runs(mask: str | Sequence[int] | np.ndarray, frames: int) -> list[tuple[int, int]]:
    """Runs of ones; an invalid mask is one run."""
    return _runs(np.array([c == "1" for c in _characters(mask)])) if valid(mask, frames) else [(0, frames)]


def _on_clips(start: np.ndarray, end: np.ndarray, duration: float, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames to seconds at the nearest edges of clips; a window that would be empty keeps its exact ends."""
    start, end = start * duration / frames, end * duration / frames
    clip_start, clip_end = (np.floor(x / CLIP_SECONDS + 0.5) * CLIP_SECONDS for x in (start, end))
    clip_end = np.minimum(clip_end, duration)
    kept = clip_start < clip_end
    return np.where(kept, clip_start, start), np.where(kept, clip_end, np.minimum(end, duration))


def _iou(start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """Intersection over the hull, as the protocol has it; no window may be empty."""
    shared = np.minimum(end, other_end) - np.maximum(start, other_start)
    return np.maximum(shared, 0) / (np.maximum(end, other_end) - np.minimum(start, other_start))


@lru_cache(maxsize=8)
def _geometry(frames: int) -> tuple[np.ndarray, ...]:
    """Of every run of frames: the first, the one after the last, how many, how many of its ends are the video's."""
    first, after = np.triu_indices(frames)
    after = after + 1
    return first, after, after - first, (first == 0) + (after == frames) * 1.0


def _runs(ones: np.ndarray) -> list[tuple[int, int]]:
    """First frame and the one after the last of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], ones, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
