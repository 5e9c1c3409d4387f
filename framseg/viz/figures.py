"""The paper's figures and those of the notebooks, each from plain values: rows, predictions, frames, log lines.

Every function returns a figure that shows itself in a notebook; without pyplot, none stays open. All share one style:
seaborn's colour-blind palette, and what must be told apart also differs in form, so that a print in grey can be read.
"""

import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from IPython.core.pylabtools import print_figure
from IPython.display import DisplayHandle, display
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from framseg import annotations
from framseg.annotations import ANNOTATORS, CLIP_SECONDS, TOP_SALIENCY, LabelledRow, Row, frame_times
from framseg.evaluate import METRICS, per_query
from framseg.predictions import SALIENCY, WINDOWS
from framseg.viz import paper_results

BLUE, ORANGE, GREEN, RED, PINK, _, _, GREY, _, SKY = sns.color_palette("colorblind").as_hex()
TRUE, PREDICTED, PROBABILITY, OTHER = GREEN, RED, BLUE, GREY
STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=0.95),
    **mpl.rc_params_from_file(Path(__file__).with_suffix(".mplstyle"), use_default_template=False),
}
WIDTH = 7.2  # inches: the width of a page's text
DPI = 160

LOSSES = {"lm": "LM", "bce": "BCE", "tversky": "Tversky", "dice": "generalized Dice"}
LOSS_COLOURS = dict(zip(LOSSES, (BLUE, ORANGE, GREEN, PINK), strict=True))

CORRECT, MISSED = 0.7, 0.5  # IoU of the first window: correct from here on, missed below
WRONG, CONFIDENT = 0.3, 0.8  # over-confident: an IoU below the first with a `confidence` of at least the second
# The words of `figures.yaml`, with these numbers in them.
_TEXT = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
_WORDS = yaml.safe_load(_TEXT.format(CORRECT=CORRECT, WRONG=WRONG, CONFIDENT=CONFIDENT))

styled = mpl.rc_context(STYLE)  # decorator: matplotlib's settings are as in STYLE while the function runs


class Picture(Figure):
    """A figure that shows itself in a notebook, and whose style also holds while it is drawn, when ticks are made."""

    @styled
    def draw(self, renderer: RendererBase) -> None:
        """Draw the figure in its style."""
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        return print_figure(self, "png", bbox_inches=None, dpi=DPI)


