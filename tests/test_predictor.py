"""Your own video: `framseg.predict`, what it shows, and the command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import psutil
import pytest
import torch
from small import SCORES, make_video
from test_decode import FRAMES, prepared

import framseg
from framseg import checkpoint as checkpoints
from framseg import config, decode, frames, moments, predictor, prompt
from framseg.backbones import CheckpointError, blip3
from framseg.checkpoint import load_trained, save_trained


@pytest.fixture
def setup(tmp_path):
    return prepared(tmp_path)


@pytest.fixture
def checkpoint(setup, tmp_path):
    """A checkpoint folder whose base is the tiny model."""
    base = tmp_path / "base"
    setup.model.save_published(base)
    section = setup.profile.model.model_copy(update={"weights": str(base)})
    profile = setup.profile.model_copy(update={"model": section})
    start = setup.model.adapt(profile.adapter, seed=0)
    save_trained(tmp_path / "checkpoint", setup.model, start, profile, setup.tokenizer, SCORES)
    return tmp_path / "checkpoint"


def test_predict(setup, checkpoint, tmp_path, monkeypatch):
    video = make_video(tmp_path / "own.mp4", 21)
    loaded, load = [], load_trained
    monkeypatch.setattr(checkpoints, "load_trained", lambda *a: loaded.append(a) or load(*a))
    one = framseg.predict(video, "a dog runs", checkpoint=checkpoint)
    queries = ["a dog runs", "a cat sleeps", "night falls"]
    several = framseg.predict(str(video), queries, checkpoint=str(checkpoint))
    assert len(loaded) == 1  # the second call finds the model there
    assert [prediction.query for prediction in several] == queries
    assert one.duration == pytest.approx(21) and one.video == str(video)
    assert several[0].mask == one.mask and len(one.mask) == FRAMES
    np.testing.assert_allclose(several[0].probability, one.probability, atol=1e-4)
    assert one.saliency.shape == (10,)
    read = one.mask, one.probability, one.duration
    assert one.windows == moments.windows(*read, moments.BEST_WINDOWS)
    assert one.saliency.tolist() == moments.saliency(*read[1:], moments.BEST_SALIENCY).tolist()
    authors = framseg.predict(video, "a dog runs", checkpoint, windows="mask", saliency="overlap")
    assert (
        authors.windows == moments.windows(*read) and authors.saliency.tolist() == moments.saliency(*read[1:]).tolist()
    )

    opened = frames.Video(video)
    images = opened.frames(opened.numbers(opened.length, FRAMES)[:, 0], 28)
    model, _ = load(checkpoint)
    ids = torch.tensor([prompt.prompt_ids(setup.tokenizer, setup.profile.model.tokens, "a dog runs", FRAMES)])
    with torch.inference_mode():
        vision = model.vision_tokens(torch.from_numpy(images).permute(0, 3, 1, 2)[None])
    expected = decode.beam_search(model, vision, ids, torch.ones_like(ids), FRAMES, 2)
    np.testing.assert_allclose(one.probability, expected.probabilities[0, 0], atol=1e-4)

    file = checkpoint / "resampler.safetensors"
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 10))  # a training run has written it anew
    framseg.predict(video, "a dog runs", checkpoint=checkpoint)
    assert len(loaded) == 2


def test_predict_refuses_with_a_reason(checkpoint, tmp_path):
    short = make_video(tmp_path / "short.mp4", 4)
    with pytest.raises(prompt.PromptError, match="empty"):
        framseg.predict(short, "  ", checkpoint=checkpoint)
    with pytest.raises(frames.VideoError, match="no such video"):
        framseg.predict(tmp_path / "none.mp4", "a dog", checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="none: there is no such folder"):
        framseg.predict(short, "a dog", checkpoint=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no trained checkpoint"):
        framseg.predict(short, "a dog", checkpoint=tmp_path / "empty")
    with pytest.raises(frames.VideoError, match="damaged|cannot be opened"):
        (tmp_path / "cut.mp4").write_bytes(short.read_bytes()[:-900])
        framseg.predict(tmp_path / "cut.mp4", "a dog", checkpoint=checkpoint)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"video": "none.mp4"}, "none.mp4: no such video file"),
        ({"query": ["a dog", " "]}, "the query is empty"),
        ({"windows": "best"}, "no windows policy named 'best'"),
        ({"saliency": "best"}, "no saliency"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"dtype": "int4"}, "dtype 'int4'"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_fetched_or_loaded(change, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.released, "fetch", lambda *_: pytest.fail("it was fetched"))
    given = {"video": make_video(tmp_path / "own.mp4", 2), "query": "a dog", "checkpoint": "paper"} | change
    with pytest.raises((ValueError, framseg.FramsegError), match=reason):
        framseg.predict(**given)


def hanging(path, then):
    """Make a file on which the decoder waits for ever; `then` is called in a thread once it does."""
    os.mkfifo(path)

    def wait():
        with open(path, "wb"):  # waits for the decoder
            then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_video_on_which_the_decoder_hangs_is_given_up(checkpoint, tmp_path):
    config.save(config.load(checkpoint / "profile.yaml", {"frames.time_limit": 1.5}), checkpoint / "profile.yaml")
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(frames.VideoError, match="x.mp4: decoding stood still for 1.5 s"):
        framseg.predict(tmp_path / "x.mp4", "a dog runs", checkpoint=checkpoint)
    assert framseg.predict(make_video(tmp_path / "own.mp4", 21), "a dog runs", checkpoint).duration == 21


def test_a_video_on_which_the_decoder_crashes_is_an_error(checkpoint, tmp_path):
    others = psutil.Process().children()  # of earlier tests

    def crash():
        [decoder] = set(psutil.Process().children()) - set(others)
        decoder.send_signal(signal.SIGSEGV)

    thread = hanging(tmp_path / "x.mp4", crash)
    with pytest.raises(frames.VideoError, match="x.mp4: the decoder crashed .exit code -11"):
        framseg.predict(tmp_path / "x.mp4", "a dog runs", checkpoint=checkpoint)
    thread.join()


def test_a_hanging_prediction_can_be_interrupted(checkpoint, tmp_path):
    others = set(psutil.Process().children())  # of earlier tests
    thread = hanging(tmp_path / "x.mp4", lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1)))
    with pytest.raises(KeyboardInterrupt):
        framseg.predict(tmp_path / "x.mp4", "a dog runs", checkpoint=checkpoint)
    assert set(psutil.Process().children()) <= others
    thread.join()


@pytest.mark.parametrize("seconds", [160, 600])
def test_a_long_video_is_asked_about_in_parts_that_overlap(setup, checkpoint, tmp_path, monkeypatch, seconds):
    video = make_video(tmp_path / "long.mp4", seconds)
    decoded, encoded = [], []
    read_apart, vision_tokens = predictor.read_apart, blip3.Blip3.vision_tokens
    monkeypatch.setattr(predictor, "read_apart", lambda *a: decoded.append(a[0]) or read_apart(*a))
    monkeypatch.setattr(blip3.Blip3, "vision_tokens", lambda *a: encoded.append(a[1].shape[1]) or vision_tokens(*a))
    # Three a batch, four queries: the last one is alone in its batch.
    queries = ["a dog runs", "a cat sleeps", "night falls", "rain"]
    answers = framseg.predict(video, queries, checkpoint=checkpoint)

    n = {160: 5, 600: 20}[seconds]  # a frame every 30 s
    assert len(decoded) == 1 and sum(encoded) == n
    monkeypatch.undo()
    opened = frames.Video(video)
    images = opened.frames(opened.numbers(opened.length, n)[:, 0], 28)
    model, _ = load_trained(checkpoint)
    begins = {160: [0], 600: [0, 2, 4, 6, 8, 10, 12, 14, 15]}[seconds]
    for query, answer in zip(queries, answers, strict=True):
        weight, ones, probability = np.zeros(n), np.zeros(n), np.zeros(n)
        ids = torch.tensor([prompt.prompt_ids(setup.tokenizer, setup.profile.model.tokens, query, FRAMES)])
        for begin in begins:
            with torch.inference_mode():
                part = torch.from_numpy(images[begin : begin + FRAMES]).permute(0, 3, 1, 2)
                decoded_part = decode.beam_search(
                    model, model.vision_tokens(part[None]), ids, torch.ones_like(ids), FRAMES, 2
                )
            for place, share in enumerate([1, 2, 3, 2, 1]):
                weight[begin + place] += share
                ones[begin + place] += share * int(decoded_part.masks[0, 0, place])
                probability[begin + place] += share * float(decoded_part.probabilities[0, 0, place])
        assert len(answer.probability) == n
        np.testing.assert_allclose(answer.probability, probability / weight, atol=1e-4)
        mask = "".join("1" if one >= of / 2 else "0" for one, of in zip(ones, weight, strict=True))
        assert answer.valid == ("1" in mask) and answer.mask == (mask if "1" in mask else "1" * n)
        assert answer.windows == moments.windows(answer.mask, answer.probability, seconds, moments.BEST_WINDOWS)
        assert answer.saliency.shape == (seconds // 2,)
        assert answer.times[[0, -1]] == pytest.approx([seconds / n / 2, seconds - seconds / n / 2])
        np.testing.assert_array_equal(answer.frames, images[np.linspace(0, n - 1, FRAMES).round().astype(int)])


@pytest.mark.parametrize(
    "name, settings",
    [
        ("a.mkv", {"sound": "aac"}),
        ("a.webm", {"codec": "libvpx-vp9", "sound": "libopus"}),
        ("a.webm", {"codec": "libvpx"}),
        ("a.avi", {"codec": "mpeg4", "sound": "libmp3lame"}),
        ("a.mov", {"sound": "aac", "rate": 50}),
        ("a.wmv", {"codec": "wmv2", "rate": 25}),
        ("a.mp4", {"codec": "libsvtav1"}),
        ("a.mp4", {"rate": Fraction(30000, 1001)}),
        ("a.mkv", {"gaps_ms": [40, 900, 40, 2000, 40, 40, 3000, 40, 1900]}),
    ],
)
def test_containers_codecs_and_frame_rates(checkpoint, tmp_path, name, settings):
    path = make_video(tmp_path / name, 8, **{"rate": 10} | settings)
    answer = framseg.predict(path, "a dog runs", checkpoint=checkpoint)
    assert answer.duration == pytest.approx(8, abs=0.5) and len(answer.saliency) in (3, 4)
    brightness = answer.frames.mean(axis=(1, 2, 3))
    assert (np.diff(brightness) >= 0).all() and np.ptp(brightness) > 100


@pytest.mark.parametrize("name", ["a.mpg", "a.ts"])
def test_a_stream_without_a_header_is_read_and_its_end_said_to_be_unknown(checkpoint, tmp_path, name):
    path = make_video(tmp_path / name, 8, rate=25, codec="mpeg2video")
    answer = framseg.predict(path, "a dog runs", checkpoint=checkpoint)
    assert answer.duration == pytest.approx(8, abs=0.05)
    assert answer.notes == [
        f"the file tells no length, so it cannot be known whether its end is missing: the answer is about the "
        f"{answer.duration:.2f} s that are there"
    ]


def test_a_file_that_is_cut_off_is_refused_or_answered_for_what_is_there(checkpoint, tmp_path, shared, capsys):
    path = shared / "cases/cut-off/half_download.mp4"
    with pytest.raises(frames.VideoError, match=r"header says 20.00 s, and its pictures end at 11.87 s.*allow-partial"):
        framseg.predict(path, "a dog runs", checkpoint=checkpoint)
    answer = framseg.predict(path, "a dog runs", checkpoint=checkpoint, allow_partial=True)
    note = "the file is cut off: the answer is about the 11.87 s that are there, of 20.00 s"
    assert answer.duration == pytest.approx(11.87, abs=0.01) and answer.notes == answer.record["notes"] == [note]
    assert note in answer.show().axes[0].get_title(loc="left").replace("\n", " ")
    predictor.main([str(path), "-q", "a dog runs", "--checkpoint", str(checkpoint), "--allow-partial"])
    assert f"  note: {note}\n" in capsys.readouterr().out


def test_seconds_are_those_of_a_player_where_the_picture_starts_late(checkpoint, shared):
    answer = framseg.predict(shared / "cases/late-video/starts_at_8s.mp4", "a dog runs", checkpoint=checkpoint)
    assert answer.notes == ["the picture starts 8.00 s after the file does: seconds count from the file's start"]
    assert answer.duration == pytest.approx(20.07, abs=0.01) and answer.times[0] < 8
    assert (answer.frames[0] == answer.frames[1]).all() and (answer.frames[-1] != answer.frames[0]).any()


@pytest.mark.parametrize("count, rate", [(1, 1), (10, 10), (30, 30)])
def test_a_video_of_a_second(checkpoint, tmp_path, count, rate):
    answer = framseg.predict(make_video(tmp_path / "a.mp4", 1, rate), "a dog runs", checkpoint=checkpoint)
    assert answer.duration == pytest.approx(1) and len(answer.saliency) == 0 and len(answer.probability) == FRAMES
    assert all(0 <= start < end <= 1.001 for start, end, _ in answer.windows)
    assert answer.show().axes


def test_an_answer_shows_itself(checkpoint, tmp_path):
    long = make_video(tmp_path / "my $video$.mp4", 200, rate=1)
    answer = framseg.predict(long, "a dog runs", checkpoint=checkpoint)
    assert len(answer.frames) == FRAMES and len(answer.mask) == 7
    texts = [text.get_text() for axes in answer.show().axes for text in [axes.title, *axes.texts]]
    texts += [axes.get_title(loc="left") for axes in answer.show().axes]
    assert any("my $video$.mp4" in text and "qid" not in text for text in texts) and "14 s" in texts
    assert answer.show()._repr_png_().startswith(b"\x89PNG")


def test_importing_framseg_does_not_wait_for_torch():
    code = "import sys, framseg; assert 'torch' not in sys.modules; assert not hasattr(framseg, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_prints_a_table_or_records(checkpoint, tmp_path, capsys, monkeypatch):
    video = str(make_video(tmp_path / "own.mp4", 21))
    queries = ["a dog runs", "night falls"]
    arguments = [video, "-q", queries[0], "--query", queries[1], "--checkpoint", str(checkpoint)]
    predictor.main([*arguments, "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = framseg.predict(video, queries, checkpoint)
    assert records == [answer.record for answer in answers]

    predictor.main(arguments)
    for answer, text in zip(answers, capsys.readouterr().out.split("\n\n"), strict=True):
        title, _, *windows, best = text.strip().splitlines()
        assert title == f"{answer.query!r} in {video} (21.0 s)"
        read = [list(map(float, line.split())) for line in windows]
        assert read == [[round(start, 1), round(end, 1), round(score, 2)] for start, end, score in answer.windows]
        begin = 2 * int(answer.saliency.argmax())
        assert best.strip() == f"best clip: {begin} to {begin + 2} s, score {answer.saliency.max():.2f}"

    monkeypatch.setattr(predictor, "predict", lambda *_, **__: replace(answers[0], valid=False))
    predictor.main(arguments)
    highest = f"{answers[0].probability.max():.2f}"
    assert capsys.readouterr().out.splitlines()[1:] == [f"  nothing found (highest frame probability {highest})"]


@pytest.mark.parametrize(
    "video, query, folder, reason",
    [
        ("none.mp4", "a dog", "checkpoint", "no such video"),
        ("own.mp4", " ", "checkpoint", "empty"),
        ("own.mp4", "a dog", "none", "there is no such folder"),
    ],
)
def test_the_command_refuses_in_one_sentence(checkpoint, tmp_path, video, query, folder, reason):
    make_video(tmp_path / "own.mp4", 4)
    with pytest.raises(SystemExit) as ended:
        predictor.main([str(tmp_path / video), "-q", query, "--checkpoint", str(tmp_path / folder)])
    assert str(ended.value).startswith("error: ") and reason in str(ended.value)
    assert len(str(ended.value).splitlines()) == 1
