"""Where answers go wrong: by query, by frame, and by what f frames can say at all."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from framseg import evaluate, moments
from framseg.annotations import Row, frame_labels, frame_times
from framseg.predictions import WINDOWS, PredictionError, matched
from framseg.viz import figures

LENGTHS = (10, 30, 60, np.inf)  # seconds, upper ends of the groups of moments
POSITIONS = 4
BINS = 10  # of probabilities, and of IoU


def reachable(rows: Sequence[Row], frames: int) -> dict[str, list[dict]]:
    """What perfect answers of `frames` digits say, as predictions to be scored by `evaluate`.

    "true labels": the digits that the model is trained to write, cut into windows by the policy `mask`. "best digits":
    for every moment the run of frames that overlaps it best, which no mask can beat. Both lists are ranked by IoU.
    """
    answers: dict[str, list[dict]] = {"true labels": [], "best digits": []}
    for row in rows:
        labels = frame_labels(row, frames)
        found = [window[:2] for window in moments.windows(labels, np.ones(frames), row.duration)]
        answers["true labels"].append(_ranked(row, found))
        answers["best digits"].append(
            _ranked(row, [_best_run(window, row.duration, frames) for window in row.relevant_windows])
        )
    return answers


def by_frame(rows: Sequence[Row], predictions: Sequence[dict]) -> dict[str, np.ndarray]:
    """Every frame of every query: its `probability`, predicted `digit`, true `label`, and the seconds to the nearest
    end of a moment (`distance`), [queries * f] each. Raises PredictionError where the qids do not match or predictions
    have no frame probabilities.
    """
    predictions, rows = matched(predictions, rows)
    lacking = [one["qid"] for one in predictions if not one.get("probability")]
    if lacking:
        raise PredictionError(f"{len(lacking)} predictions have no frame probabilities (qid {lacking[0]}, …)")
    probability = [np.asarray(one["probability"], dtype=np.float64) for one in predictions]
    digit = [
        np.array([int(character) for character in one["mask"]]) if "mask" in one else (values >= 0.5).astype(int)
        for one, values in zip(predictions, probability, strict=True)
    ]
    label = [frame_labels(row, len(values)) for row, values in zip(rows, probability, strict=True)]
    distance = [
        np.abs(np.subtract.outer(frame_times(row.duration, len(values)), np.ravel(row.relevant_windows))).min(axis=1)
        for row, values in zip(rows, probability, strict=True)
    ]
    columns = {"probability": probability, "digit": digit, "label": label, "distance": distance}
    return {name: np.concatenate(values) for name, values in columns.items()}


def calibration(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Frames in ten bins of probability: mean probability, share of true frames, count (empty bins are left out), and
    the expected calibration error: the mean distance of the first two, weighted by the third.
    """
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    there = count > 0
    said = np.bincount(place, weights=probability, minlength=BINS)[there] / count[there]
    true = np.bincount(place, weights=label, minlength=BINS)[there] / count[there]
    return said, true, count[there], float(np.average(np.abs(said - true), weights=count[there]))


