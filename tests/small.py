"""Small models for tests, of the same class as the published one, and small videos."""

import os
from fractions import Fraction

import av
import numpy as np

from framseg import annotations, config
from framseg.evaluate import METRICS

# The architecture of the golden files' tiny model.
TINY = {
    "dtype": "float32",
    "attention": "sdpa",
    "vision": {
        "hidden_size": 72,
        "intermediate_size": 144,
        "layers": 3,
        "heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    "resampler": {"latents": 8, "layers": 6, "heads": 16, "head_dim": 96},
    "language": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "layers": 3,
        "heads": 4,
        "vocab_size": 320,
        "used_vocab": 300,
        "extra_rows": 3,
    },
    "tokens": {"zero": 50, "one": 49, "assistant": 291, "end": 292, "pad": 299, "image": 300},
}


SCORES = {"brief": dict.fromkeys(METRICS, 12.5)}  # metrics, as far as a checkpoint's card shows them


def tiny(**changes) -> config.Profile:
    """Profile `paper` with the tiny model and five frames; `changes` are dotted keys with __ for the dots."""
    overrides = {"frames.count": 5, "model": TINY} | {key.replace("__", "."): value for key, value in changes.items()}
    return config.load("paper", overrides)


def unlabelled(row: annotations.Row) -> annotations.Row:
    """The row as a test split shows it."""
    return annotations.Row(row.qid, row.query, row.duration, row.vid)


def make_video(path, seconds, rate=2, codec="libx264", sound=None, gaps_ms=None):
    """From black to white. `sound` is an audio codec; `gaps_ms` are the times between frames, instead of a rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        heard = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        times = np.concatenate([[0], np.cumsum(gaps_ms)]) if gaps_ms is not None else np.arange(seconds * rate)
        if gaps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times.tolist()):
            image = np.full((48, 64, 3), 255 * number // len(times), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000 if gaps_ms is not None else rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for second in range(seconds if heard else 0):
            tone = np.sin(np.arange(48000) / 20, dtype=np.float32)[None] / 4
            frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, second * 48000, Fraction(1, 48000)
            container.mux(heard.encode(frame))
        container.mux(heard.encode() if heard else [])
    if codec == "libsvtav1":  # where it may, it makes its caller a real-time process, and two of those starve two cores
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path
