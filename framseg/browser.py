"""The prediction browser: a Jupyter widget to search, filter, sort and look at predictions one by one.

The picture of a query is drawn here as SVG, which takes milliseconds where a matplotlib figure takes half a second.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image

from framseg import annotations, config, evaluate, figures
from framseg.annotations import CLIP_SECONDS, Row
from framseg.frames import Store, VideoError

WIDTH, PLOT, LANE, LEFT = 900, 130, 20, 86  # pixels: width of the time axis, curve, one lane of windows, labels
THUMBNAIL = 96  # pixels at most: a frame of the strip

Entry = dict  # qid, row, prediction, iou, hit, confidence

FILTERS: dict[str, Callable[[Entry], bool]] = {
    "all": lambda e: True,
    f"correct (IoU ≥ {figures.CORRECT})": lambda e: e["iou"] is not None and e["iou"] >= figures.CORRECT,
    f"missed (IoU < {figures.MISSED})": lambda e: e["iou"] is not None and e["iou"] < figures.MISSED,
    f"over-confident (IoU < {figures.WRONG}, score ≥ {figures.CONFIDENT})": lambda e: (
        e["iou"] is not None and e["iou"] < figures.WRONG and e["confidence"] >= figures.CONFIDENT
    ),
    "invalid mask": lambda e: e["prediction"].get("valid") is False,
    "short moment (up to 10 s)": lambda e: any(0 < end - start <= 10 for start, end in e["row"].relevant_windows or ()),
    "middle (10 to 30 s)": lambda e: any(10 < end - start <= 30 for start, end in e["row"].relevant_windows or ()),
    "long (over 30 s)": lambda e: any(end - start > 30 for start, end in e["row"].relevant_windows or ()),
}
SORTS: dict[str, Callable[[Entry], tuple]] = {
    "query id": lambda e: (e["qid"],),
    "IoU, worst first": lambda e: (e["iou"] is None, e["iou"], e["qid"]),
    "IoU, best first": lambda e: (e["iou"] is None, -(e["iou"] or 0), e["qid"]),
    "highlight missed first": lambda e: (bool(e["hit"]), e["qid"]),
    "confidence, highest first": lambda e: (-e["confidence"], e["qid"]),
}


def browse(
    run: config.Run | Path | str,
    rows: Sequence[Row] | Path | str | None = None,
    store: Store | None = None,
    compare: config.Run | Path | str | None = None,
) -> widgets.Widget:
    """The widget for a run's val predictions, or for any prediction file in the dataset's format.

    run, compare: a Run, its folder, or a predictions .jsonl; `compare` is shown below the first. rows: annotations or
    their file, and store: frames; both are taken from the run where not given. Without frames there are curves only.
    Raises PredictionError or AnnotationError for files that cannot be used.
    """
    return Browser(run, rows, store, compare).widget


class Browser:
    """What the widget's controls do, as plain methods; `widget` is the whole of it."""

    def __init__(self, run, rows=None, store=None, compare=None):
        file, profile = _source(run)
        if profile is not None and (rows is None or store is None):
            from framseg import dataset  # here, because it imports torch and a file of predictions needs none

            rows = dataset.rows(profile, "val") if rows is None else rows
            store = store or dataset.store(profile)
        if rows is None:
            raise annotations.AnnotationError(f"{file}: give the annotations that belong to it (rows=…)")
        rows = annotations.read(rows) if isinstance(rows, str | Path) else list(rows)
        self.store = store
        self.entries = _entries(file, rows)
        other, _ = _source(compare) if compare is not None else (None, None)
        self.compared = {entry["qid"]: entry for entry in _entries(other, rows)} if other else {}
        self.titles = (_title(file), _title(other) if other else "")
        self.folder = file.parent
        self.shown: list[Entry] = self.entries
        self._build()
        self._refresh()

    def selection(self) -> list[dict]:
        """The predictions that search and filter leave, in the order shown."""
        return [entry["prediction"] for entry in self.shown]

    def show(self, qid: int) -> None:
        """Show one query; raises KeyError for one that search and filter have left out."""
        if qid not in [entry["qid"] for entry in self.shown]:
            raise KeyError(f"query {qid} is not in the list shown")
        self.list.value = qid

    def next(self) -> None:
        """Go to the next query of the list; the last one stays."""
        self._move(1)

    def previous(self) -> None:
        """Go to the previous query of the list; the first one stays."""
        self._move(-1)

    def export(self) -> Path:
        """Write the selection as JSON lines beside the predictions; returns the file."""
        path = self.folder / "selection.jsonl"
        evaluate.write_predictions(path, self.selection())
        self.said.value = f"{len(self.shown)} predictions written to {html.escape(str(path))}"
        return path

    def save_figure(self) -> list[Path]:
        """Save the shown query's figure as PNG and PDF beside the predictions; returns the files, none without a query.

        Where two runs are compared both are in it.
        """
        entry = self._current()
        if entry is None:
            self.said.value = "no query is shown, so there is no figure to save"
            return []
        other = self.compared.get(entry["qid"])
        against = (self.titles[1], other["prediction"]) if other else None
        picture = figures.qualitative(entry["row"], entry["prediction"], self._frames(entry["row"]), against=against)
        paths = figures.save(picture, self.folder, f"query_{entry['qid']}")
        self.said.value = f"saved {html.escape(', '.join(str(path) for path in paths))}"
        return paths

    def _build(self) -> None:
        wide = widgets.Layout(width="99%")
        self.search = widgets.Text(placeholder="search in the queries", layout=wide)
        self.filter = widgets.Dropdown(options=list(FILTERS), layout=wide)
        self.sort = widgets.Dropdown(options=list(SORTS), layout=wide)
        self.count = widgets.HTML()
        self.list = widgets.Select(rows=22, layout=wide)
        self.said = widgets.HTML()
        self.picture = widgets.HTML()
        buttons = []
        for text, action in (
            ("◀ previous", self.previous),
            ("next ▶", self.next),
            ("save figure", self.save_figure),
            ("export selection", self.export),
        ):
            button = widgets.Button(description=text)
            button.on_click(lambda _, action=action: self._try(action))
            buttons.append(button)
        for control in (self.search, self.filter, self.sort):
            control.observe(lambda _: self._refresh(), "value")
        self.list.observe(lambda _: self._draw(), "value")
        left = widgets.VBox(
            [self.search, self.filter, self.sort, self.count, self.list], layout=widgets.Layout(width="320px")
        )
        self.widget = widgets.HBox([left, widgets.VBox([widgets.HBox(buttons), self.said, self.picture])])

    def _try(self, action: Callable) -> None:
        try:
            action()
        except OSError as error:  # the folder of someone else's predictions may be read-only
            self.said.value = f"not written: {html.escape(str(error))}"

    def _refresh(self) -> None:
        words = self.search.value.lower().split()
        kept = [e for e in self.entries if all(w in f"{e['qid']} {e['row'].query}".lower() for w in words)]
        self.shown = sorted(filter(FILTERS[self.filter.value], kept), key=SORTS[self.sort.value])
        self.count.value = f"{len(self.shown)} of {len(self.entries)} queries"
        before, qids = self.list.value, [entry["qid"] for entry in self.shown]
        self.list.options = [(_label(entry), entry["qid"]) for entry in self.shown]
        self.list.value = before if before in qids else next(iter(qids), None)
        self._draw()

    def _move(self, by: int) -> None:
        qids = [entry["qid"] for entry in self.shown]
        if qids:
            place = qids.index(self.list.value) + by
            self.list.value = qids[min(max(place, 0), len(qids) - 1)]

    def _current(self) -> Entry | None:
        return next((entry for entry in self.shown if entry["qid"] == self.list.value), None)

    def _frames(self, row: Row) -> np.ndarray | None:
        try:
            return self.store.read(row.vid) if self.store is not None else None
        except VideoError:
            return None  # the picture says that they are missing

    def _draw(self) -> None:
        entry = self._current()
        if entry is None:
            self.picture.value = "<p>no query matches</p>"
            return
        row = entry["row"]
        parts = [
            f"<h3>{html.escape(row.query)}</h3>",
            f"<p>query {row.qid} · video {html.escape(row.vid)} · {row.duration:g} s</p>",
            _strip(self._frames(row)),
        ]
        for title, one in zip(self.titles, (entry, self.compared.get(entry["qid"])), strict=True):
            if title:
                parts.append(f"<p><b>{html.escape(title)}</b>: {_said(row, one)}</p>")
                parts.append(_svg(row, one["prediction"]) if one else "")
        self.picture.value = "".join(parts)


