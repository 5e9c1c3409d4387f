"""Where answers go wrong: by query, by frame, and by what a mask of f frames can express at best."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from framseg import evaluate, moments
from framseg.annotations import LabelledRow, Row, frame_labels, frame_times, labelled
from framseg.predictions import WINDOWS, PredictionError, matched
from framseg.viz import figures

LENGTHS = (10, 30, 60, np.inf)  # seconds, upper ends of the groups of moments
POSITIONS = 4
BINS = 10  # of probabilities, and of IoU


def reachable(rows: Sequence[Row], frames: int) -> dict[str, list[dict]]:
    """What perfect answers of `frames` digits can express, as predictions to be scored by `evaluate`, ranked by IoU.

    "true labels": the digits that the model is trained to write, cut into windows by the policy `mask`. "best digits":
    for every moment the run of frames that overlaps it best. Raises AnnotationError for rows without labels.
    """
    answers: dict[str, list[dict]] = {"true labels": [], "best digits": []}
    for row in labelled(rows):
        windows = moments.windows(frame_labels(row, frames), np.ones(frames), row.duration)
        answers["true labels"].append(_ranked(row, [window[:2] for window in windows]))
        best = [_best_run(window, row.duration, frames) for window in row.relevant_windows]
        answers["best digits"].append(_ranked(row, best))
    return answers


def by_frame(rows: Sequence[Row], predictions: Sequence[dict]) -> dict[str, np.ndarray]:
    """`probability`, predicted `digit`, true `label` and seconds to a moment's nearest end (`distance`), [queries * f].

    Raises PredictionError for other qids or lacking probabilities, AnnotationError for rows without labels.
    """
    records, with_labels = matched(predictions, labelled(rows))
    lacking = [record["qid"] for record in records if not record.get("probability")]
    if lacking:
        raise PredictionError(f"{len(lacking)} predictions have no frame probabilities (qid {lacking[0]}, …)")
    queries = []
    for record, row in zip(records, with_labels, strict=True):
        probability = np.asarray(record["probability"], dtype=np.float64)
        times = frame_times(row.duration, len(probability))
        digits = np.array([*map(int, record["mask"])]) if "mask" in record else (probability >= 0.5).astype(int)
        distance = np.abs(np.subtract.outer(times, np.ravel(row.relevant_windows))).min(axis=1)
        queries.append((probability, digits, frame_labels(row, len(probability)), distance))
    columns = map(np.concatenate, zip(*queries, strict=True))
    return dict(zip(("probability", "digit", "label", "distance"), columns, strict=True))


def calibration(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Frames in ten bins of probability: mean probability, share of true frames, count (empty bins are left out), and
    the expected calibration error: the mean distance between the first two, weighted by the third.
    """
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    filled = count > 0
    mean = np.bincount(place, weights=probability, minlength=BINS)[filled] / count[filled]
    true = np.bincount(place, weights=label, minlength=BINS)[filled] / count[filled]
    return mean, true, count[filled], float(np.average(np.abs(mean - true), weights=count[filled]))