def new_figure(
    height: float, rows: int = 1, columns: int = 1, share: str = "", ratios: Sequence[float] | None = None
) -> tuple[Picture, list[Axes]]:
    """A figure as wide as a page's text and `height` inches high, and its panels row by row, for a `styled` function.

    share: the axis, "x" or "y", that all panels have in common; ratios: heights of the rows.
    """
    figure = Picture(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    x, y = share == "x", share == "y"
    panels = figure.subplots(rows, columns, sharex=x, sharey=y, squeeze=False, height_ratios=ratios)
    return figure, panels.ravel().tolist()


def label_shares(axes: Axes, title: str, xlabel: str, ylabel: str = "", **limits: tuple[float, float | None]) -> None:
    """Label a panel whose y axis shows shares of 1: in whole percent, from 0 on if `limits` have no ylim."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **{"ylim": (0, None)} | limits)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@styled
def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `folder`/`name`.png and .pdf, the same bytes for the same figure; returns both paths."""
    paths = [Path(folder, f"{name}.{kind}") for kind in ("png", "pdf")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(paths[0], dpi=2 * DPI)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


# The data

_WORD = re.compile(r"[^\W\d_]+")
_FUNCTION_WORDS = frozenset(_WORDS["function words"].split())
_READABLE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.2"}


@styled
def data_overview(splits: Mapping[str, Sequence[Row]], frames: int, whole_seconds: bool = False) -> Figure:
    """Nine panels that compare splits (name -> rows) in what their videos, queries, moments and annotators are like.

    The last one shows the class balance of `frames` frames per video next to the paper's. Splits without labels are
    only in the panels about videos and words. Raises ValueError if no split has labels.
    """
    labelled = {name: [row for row in rows if isinstance(row, LabelledRow)] for name, rows in splits.items()}
    labelled = {name: rows for name, rows in labelled.items() if rows}
    if not labelled:
        raise ValueError(f"none of the splits {', '.join(splits)} has labels; give at least one that has")
    colours = dict(zip(splits, sns.color_palette("colorblind", len(splits)).as_hex(), strict=True))
    figure, panels = new_figure(6.6, 3, 3)
    videos, windows, lengths, saliency, distances, positions, words, common, balance = panels
    queries = {name: list(Counter(row.vid for row in rows).values()) for name, rows in splits.items()}
    _counts(videos, queries, colours)
    moments = {name: [len(row.relevant_windows) for row in rows] for name, rows in labelled.items()}
    _counts(windows, moments, colours)
    for name, rows in labelled.items():
        seconds = [end - start for row in rows for start, end in row.relevant_windows]
        count, edges = np.histogram(seconds, bins=np.arange(0, max(row.duration for row in rows) + 10, 10))
        lengths.stairs(count / len(seconds), edges, color=colours[name], linewidth=1.5)
        sums = [sum(scores) for row in rows for scores in row.saliency_scores]
        share = np.bincount(sums, minlength=ANNOTATORS * TOP_SALIENCY + 1) / len(sums)
        saliency.plot(np.arange(len(share)) / ANNOTATORS, share, marker="o", markersize=3, color=colours[name])
        distance = annotations.annotator_distance(rows)
        distances.plot(distance.measured, marker="o", markersize=3, color=colours[name])
        distances.plot(distance.chance, linestyle=":", color=colours[name])
        covered = np.mean([annotations.frame_labels(row, frames, whole_seconds) for row in rows], axis=0)
        positions.plot((np.arange(frames) + 0.5) / frames, covered, color=colours[name])
    for limit in (10, 30):  # between short, middle and long
        lengths.axvline(limit, color=GREY, linestyle=":", linewidth=1)
    for name, split in splits.items():
        count = np.bincount([min(len(row.query.split()), 30) for row in split], minlength=31)
        words.stairs(count / len(split), np.arange(32) - 0.5, color=colours[name], linewidth=1.5)
    for axes, labels in zip(panels, _WORDS["overview"], strict=False):
        label_shares(axes, *labels)
    for axes in (lengths, words):
        axes.set_xlim(0, None)
    used = [set(_WORD.findall(row.query.lower())) for rows in splits.values() for row in rows]
    commonest = Counter(word for query in used for word in sorted(query - _FUNCTION_WORDS)).most_common(8)
    common.barh([word for word, _ in commonest], [count / len(used) for _, count in commonest], color=GREY)
    common.set(title="Commonest words", xlabel="share of all queries")
    classes = {name: annotations.class_balance(rows, frames, whole_seconds) for name, rows in labelled.items()}
    bars = [(name, split.background_share, split.ratio, colours[name], "") for name, split in classes.items()]
    bars += [("paper", paper_results.BACKGROUND_SHARE, paper_results.CLASS_RATIO, "white", "//")]
    for place, (name, background, ratio, colour, hatch) in enumerate(bars):
        balance.barh(name, background, color=colour, edgecolor=GREY, hatch=hatch)
        balance.text(0.02, place, f"{background:.2%}\n{ratio:.4f} : 1", va="center", fontsize="small", bbox=_READABLE)
    balance.set(title=f"Background, {frames} frames", xlabel="share of frames", xlim=(0, 1))
    for axes in (common, balance):
        axes.invert_yaxis()
    for axes in (positions, common, balance):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles = [Patch(color=colours[name], label=f"{name} ({len(rows):,} queries)") for name, rows in splits.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _counts(axes: Axes, counts: Mapping[str, list[int]], colours: Mapping[str, str]) -> None:
    """Bars: what share of a split's counts are 1, 2, ... and 6 or more."""
    largest = max(max(values) for values in counts.values())
    top = min(6, largest)
    width = 0.8 / len(counts)
    for place, (name, values) in enumerate(counts.items()):
        share = np.bincount(np.minimum(values, top), minlength=top + 1)[1:] / len(values)
        axes.bar(np.arange(1, top + 1) + (place - (len(counts) - 1) / 2) * width, share, width, color=colours[name])
    axes.set_xticks(range(1, top + 1), [*map(str, range(1, top)), f"{top}+" if largest > top else str(top)])


@styled
def frame_strip(frames: np.ndarray, times: Sequence[float], labels: Sequence[int]) -> Figure:
    """Frames, uint8 [f, H, W, 3], in rows of 13, each with its time [f] (s) and label [f]; a 1 has a border."""
    rows, columns = math.ceil(len(frames) / 13), min(13, len(frames))
    figure, panels = new_figure(rows * (0.78 * WIDTH / columns + 0.25), rows, columns)
    for axes in panels[len(frames) :]:
        axes.set_axis_off()
    for axes, frame, time, label in zip(panels, frames, times, labels, strict=False):
        _show_frame(axes, frame, TRUE if label else None)
        axes.set_xlabel(f"{time:.0f} s  {label}", fontsize="small", color=TRUE if label else "black", labelpad=2)
    return figure


@styled
def soft_targets(row: LabelledRow, frames: int) -> Figure:
    """The segmentation targets of one query: a bar for each of `frames` frames, and the annotators' points behind them.

    Scores are divided by 4; the moments are shaded. Raises AnnotationError for a row without labels.
    """
    targets = annotations.soft_targets(row, frames)
    figure, [axes] = new_figure(2.4)
    for start, end in row.relevant_windows:
        axes.axvspan(start, end, color="0.92")
    middles = CLIP_SECONDS * (np.array(row.relevant_clip_ids) + 0.5)
    for number, scores in enumerate(np.reshape(row.saliency_scores, (-1, ANNOTATORS)).T, 1):
        axes.plot(middles, scores / TOP_SALIENCY, ".", label=f"annotator {number}")
    width = 0.8 * row.duration / frames
    axes.bar(frame_times(row.duration, frames), targets, width, color="0.7", label="soft target")
    axes.set(xlabel="seconds (shaded: the moments)", ylabel="saliency / 4", xlim=(0, row.duration))
    axes.set_title(row.query, parse_math=False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def variations(
    frames: np.ndarray, times: Sequence[float], distance: float, choice: Sequence[int], columns: int = 8
) -> Figure:
    """The paper's Figure 4: the frame v_i of `columns` positions and its neighbours, `distance` seconds apart.

    frames: uint8 [variations, f, H, W, 3], the middle variation is v_i; times: [f] seconds. `choice` [f] holds the
    variation that a training sample draws at each position; the drawn ones have a border.
    """
    shown = np.unique(np.linspace(0, len(times) - 1, columns).round().astype(int))
    middle = len(frames) // 2
    figure, panels = new_figure(len(frames) * WIDTH / (len(shown) + 1) + 0.35, len(frames), len(shown))
    for axes, (variation, position) in zip(panels, itertools.product(range(len(frames)), shown), strict=True):
        _show_frame(axes, frames[variation, position], PREDICTED if choice[position] == variation else None)
        name = "frame $v_i$" if variation == middle else f"{(variation - middle) * distance:+.1f} s"
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_xlabel(f"{times[position]:.0f} s")
        axes.label_outer()
    figure.suptitle("with a border: the variations of one training sample", fontsize="small", x=0.01, ha="left")
    return figure


def _show_frame(axes: Axes, frame: np.ndarray, colour: str | None) -> None:
    axes.imshow(frame, aspect="auto", interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=colour is not None, color=colour, linewidth=2.5)


# The prompt

_PLAIN = ("#f2f2f2", "#e2e2e2")  # in turn, so that neighbours can be told apart
_IMAGE = "image (its vectors go here)"
_KINDS = {"text": _PLAIN[0], "control token": SKY, _IMAGE: ORANGE, "answer 1": GREEN, "answer 0": "#b9b9b9"}


@styled
def tokens(pieces: Sequence[tuple[int, str]], columns: int = 118) -> Figure:
    """A tokenised sample, a box for each token, wrapped at `columns` characters.

    pieces: ids and spellings as `framseg.prompt.pieces` gives them. Control tokens, images and the answer's digits
    (those after <|assistant|>) have colours of their own; a newline is shown as ↵ and ▁ is a space.
    """
    figure, [axes] = new_figure(1)
    axes.set_axis_off()
    # DejaVu Sans Mono is 0.602 em wide: the size at which a character fills its column, with a little air.
    size = 0.9 * (WIDTH - 0.1) * 72 / columns / 0.602
    line, column, answer = 0, 0, False
    for place, (_, spelling) in enumerate(pieces):
        kind = _IMAGE if spelling == "<image>" else f"answer {spelling}" if answer else ""
        if spelling.startswith("<|") and spelling.endswith("|>"):
            kind = "control token"
        colour = _KINDS.get(kind, _PLAIN[place % 2])
        text = spelling.replace("<0x0A>", "↵").replace("\n", "↵")
        if column and column + len(text) + 1 > columns:
            line, column = line + 1, 0
        axes.add_patch(Rectangle((column, line + 0.08), len(text) + 0.75, 0.84, facecolor=colour, edgecolor="none"))
        axes.text(column + (len(text) + 0.75) / 2, line + 0.52, text, family="DejaVu Sans Mono", fontsize=size,
                  ha="center", va="center", parse_math=False)  # fmt: skip
        column += len(text) + 1
        answer = answer or spelling == "<|assistant|>"
    figure.set_figheight((line + 1) * 0.165 + 0.35)
    axes.set(xlim=(0, columns), ylim=(line + 1, 0))
    handles = [Patch(color=colour, label=kind) for kind, colour in _KINDS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize="small")
    return figure


# Training

EPOCH_METRICS: dict[str, list[str]] = _WORDS["metrics by epoch"]


def ema(x: Sequence[float], y: Sequence[float], half_life: float = 0.02) -> np.ndarray:
    """Time-weighted exponential moving average of y at ascending x, float64 [n].

    A point's weight halves with every `half_life` (at least 0.001) of the whole range of x, whatever the spacing.
    """
    span = np.ptp(x) * half_life if len(np.unique(x)) > 1 else 1
    weight = 2.0 ** (np.subtract(x, x[:1]) / span)
    return np.cumsum(weight * y) / np.cumsum(weight)


@styled
def losses(steps: Sequence[dict]) -> Figure:
    """The paper's Figure 10: losses by optimizer step, raw and averaged, from the step log (ValueError if empty)."""
    _require(steps, "steps")
    figure, panels = new_figure(3.8, 2, 2, share="x")
    for axes, (key, name) in zip(panels, LOSSES.items(), strict=True):
        _loss_curve(axes, steps, key)
        axes.set_title(name)
    for axes in panels[2:]:
        axes.set_xlabel("optimizer step")
    return figure


@styled
def schedule(steps: Sequence[dict]) -> Figure:
    """Learning rate and four loss weights by optimizer step, from the step log (ValueError if empty)."""
    _require(steps, "steps")
    figure, [rate, weights] = new_figure(2.2, 1, 2)
    _learning_rate(rate, steps)
    x = [line["step"] for line in steps]
    styles = ("-", "-", "--", ":")  # three of the four often coincide
    for place, (key, name) in enumerate(LOSSES.items()):
        values, width = [line["weights"][place] for line in steps], 3 if key == "bce" else 1.8
        weights.plot(x, values, color=LOSS_COLOURS[key], linestyle=styles[place], linewidth=width, label=name)
    weights.set(title="Loss weights", xlabel="optimizer step", ylim=(0, 1.05))
    weights.legend()
    return figure


@styled
def validation(records: Sequence[dict]) -> Figure:
    """`EPOCH_METRICS` on val by epoch, 0 being the untouched base, from the validation log (ValueError if empty)."""
    _require(records, "validations")
    figure, [axes] = new_figure(2.9)
    _metric_curves(axes, records, EPOCH_METRICS)
    labels = [f"{METRICS[key]}  {records[-1]['metrics']['brief'].get(key, np.nan):.2f}" for key in EPOCH_METRICS]
    axes.legend(axes.lines, labels, title="after the last", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def progress(steps: Sequence[dict], validations: Sequence[dict]) -> Figure:
    """A training so far, from the lines of its two logs: the losses, the learning rate, and the validations."""
    _require(steps, "steps")
    figure, [loss, rate, metrics] = new_figure(2.7, 1, 3)
    for key in LOSSES:
        _loss_curve(loss, steps, key)
    loss.set(title="Losses", xlabel="optimizer step")
    _learning_rate(rate, steps)
    for axes in (loss, rate):
        axes.set(xlim=(0, max(steps[-1]["step"], 10)), ylim=(0, None))
    _metric_curves(metrics, validations, ("MR-full-R1@0.7", "MR-full-mAP"))
    last = max([1, *(record["epoch"] for record in validations)])
    metrics.set(title="Decoded val", xlim=(-0.1, last + 0.1))
    metrics.legend(fontsize="small")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOSSES))
    return figure


def _loss_curve(axes: Axes, steps: Sequence[dict], key: str) -> None:
    """A loss, raw and averaged, where it is finite; labelled with its name and last value."""
    points = np.array([(line["step"], line[key]) for line in steps], dtype=np.float64)
    points = points[np.isfinite(points).all(axis=1)]
    label = f"{LOSSES[key]} {points[-1, 1]:.3f}" if len(points) else LOSSES[key]
    marker = "." if len(points) == 1 else ""
    axes.plot(*points.T, color=LOSS_COLOURS[key], alpha=0.3, linewidth=0.8)
    axes.plot(points[:, 0], ema(*points.T), color=LOSS_COLOURS[key], linewidth=1.8, marker=marker, label=label)


def _learning_rate(axes: Axes, steps: Sequence[dict]) -> None:
    rates = [line["learning_rate"] for line in steps]
    axes.plot([line["step"] for line in steps], rates, color="black", marker="." if len(steps) == 1 else "")
    axes.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _metric_curves(axes: Axes, records: Sequence[dict], keys: Iterable[str]) -> None:
    """Metrics by epoch; one that was not scored leaves a gap."""
    for key in keys:
        marker, colour = EPOCH_METRICS[key]
        values = [record["metrics"]["brief"].get(key, np.nan) for record in records]
        axes.plot([record["epoch"] for record in records], values, marker=marker, color=colour, label=METRICS[key])
    axes.set(xlabel="epoch", ylabel="%", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


class Live:
    """The `progress` figure in a notebook's output, drawn anew with each call; `train.launch` calls it."""

    handle: DisplayHandle | None = None

    def __call__(self, steps: Sequence[dict], validations: Sequence[dict]) -> None:
        """Draw the lines that both logs hold by now."""
        figure = progress(steps, validations)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


def _require(lines: Sequence[dict], what: str) -> None:
    if not lines:
        raise ValueError(f"no {what} are logged yet: train first")


# Evaluation


@styled
def comparison(metrics: Mapping[str, dict]) -> Figure:
    """Metrics in the official layout by name of the answers, the first being the model's, a panel for each metric."""
    figure, panels = new_figure(0.6 + 0.24 * len(metrics), 1, len(METRICS), share="y")
    for axes, (key, title) in zip(panels, METRICS.items(), strict=True):
        values = [scored["brief"].get(key) for scored in metrics.values()]
        colours = [PROBABILITY] + ["#c4c4c4"] * (len(values) - 1)
        axes.barh(list(metrics), [value or 0 for value in values], color=colours, height=0.75)
        for place, value in enumerate(values):
            axes.text((value or 0) + 2, place, "–" if value is None else f"{value:.1f}", va="center", fontsize="small",
                      fontweight="bold" if place == 0 else "normal")  # fmt: skip
        axes.set(title=title, xlim=(0, 125), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    panels[0].invert_yaxis()  # shared
    return figure


@styled
def intervals(systems: Mapping[str, dict]) -> Figure:
    """Scores with their intervals, a panel for each metric; the last system has a colour of its own.

    systems: name -> {"scores": {metric: percent}, "interval": {metric: (low, high)}}, all with the same metrics.
    """
    metrics = list(next(iter(systems.values()))["scores"])
    figure, panels = new_figure(0.7 + 0.24 * len(systems), 1, len(metrics), share="y")
    for axes, metric in zip(panels, metrics, strict=True):
        for place, system in enumerate(systems.values()):
            colour = PROBABILITY if place == len(systems) - 1 else "#8a8a8a"
            axes.plot(system["interval"][metric], [place, place], color=colour, linewidth=1.5)
            axes.plot(system["scores"][metric], place, "o", color=colour)
        axes.set(title=metric, yticks=range(len(systems)), yticklabels=list(systems), ylim=(len(systems) - 0.5, -0.5))
    return figure


# One query


def predicted_curve(prediction: dict, duration: float) -> tuple[np.ndarray, np.ndarray, str]:
    """The curve of a prediction: seconds [n], values 0..1 [n], its name.

    Frame probabilities where the prediction has them, else clip scores, stretched to 0..1 if they leave it, else empty.
    """
    if prediction.get("probability"):
        values = np.asarray(prediction["probability"], dtype=np.float64)
        return frame_times(duration, len(values)), values, "frame probability"
    values = np.asarray(prediction.get(SALIENCY, [])[: max(annotations.clips(duration), 1)], dtype=np.float64)
    seconds = (np.arange(len(values)) + 0.5) * CLIP_SECONDS
    if len(values) and (values.min() < 0 or values.max() > 1):
        values = (values - values.min()) / max(np.ptp(values), 1e-9)
        return seconds, values, "clip score, stretched to 0..1"
    return seconds, values, "clip score"


def confidence(prediction: dict, duration: float) -> float:
    """How sure a prediction is of its first window, 0..1: the mean probability of the frames whose times lie in it.

    A prediction without frame probabilities, or with no frame there, has the window's own score; without windows 0.
    """
    if not prediction.get(WINDOWS):
        return 0.0
    start, end, score = prediction[WINDOWS][0]
    probability = np.asarray(prediction.get("probability") or [], dtype=np.float64)
    times = frame_times(duration, len(probability))
    inside = probability[(times >= start) & (times <= end)]
    return float(inside.mean()) if len(inside) else float(score)


def lanes(prediction: dict, duration: float, most: int = 4) -> tuple[list[list[tuple]], int]:
    """Predicted windows as (rank from 1, start, end, score), in as few lanes as keep overlapping windows apart.

    Windows that only fill the list (the whole video at score 0) are dropped. Returns at most `most` lanes and the
    number of windows for which they have no room.
    """
    out: list[list[tuple]] = [[] for _ in range(most)]
    left_out = 0
    for rank, (start, end, score) in enumerate(prediction.get(WINDOWS, []), 1):
        if rank > 1 and score == 0 and start <= 0 and end >= duration:
            continue
        lane = next((lane for lane in out if all(end <= other[1] or start >= other[2] for other in lane)), None)
        if lane is None:
            left_out += 1
        else:
            lane.append((rank, start, end, score))
    return [lane for lane in out if lane], left_out


def scores(row: Row, prediction: dict) -> str:
    """What the prediction scored, as text: IoU of the first window, highlight hit or missed, the window's score."""
    parts = []
    if isinstance(row, LabelledRow):
        number = per_query([prediction], [row])[0]
        parts += [f"IoU {number['iou']:.2f}"] if "iou" in number else []
        parts += [f"highlight {'hit' if number['hit'] else 'missed'}"] if "hit" in number else []
    parts += [f"window score {prediction[WINDOWS][0][2]:.2f}"] if WINDOWS in prediction else []
    parts += ["invalid mask, read as all ones"] if prediction.get("valid") is False else []
    return " · ".join(parts)


@styled
def qualitative(
    row: Row,
    prediction: dict,
    frames: np.ndarray | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    against: tuple[str, dict] | None = None,
) -> Figure:
    """The paper's Figures 2, 3, 5 to 9: frames, true and predicted windows, predicted curve over the true saliency.

    frames: uint8 [f, H, W, 3] at `times` [f] seconds (by default the middles of f equal parts); in nine equal slots the
    one nearest to its middle is drawn; without frames the figure says so. `against`: name and record of another
    prediction, which is drawn as well. A row without labels has no true windows and saliency; a qid below 0 (your own
    video) is not shown, the `notes` of an answer are.
    """
    t = row.duration
    named = [("predicted", prediction), *([against] if against else [])]
    levels = sum(max(len(lanes(record, t)[0]), 1) for _, record in named) + isinstance(row, LabelledRow)
    title = textwrap.wrap(f"“{row.query}”", 88) or [""]
    heights = [0.62 if frames is not None else 0.16, 0.17 * levels + 0.08, 1.35]
    about = [" · ".join(([f"qid {row.qid}"] if row.qid >= 0 else []) + [row.vid, scores(row, prediction)])]
    about += [line for note in prediction.get("notes", []) for line in textwrap.wrap(note, 110)]
    height = sum(heights) + 0.58 + 0.17 * (len(title) + len(about))
    figure, [strip, spans, curve] = new_figure(height, 3, share="x", ratios=heights)
    figure.suptitle("\n".join(title), x=0.01, ha="left", fontweight="bold", fontsize="medium", parse_math=False)
    strip.set_title("\n".join(about), fontsize="small", fontweight="normal", parse_math=False)
    if frames is None:
        strip.text(0, 0.5, "No frames are shown: there are none of this video.", va="center", fontsize="small",
                   style="italic", transform=strip.transAxes)  # fmt: skip
    else:
        times = frame_times(t, len(frames)) if times is None else np.asarray(times)
        slots = min(9, len(frames))
        slot = t / slots
        for middle in (np.arange(slots) + 0.5) * slot:
            nearest = int(np.abs(times - middle).argmin())
            strip.imshow(frames[nearest], extent=(middle - 0.48 * slot, middle + 0.48 * slot, 0, 1), aspect="auto")
            strip.text(middle, 0.03, f"{times[nearest]:.0f} s", ha="center", va="bottom", fontsize="x-small",
                       bbox=_READABLE)  # fmt: skip
        strip.set_ylim(0, 1)
    strip.tick_params(left=False, bottom=False, labelleft=False)
    strip.spines[:].set_visible(False)
    _windows_on_axis(spans, row, named)
    _curves_on_axis(curve, row, named)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _windows_on_axis(axes: Axes, row: Row, named: Sequence[tuple[str, dict]]) -> None:
    """True windows, and under them each prediction's in their lanes, with their scores."""
    ticks = {"true": 0} if isinstance(row, LabelledRow) else {}
    level = len(ticks)
    for start, end in getattr(row, "relevant_windows", ()):
        axes.barh(0, end - start, left=start, height=0.7, color=TRUE, hatch="////", edgecolor="white", lw=0)
    for (name, record), colour in zip(named, (PREDICTED, OTHER), strict=False):
        ticks[name] = level
        filled, left_out = lanes(record, row.duration)
        for lane in filled or [[]]:
            for rank, start, end, score in lane:
                axes.barh(level, end - start, left=start, height=0.7, color=colour, alpha=1 if rank == 1 else 0.55)
                axes.text((start + end) / 2, level, f"{score:.2f}", ha="center", va="center", fontsize="x-small",
                          color="white" if rank == 1 else "black", clip_on=True)  # fmt: skip
            level += 1
        if left_out:
            axes.text(row.duration, level - 1, f" +{left_out}", va="center", fontsize="x-small")
    axes.set(ylim=(level - 0.5, -0.5), yticks=list(ticks.values()), yticklabels=list(ticks))
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)


def _curves_on_axis(axes: Axes, row: Row, named: Sequence[tuple[str, dict]]) -> None:
    """Each prediction's curve over the true saliency."""
    if isinstance(row, LabelledRow):
        truth = annotations.clip_saliency(row)
        edges = np.minimum(np.arange(len(truth) + 1) * float(CLIP_SECONDS), row.duration)
        axes.stairs(truth, edges, fill=True, color=TRUE, alpha=0.3, label="true saliency (mean of annotators / 4)")
        axes.stairs(truth, edges, color=TRUE, linewidth=0.8)
    for place, (prediction, record) in enumerate(named):
        seconds, values, curve = predicted_curve(record, row.duration)
        if len(values):
            colour, line, prefix = (OTHER, "--", f"{prediction}: ") if place else (PROBABILITY, "-", "")
            marker = "o" if curve == "frame probability" else ""
            axes.plot(seconds, values, line, color=colour, marker=marker, markersize=3, label=f"{prefix}{curve}")
    axes.set(xlabel="seconds", ylim=(-0.02, 1.05), xlim=(0, row.duration), yticks=[0, 0.5, 1])
    axes.grid(linewidth=0.4)


# The queries of the qualitative figures

RULES = {name: rule["words"] for name, rule in _WORDS["rules"].items()}


def choose(
    rows: Sequence[Row], predictions: Sequence[dict], numbers: Sequence[dict], earlier: Sequence[dict] | None = None
) -> dict[str, int]:
    """The queries of the paper's qualitative figures by the rules in `RULES`: name -> qid, each query once.

    numbers: `framseg.evaluate.per_query` of the predictions; `earlier`: the same of an earlier epoch. Of equals the
    smaller qid is taken; a name whose rule no query meets is left out. AnnotationError for rows without labels.
    """
    row_of = {row.qid: row for row in annotations.labelled(rows)}
    record_of = {record["qid"]: record for record in predictions}
    before = {number["qid"]: number.get("iou", 0.0) for number in earlier or []}
    lines = []
    for number in sorted(numbers, key=lambda number: number["qid"]):
        qid, iou, hit = number["qid"], number.get("iou", 0.0), number.get("hit", False)
        likeness, excess = _likeness(row_of[qid], record_of[qid])
        sure, gain = confidence(record_of[qid], row_of[qid].duration), iou - before.get(qid, iou)
        lines.append((qid, iou, hit, sure, likeness, -likeness, excess, gain))
    measures = pd.DataFrame(lines, columns="qid iou hit confidence likeness unlikeness excess gain".split())
    chosen: dict[str, int] = {}
    for name, rule in _WORDS["rules"].items():
        qualified = measures[~measures["qid"].isin(chosen.values())].query(rule["condition"])
        if len(qualified):
            chosen[name] = int(qualified["qid"].iloc[qualified[rule["largest"]].argmax()])  # the first of equals
    return chosen


def _likeness(row: LabelledRow, prediction: dict) -> tuple[float, float]:
    """Correlation of the predicted curve with the true saliency, and its mean excess over it in the true windows."""
    truth = annotations.clip_saliency(row)
    seconds, values, _ = predicted_curve(prediction, row.duration)
    if not len(values):
        return -1.0, -1.0
    curve = np.interp((np.arange(len(truth)) + 0.5) * CLIP_SECONDS, seconds, values)
    inside = list(row.relevant_clip_ids)
    excess = (curve[inside] - truth[inside]).mean()
    varied = curve.std() * truth.std() * len(truth) > 1e-12
    correlation = np.corrcoef(curve, truth)[0, 1] if varied else 0.0
    return round(float(correlation), 9), round(float(excess), 9)  # the last bits would tell equals apart
