"""Number formats: the rule, int8 weights, and the memory that an answer takes, counted and told."""

import gc
import re
import weakref
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from test_decode import TINY, tiny
from test_released import batch

from framseg import FramsegError, backbones, checkpoint, config, dataset, decode
from framseg.backbones import blip3, fingerprint
from framseg.run import cost, precision

GPU, CPU, APPLE = torch.device("cuda", 0), torch.device("cpu"), torch.device("mps")
WIDE = TINY["model.language"] | dict(hidden_size=128, intermediate_size=256)  # rows that can be divided into groups


def test_which_device_and_which_format(monkeypatch):
    monkeypatch.setattr(precision, "find_spec", lambda name: ModuleSpec(name, None))
    for has, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        for asked in ("auto", "int8"):
            assert precision.chosen(asked, GPU, "bfloat16") == expected
            assert precision.chosen(asked, GPU, "float32") == "float32"
        assert precision.chosen(None, GPU, "bfloat16") == "bfloat16"
        assert precision.chosen("float32", GPU, "bfloat16") == "float32"
    assert precision.chosen("auto", CPU, "bfloat16") == precision.chosen("int8", CPU, "bfloat16") == "bfloat16"
    assert precision.chosen("auto", APPLE, "bfloat16") == "float16"
    with pytest.raises(FramsegError, match="dtype 'int4' is none of auto, float32, float16, bfloat16, int8"):
        precision.chosen("int4", CPU, "float32")
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(FramsegError, match="int8 needs the package torchao: pip install torchao$"):
        precision.chosen("int8", CPU, "float32")
    for cuda, mps, auto in ((False, False, "cpu"), (False, True, "cpu"), (True, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert backbones.device().type == auto and backbones.device("cpu").type == "cpu"
        for name, there in (("cuda", cuda), ("mps", mps), ("tpu", False)):
            if there:
                assert backbones.device(name).type == name
            else:
                with pytest.raises(FramsegError, match=f"device '{name}': this machine does not have it; .*cpu"):
                    backbones.device(name)


# memory


def test_the_memory_of_the_papers_model():
    paper = config.load("paper")
    whole, query = cost.fixed_bytes(paper)[0], int(cost.query_bytes(paper))
    assert precision.memory(paper, CPU) == {"cpu": whole + query}
    assert precision.memory(paper, GPU) == {"cuda:0": whole + query, "main memory": whole}
    small = precision.memory(paper, GPU, int8=True)
    assert small["main memory"] == whole and 5 < small["cuda:0"] / 2**30 < 6.5  # a card of 8 GB has room for it
    assert precision.memory(paper, CPU, int8=True) == {"cpu": whole}  # they are made int8 after they were read


def test_too_little_memory_is_told_before_loading(monkeypatch):
    paper = config.load("paper")
    free = {"main": 23.6, "gpu": 7.5}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free["main"] * 1e9)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (int(free["gpu"] * 1e9), 10**11))
    line = precision.told("a/b", paper, CPU)
    assert re.fullmatch(r"loading a/b in bfloat16: cpu needs about 9\.\d+GB, 23\.6GB are free\n", line)
    line = precision.told("a/b", paper, GPU)
    assert re.fullmatch(
        r"loading a/b in bfloat16: cuda:0 needs about 9\.\d+GB, 7\.50GB are free; main memory needs about 8\.\d+GB, "
        r"23\.6GB are free; it may fail: choose another device or dtype, or close what else takes memory\n",
        line,
    )
    line = precision.told("a/b", paper, GPU, int8=True)
    assert "loading a/b in int8 and bfloat16: cuda:0 needs about 6." in line and "may fail" not in line
    free["main"] = 4  # the weights pass through it
    assert "may fail" in precision.told("a/b", paper, GPU, int8=True)
    small = tiny()[1]
    assert not precision.told("a/b", small, CPU)
    free["main"] = 1e-6
    assert "may fail" in precision.told("a/b", small, CPU)


def test_loading_says_so_and_never_holds_two_models(tmp_path, monkeypatch, capsys):
    model, profile = tiny()
    model.save_published(tmp_path / "merged")
    section = {"weights": str(tmp_path / "merged"), "tokenizer": "framseg/demo/base"}
    profile = profile.model_copy(update={"model": profile.model.model_copy(update=section)})
    config.save(profile, tmp_path / "profile.yaml")
    monkeypatch.setattr(checkpoint.released, "PROFILE", tmp_path / "profile.yaml")
    monkeypatch.setattr(checkpoint.prompt, "fitting", lambda *_: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16))
    first = weakref.ref(checkpoint.loaded(tmp_path / "merged", "cpu", "float32")[0])
    said = capsys.readouterr().err
    assert said.startswith(f"loading {tmp_path / 'merged'} in float32: cpu needs about") and "it may fail" in said
    load, gone = blip3.Blip3.load_published, []

    def later(*arguments):
        gc.collect()
        gone.append(first() is None)
        return load(*arguments)

    monkeypatch.setattr(blip3.Blip3, "load_published", later)
    assert first() is checkpoint.loaded(tmp_path / "merged", "cpu", "float32")[0] and not gone
    checkpoint.loaded(tmp_path / "merged", "cpu", "bfloat16")
    assert gone == [True]


# int8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_keeps_the_layers_weights_alone_as_bytes(dtype):
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    model, profile = tiny(**{"model.language": WIDE})
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = batch(profile)
    with torch.inference_mode():
        expected = model.digit_logits(model(**inputs))
        before = fingerprint(model)
        model.to(getattr(torch, dtype))
        precision.make_int8(model.lang_model.model.layers)
        inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
        logits = model.digit_logits(model(**inputs)).float()
    assert 0 < (logits - expected).abs().mean() < 0.1 * expected.std()
    assert fingerprint(model) != before
    kept = {name for name, value in model.named_parameters() if hasattr(value, "qdata")}
    assert kept == {f"lang_model.model.layers.{i}.{part}.weight" for i in range(2) for part in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")}  # fmt: skip
    for name, value in model.state_dict().items():
        if name not in kept:
            assert torch.equal(value, exact[name].to(value.dtype)), name
    counted = profile.model_copy(update={"model": profile.model.model_copy(update={"dtype": dtype})})
    parts = [getattr(p, name, None) for p in model.parameters() for name in ("qdata", "scale")]
    own = sum(part.nbytes for part in parts if part is not None)
    own += sum(p.nbytes for p in model.parameters() if not hasattr(p, "qdata"))
    assert precision.memory(counted, GPU, int8=True)["cuda:0"] == own + int(cost.query_bytes(counted))


def test_int8_after_merging_what_was_trained(trained, tmp_path):
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    profile, run = trained
    rows = dataset.rows(profile, "val")
    probability = {}
    for dtype in ("float32", "int8"):
        model, own, tokenizer = checkpoint.loaded(run.checkpoint, "cpu", dtype)
        assert own.model.dtype == "float32"
        records = decode.split(model, tokenizer, profile, rows, tmp_path / f"{dtype}.jsonl")
        probability[dtype] = np.array([record["probability"] for record in records])
    assert 0 < abs(probability["int8"] - probability["float32"]).max() < 0.05
