import os

import numpy as np
import pytest
from small import make_video

from framseg.frames import VideoError
from framseg.predictor import Prediction
from framseg.viz import ask_form


@pytest.fixture
def form(monkeypatch):
    """A form whose model has an answer at once."""

    def predict(video, queries, checkpoint):
        if not str(video).endswith(".mp4"):
            raise VideoError(f"{video}: is <nothing>")
        flat, frames = np.linspace(0, 1, 5), np.zeros((5, 8, 8, 3), np.uint8)
        return [
            Prediction(video, query, 10, [[2, 6, 0.5]], flat, "01100", flat, True, frames, 2 * np.arange(5) + 1)
            for query in queries
        ]

    monkeypatch.setattr(ask_form, "predict", predict)
    return ask_form.Form("a checkpoint")


def test_every_line_is_a_query(form, tmp_path):
    form.video.value, form.queries.value = str(make_video(tmp_path / "own.mp4", 10)), " a dog \n\n<b>a cat"
    form.button.click()
    assert [answer.query for answer in form.answers] == ["a dog", "<b>a cat"] and not form.button.disabled
    assert form.picture.value.count("<svg") == 2 and "<h3>&lt;b&gt;a cat</h3>" in form.picture.value
    assert "window score 0.50" in form.picture.value and "2 to 6 s" in form.picture.value
    sent = []
    form.picture.send = lambda *message: sent.append(message[0])
    form.play(2, 6)
    assert sent[0]["kind"] == "clip" and form.message.value == ""


def test_why_a_question_has_no_answer_is_shown(form):
    form.button.click()
    assert "give a video and at least one query" in form.message.value
    form.video.value, form.queries.value = "other.avi", "a dog"
    form.button.click()
    assert form.message.value == "other.avi: is &lt;nothing&gt;" and form.picture.value == "" and not form.answers
    form.video.value = "no.mp4"
    form.button.click()
    form.play(1)
    assert "no.mp4: no such video file" in form.message.value


def test_an_upload_comes_in_pieces_and_takes_the_place_of_the_last(form):
    sent = []
    form.upload.send = sent.append
    pieces = [b"one ", b"two ", b"three"]
    for name in ("../own.mp4", "other.mp4"):
        begin = 0
        for piece in pieces:
            form.upload._store({"id": 1, "name": name, "begin": begin, "last": piece == b"three"}, [memoryview(piece)])
            begin += len(piece)
    path = form.upload._folder.name + "/other.mp4"
    assert form.video.value == form.upload.path == path
    assert open(path, "rb").read() == b"one two three"
    assert [message["received"] for message in sent] == [4, 8, 13] * 2
    assert os.listdir(form.upload._folder.name) == ["other.mp4"]
