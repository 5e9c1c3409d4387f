"""A form to ask about your own video: upload it or name its path, write queries, look at the answers and play them."""

import html
import tempfile
from pathlib import Path

import anywidget
import ipywidgets as widgets
import traitlets

from framseg.predictor import Prediction, predict
from framseg.viz import browser, figures
from framseg.viz.player import Player


class Upload(anywidget.AnyWidget):
    """A button that takes a file of any size from the page, in pieces.

    A notebook server closes the connection at a message of 10 MiB, so the page sends the next piece only when the one
    before is stored. `path` is the file once all of it has arrived, in a temporary folder deleted with this object.
    """

    _esm = Path(__file__).with_name("upload.js")
    path = traitlets.Unicode()

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="framseg-")
        self.on_msg(lambda _, content, buffers: self._store(content, buffers))

    def _store(self, content: dict, buffers: list[memoryview]) -> None:
        """Store a piece, {"id", "name", "begin", "last"} and its bytes; the reply has the upload's id."""
        path = Path(self._folder.name) / Path(content["name"]).name
        if content["begin"] == 0:
            self.path = ""
            for old in path.parent.iterdir():
                old.unlink()
        try:
            with path.open("ab") as file:
                file.write(buffers[0])
            self.send({"id": content["id"], "received": content["begin"] + len(buffers[0])})
            self.path = str(path) if content["last"] else ""
        except OSError as error:
            self.send({"id": content["id"], "error": f"not stored: {error.strerror}"})


class Form(widgets.VBox):
    """The widget, for ``runs/<profile>/checkpoint``; its actions are plain methods, `answers` the latest answers."""

    def __init__(self, checkpoint: Path | str):
        self.checkpoint = checkpoint
        self.answers: list[Prediction] = []
        wide = widgets.Layout(width="99%")
        self.upload = Upload()
        self.video = widgets.Text(placeholder="or the path of a video on the machine of the kernel", layout=wide)
        self.queries = widgets.Textarea(placeholder="what to look for, one query per line", rows=3, layout=wide)
        self.button = widgets.Button(description="ask", button_style="primary")
        self.message = widgets.HTML("Seconds are a player's: 0 is the start of the file.")
        self.progress = widgets.Output()
        self.picture = Player(lambda by: None, self.play)
        traitlets.dlink((self.upload, "path"), (self.video, "value"))
        self.button.on_click(lambda _: self.ask())
        parts = [self.upload, self.video, self.queries, self.button, self.message, self.progress, self.picture]
        super().__init__(parts, layout=widgets.Layout(max_width="1010px"))
        self.add_class("framseg")

    def ask(self) -> None:
        """Answer the queries about the video, or say why that is impossible."""
        queries = [line.strip() for line in self.queries.value.splitlines() if line.strip()]
        video = self.video.value.strip()
        self.answers, self.picture.value = [], ""
        if not video or not queries:
            self.message.value = "give a video and at least one query"
            return
        self.message.value, self.button.disabled = "looking at the video …", True
        with self.progress:  # shows the bar that a long video has
            try:
                answers = predict(video, queries, self.checkpoint)
                self.answers = answers if isinstance(answers, list) else [answers]
                self.message.value = "<br>".join(map(html.escape, self.answers[0].notes))
            except (ValueError, OSError) as error:
                self.message.value = html.escape(str(error))
            finally:
                self.progress.clear_output()
                self.button.disabled = False
        self.picture.value = browser.PAGES.answers(self.answers, figures.scores, browser.sketch)

    def play(self, second: float, end: float | None = None) -> None:
        """Play the video of the answers from a second on, to `end` or for half a minute, or say why it cannot be."""
        video = Path(self.answers[0].video)
        self.message.value = html.escape(self.picture.play_clip(video, second, end))


form = Form  # what the notebooks call
