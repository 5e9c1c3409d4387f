"""A form to ask about one's own video: upload it or name its path, write queries, look at the answers and play them."""

import html
import tempfile
from pathlib import Path

import anywidget
import ipywidgets as widgets
import traitlets

from framseg.frames import VideoError
from framseg.predictor import Prediction, predict
from framseg.viz import browser, figures
from framseg.viz.player import Stage


def form(checkpoint: Path | str) -> widgets.Widget:
    """The widget, for the folder a training run has written (``runs/<profile>/checkpoint``)."""
    return Ask(checkpoint).widget


class Upload(anywidget.AnyWidget):
    """A button that takes a file of any size from the page, piece by piece.

    A server closes the connection at a message of 10 MiB, so the page sends the next piece only when the one before is
    written. `path` is the file on this side once all of it is there, in a folder that goes with this object.
    """

    _esm = Path(__file__).with_name("upload.js")
    path = traitlets.Unicode()

    def __init__(self):
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="framseg-")
        self.on_msg(lambda _, content, buffers: self._take(content, buffers))

    def _take(self, content: dict, buffers: list) -> None:
        """One piece: {"id", "name", "begin", "last"} and its bytes; the answer names the upload's id."""
        path = Path(self._folder.name) / Path(content["name"]).name
        if content["begin"] == 0:
            self.path = ""
            for old in path.parent.iterdir():
                old.unlink()
        try:
            with path.open("ab") as file:
                file.write(buffers[0])
        except OSError as error:
            self.send({"id": content["id"], "error": f"not stored: {error.strerror}"})
            return
        self.send({"id": content["id"], "received": content["begin"] + len(buffers[0])})
        if content["last"]:
            self.path = str(path)


class Ask:
    """What the form's controls do, as plain methods; `widget` is the whole of it, `answers` the latest."""

    def __init__(self, checkpoint: Path | str):
        self.checkpoint = checkpoint
        self.answers: list[Prediction] = []
        wide = widgets.Layout(width="99%")
        self.upload = Upload()
        self.video = widgets.Text(placeholder="or the path of a video on the machine of the kernel", layout=wide)
        self.queries = widgets.Textarea(placeholder="what to look for, one query a line", rows=3, layout=wide)
        self.button = widgets.Button(description="ask", button_style="primary")
        self.said = widgets.HTML()
        self.progress = widgets.Output()
        self.picture = Stage(lambda by: None, self.play)
        traitlets.dlink((self.upload, "path"), (self.video, "value"))
        self.button.on_click(lambda _: self.ask())
        self.widget = widgets.VBox(
            [self.upload, self.video, self.queries, self.button, self.said, self.progress, self.picture],
            layout=widgets.Layout(max_width="1010px"),
        )
        self.widget.add_class("framseg")

    def ask(self) -> None:
        """Answer the queries about the video; what hinders it is said."""
        queries = [line.strip() for line in self.queries.value.splitlines() if line.strip()]
        video = self.video.value.strip()
        self.answers, self.picture.value = [], ""
        if not video or not queries:
            self.said.value = "give a video and at least one query"
            return
        self.said.value, self.button.disabled = "looking at the video …", True
        with self.progress:  # shows the bar that a long video has
            try:
                self.answers = predict(video, queries, self.checkpoint)
                self.said.value = ""
            except (ValueError, OSError) as error:
                self.said.value = html.escape(str(error))
            finally:
                self.progress.clear_output()
                self.button.disabled = False
        self.picture.value = "".join(
            f"<h3>{html.escape(one.query)}</h3><p>{html.escape(figures.scores(one.row, one.record))}</p>"
            + browser.sketch(one.row, one.record, one.frames)
            for one in self.answers
        )

    def play(self, second: float, end: float | None = None) -> None:
        """Play the video of the answers from a second on, to `end` or for half a minute; what hinders it is said."""
        self.said.value = ""
        try:
            self.picture.show_clip(Path(self.answers[0].video), second, end)
        except VideoError as error:
            self.said.value = html.escape(str(error))
            self.picture.send({"kind": "silent"})
