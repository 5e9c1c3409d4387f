"""What a sample costs in floating-point operations, counted from a profile, and what a device can do.

Counted are the matrix products that the method needs, a multiplication and an addition as two operations: attention
over the positions that a causal mask and the sliding window leave, logits of the answer alone, and backward passes
without the weight gradients of what is frozen.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from framseg import config

TERA = 1e12


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one sample."""

    encoder: float  # forward alone, at training too: it is frozen
    resampler: float
    language: float
    resampler_backward: float
    language_backward: float
    recomputation: float  # of the language model, if the profile recomputes its layers

    @property
    def inference(self) -> float:
        """Of an answer, up to its first digit; the digits after it add less than a hundredth."""
        return self.encoder + self.resampler + self.language

    @property
    def training(self) -> float:
        """Of a sample in training: forward, backward and, if the profile recomputes layers, recomputation."""
        return sum(asdict(self).values())


def operations(profile: config.Profile, positions: int) -> Operations:
    """Operations of a sample with `positions` positions of the language model (`prompt.Report.sample_positions`)."""
    vision, resampler, language = profile.model.vision, profile.model.resampler, profile.model.language
    frames, patches, width = profile.frames.count, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches**2 * width
    encoder = frames * (2 * patches * 3 * vision.patch_size**2 * width + vision.layers * layer)

    inner, latents = resampler.heads * resampler.head_dim, resampler.latents
    layer = (
        2 * latents * 2 * width * inner  # queries, output
        + 2 * (patches + latents) * width * 2 * inner  # keys, values
        + 4 * latents * (patches + latents) * inner  # attention
        + 2 * latents * 2 * width * 4 * width  # feed-forward
    )
    tokens = frames * (resampler.layers * layer + 2 * latents * width * language.hidden_size)

    # Of a layer's four linear maps (qkv, output, gate and up, down): the weights, and the number of inputs and outputs.
    weights = 4 * language.hidden_size**2 + 3 * language.hidden_size * language.intermediate_size
    borders = 8 * language.hidden_size + 3 * language.intermediate_size
    window = min(language.sliding_window or positions, positions)
    pairs = window * (window + 1) / 2 + (positions - window) * window
    attention = language.layers * 4 * pairs * language.hidden_size
    linear = language.layers * 2 * positions * weights
    adapter = language.layers * 2 * positions * profile.adapter.rank * borders
    head = 2 * (frames + 1) * language.hidden_size * (language.used_vocab + language.extra_rows)
    forward = linear + attention + adapter + head
    return Operations(
        encoder=encoder,
        resampler=tokens,
        language=forward,
        resampler_backward=2 * tokens,
        language_backward=linear + head + 2 * (attention + adapter),
        recomputation=forward - head if profile.training.gradient_checkpointing else 0.0,
    )


def matrix_rate(
    device: torch.device | str,
    dtype: torch.dtype,
    width: int = 4096,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Operations per second that square matrix products of `width` reach on the device: the limit to compare with.

    seconds: how long to measure, after a warm-up. clock: the one that times what is compared.
    """
    left, right = torch.randn(2, width, width, device=device).to(dtype)
    for warm_up in (True, False):
        done, began = 0, clock()
        while clock() - began < (seconds / 4 if warm_up else seconds):
            left @ right
            done += 1
            if left.is_cuda and done % 16 == 0:
                torch.cuda.synchronize()
        if left.is_cuda:
            torch.cuda.synchronize()
    return done * 2 * width**3 / (clock() - began)


def device_name() -> str:
    """The GPU's name, with how many there are; without one the processor's and how many of its cores."""
    if count := torch.cuda.device_count():
        return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"
