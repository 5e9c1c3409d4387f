import itertools
import json
import time

import pytest
import torch
from small import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from framseg import config
from framseg.backbones import blip3
from framseg.run import cost

TEXT = 12  # ids other than the images', with the answer


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    return tiny(model__language__sliding_window=None, adapter__init="gaussian", adapter__dropout=0.0)


def test_the_papers_sample():
    """About 17 + 5 + 59 TFLOP to train, 29 more with recomputation, 47 at inference."""
    counted_work = cost.operations(config.load("paper"), 3621)
    assert counted_work.encoder / cost.TERA == pytest.approx(17, abs=0.5)
    assert (counted_work.resampler + counted_work.resampler_backward) / cost.TERA == pytest.approx(5, abs=0.5)
    assert (counted_work.language + counted_work.language_backward) / cost.TERA == pytest.approx(59, abs=1)
    assert counted_work.recomputation / cost.TERA == pytest.approx(29, abs=0.5)
    assert counted_work.inference / cost.TERA == pytest.approx(47, abs=0.5)
    assert cost.operations(config.load("h100"), 3621).training == counted_work.training - counted_work.recomputation


@sdpa_kernel(SDPBackend.MATH)  # torch does not count the CPU's fused attention
def test_operations_are_those_that_torch_counts(profile):
    """torch counts attention over all pairs, also those that the causal mask leaves out."""
    torch.manual_seed(0)
    model = blip3.Blip3(profile.model)
    model.adapt(profile.adapter, 0)
    tokens, frames = profile.model.tokens, profile.frames.count
    ids = torch.randint(0, 200, (1, TEXT + frames))
    ids[0, 1 : 1 + frames] = tokens.image
    positions = torch.arange(TEXT + frames - frames - 2, TEXT + frames - 1)[None]
    length = TEXT + frames * profile.model.resampler.latents
    expected = cost.operations(profile, length)
    language = profile.model.language
    beyond = language.layers * 4 * language.hidden_size * (length**2 - length * (length + 1) / 2)

    pixels = torch.rand(1, frames, 3, 56, 56)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.vision_features(pixels[0])
    assert counted.get_total_flops() == expected.encoder
    with FlopCounterMode(display=False) as counted:
        vision = model.vision_tokens(pixels)
    assert counted.get_total_flops() == expected.encoder + expected.resampler
    with FlopCounterMode(display=False) as counted:
        logits = model(None, ids, torch.ones_like(ids), positions, vision)
    assert counted.get_total_flops() == expected.language + beyond
    with FlopCounterMode(display=False) as counted:
        logits.sum().backward()
    backward = expected.language_backward + expected.resampler_backward
    assert counted.get_total_flops() == pytest.approx(backward + 2 * beyond, rel=0.01)


def test_bytes_are_those_of_the_model(profile):
    model = blip3.Blip3(profile.model)
    assert cost.fixed_bytes(profile)[0] == sum(parameter.nbytes for parameter in model.parameters())
    model.adapt(profile.adapter, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = profile.training.model_copy(update={"offload_optimizer": False, "processes": 1})
    assert cost.fixed_bytes(profile.model_copy(update={"training": alone}))[1] == 16 * trained
    assert cost.fixed_bytes(config.load("paper"))[1] == 2 * 135_067_392


def test_parameters_are_those_of_the_full_size_model():
    full, tied = config.load("paper"), config.load("demo")
    for profile in (full, tied, config.load("paper", {"adapter.targets": ["o_proj", "down_proj"]})):
        with torch.device("meta"):
            model = blip3.Blip3(profile.model)
            base = sum(parameter.numel() for parameter in model.parameters())
            model.adapt(profile.adapter.model_copy(update={"init": True}), 0)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert cost.parameters(profile) == (base, trained)


@pytest.mark.parametrize("name", ["h100", "paper"])
def test_a_samples_memory_is_that_of_the_record(name):
    """The record has what autograd keeps at full size; the estimate follows from the profile's sizes alone."""
    record = json.loads((config.REPOSITORY / "tests/benchmarks/records/activations.json").read_text())
    profile = config.load(name)
    assert cost.sample_bytes(profile) / 2**30 == pytest.approx(record[name]["GiB per sample"], rel=0.02)
    decoded = profile.inference.batch * cost.query_bytes(profile)
    trained = profile.training.micro_batch * cost.sample_bytes(profile)
    assert cost.gpu_bytes(profile) == sum(cost.fixed_bytes(profile)) + max(decoded, trained) + cost.SPARE


def test_memory_grows_with_what_it_is_made_of():
    profile = config.load("paper")
    for change in (
        {"training.micro_batch": 32},
        {"training.gradient_checkpointing": False},
        {"training.offload_optimizer": False},
        {"inference.batch": 128},
        {"model.dtype": "float32"},
        {"frames.count": 28},
    ):
        assert cost.gpu_bytes(config.load("paper", change)) > cost.gpu_bytes(profile), change


def test_a_window_leaves_fewer_pairs(profile):
    near = tiny(model__language__sliding_window=16)
    language = near.model.language
    pairs = sum(min(position + 1, 16) for position in range(100))
    less = cost.operations(profile, 100).language - cost.operations(near, 100).language
    assert less == language.layers * 4 * language.hidden_size * (100 * 101 / 2 - pairs)


def test_matrix_rate_counts_the_products_that_the_clock_gave_time_for():
    """Each look at the clock takes 1/16 s: one look per product, and two at the end; the warm-up does not count."""
    looks = itertools.count()
    rate = cost.matrix_rate("cpu", torch.float32, width=32, clock=lambda: next(looks) / 16)
    assert rate == 15 * 2 * 32**3 / (17 / 16)


def test_matrix_rate_is_that_of_the_device():
    left, right = torch.randn(2, 256, 256)
    began = time.perf_counter()
    for _ in range(200):
        left @ right
    plain = 200 * 2 * 256**3 / (time.perf_counter() - began)
    assert plain / 10 < cost.matrix_rate("cpu", torch.float32, width=256, seconds=0.1) < 10 * plain