def _source(run: config.Run | Path | str) -> tuple[Path, config.Profile | None]:
    """A predictions file, and the profile it was made with where it belongs to a run."""
    if not isinstance(run, config.Run):
        if Path(run).suffix == ".jsonl":
            return Path(run), None
        run = config.Run("", run)
    if not run.predicted("val").is_file():
        raise evaluate.PredictionError(f"{run.predicted('val')}: no predictions here; notebook 04 writes them")
    return run.predicted("val"), config.load(run.profile)


def _title(file: Path) -> str:
    return f"{file.parent.parent.name}/{file.stem}"


def _entries(file: Path, rows: list[Row]) -> list[Entry]:
    predictions, rows = evaluate.matched(evaluate.read_predictions(file), rows, intersection=True)
    labelled = all(row.labelled for row in rows)
    numbers = {number["qid"]: number for number in evaluate.per_query(predictions, rows)} if labelled else {}
    return [
        {
            "qid": row.qid,
            "row": row,
            "prediction": prediction,
            "iou": numbers.get(row.qid, {}).get("iou"),
            "hit": numbers.get(row.qid, {}).get("hit"),
            "confidence": prediction[evaluate.WINDOWS][0][2] if prediction.get(evaluate.WINDOWS) else 0.0,
        }
        for prediction, row in zip(predictions, rows, strict=True)
    ]


