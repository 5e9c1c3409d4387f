"""The prediction browser: a Jupyter widget to search, filter and sort predictions and to look at each of them.

The picture of a query is drawn here as SVG, which takes milliseconds where a matplotlib figure takes half a second.
"""

import base64
import glob
import html
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import jinja2
import numpy as np
import pandas as pd
import yaml
from PIL import Image

from framseg import annotations, config, evaluate
from framseg.annotations import CLIP_SECONDS, LabelledRow, Row
from framseg.frames import Store, VideoError
from framseg.predictions import PredictionError, matched, read_predictions, read_released, write_predictions
from framseg.run.paths import Run
from framseg.viz import figures
from framseg.viz.player import Player

LEFT, WIDTH, NARROW = 86, 900, 400  # pixels: width of the labels, of the time axis, of each where two are side by side
THUMBNAIL = 112  # pixels: most that a frame of the strip has, which is enlarged under the mouse
LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, np.inf)}  # seconds: more than, up to
PAGE = 2000  # queries that the list holds at a time; more make the page slow
TICKS = (1, 2, 5, 10, 30, 60, 300, 600, 1800, 3600)  # seconds between two labels of the time axis
NOTHING = "compare with: nothing"
_TEXT = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
_LISTS = yaml.safe_load(_TEXT.format_map(vars(figures)))  # the thresholds have their names there
FILTERS: dict[str, str] = _LISTS["filters"]
SORTS: dict[str, str] = _LISTS["sorts"]
_HTML = Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8")
PAGES: Any = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_HTML).module


