"""The paper's figures, each from plain values: rows, predictions, frames, log lines.

Every function returns a figure that shows itself as the last line of a notebook cell; pyplot is not used, so nothing
stays open. One style for all: seaborn's colour-blind palette, and what matters also differs in form (filled against
line, hatched against plain), so that a print in grey can be read. `save` writes PNG and PDF.
"""

import functools
import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from framseg import annotations
from framseg.annotations import (
    ANNOTATORS,
    CLIP_SECONDS,
    TOP_SALIENCY,
    LabelledRow,
    Row,
    annotator_distance,
    class_balance,
    clips,
    frame_labels,
    frame_times,
)
from framseg.evaluate import METRICS, per_query
from framseg.predictions import SALIENCY, WINDOWS
from framseg.viz import paper_results

BLUE, ORANGE, GREEN, RED, PINK, BROWN, _, GREY, _, SKY = sns.color_palette("colorblind").as_hex()
TRUE, PREDICTED, PROBABILITY, OTHER = GREEN, RED, BLUE, GREY
STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=0.95),
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so pictures look the same everywhere
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, PINK]),
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # text stays text
}
WIDTH = 7.2  # inches: the width of a page's text
DPI = 160

LOSSES = {"lm": "LM", "bce": "BCE", "tversky": "Tversky", "dice": "generalized Dice"}

CORRECT, MISSED = 0.7, 0.5  # IoU of the first window: correct from here on, missed below
WRONG, CONFIDENT = 0.3, 0.8  # over-confident: an IoU below the one, with a `confidence` of the other or more

RULES = {
    "good highlight, weak moment": f"highlight hit and IoU below {WRONG}: the curve closest to the true saliency",
    "perfect moment, over-inclusive highlight": "IoU of at least 0.9: the curve that exceeds the true saliency most "
    "inside the true windows",
    "failure": "IoU 0 and no highlight hit: the curve least like the true saliency",
    "over-confident": f"IoU below {WRONG} and confidence (mean frame probability in the first window) of at least "
    f"{CONFIDENT}: the highest",
    "excellent": "highlight hit and IoU of at least 0.9: the curve closest to the true saliency",
    "improvement": f"IoU of at least {CORRECT}: the one that grew most since the earlier predictions",
}


class Picture(Figure):
    """A figure that keeps the style whenever it is drawn (ticks are made only then) and shows itself in a notebook."""

    def draw(self, renderer):
        with mpl.rc_context(STYLE):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=DPI)
        return out.getvalue()


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `folder`/`name`.png and .pdf, the same bytes for the same figure; returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    with mpl.rc_context(STYLE):
        figure.savefig(paths[0], dpi=2 * DPI)
        figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def _styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(function)
    def draw(*arguments, **options):
        with mpl.rc_context(STYLE):
            return function(*arguments, **options)

    return draw


def _picture(height: float) -> Picture:
    return Picture(figsize=(WIDTH, height), layout="constrained", dpi=DPI)


# The data