def _label(entry: Entry) -> str:
    iou = "  –  " if entry["iou"] is None else f"{entry['iou']:.2f}"
    return f"{iou}  {entry['row'].query}"


def _said(row: Row, entry: Entry | None) -> str:
    return html.escape(figures.scores(row, entry["prediction"])) if entry else "no prediction for this query"


def _strip(frames: np.ndarray | None) -> str:
    if frames is None:
        return "<p><i>no frames: this video is not in the frame store, curves only</i></p>"
    size = min(THUMBNAIL, frames.shape[1])
    strip = Image.fromarray(np.concatenate(list(frames), axis=1)).resize((len(frames) * size, size))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="sampled frames" src="data:image/jpeg;base64,{data}" '
        f'style="margin-left:{LEFT}px;width:{WIDTH}px;height:{WIDTH // len(frames) * 3 // 2}px">'
    )


def _svg(row: Row, prediction: dict) -> str:
    """True and predicted windows over the curve of the frame probabilities and the true saliency."""
    duration = row.duration

    def x(seconds: float) -> float:
        return LEFT + WIDTH * seconds / duration

    lanes, left_out = figures.lanes(prediction, duration)
    truth = [[(0, start, end, 1.0) for start, end in row.relevant_windows]] if row.labelled else []
    out, y = [], 4
    named = [("true", lane, figures.TRUE) for lane in truth]
    named += [("" if i else "predicted", lane, figures.PREDICTED) for i, lane in enumerate(lanes)]
    for name, lane, colour in named:
        out.append(f'<text x="0" y="{y + 13}">{name}</text>')
        for rank, start, end, score in lane:
            tip = f"{start:g} to {end:g} s" + (f", rank {rank}, score {score:.3f}" if rank else "")
            out.append(
                f'<rect x="{x(start):.1f}" y="{y}" width="{max(x(end) - x(start), 1):.1f}" height="{LANE - 5}" '
                f'fill="{colour}" opacity="{1 if rank < 2 else 0.55}"><title>{tip}</title></rect>'
            )
        y += LANE
    if left_out:
        out.append(f'<text x="0" y="{y + 13}">{left_out} windows more, not drawn</text>')
        y += LANE
    bottom = y + 8 + PLOT
    if row.labelled:
        steps = [(x(CLIP_SECONDS * i), bottom - PLOT * v) for i, v in enumerate(figures.true_saliency(row))]
        path = f"M{x(0):.1f},{bottom}" + "".join(
            f"V{v:.1f}H{min(x0 + WIDTH * CLIP_SECONDS / duration, LEFT + WIDTH):.1f}" for x0, v in steps
        )
        out.append(f'<path d="{path}V{bottom}Z" fill="{figures.TRUE}" opacity="0.25"/>')
    seconds, values, name = figures.predicted_curve(prediction, duration)
    if len(values):
        points = " ".join(f"{x(s):.1f},{bottom - PLOT * v:.1f}" for s, v in zip(seconds, values, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{figures.PROBABILITY}" stroke-width="2"/>')
    for value in (0, 0.5, 1):
        at = bottom - PLOT * value
        out.append(f'<text x="{LEFT - 26}" y="{at + 4:.1f}">{value:g}</text>')
        out.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
    for second in range(0, int(duration) + 1, 30 if duration > 90 else 10):
        out.append(f'<text x="{x(second):.1f}" y="{bottom + 16}" text-anchor="middle">{second} s</text>')
    key = f"line: {name}" + ("; shaded: true saliency (mean of the annotators / 4)" if row.labelled else "")
    out.append(f'<text x="{LEFT}" y="{bottom + 34}">{key}</text>')
    return (
        f'<svg width="{LEFT + WIDTH + 20}" height="{bottom + 42}" font-size="12" font-family="sans-serif" '
        'style="background:white">' + "".join(out) + "</svg>"
    )