class Browser(widgets.HBox):
    """The widget for a run's val predictions, or for any prediction file in the dataset's format.

    run, compare: a Run, its folder, a predictions .jsonl, or a .csv in the format of the paper's authors; `compare` is
    shown next to the first and can be changed to any epoch of the run. rows: annotations or their file; store: frames;
    videos: the folder of {vid}.mp4 (or another ending), for playing. These three are taken from the run where not
    given; without frames only curves are shown. folder: where figures and selections are saved, by default the folder
    of the predictions, or the kernel's current folder if that cannot be written.
    Raises PredictionError or AnnotationError for files that cannot be used.

    What the controls do are plain methods; `entries` are all queries, `shown` what search and filter leave, in order.
    """

    def __init__(
        self,
        run: Run | Path | str,
        rows: Sequence[Row] | Path | str | None = None,
        store: Store | None = None,
        compare: Run | Path | str | None = None,
        videos: Path | str | None = None,
        folder: Path | str | None = None,
    ):
        file, profile = _source(run)
        if profile is not None and any(given is None for given in (rows, store, videos)):
            from framseg import dataset  # here, because it imports torch, which files of predictions do not need

            rows = dataset.rows(profile, "val") if rows is None else rows
            store, videos = store or dataset.store(profile), videos or dataset.videos(profile)
        if rows is None:
            raise annotations.AnnotationError(f"{file}: give the annotations that belong to it (rows=…)")
        self.rows = annotations.read(rows) if isinstance(rows, str | Path) else list(rows)
        self.store, self.videos = store, Path(videos) if videos is not None else None
        self.entries, self.title = _entries(file, self.rows), _title(file)
        others = [_source(compare)[0]] if compare is not None else []
        others += [other for other in sorted(file.parent.glob("val*.jsonl")) if profile is not None and other != file]
        self.others: dict[str, Path] = {}  # files to compare with, by title, or by path where titles are the same
        for other in others:
            alike = _title(other) in (self.title, *self.others)
            self.others[str(other) if alike else _title(other)] = other
        self.folder = Path(folder) if folder else file.parent if os.access(file.parent, os.W_OK) else Path.cwd()
        self.shown: list[Any] = list(self.entries.itertuples())
        self.place = 0  # in `shown`
        self._build()
        self.compare.value = next(iter(self.others)) if compare is not None else NOTHING
        self._take_compared()

    def selection(self) -> list[dict]:
        """The predictions that search and filter leave, in the order shown."""
        return [entry.prediction for entry in self.shown]

    def show(self, qid: int) -> None:
        """Show a query; raises KeyError if search and filter have left it out."""
        if qid not in self.places:
            raise KeyError(f"query {qid} is not in the list shown")
        self._go(self.places[qid])

    def next(self) -> None:
        """Go to the next query of the list; the last one stays."""
        self._go(self.place + 1)

    def previous(self) -> None:
        """Go to the previous query of the list; the first one stays."""
        self._go(self.place - 1)

    def play(self, second: float, end: float | None = None) -> None:
        """Play the shown query's video from a second on, to `end` or for half a minute, or say why it cannot be."""
        video = self._video(self.shown[self.place].row.vid)
        self.message.value = html.escape(self.picture.play_clip(video, second, end))

    def export(self) -> Path:
        """Write the selection as JSON lines into the folder; returns the file."""
        path = self.folder / "selection.jsonl"
        write_predictions(path, self.selection())
        self.message.value = f"{len(self.shown)} predictions written to {html.escape(str(path))}"
        return path

    def save_figure(self) -> list[Path]:
        """Save the shown query's figure as PNG and PDF into the folder; returns the files, none without a query."""
        if not self.shown:
            self.message.value = "no query is shown, so there is no figure to save"
            return []
        entry = self.shown[self.place]
        row, other = entry.row, self.compared.get(entry.row.qid)
        against = (self.compare.value, other) if other else None
        picture = figures.qualitative(row, entry.prediction, self._frames(row), against=against)
        paths = figures.save(picture, self.folder, f"query_{row.qid}")
        self.message.value = f"saved {html.escape(', '.join(str(path) for path in paths))}"
        return paths

    def _build(self) -> None:
        wide = widgets.Layout(width="99%")
        self.search = widgets.Text(placeholder="search in the queries", layout=wide)
        self.filter = widgets.Dropdown(options=list(FILTERS), layout=wide)
        self.sort = widgets.Dropdown(options=list(SORTS), layout=wide)
        self.compare = widgets.Dropdown(options=[NOTHING, *self.others], layout=wide)
        self.count = widgets.HTML()
        self.list = widgets.Select(rows=22, layout=wide)
        self.message = widgets.HTML()
        self.picture = Player(lambda by: self._go(self.place + by), self.play)
        actions: dict[str, Callable[[], object]] = {"◀ previous": self.previous, "next ▶": self.next}
        actions |= {"save figure": self.save_figure, "export selection": self.export}
        self.buttons = {text: widgets.Button(description=text) for text in actions}
        for text, button in self.buttons.items():
            button.on_click(lambda _, action=actions[text]: self._try(action))
        for control in (self.search, self.filter, self.sort):
            control.observe(lambda _: self._refresh(), "value")
        self.compare.observe(lambda _: self._try(self._take_compared), "value")
        self.list.observe(self._picked, "index")
        left = widgets.VBox([self.search, self.filter, self.sort, self.compare, self.count, self.list])
        left.layout = widgets.Layout(flex="0 0 300px")
        right = widgets.VBox([widgets.HBox(list(self.buttons.values())), self.message, self.picture])
        right.layout = widgets.Layout(flex="1 1 0", min_width="0", padding="0 0 0 12px")
        super().__init__([left, right])
        self.add_class("framseg")  # `player.js` takes the arrow keys of what has this class

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, PredictionError) as error:  # a folder that cannot be written, a file that has changed
            self.message.value = f"not done: {html.escape(str(error))}"

    def _take_compared(self) -> None:
        file = self.others.get(self.compare.value)
        compared = _entries(file, self.rows) if file else self.entries[:0]
        self.compared: dict = compared["prediction"].to_dict()
        self.entries["gain"] = self.entries["iou"] - compared["iou"]
        self._refresh()

    def _refresh(self) -> None:
        before = self.shown[self.place].row.qid if self.shown else None
        kept = self.entries.query(FILTERS[self.filter.value]).sort_index()
        for word in self.search.value.lower().split():
            kept = kept[kept["text"].str.contains(word, regex=False)]
        order = np.argsort(np.asarray(kept.eval(SORTS[self.sort.value])), kind="stable")
        self.shown = list(kept.iloc[order].itertuples())
        self.places = {entry.row.qid: place for place, entry in enumerate(self.shown)}
        self.list.options = ()
        self._go(0 if before is None else self.places.get(before, 0))

    def _go(self, place: int) -> None:
        """Show the query at this place, or at the nearest that exists, and the page of the list that holds it."""
        self.place = min(max(place, 0), max(len(self.shown) - 1, 0))
        first = self.place - self.place % PAGE
        page = [(f"{entry.scored}  {entry.row.query}", entry.row.qid) for entry in self.shown[first : first + PAGE]]
        self.list.unobserve(self._picked, "index")
        if tuple(self.list.options) != tuple(page):
            self.list.options = page
        self.list.index = self.place - first if page else None
        self.list.observe(self._picked, "index")
        listed = f", {first + 1} to {first + len(page)} are listed" if len(page) < len(self.shown) else ""
        self.count.value = f"{len(self.shown)} of {len(self.entries)} queries{listed}: IoU, query"
        self._draw()

    def _picked(self, change: dict) -> None:
        if change["new"] is not None:
            self._go(self.place - self.place % PAGE + change["new"])

    def _video(self, vid: str) -> Path | None:
        return min(self.videos.glob(f"{glob.escape(vid)}.*"), default=None) if self.videos is not None else None

    def _frames(self, row: Row) -> np.ndarray | None:
        try:
            return self.store.read(row.vid) if self.store is not None else None
        except VideoError:
            return None  # the picture says that they are missing

    def _draw(self) -> None:
        self.message.value = ""
        if not self.shown:
            self.picture.value = "<p>no query matches</p>"
            return
        entry = self.shown[self.place]
        row, frames = entry.row, self._frames(entry.row)
        named = {self.title: entry.prediction}
        named |= {self.compare.value: self.compared.get(row.qid)} if self.compared else {}
        width, most = WIDTH if len(named) == 1 else NARROW, LEFT + WIDTH + 20
        self.picture.value = PAGES.query(row, named, frames, self._video(row.vid), width, most, figures.scores, sketch)


