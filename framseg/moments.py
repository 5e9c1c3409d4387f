"""From a mask and its frame probabilities to moments (ranked windows) and highlights (clip saliency).

Frame i of f stands for the seconds [i * t/f, (i+1) * t/f] of a video of t seconds; a run is a stretch of frames.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from framseg.annotations import CLIP_SECONDS, USUAL_SECONDS, clips, frame_times

Policy = Literal["mask", "thresholds", "ranked"]
Rounding = Literal["floor", "nearest"]
Method = Literal["overlap", "interpolation", "gaussian"]
Mask = str | Sequence[int] | np.ndarray  # f characters or numbers 0 and 1

LISTED = 10  # windows per query that count for the protocol's mAP
CUTS = (0.25, 0.5, 0.75)  # probabilities at which the policy `thresholds` cuts
BEST_WINDOWS: Policy = "ranked"  # what framseg.predict and the demo use
BEST_SALIENCY: Method = "gaussian"


class Ranking(NamedTuple):
    """Weights of the policy `ranked`."""

    runs: tuple[float, ...]  # of `run_features`, in the probability of a run
    start: tuple[float, float, float]  # of `edge_features`, in the number of frames that a window's start moves
    end: tuple[float, float, float]


RANKING = Ranking(  # fitted on the authors' val predictions by tests/benchmarks/ranked_policy.py
    runs=(0.293, -0.283, 1.155, 1.289, 0.672, 1.986), start=(0.676, -0.968, -0.736), end=(-1.809, -0.381, 2.159)
)
KERNEL = 0.8  # frames, width of the method `gaussian`; fitted there too
LIKELY = 64  # the policy `ranked` chooses among this many of the most likely runs, for speed


def valid(mask: Mask, frames: int) -> bool:
    """True if the answer is `frames` characters (or numbers) 0 and 1 with at least one 1."""
    return len(mask) == frames and set(mask) in ({"0", "1"}, {"1"}, {0, 1}, {1})


def counted(mask: Mask, frames: int) -> str:
    """The mask that counts, as `frames` characters: all ones for an invalid one."""
    return "".join(str(int(digit)) for digit in mask) if valid(mask, frames) else "1" * frames


def windows(
    mask: Mask, probability: ArrayLike, duration: float, policy: Policy = "mask", rounding: Rounding = "floor"
) -> list[list[float]]:
    """Moments [[start, end, score], ...] in seconds, best score first, earlier first on ties.

    mask: the answer; an invalid one (see `valid`) counts as all ones. probability: [f], of foreground, 0..1. duration:
    t in seconds.

    Frames a to b give [floor(a * t/f), floor((b+1) * t/f)] and their mean probability as score; a run that would be
    left without a whole second keeps its exact ends. Policies:
    `mask`: every run of ones in the mask (the paper's).
    `thresholds`: the authors' competition entry. Every run of frames with a probability of at least .25, .5 or .75,
    each pair of ends once, the first ten, filled up to ten with [0, t, 0]; the mask is not used.
    `ranked`: the mask's best run with its ends moved, then up to nine other runs (see `ranked`).

    rounding: the paper's formula and the authors' masks of epoch 11 have `floor`; the windows of their final
    predictions are rounded to the `nearest` second, which differs in 19 of 1,561. `ranked` uses neither.

    Raises ValueError for probabilities of another shape or out of 0..1, a duration <= 0, an unknown name.
    """
    probability = _checked(probability, duration)
    frames = len(probability)
    _known("windows policy", policy, Policy)
    _known("rounding", rounding, Rounding)
    if policy == "ranked":
        best = moved(best_run(mask, probability), probability)
        return ranked(best, run_probability(mask, probability, duration), duration)
    above = [run for cut in CUTS for run in _runs(probability >= cut)]
    runs, out = _mask_runs(mask, frames) if policy == "mask" else above, []
    for first, after in sorted(set(runs)):
        exact = first * duration / frames, after * duration / frames
        start, end = (math.floor(x if rounding == "floor" else x + 0.5) for x in exact)
        ends = (start, min(end, duration)) if end > start else exact
        out.append([*ends, float(probability[first:after].mean())])
    out.sort(key=lambda window: -window[2])
    return filled(out, duration) if policy == "thresholds" else out


def filled(windows: list[list[float]], duration: float) -> list[list[float]]:
    """The first ten windows, filled up to ten with the whole video at score 0, as the authors submitted them."""
    return windows[:LISTED] + [[0, duration, 0.0] for _ in range(LISTED - len(windows))]


def run_features(mask: Mask, probability: np.ndarray, duration: float = USUAL_SECONDS) -> np.ndarray:
    """What the policy `ranked` knows of every run of frames, float64 [f * (f + 1) / 2, 6], runs as in `run_edges`.

    With v = tanh(logit / 4) of a frame, -1..1, and lengths in 25ths of the video (of 150 s if it is longer): the sum
    of v over the run; its length; the steps of v at its two ends; how many ends are the video's; how many it shares
    with the mask's runs; its soft IoU with the probabilities.
    """
    first, after = run_edges(len(probability))
    length = after - first
    root, opposite = np.sqrt(probability), np.sqrt(1 - probability)
    belief = (root - opposite) / (root + opposite)  # tanh(logit / 4), finite at 0 and 1
    # The first and last frame are repeated, so that v has no step at the video's ends.
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
            (first == 0) + (after == len(probability)) * 1.0,
            starts[first] + stops[after],
            within / (length + mass[-1] - within),
        ),
        axis=1,
    )


def run_edges(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First frame and the one after the last of every run of frames, int64 [frames * (frames + 1) / 2] each."""
    first, last = np.triu_indices(frames)
    return first, last + 1


def run_probability(
    mask: Mask, probability: np.ndarray, duration: float = USUAL_SECONDS, ranking: Ranking = RANKING
) -> np.ndarray:
    """Probability of each run to be a true window, float64 [f * (f + 1) / 2]: a softmax, linear in `run_features`."""
    score = run_features(mask, probability, duration) @ np.array(ranking.runs)
    likely = np.exp(score - score.max())
    return likely / likely.sum()


def best_run(mask: Mask, probability: np.ndarray) -> tuple[int, int]:
    """The mask's run with the highest mean probability, the first of equals."""
    return max(_mask_runs(mask, len(probability)), key=lambda run: probability[run[0] : run[1]].mean())


def edge_features(probability: np.ndarray, first: int, after: int) -> np.ndarray:
    """For start and end of the run: 1, probability just outside (0 beyond the video) and inside, float64 [2, 3]."""
    sides = np.concatenate(([0.0], probability, [0.0]))
    return np.array([[1, sides[first], sides[first + 1]], [1, sides[after + 1], sides[after]]])


def moved(run: tuple[int, int], probability: np.ndarray, ranking: Ranking = RANKING) -> tuple[float, float]:
    """The run's start and end in frames, moved by the weighted `edge_features`."""
    (first, after), features = run, edge_features(probability, *run)
    quarter = (after - first) / 4  # an end moves inward by this much at most, so that half of a short run is left
    start = first + min(float(features[0] @ ranking.start), quarter)
    end = after + max(float(features[1] @ ranking.end), -quarter)
    return max(start, 0.0), min(end, float(len(probability)))


def ranked(best: tuple[float, float], likely: np.ndarray, duration: float) -> list[list[float]]:
    """Up to ten windows [[start, end, score], ...], `best` first, that together find most true windows.

    best: (start, end) in frames. likely: float64 [f * (f + 1) / 2], from `run_probability`. A list finds a true window
    by the share of the IoU thresholds .5 to .95 that its best window reaches, taken as linear in the IoU. Each further
    window is the run that adds most to the expected share, which is its score, so near-duplicates stay out and the
    scores fall. Ends are the nearest edges of the dataset's 2-second clips, the exact seconds where these coincide.
    """
    frames = (math.isqrt(8 * len(likely) + 1) - 1) // 2
    top = np.argsort(-likely, kind="stable")[:LIKELY]
    first, after = (x[top] for x in run_edges(frames))
    exact = np.minimum(np.vstack((best, np.stack((first, after), axis=1))) * duration / frames, duration)
    on_clips = np.minimum(np.floor(exact / CLIP_SECONDS + 0.5) * CLIP_SECONDS, duration)
    options = np.where(on_clips[:, :1] < on_clips[:, 1:], on_clips, exact)
    share = ((iou(options[:, None], options[1:]) - 0.45) / 0.5).clip(0, 1)
    weight, so_far, listed, gains = likely[top], share[0], [0], [float(share[0] @ likely[top])]
    while len(listed) < LISTED:
        gain = np.maximum(share - so_far, 0) @ weight
        chosen = int(gain.argmax())
        if gain[chosen] < 1e-6:
            break
        listed.append(chosen)
        gains.append(float(gain[chosen]))
        so_far = np.maximum(so_far, share[chosen])
    gains[0] = max(gains[:2])  # `best` stays first even if another run adds more
    return [[*options[i].tolist(), min(gain, 1.0)] for i, gain in zip(listed, gains, strict=True)]


def iou(windows: ArrayLike, others: ArrayLike, union: Literal["hull", "lengths"] = "hull") -> np.ndarray:
    """Intersection over union of windows [..., 2], broadcast against others [..., 2]; float64, 0 if both are empty.

    union: `hull`, from the first start to the last end, as the protocol's R1 has it; `lengths`, the sum of both less
    what they share, as its mAP has it. For windows that overlap these are equal up to the last bit, which decides
    where an IoU lies on a threshold.
    """
    (start, end), (other_start, other_end) = (np.moveaxis(np.asarray(w, np.float64), -1, 0) for w in (windows, others))
    shared = (np.minimum(end, other_end) - np.maximum(start, other_start)).clip(min=0)
    whole = np.maximum(end, other_end) - np.minimum(start, other_start)
    if union == "lengths":
        whole = (end - start) + (other_end - other_start) - shared  # in this order, as another rounds otherwise
    return np.divide(shared, whole, out=np.zeros_like(whole), where=whole > 0)


def saliency(probability: ArrayLike, duration: float, method: Method = "overlap") -> np.ndarray:
    """Saliency of the video's 2-second clips, float64 [int(duration / 2)], 0..1.

    probability: [f], of foreground. `overlap`: mean of the frames' probabilities weighted by the seconds each shares
    with the clip (the authors' code, used for the paper's Table I). `interpolation`: linear between the frames' times,
    read at the clip's middle, constant at the ends (the paper's text). `gaussian`: mean of the frames' probabilities
    weighted by a normal density, 0.8 frames wide, of a frame's distance from the clip's middle. Raises as `windows`.
    """
    probability = _checked(probability, duration)
    _known("saliency method", method, Method)
    if method == "gaussian":
        return gaussian(probability, duration)
    starts = np.arange(clips(duration)) * float(CLIP_SECONDS)
    if method == "interpolation":
        return np.interp(starts + CLIP_SECONDS / 2, frame_times(duration, len(probability)), probability)
    edges = np.arange(len(probability) + 1) * (duration / len(probability))
    shared = np.minimum(starts[:, None] + CLIP_SECONDS, edges[1:]) - np.maximum(starts[:, None], edges[:-1])
    shared = shared.clip(min=0)
    return shared @ probability / shared.sum(axis=1)


def gaussian(values: np.ndarray, duration: float, width: float = KERNEL) -> np.ndarray:
    """Kernel regression, `width` frames wide, of values [f] at the clips' middles, float64 [int(duration / 2)]."""
    middles = (np.arange(clips(duration)) + 0.5) * CLIP_SECONDS
    distance = (frame_times(duration, len(values)) - middles[:, None]) * len(values) / duration
    power = (distance / width) ** 2 / 2
    weight = np.exp(power.min(axis=1, keepdims=True) - power)  # relative to the nearest frame, so never all zeros
    return weight @ values / weight.sum(axis=1)


def _known(what: str, name: str, names: object) -> None:
    if name not in get_args(names):
        raise ValueError(f"no {what} named {name!r}: there are {', '.join(get_args(names))}")


def _checked(probability: ArrayLike, duration: float) -> np.ndarray:
    probability = np.asarray(probability, dtype=np.float64)
    if probability.ndim != 1 or not len(probability):
        raise ValueError(f"frame probabilities must be one list [f], not of shape {list(probability.shape)}")
    good = (probability >= 0) & (probability <= 1)  # False for NaN
    if not good.all():
        raise ValueError(f"probability of frame {good.argmin()} is {probability[good.argmin()]}, not in 0..1")
    if not 0 < duration < math.inf:
        raise ValueError(f"duration must be a positive number of seconds, not {duration}")
    return probability


def _mask_runs(mask: Mask, frames: int) -> list[tuple[int, int]]:
    return _runs(np.array([digit == "1" for digit in counted(mask, frames)]))


def _runs(ones: np.ndarray) -> list[tuple[int, int]]:
    """The runs of True in ones [f]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], ones, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
