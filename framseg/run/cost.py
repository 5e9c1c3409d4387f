"""What a profile costs, counted from its sizes alone, and how fast a device is.

Operations are those of the matrix products that the method needs, a multiplication and an addition counted as two:
attention over the positions that a causal mask and the sliding window leave, logits of the answer alone, and backward
passes without the weight gradients of what is frozen.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Timer, timer

from framseg import config

TERA = 1e12
TEXT = 421  # positions of prompt and answer next to the frames' vectors, about
# Bytes of a GPU for fragments, work space of the matrix products, the CUDA context: in training, in decoding alone.
SPARE, DECODING_SPARE = 4 * 2**30, 2**30
# Bytes that autograd keeps in bfloat16, measured at full size by tests/benchmarks/activations.py: of a language layer
# per position and unit of its two widths, of a resampler layer per vector and unit of its two widths.
LANGUAGE_KEPT, RESAMPLER_KEPT = 16.67, 5.17


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
    frames, patches, width = profile.frames.count, _patches(vision), vision.hidden_size
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


def parameters(profile: config.Profile) -> tuple[int, int]:
    """How many parameters the base model has, and how many are trained: the resampler's and the adapter's."""
    vision, section, language = profile.model.vision, profile.model.resampler, profile.model.language
    width, inner, patches = vision.hidden_size, section.heads * section.head_dim, _patches(vision)
    resampler = width * (section.latents + 2 + language.hidden_size) + language.hidden_size
    resampler += section.layers * width * (6 + 4 * inner + 8 * width)

    block = 4 * width * (width + 1) + 2 * width * vision.intermediate_size + vision.intermediate_size + width
    encoder = width * (3 * vision.patch_size**2 + 1 + patches + 2) + vision.layers * (block + 4 * width)
    encoder += block + 3 * width  # the pooling head, which the method does not read

    size, feed = language.hidden_size, language.intermediate_size
    tables = 1 if language.tie_embeddings else 2
    model = tables * language.vocab_size * size + language.vocab_size + language.extra_rows * (2 * size + 1) + size
    model += language.layers * (4 * size**2 + 3 * size * feed + 2 * size)
    borders = {"qkv_proj": 4 * size, "o_proj": 2 * size, "gate_up_proj": size + 2 * feed, "down_proj": feed + size}
    adapter = language.layers * profile.adapter.rank * sum(borders[target] for target in set(profile.adapter.targets))
    return encoder + resampler + model, resampler + adapter


def fixed_bytes(profile: config.Profile) -> tuple[int, float]:
    """Bytes on each device that do not depend on the samples: all weights, and the state of what is trained.

    The state: gradients, and the optimizer's float32 copy and two moments, shared by all processes, unless offloaded.
    """
    base, trained = parameters(profile)
    size = getattr(torch, profile.model.dtype).itemsize
    states = 0 if profile.training.offload_optimizer else 12 / profile.training.processes
    return size * base, trained * (size + states) if profile.training.epochs else 0


def sample_bytes(profile: config.Profile) -> float:
    """Bytes of a training sample that are kept from the forward to the backward pass, about."""
    vision, section, language = profile.model.vision, profile.model.resampler, profile.model.language
    positions, inner = profile.frames.count * section.latents + TEXT, section.heads * section.head_dim
    vectors = profile.frames.count * (_patches(vision) + section.latents)
    resampler = section.layers * vectors * (vision.hidden_size + inner) * RESAMPLER_KEPT
    layer = positions * (language.hidden_size + language.intermediate_size) * LANGUAGE_KEPT
    inputs = (language.layers + 3) * positions * language.hidden_size * 2  # of every layer, of the norm, of the head
    kept = layer + inputs if profile.training.gradient_checkpointing else language.layers * layer
    return (resampler + kept) * getattr(torch, profile.model.dtype).itemsize / 2


def query_bytes(profile: config.Profile) -> float:
    """Bytes of a query that is decoded: the prompt's keys and values and its beams', and one layer's values, about."""
    section, language = profile.model.resampler, profile.model.language
    positions = profile.frames.count * section.latents + TEXT
    kept = min(positions, language.sliding_window or positions) + profile.inference.beams * profile.frames.count
    keys = 2 * language.layers * kept * language.hidden_size
    values = positions * (3 * language.intermediate_size + 8 * language.hidden_size)
    return (keys + values) * getattr(torch, profile.model.dtype).itemsize


def gpu_bytes(profile: config.Profile) -> float:
    """Bytes that each GPU needs, about: it decodes and, unless there are no epochs, trains."""
    decodes = sum(fixed_bytes(profile)) + profile.inference.batch * query_bytes(profile)
    if not profile.training.epochs:
        return decodes + DECODING_SPARE
    trains = sum(fixed_bytes(profile)) + profile.training.micro_batch * sample_bytes(profile)
    return max(trains, decodes) + SPARE


def _patches(vision: config.Vision) -> int:
    return (vision.image_size // vision.patch_size) ** 2


def matrix_rate(
    device: torch.device | str,
    dtype: torch.dtype,
    width: int = 4096,
    seconds: float = 1.0,
    clock: Callable[[], float] = timer,
) -> float:
    """Operations per second that square matrix products of `width` reach on the device: the limit to compare with.

    seconds: how long to measure, after a warm-up. clock: the one that times what is compared; it waits for a GPU.
    """
    names = dict(zip(("left", "right"), torch.randn(2, width, width, device=device).to(dtype), strict=True))
    product = Timer("left @ right", timer=clock, globals=names, num_threads=torch.get_num_threads())
    return 2 * width**3 / product.blocked_autorange(min_run_time=seconds).median


def device_name(where: str = "auto") -> str:
    """The GPU's name, with how many there are; without one, or for "cpu", the processor's and how many of its cores."""
    if where != "cpu" and (count := torch.cuda.device_count()):
        return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"