def precision_recall(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Precision and recall at every threshold, falling, and the average precision (area by steps of recall)."""
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)  # equal probabilities enter together
    found = label[order].cumsum()[last]
    precision = found / (np.flatnonzero(last) + 1)
    recall = found / max(label.sum(), 1)
    return precision, recall, float((np.diff(recall, prepend=0) * precision).sum())


@figures._styled
def figure(rows: Sequence[Row], predictions: Sequence[dict]) -> Figure:
    """Eight panels. Queries: IoU of the first window; R1 by the longest moment's length, by the number of moments, by
    the longest moment's place. Frames: calibration, precision and recall, errors by the distance to the nearest end of
    a moment, and each distance's share of all errors. Without frame probabilities the lower row says so.
    """
    predictions, rows = matched(predictions, rows)
    iou = np.array([one["iou"] for one in evaluate.per_query(predictions, rows)])
    out = figures._picture(4.6)
    (spread, length, number, place), below = out.subplots(2, 4)
    longest = np.array([max(row.relevant_windows, key=lambda window: window[1] - window[0]) for row in rows])
    seconds = longest[:, 1] - longest[:, 0]
    share, edges = np.histogram(iou, bins=np.linspace(0, 1, BINS + 1))
    spread.stairs(share / len(iou), edges, fill=True, color=figures.PREDICTED, alpha=0.5)
    for threshold in (0.5, 0.7):
        spread.axvline(threshold, color=figures.GREY, linestyle=":", linewidth=1)
    spread.set(title="First window", xlabel="IoU", ylabel="share of queries", xlim=(0, 1))
    spread.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    names = [f"≤ {top:g}" for top in LENGTHS[:-1]] + [f"> {LENGTHS[-2]:g}"]
    _recall(length, iou, np.searchsorted(LENGTHS, seconds), names, "By moment length", "longest, seconds")
    many = np.minimum([len(row.relevant_windows) for row in rows], 4) - 1
    _recall(number, iou, many, ["1", "2", "3", "4+"], "By moments", "moments")
    middle = longest.mean(axis=1) / [row.duration for row in rows]
    at = np.minimum((middle * POSITIONS).astype(int), POSITIONS - 1)
    parts = [f"{100 * i // POSITIONS}+" for i in range(POSITIONS)]
    _recall(place, iou, at, parts, "By position", "% of the video")
    length.legend(fontsize="small", loc="upper left")

    if not all(one.get("probability") for one in predictions):
        for axes in below:
            axes.set_axis_off()
        below[1].text(0, 0.5, "These predictions have no frame probabilities.")
        return out
    found = by_frame(rows, predictions)
    _by_frame(below, found)
    return out


@figures._styled
def reach(metrics: Mapping[int, Mapping[str, dict]], reached: dict | None = None) -> Figure:
    """Best reachable R1@0.5, R1@0.7 and mAP over the number of frames.

    metrics: frames -> name of the answers -> metrics, as `evaluate` scores `reachable`. `reached`: metrics of a model,
    drawn as a line.
    """
    out = figures._picture(2.3)
    shown = dict(list(figures.METRICS.items())[:3])
    for axes, (key, title) in zip(out.subplots(1, 3, sharey=True), shown.items(), strict=True):
        for answers, style in (("best digits", "-"), ("true labels", "--")):
            values = [scores[answers]["brief"][key] for scores in metrics.values()]
            axes.plot(list(metrics), values, style, marker="o", color=figures.TRUE, label=answers)
        if reached:
            axes.axhline(reached["brief"][key], color=figures.PREDICTED, label="reached")
        axes.set(title=title, xlabel="frames", xticks=list(metrics), ylim=(0, 103))
    out.axes[0].legend(fontsize="small", loc="lower right")
    return out


def _by_frame(below: Sequence[Axes], found: Mapping[str, np.ndarray]) -> None:
    calibrated, curve, near, shares = below
    said, true, _, error = calibration(found["probability"], found["label"])
    calibrated.plot([0, 1], [0, 1], color=figures.GREY, linestyle=":")
    calibrated.plot(said, true, marker="o", markersize=3, color=figures.PROBABILITY)
    calibrated.set(title="Calibration", xlabel="frame probability", ylabel="share true", xlim=(0, 1), ylim=(0, 1))
    calibrated.text(0.05, 0.9, f"error {error:.3f}", fontsize="small")
    precision, recall, average = precision_recall(found["probability"], found["label"])
    curve.plot(recall, precision, color=figures.PROBABILITY)
    curve.set(title="Frames", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    curve.text(0.05, 0.06, f"average precision {average:.3f}", fontsize="small")

    edges = np.array([0, 3, 6, 15, np.inf])  # seconds; half a frame's share of 150 s is 3
    group = np.searchsorted(edges, found["distance"], side="right") - 1
    names = [f"{low:g}–{high:g}" for low, high in zip(edges[:-2], edges[1:-1], strict=True)] + [f"{edges[-2]:g}+"]
    kinds = {"missed": (found["digit"] < found["label"], ""), "false": (found["digit"] > found["label"], "//")}
    total = np.maximum(np.bincount(group, minlength=len(names)), 1)
    wrong = max(sum(int(is_wrong.sum()) for is_wrong, _ in kinds.values()), 1)
    bottoms = np.zeros((2, len(names)))
    for (kind, (is_wrong, hatch)), colour in zip(kinds.items(), (figures.PREDICTED, figures.OTHER), strict=True):
        count = np.bincount(group[is_wrong], minlength=len(names))
        for axes, height, bottom in zip((near, shares), (count / total, count / wrong), bottoms, strict=True):
            axes.bar(names, height, bottom=bottom, color=colour, hatch=hatch, label=kind, edgecolor="white")
            bottom += height
    near.set(title="Wrong frames", xlabel="seconds to an end", ylabel="share of such frames")
    shares.set(title="Of all errors", xlabel="seconds to an end")
    for axes in (near, shares):
        axes.tick_params(axis="x", labelsize="x-small")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    near.legend(fontsize="small")


def _recall(axes: Axes, iou: np.ndarray, group: np.ndarray, names: Sequence[str], title: str, xlabel: str) -> None:
    """R1@0.5 and R1@0.7 of each group of queries, with how many there are."""
    count = np.bincount(group, minlength=len(names))
    for offset, threshold, alpha in ((-0.2, 0.5, 0.45), (0.2, 0.7, 1.0)):
        right = np.bincount(group, weights=iou >= threshold, minlength=len(names)) / np.maximum(count, 1)
        axes.bar(
            np.arange(len(names)) + offset, right, 0.4, color=figures.PREDICTED, alpha=alpha, label=f"R1@{threshold}"
        )
    axes.set_xticks(range(len(names)), [f"{name}\n({many})" for name, many in zip(names, count, strict=True)])
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set(title=title, xlabel=xlabel, ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _best_run(window: Sequence[float], duration: float, frames: int) -> list[float]:
    step = duration / frames
    starts = {int(window[0] // step), int(-(-window[0] // step))}
    ends = {int(window[1] // step), int(-(-window[1] // step))}
    runs = [[start * step, end * step] for start in starts for end in ends | {start + 1} if start < end <= frames]
    return max(runs, key=lambda run: float(moments.iou(run, window)))


def _ranked(row: Row, found: list[list[float]]) -> dict:
    scored = [[*window, float(moments.iou(window[:2], row.relevant_windows).max())] for window in found]
    return {"qid": row.qid, WINDOWS: sorted(scored, key=lambda window: -window[2])}