@_styled
def data_overview(splits: Mapping[str, Sequence[Row]], frames: int) -> Figure:
    """Nine panels over the splits by name: queries a video, windows a query, window lengths; clip saliency, how far two
    annotators of a clip are apart, the share of queries whose moments cover each position of the video; words a query,
    the commonest words, and the class balance of `frames` frames a video beside the paper's. Splits without labels are
    in the panels about videos and words only.
    """
    labelled = {name: [row for row in rows if isinstance(row, LabelledRow)] for name, rows in splits.items()}
    labelled = {name: rows for name, rows in labelled.items() if rows}
    if not labelled:
        raise ValueError(f"none of the splits {', '.join(splits)} has labels; give at least one that has")
    colours = dict(zip(splits, sns.color_palette("colorblind", len(splits)), strict=True))
    figure = _picture(6.6)
    (videos, counts, lengths), (saliency, apart, position), (sizes, words, balance) = figure.subplots(3, 3)

    _shares(videos, {name: list(Counter(row.vid for row in rows).values()) for name, rows in splits.items()}, colours)
    videos.set(title="Queries a video", xlabel="queries", ylabel="share of videos")
    _shares(counts, {name: [len(row.relevant_windows) for row in rows] for name, rows in labelled.items()}, colours)
    counts.set(title="Windows a query", xlabel="windows", ylabel="share of queries")

    for name, rows in labelled.items():
        seconds = [end - start for row in rows for start, end in row.relevant_windows]
        longest = max(row.duration for row in rows)
        share, edges = np.histogram(seconds, bins=np.arange(0, longest + 10, 10))
        lengths.stairs(share / len(seconds), edges, color=colours[name], linewidth=1.5)
        sums = [sum(three) for row in rows for three in row.saliency_scores]
        share = np.bincount(sums, minlength=ANNOTATORS * TOP_SALIENCY + 1) / len(sums)
        saliency.plot(np.arange(len(share)) / ANNOTATORS, share, marker="o", markersize=3, color=colours[name])
        found = annotator_distance(rows)
        apart.plot(found.measured, marker="o", markersize=3, color=colours[name])
        apart.plot(found.chance, linestyle=":", color=colours[name])
        covered = np.mean([frame_labels(row, frames) for row in rows], axis=0)
        position.plot((np.arange(frames) + 0.5) / frames, covered, color=colours[name])
    for limit in (10, 30):  # short, middle, long
        lengths.axvline(limit, color=GREY, linestyle=":", linewidth=1)
    lengths.set(title="Window lengths", xlabel="seconds (dotted: 10 and 30)", ylabel="share of windows", xlim=(0, None))
    saliency.set(title="Clip saliency", xlabel="mean of three annotators", ylabel="share of relevant clips")
    apart.set(title="Annotators apart", xlabel="points (dotted: by chance)", ylabel="pairs of annotators")
    position.set(title="Where moments lie", xlabel="position in the video", ylabel="queries covering it")
    position.xaxis.set_major_formatter(PercentFormatter(1))

    spoken = {name: [set(_WORD.findall(row.query.lower())) for row in rows] for name, rows in splits.items()}
    for name, rows in splits.items():
        many = [len(row.query.split()) for row in rows]
        share = np.bincount(np.minimum(many, 30), minlength=31) / len(many)
        sizes.stairs(share, np.arange(32) - 0.5, color=colours[name], linewidth=1.5)
    sizes.set(title="Words a query", xlabel="words (30: or more)", ylabel="share of queries", xlim=(0, None))
    for axes in (lengths, saliency, apart, position, sizes):
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    everyone = [one for queries in spoken.values() for one in queries]
    common = Counter(word for query in everyone for word in sorted(query - _FUNCTION_WORDS)).most_common(8)
    words.barh([word for word, _ in common], [many / len(everyone) for _, many in common], color=GREY)
    words.invert_yaxis()
    words.set(title="Commonest words", xlabel="share of all queries")
    words.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    found = {name: class_balance(rows, frames) for name, rows in labelled.items()}
    bars = [(name, b.background_share, b.ratio) for name, b in found.items()] + [
        ("paper", paper_results.BACKGROUND_SHARE, paper_results.CLASS_RATIO)
    ]
    for name, share, ratio in bars:
        balance.barh(name, share, color=colours.get(name, "white"), edgecolor=GREY, hatch="" if name in found else "//")
        balance.text(0.02, name, f"{share:.2%}\n{ratio:.4f} : 1", va="center", fontsize="small", bbox=_READABLE)
    balance.invert_yaxis()
    balance.set(title=f"Background, {frames} frames", xlabel="share of frames", xlim=(0, 1))
    balance.xaxis.set_major_formatter(PercentFormatter(1))
    handles = [Patch(color=colours[name], label=f"{name} ({len(rows):,} queries)") for name, rows in splits.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


_WORD = re.compile(r"[^\W\d_]+")
# Words of English that say nothing of what a query is about.
_FUNCTION_WORDS = frozenset(
    "a an the and or but of in on at to into onto from with without for by as about is are was be been being has have "
    "had do does her his him he she it its they them their there this that while who which up down out off over some "
    "one s".split()
)
_READABLE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.2"}


def _shares(axes: Axes, numbers: Mapping[str, list[int]], colours: Mapping[str, Any], most: int = 6) -> None:
    """Bars: what share of each split has 1, 2, ... and `most` or more."""
    top = min(most, max(max(values) for values in numbers.values()))
    width = 0.8 / len(numbers)
    for place, (name, values) in enumerate(numbers.items()):
        share = np.bincount(np.minimum(values, top), minlength=top + 1)[1:] / len(values)
        left = np.arange(1, top + 1) + (place - (len(numbers) - 1) / 2) * width
        axes.bar(left, share, width, color=colours[name])
    more = max(max(values) for values in numbers.values()) > top
    axes.set_xticks(range(1, top + 1), [*map(str, range(1, top)), f"{top}+" if more else str(top)])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@_styled
def frame_strip(
    frames: np.ndarray, times: Sequence[float], labels: Sequence[int] | None = None, columns: int = 13
) -> Figure:
    """All frames of a video in rows of `columns`, each with its time in seconds.

    frames: uint8 [f, H, W, 3]; times: [f]. With `labels` (0 and 1, [f]) the digit stands beside the time and frames
    with a 1 are framed.
    """
    rows = -(-len(frames) // columns)
    columns = min(columns, len(frames))
    figure = _picture(rows * (0.78 * WIDTH / columns + 0.25))
    for place, axes in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        if place >= len(frames):
            axes.set_axis_off()
            continue
        inside = labels is not None and labels[place] == 1
        _show(axes, frames[place], TRUE if inside else None)
        digit = "" if labels is None else f"  {labels[place]}"
        axes.set_xlabel(f"{times[place]:.0f} s{digit}", fontsize="small", color=TRUE if inside else "black", labelpad=2)
    return figure


@_styled
def soft_targets(row: LabelledRow, frames: int) -> Figure:
    """The segmentation targets of one query: a bar for each of `frames` frames, and the annotators' points behind them.

    Saliency is divided by 4, so that all heights are 0 to 1; the moments are shaded. Raises AnnotationError for a row
    without labels.
    """
    targets = annotations.soft_targets(row, frames)
    figure = _picture(2.4)
    axes = figure.add_subplot()
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


@_styled
def variations(
    frames: np.ndarray,
    times: Sequence[float],
    distance: float,
    choice: Sequence[int] | None = None,
    columns: int = 8,
) -> Figure:
    """Figure 4: each position's frame v_i and its neighbours, `distance` seconds apart; `columns` positions are shown.

    frames: uint8 [variations, f, H, W, 3], the middle one v_i; times: [f] seconds. `choice` [f] are the variations one
    training sample draws; they are framed.
    """
    shown = np.unique(np.linspace(0, len(times) - 1, columns).round().astype(int))
    middle = len(frames) // 2
    figure = _picture(len(frames) * WIDTH / (len(shown) + 1) + 0.35)
    grid = figure.subplots(len(frames), len(shown), squeeze=False)
    for variation, line in enumerate(grid):
        for axes, position in zip(line, shown, strict=True):
            drawn = choice is not None and choice[position] == variation
            _show(axes, frames[variation, position], PREDICTED if drawn else None)
            if variation == len(frames) - 1:
                axes.set_xlabel(f"{times[position]:.0f} s")
        seconds = (variation - middle) * distance
        name = "frame $v_i$" if variation == middle else f"{seconds:+.1f} s"
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    if choice is not None:
        figure.suptitle("framed: the variations one training sample draws", fontsize="small", x=0.01, ha="left")
    return figure


def _show(axes: Axes, frame: np.ndarray, colour: str | None) -> None:
    axes.imshow(frame, aspect="auto", interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=2.5)


# The prompt

_KINDS = {"text": ("#f2f2f2", "#e2e2e2"), "control token": (SKY,), "image (its vectors go here)": (ORANGE,)}
_DIGITS = {"1": GREEN, "0": "#b9b9b9"}


@_styled
def tokens(pieces: Sequence[tuple[int, str]], columns: int = 118) -> Figure:
    """A tokenised sample, one box a token, wrapped at `columns` characters.

    pieces: ids and spellings as `framseg.prompt.pieces` gives them. Control tokens, images and the answer's digits
    (those after <|assistant|>) have colours of their own; a newline is shown as ↵ and ▁ is a space.
    """
    boxes, line, column, answer = [], 0, 0, False
    for place, (_, spelling) in enumerate(pieces):
        control = spelling.startswith("<|") and spelling.endswith("|>")
        if control:
            colour = _KINDS["control token"][0]
        elif spelling == "<image>":
            colour = _KINDS["image (its vectors go here)"][0]
        elif answer and spelling in _DIGITS:
            colour = _DIGITS[spelling]
        else:
            colour = _KINDS["text"][place % 2]
        text = spelling.replace("<0x0A>", "↵").replace("\n", "↵")
        if column and column + len(text) + 1 > columns:
            line, column = line + 1, 0
        boxes.append((column, line, text, colour))
        column += len(text) + 1
        answer = answer or spelling == "<|assistant|>"

    lines = boxes[-1][1] + 1 if boxes else 1
    figure = _picture(lines * 0.165 + 0.35)
    axes = figure.add_subplot()
    axes.set(xlim=(0, columns), ylim=(lines, 0))
    axes.set_axis_off()
    # DejaVu Sans Mono is 0.602 em wide: the size at which a character fills its column, with a little air.
    size = 0.9 * (WIDTH - 0.1) * 72 / columns / 0.602
    for left, line, text, colour in boxes:
        axes.add_patch(Rectangle((left, line + 0.08), len(text) + 0.75, 0.84, facecolor=colour, edgecolor="none"))
        axes.text(left + (len(text) + 0.75) / 2, line + 0.52, text, family="DejaVu Sans Mono", fontsize=size,
                  ha="center", va="center", parse_math=False)  # fmt: skip
    handles = [Patch(color=colours[0], label=kind) for kind, colours in _KINDS.items()]
    handles += [Patch(color=colour, label=f"answer {digit}") for digit, colour in _DIGITS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize="small")
    return figure


# Training


def ema(x: Sequence[float], y: Sequence[float], half_life: float = 0.02) -> np.ndarray:
    """Time-weighted exponential moving average of y at ascending x, float64 [n].

    A point's weight halves with every `half_life` of the whole range of x, so uneven spacing does no harm; the weights
    up to each point sum to 1.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    span = (x[-1] - x[0]) * half_life if len(x) > 1 else 0
    out = np.empty(len(y))
    total = weight = 0.0
    for i, value in enumerate(y):
        keep = 0.5 ** ((x[i] - x[i - 1]) / span) if i and span else 0.0
        total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight
    return out


def _finite(steps: Sequence[dict], key: str) -> np.ndarray:
    """(step, value) of the lines whose value is a finite number, float64 [n, 2]."""
    points = np.array([(line["step"], line[key]) for line in steps], dtype=np.float64)
    return points[np.isfinite(points).all(axis=1)]


@_styled
def losses(steps: Sequence[dict]) -> Figure:
    """Figure 10: the four losses by optimizer step, a faint raw curve under its time-weighted EMA.

    steps: lines of the step log. Values that are not finite are left out.
    """
    _some(steps, "steps")
    figure = _picture(3.8)
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (key, name), colour in zip(grid.flat, LOSSES.items(), (BLUE, ORANGE, GREEN, PINK), strict=True):
        points = _finite(steps, key)
        axes.plot(*points.T, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(points[:, 0], ema(*points.T), color=colour, linewidth=1.8, marker="." if len(points) == 1 else "")
        axes.set_title(name)
    for axes in grid[1]:
        axes.set_xlabel("optimizer step")
    return figure


@_styled
def schedule(steps: Sequence[dict]) -> Figure:
    """Learning rate and the four loss weights, by optimizer step; `steps` are lines of the step log."""
    _some(steps, "steps")
    figure = _picture(2.2)
    rate, weights = figure.subplots(1, 2)
    x = [line["step"] for line in steps]
    rate.plot(x, [line["learning_rate"] for line in steps], color="black")
    rate.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    styles = ("-", "-", "--", ":")  # three of the four often coincide
    for place, (name, colour) in enumerate(zip(LOSSES.values(), (BLUE, ORANGE, GREEN, PINK), strict=True)):
        values = [line["weights"][place] for line in steps]
        weights.plot(x, values, color=colour, linestyle=styles[place], linewidth=3 if place == 1 else 1.8, label=name)
    weights.set(title="Loss weights", xlabel="optimizer step", ylim=(0, 1.05))
    weights.legend()
    return figure


@_styled
def validation(records: Sequence[dict]) -> Figure:
    """R1@0.5, R1@0.7, mAP and HIT@1 (very good) on val by epoch; epoch 0 is the untouched base.

    records: lines of the validation log, {"epoch": int, "metrics": official layout}.
    """
    _some(records, "validations")
    figure = _picture(2.9)
    axes = figure.add_subplot()
    epochs = [record["epoch"] for record in records]
    chosen = [key for key in METRICS if key != "HL-min-VeryGood-mAP"]
    for key, marker, colour in zip(chosen, "os^D", (BLUE, ORANGE, GREEN, PINK), strict=True):
        values = [record["metrics"]["brief"].get(key, np.nan) for record in records]
        axes.plot(epochs, values, marker=marker, color=colour, label=f"{METRICS[key]}  {values[-1]:.2f}")
    axes.set(xlabel="epoch", ylabel="%", ylim=(0, 100))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="after the last", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@_styled
def progress(steps: Sequence[dict], validations: Sequence[dict]) -> Figure:
    """A training so far: the four losses (EMA over a faint raw curve), the learning rate, and the validations."""
    _some(steps, "steps")
    figure = _picture(2.7)
    fall, rate, answers = figure.subplots(1, 3)
    x = [line["step"] for line in steps]
    dot = "." if len(steps) == 1 else ""
    for (key, name), colour in zip(LOSSES.items(), (BLUE, ORANGE, GREEN, PINK), strict=True):
        points = _finite(steps, key)
        fall.plot(*points.T, color=colour, alpha=0.3, linewidth=0.8)
        label = f"{name} {points[-1, 1]:.3f}" if len(points) else name
        fall.plot(points[:, 0], ema(*points.T), color=colour, linewidth=1.8, marker=dot, label=label)
    steps_axis = {"xlabel": "optimizer step", "xlim": (0, max(x[-1], 10)), "ylim": (0, None)}
    fall.set(title="Losses", **steps_axis)
    rate.plot(x, [line["learning_rate"] for line in steps], color="black", marker=dot)
    rate.set(title="Learning rate", **steps_axis)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    epochs = [record["epoch"] for record in validations]
    for key, marker, colour in zip(("MR-full-R1@0.7", "MR-full-mAP"), "os", (BLUE, GREEN), strict=True):
        values = [record["metrics"]["brief"].get(key, np.nan) for record in validations]
        answers.plot(epochs, values, marker=marker, color=colour, label=METRICS[key])
    answers.set(title="Decoded val", xlabel="epoch", ylabel="%", xlim=(-0.1, max([1, *epochs]) + 0.1), ylim=(0, 100))
    answers.xaxis.set_major_locator(MaxNLocator(integer=True))
    answers.legend(fontsize="small")
    figure.legend(*fall.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOSSES))
    return figure


class Live:
    """One picture in a notebook's output that is drawn anew with each call; `train.launch` calls it."""

    def __init__(self):
        self.handle = None

    def __call__(self, steps: Sequence[dict], validations: Sequence[dict]) -> None:
        from IPython.display import display

        figure = progress(steps, validations)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


def _some(lines: Sequence[dict], what: str) -> None:
    if not lines:
        raise ValueError(f"no {what} are logged yet: train first")


# Evaluation


@_styled
def comparison(metrics: Mapping[str, dict]) -> Figure:
    """The first answer (the model's) beside the others, a panel a metric.

    metrics: name -> metrics in the official layout; what an answer was not scored for stays empty.
    """
    figure = _picture(0.6 + 0.24 * len(metrics))
    for axes, (key, title) in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS.items(), strict=True):
        values = [found["brief"].get(key) for found in metrics.values()]
        colours = [PROBABILITY] + ["#c4c4c4"] * (len(values) - 1)
        axes.barh(list(metrics), [value or 0 for value in values], color=colours, height=0.75)
        for place, value in enumerate(values):
            axes.text((value or 0) + 2, place, "–" if value is None else f"{value:.1f}", va="center", fontsize="small",
                      fontweight="bold" if place == 0 else "normal")  # fmt: skip
        axes.set(title=title, xlim=(0, 125), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    axes.invert_yaxis()  # shared
    return figure


@_styled
def intervals(systems: Mapping[str, dict]) -> Figure:
    """Scores with their intervals, a panel a metric, the last system set apart.

    systems: name -> {"scores": {metric: percent}, "interval": {metric: (low, high)}}, all with the same metrics.
    """
    figure = _picture(0.7 + 0.24 * len(systems))
    metrics = list(next(iter(systems.values()))["scores"])
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        for place, found in enumerate(systems.values()):
            colour = PROBABILITY if place == len(systems) - 1 else "#8a8a8a"
            axes.plot(found["interval"][metric], [place, place], color=colour, linewidth=1.5)
            axes.plot(found["scores"][metric], place, "o", color=colour)
        axes.set(title=metric, yticks=range(len(systems)), yticklabels=list(systems), ylim=(len(systems) - 0.5, -0.5))
    return figure


# One query


def true_saliency(row: Row) -> np.ndarray:
    """Mean of the annotators over 4 for every 2-second clip, float64 [clips, a last shorter one included], 0..1."""
    out = np.zeros(math.ceil(row.duration / CLIP_SECONDS))
    out[list(row.relevant_clip_ids)] = np.reshape(row.saliency_scores, (-1, ANNOTATORS)).mean(axis=1) / TOP_SALIENCY
    return out


def predicted_curve(prediction: dict, duration: float) -> tuple[np.ndarray, np.ndarray, str]:
    """The curve of a prediction: seconds [n], values 0..1 [n], its name.

    The frame probabilities where the prediction has them, else its clip scores, stretched to 0..1 if they leave it;
    empty where it has neither.
    """
    if prediction.get("probability"):
        values = np.asarray(prediction["probability"], dtype=np.float64)
        return frame_times(duration, len(values)), values, "frame probability"
    values = np.asarray(prediction.get(SALIENCY, [])[: max(clips(duration), 1)], dtype=np.float64)
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
    times = frame_times(duration, len(probability)) if len(probability) else probability
    inside = probability[(times >= start) & (times <= end)]
    return float(inside.mean()) if len(inside) else float(score)


def lanes(prediction: dict, duration: float, most: int = 4) -> tuple[list[list[tuple[int, float, float, float]]], int]:
    """Predicted windows as (rank from 1, start, end, score), put in as few lanes as keep overlapping ones apart.

    Windows that only fill the list (the whole video at score 0) are dropped. Returns at most `most` lanes and the
    number of windows that found no room.
    """
    out: list[list[tuple[int, float, float, float]]] = []
    left_out = 0
    for rank, (start, end, score) in enumerate(prediction.get(WINDOWS, []), 1):
        if rank > 1 and score == 0 and start <= 0 and end >= duration:
            continue
        lane = next((lane for lane in out if all(end <= other[1] or start >= other[2] for other in lane)), None)
        if lane is not None:
            lane.append((rank, start, end, score))
        elif len(out) < most:
            out.append([(rank, start, end, score)])
        else:
            left_out += 1
    return out, left_out


def scores(row: Row, prediction: dict) -> str:
    """What the prediction scored, in words: IoU of the first window, highlight hit or miss, its score."""
    said = []
    if isinstance(row, LabelledRow):
        number = per_query([prediction], [row])[0]
        said += [f"IoU {number['iou']:.2f}"] if "iou" in number else []
        said += [f"highlight {'hit' if number['hit'] else 'missed'}"] if "hit" in number else []
    said += [f"window score {prediction[WINDOWS][0][2]:.2f}"] if WINDOWS in prediction else []
    said += ["invalid mask, read as all ones"] if prediction.get("valid") is False else []
    return " · ".join(said)


@_styled
def qualitative(
    row: Row,
    prediction: dict,
    frames: np.ndarray | None = None,
    times: Sequence[float] | None = None,
    against: tuple[str, dict] | None = None,
    shown: int = 9,
) -> Figure:
    """Figures 2, 3, 5 to 9: a strip of frames, true and predicted windows, the predicted curve over the true saliency.

    frames: uint8 [f, H, W, 3] at `times` [f] seconds (by default those of f equal parts), `shown` of them are drawn;
    without frames the figure says so and has the curves only. `against` is a name and another prediction (an earlier
    epoch, another model) drawn beside. The true windows and saliency are left out for a row without labels, the qid
    where it is below 0 (one's own video).
    """
    t = row.duration
    named = [("predicted", prediction, PREDICTED), *([(*against, OTHER)] if against else [])]
    listed = [(name, *lanes(record, t), colour) for name, record, colour in named]
    levels = sum(max(len(found), 1) for _, found, _, _ in listed) + isinstance(row, LabelledRow)
    title = textwrap.wrap(f"“{row.query}”", 88) or [""]
    heights = [0.62 if frames is not None else 0.16, 0.17 * levels + 0.08, 1.35]
    figure = _picture(sum(heights) + 0.75 + 0.17 * len(title))
    strip, spans, curve = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    figure.suptitle("\n".join(title), x=0.01, ha="left", fontweight="bold", fontsize="medium", parse_math=False)
    about = ([f"qid {row.qid}"] if row.qid >= 0 else []) + [row.vid, scores(row, prediction)]
    strip.set_title(" · ".join(about), fontsize="small", fontweight="normal", parse_math=False)

    strip.tick_params(left=False, bottom=False, labelleft=False)
    strip.spines[:].set_visible(False)
    if frames is None:
        strip.text(0, 0.5, "No frames are shown: those of this video are not at hand.", va="center", fontsize="small",
                   style="italic", transform=strip.transAxes)  # fmt: skip
    else:
        times = frame_times(t, len(frames)) if times is None else np.asarray(times)
        slot = t / min(shown, len(frames))
        for middle in (np.arange(min(shown, len(frames))) + 0.5) * slot:
            nearest = int(np.abs(times - middle).argmin())
            strip.imshow(frames[nearest], extent=(middle - 0.48 * slot, middle + 0.48 * slot, 0, 1), aspect="auto")
            strip.text(middle, 0.03, f"{times[nearest]:.0f} s", ha="center", va="bottom", fontsize="x-small",
                       bbox=_READABLE)  # fmt: skip
        strip.set_ylim(0, 1)

    ticks = []
    level = 0
    if isinstance(row, LabelledRow):
        for start, end in row.relevant_windows:
            spans.barh(level, end - start, left=start, height=0.7, color=TRUE, hatch="////", edgecolor="white", lw=0)
        ticks.append((level, "true"))
        level += 1
    for name, found, left_out, colour in listed:
        ticks.append((level, name))
        for lane in found or [[]]:
            for rank, start, end, score in lane:
                spans.barh(level, end - start, left=start, height=0.7, color=colour, alpha=1 if rank == 1 else 0.55)
                spans.text((start + end) / 2, level, f"{score:.2f}", ha="center", va="center", fontsize="x-small",
                           color="white" if rank == 1 else "black", clip_on=True)  # fmt: skip
            level += 1
        if left_out:
            spans.text(t, level - 1, f" +{left_out}", va="center", fontsize="x-small")
    spans.set(ylim=(level - 0.5, -0.5), yticks=[at for at, _ in ticks], yticklabels=[name for _, name in ticks])
    spans.tick_params(left=False, bottom=False)
    spans.spines[:].set_visible(False)
    spans.grid(axis="x", linewidth=0.4)
    spans.set_axisbelow(True)

    if isinstance(row, LabelledRow):
        truth = true_saliency(row)
        edges = np.minimum(np.arange(len(truth) + 1) * float(CLIP_SECONDS), t)
        curve.stairs(truth, edges, fill=True, color=TRUE, alpha=0.3, label="true saliency (mean of annotators / 4)")
        curve.stairs(truth, edges, color=TRUE, linewidth=0.8)
    for (_, record, _), colour, line, prefix in zip(
        named, (PROBABILITY, OTHER), ("-", "--"), ("", against and f"{against[0]}: "), strict=False
    ):
        seconds, values, name = predicted_curve(record, t)
        if len(values):
            marker = "o" if name == "frame probability" else ""
            curve.plot(seconds, values, line, color=colour, marker=marker, markersize=3, label=f"{prefix}{name}")
    curve.set(xlabel="seconds", ylim=(-0.02, 1.05), xlim=(0, t), yticks=[0, 0.5, 1])
    curve.grid(linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def choose(
    rows: Sequence[Row], predictions: Sequence[dict], numbers: Sequence[dict], earlier: Sequence[dict] | None = None
) -> dict[str, int]:
    """The queries of the paper's qualitative figures by the rules in `RULES`: name -> qid, each query once.

    numbers: `framseg.evaluate.per_query` of the predictions; `earlier`: that of an earlier epoch, needed for
    `improvement`. Equals go to the smaller qid; a name whose rule no query meets is left out. Closeness of a curve is
    its correlation with the true saliency over the clips.
    """
    rows_by, records = {row.qid: row for row in rows}, {record["qid"]: record for record in predictions}
    before = {number["qid"]: number.get("iou", 0.0) for number in earlier or []}
    close, excess = {}, {}
    for number in numbers:
        close[number["qid"]], excess[number["qid"]] = _closeness(rows_by[number["qid"]], records[number["qid"]])
    confident = {qid: confidence(record, rows_by[qid].duration) for qid, record in records.items() if qid in rows_by}
    # For every rule: whether a query qualifies, and the number that must be largest.
    rules: dict[str, tuple[Callable, Callable]] = {
        "good highlight, weak moment": (lambda q, iou, hit: hit and iou < WRONG, close.get),
        "perfect moment, over-inclusive highlight": (lambda q, iou, hit: iou >= 0.9, excess.get),
        "failure": (lambda q, iou, hit: iou == 0 and not hit, lambda q: -close[q]),
        "over-confident": (lambda q, iou, hit: iou < WRONG and confident[q] >= CONFIDENT, confident.get),
        "excellent": (lambda q, iou, hit: hit and iou >= 0.9, close.get),
        "improvement": (
            lambda q, iou, hit: q in before and iou >= CORRECT and iou > before[q],
            lambda q: measured[q][0] - before[q],
        ),
    }
    measured = {n["qid"]: (n.get("iou", 0.0), n.get("hit", False)) for n in sorted(numbers, key=lambda n: n["qid"])}
    out: dict[str, int] = {}
    for name, (qualifies, size) in rules.items():
        found = [q for q, (iou, hit) in measured.items() if q not in out.values() and qualifies(q, iou, hit)]
        if found:
            out[name] = max(found, key=size)  # the first of equals
    return out


def _closeness(row: Row, prediction: dict) -> tuple[float, float]:
    """Correlation of the predicted curve with the true saliency, and its mean excess over it in the true windows."""
    truth = true_saliency(row)
    seconds, values, _ = predicted_curve(prediction, row.duration)
    if not len(values):
        return -1.0, -1.0
    curve = np.interp((np.arange(len(truth)) + 0.5) * CLIP_SECONDS, seconds, values)
    inside = list(row.relevant_clip_ids)
    excess = (curve[inside] - truth[inside]).mean()
    one, other = curve - curve.mean(), truth - truth.mean()
    size = np.sqrt((one @ one) * (other @ other))
    correlation = one @ other / size if size > 1e-12 else 0.0
    return round(float(correlation), 9), round(float(excess), 9)  # the last bits must not part equals