browse = Browser  # what the notebooks call


def _source(run: Run | Path | str) -> tuple[Path, config.Profile | None]:
    """A file of predictions, and the profile that it was made with if it belongs to a run."""
    if not isinstance(run, Run):
        if Path(run).suffix in (".jsonl", ".csv"):
            return Path(run), None
        run = Run("", run)
    if not run.predicted("val").is_file():
        raise PredictionError(f"{run.predicted('val')}: no predictions here; notebook 04 writes them")
    return run.predicted("val"), config.load(run.profile)


def _title(file: Path) -> str:
    folder = file.parent.parent if file.parent.name == "predictions" else file.parent  # of a run: the run's name
    return f"{folder.name}/{file.stem}"


def _entries(file: Path, rows: list[Row]) -> pd.DataFrame:
    """The queries of a file by qid: row, prediction, and what `browser.yaml` filters and sorts them by."""
    read = read_released if file.suffix == ".csv" else read_predictions
    predictions, rows = matched(read(file), rows, intersection=True)
    labelled = all(isinstance(row, LabelledRow) for row in rows)
    numbers = evaluate.per_query(predictions, rows) if labelled else [{} for _ in rows]
    lines = []
    for row, record, number in zip(rows, predictions, numbers, strict=True):
        lengths = [end - start for start, end in getattr(row, "relevant_windows", ())]
        own = {"row": row, "prediction": record, "text": f"{row.qid} {row.query}".lower()}
        own |= {"confidence": figures.confidence(record, row.duration), "invalid": record.get("valid") is False}
        own["scored"] = f"{number['iou']:.2f}" if "iou" in number else "  –  "
        own |= {name: any(low < length <= high for length in lengths) for name, (low, high) in LENGTHS.items()}
        lines.append({"qid": row.qid, "iou": math.nan, "hit": None} | number | own)
    return pd.DataFrame(lines).set_index("qid")


def sketch(row: Row, prediction: dict, frames: np.ndarray | None = None, width: int = WIDTH) -> str:
    """SVG: the frames, true and predicted windows, the curve of the prediction over the true saliency.

    frames: uint8 [f, H, W, 3], evenly spread. width: pixels of the time axis, which shrinks and grows with the page.
    """
    lanes, left_out = figures.lanes(prediction, row.duration)
    seconds, values, name = figures.predicted_curve(prediction, row.duration)
    return PAGES.sketch(
        row, LEFT, width, lanes=lanes, left_out=left_out, colours=figures,
        frames=0 if frames is None else len(frames), strip="" if frames is None else _strip(frames),
        truth=annotations.clip_saliency(row).tolist() if isinstance(row, LabelledRow) else [], clip=CLIP_SECONDS,
        curve=list(zip(seconds, values, strict=True)), name=name,
        step=next((step for step in TICKS if row.duration / step <= width / 80), TICKS[-1]),
    )  # fmt: skip


def _strip(frames: np.ndarray) -> str:
    """The frames, made small and put side by side, as the address of a JPEG that holds its own data."""
    size = min(THUMBNAIL, frames.shape[1])
    small = [np.asarray(Image.fromarray(frame).resize((size, size))) for frame in frames]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(small, axis=1)).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