def precision_recall(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Precision and recall at every threshold from the highest on, and the average precision (area by recall steps)."""
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)  # equal probabilities enter together
    hits = label[order].cumsum()[last]
    precision = hits / (np.flatnonzero(last) + 1)
    recall = hits / max(label.sum(), 1)
    return precision, recall, float((np.diff(recall, prepend=0) * precision).sum())


@figures.styled
def figure(rows: Sequence[Row], predictions: Sequence[dict]) -> Figure:
    """Eight panels about queries and frames.

    Queries: IoU of the first window; R1 by the longest moment's length, by the number of moments, by the longest
    moment's position. Frames: calibration, precision and recall, errors by the distance to the nearest end of a moment,
    and each distance's share of all errors; without frame probabilities the figure says so. Raises as `by_frame` does.
    """
    out, panels = figures.new_figure(4.6, 2, 4)
    calibrated, recalled, rate, share = panels[4:]
    for axes in (*panels[1:4], rate, share):
        axes.tick_params(axis="x", labelsize="x-small")
    _by_query(panels[:4], labelled(rows), np.array([query["iou"] for query in evaluate.per_query(predictions, rows)]))
    if all(record.get("probability") for record in predictions):
        frames = by_frame(rows, predictions)
        mean, true, _, error = calibration(frames["probability"], frames["label"])
        calibrated.plot([0, 1], [0, 1], color=figures.GREY, linestyle=":")
        calibrated.plot(mean, true, marker="o", markersize=3, color=figures.PROBABILITY)
        calibrated.set(title="Calibration", xlabel="frame probability", ylabel="share true", xlim=(0, 1), ylim=(0, 1))
        calibrated.text(0.05, 0.9, f"error {error:.3f}", fontsize="small")
        precision, recall, average = precision_recall(frames["probability"], frames["label"])
        recalled.plot(recall, precision, color=figures.PROBABILITY)
        recalled.set(title="Frames", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        recalled.text(0.05, 0.06, f"average precision {average:.3f}", fontsize="small")
        _errors_by_distance(rate, share, frames)
    else:
        for axes in panels[4:]:
            axes.set_axis_off()
        recalled.text(0, 0.5, "These predictions have no frame probabilities.")
    return out


@figures.styled
def reach(metrics: Mapping[int, Mapping[str, dict]], reached: dict) -> Figure:
    """Best reachable R1@0.5, R1@0.7 and mAP over the number of frames.

    metrics: frames -> name of the answers -> metrics, as `evaluate` scores `reachable`. `reached`: a model's, a line.
    """
    out, panels = figures.new_figure(2.3, 1, 3, share="y")
    for axes, (key, title) in zip(panels, figures.METRICS.items(), strict=False):
        for answers, style in (("best digits", "-"), ("true labels", "--")):
            values = [scores[answers]["brief"][key] for scores in metrics.values()]
            axes.plot(list(metrics), values, style, marker="o", color=figures.TRUE, label=answers)
        axes.axhline(reached["brief"][key], color=figures.PREDICTED, label="reached")
        axes.set(title=title, xlabel="frames", xticks=list(metrics), ylim=(0, 103))
    panels[0].legend(fontsize="small", loc="lower right")
    return out


def _by_query(panels: Sequence[Axes], rows: Sequence[LabelledRow], iou: np.ndarray) -> None:
    """How the IoU of first windows is distributed, then R1 of groups of queries in three panels."""
    share, edges = np.histogram(iou, bins=np.linspace(0, 1, BINS + 1))
    panels[0].stairs(share / len(iou), edges, fill=True, color=figures.PREDICTED, alpha=0.5)
    for threshold in (0.5, 0.7):
        panels[0].axvline(threshold, color=figures.GREY, linestyle=":", linewidth=1)
    figures.label_shares(panels[0], "First window", "IoU", "share of queries", xlim=(0, 1))
    longest = np.array([max(row.relevant_windows, key=lambda window: window[1] - window[0]) for row in rows])
    length = np.searchsorted(LENGTHS, longest[:, 1] - longest[:, 0])
    names = [f"≤ {top:g}" for top in LENGTHS[:-1]] + [f"> {LENGTHS[-2]:g}"]
    _recall(panels[1], iou, length, names, "By moment length", "longest, seconds")
    panels[1].legend(fontsize="small", loc="upper left")
    number = np.minimum([len(row.relevant_windows) for row in rows], 4) - 1
    _recall(panels[2], iou, number, ["1", "2", "3", "4+"], "By moments", "moments")
    middle = longest.mean(axis=1) / [row.duration for row in rows]
    position = np.minimum((middle * POSITIONS).astype(int), POSITIONS - 1)
    names = [f"{100 * part // POSITIONS}+" for part in range(POSITIONS)]
    _recall(panels[3], iou, position, names, "By position", "% of the video")


def _recall(axes: Axes, iou: np.ndarray, group: np.ndarray, names: Sequence[str], title: str, xlabel: str) -> None:
    """R1@0.5 and R1@0.7 of each group of queries, with the number of its queries."""
    count = np.bincount(group, minlength=len(names))
    for offset, threshold, alpha in ((-0.2, 0.5, 0.45), (0.2, 0.7, 1.0)):
        right = np.bincount(group, weights=iou >= threshold, minlength=len(names)) / np.maximum(count, 1)
        places, label = np.arange(len(names)) + offset, f"R1@{threshold}"
        axes.bar(places, right, 0.4, color=figures.PREDICTED, alpha=alpha, label=label)
    axes.set_xticks(range(len(names)), [f"{name}\n({queries})" for name, queries in zip(names, count, strict=True)])
    figures.label_shares(axes, title, xlabel, ylim=(0, 1))


def _errors_by_distance(rate: Axes, share: Axes, frames: Mapping[str, np.ndarray]) -> None:
    """Missed and false frames by distance to a moment's end: of the frames at that distance, and of all errors."""
    group = np.digitize(frames["distance"], (3, 6, 15))  # seconds; 3 are half of the 6 that a frame of 25 stands for
    names = ["0–3", "3–6", "6–15", "15+"]
    total = np.maximum(np.bincount(group, minlength=len(names)), 1)
    missed, false = frames["digit"] < frames["label"], frames["digit"] > frames["label"]
    errors = max(int(missed.sum() + false.sum()), 1)
    bottoms = np.zeros((2, len(names)))
    kinds = (("missed", missed, "", figures.PREDICTED), ("false", false, "//", figures.OTHER))
    for kind, wrong, hatch, colour in kinds:
        count = np.bincount(group[wrong], minlength=len(names))
        for axes, height, bottom in zip((rate, share), (count / total, count / errors), bottoms, strict=True):
            axes.bar(names, height, bottom=bottom, color=colour, hatch=hatch, label=kind, edgecolor="white")
            bottom += height
    figures.label_shares(rate, "Wrong frames", "seconds to an end", "share of such frames")
    figures.label_shares(share, "Of all errors", "seconds to an end")
    rate.legend(fontsize="small")


def _best_run(window: Sequence[float], duration: float, frames: int) -> list[float]:
    """Of the runs of whole frames whose ends are next to the window's, the one with the best IoU, in seconds."""
    step = duration / frames
    starts, ends = ({int(second // step), int(-(-second // step))} for second in window)
    runs = [[start * step, end * step] for start in starts for end in ends | {start + 1} if start < end <= frames]
    return max(runs, key=lambda run: float(moments.iou(run, window)))


def _ranked(row: LabelledRow, windows: Sequence[Sequence[float]]) -> dict:
    """Windows as a prediction, scored by their IoU with the true window that they overlap best."""
    scored = [[*window, float(moments.iou(window, row.relevant_windows).max())] for window in windows]
    return {"qid": row.qid, WINDOWS: sorted(scored, key=lambda window: -window[2])}
