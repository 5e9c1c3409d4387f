import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small import SCORES, tiny

from framseg import config, losses, prompt
from framseg.backbones import CheckpointError, blip3
from framseg.checkpoint import load_base, load_trained, save_trained


@pytest.fixture(scope="module")
def model() -> blip3.Blip3:
    torch.manual_seed(0)
    return blip3.Blip3(tiny().model).eval()


@pytest.fixture
def batch(model) -> dict:
    """Two samples of five frames, the second three ids shorter and padded on the left."""
    torch.manual_seed(1)
    tokens = model.section.tokens
    ids = torch.randint(0, 200, (2, 30))
    ids[:, [6, 9, 12, 15, 18]] = tokens.image
    ids[1, :3] = tokens.pad
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"pixel_values": torch.rand(2, 5, 3, 56, 56) * 2 - 1, "input_ids": ids, "attention_mask": mask}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("window", "golden"), [(None, "full_attention"), (16, "sliding_window_16")])
def test_equals_the_original_implementation(shared, tmp_path, attention, window, golden):
    shutil.copy(shared / "golden" / "blip3_tiny_weights.safetensors", tmp_path / "model.safetensors")
    profile = tiny(model__attention=attention, model__language__sliding_window=window)
    model = blip3.Blip3.load_published(profile.model, tmp_path)
    io = load_file(shared / "golden" / f"blip3_tiny_io_{golden}.safetensors")
    with torch.no_grad():
        features = model.vision_features(io["pixel_values"].flatten(0, 1)).view_as(io["vision_features"])
        tokens = model.vision_tokens(io["pixel_values"])
        logits = model(io["pixel_values"], io["input_ids"], io["attention_mask"])
        count = int(io["labels"][0].ne(-100).sum())
        positions = torch.arange(30 - count - 1, 29).expand(2, -1)
        asked = model(io["pixel_values"], io["input_ids"], io["attention_mask"], positions)
        _, long_mask, _ = model.expand(io["input_ids"], io["attention_mask"], tokens)
    seen = long_mask.bool()
    assert relative(features, io["vision_features"]) < 1e-5
    assert relative(tokens, io["vision_tokens"]) < 1e-5
    assert relative(logits[seen], io["logits"][seen]) < 1e-5
    loss = losses.lm(asked, io["input_ids"][:, -count:])
    assert relative(loss, io["lm_loss"][0]) < 1e-5


def test_asked_positions_are_the_same_as_all(model, batch):
    with torch.no_grad():
        everything = model(**batch)
        positions = torch.tensor([[23, 25, 28], [24, 26, 29]])
        asked = model(**batch, positions=positions)
    # Five images of eight vectors stand before every asked position.
    expected = torch.stack([everything[i, positions[i] + 5 * 7] for i in range(2)])
    assert asked.shape == (2, 3, 303)
    torch.testing.assert_close(asked, expected)


def test_padding_side_does_not_matter(model, batch):
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[1], mask[1] = ids[1].roll(-3), mask[1].roll(-3)
    with torch.no_grad():
        left = model(**batch, positions=torch.tensor([[27], [27]]))
        right = model(batch["pixel_values"], ids, mask, positions=torch.tensor([[27], [24]]))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_uint8_frames_are_scaled_to_one(model):
    images = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.vision_features(images), model.vision_features((images / 255 - 0.5) / 0.5))


def test_a_prompt_with_another_number_of_images_is_refused(model, batch):
    with pytest.raises(ValueError, match=r"\[5, 5\] <image> tokens, but 4 frames"):
        model(batch["pixel_values"][:, :4], batch["input_ids"], batch["attention_mask"])


def test_published_names_shapes_and_counts(shared):
    with init_empty_weights():
        model = blip3.Blip3(config.load("paper", {"model.attention": "sdpa"}).model)
    expected = json.loads((shared / "golden" / "blip3_state_dict_shapes.json").read_text())
    assert {blip3.PREFIX + name: list(value.shape) for name, value in model.state_dict().items()} == expected
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"vision_encoder": 428225600, "vision_tokenizer": 109901568, "lang_model": 3821130051}
    assert sum(counts.values()) == 4359257219
    section = config.load("paper").adapter.model_copy(update={"init": True})  # PiSSA's SVD has no meta version
    with torch.device("meta"):
        start = model.adapt(section, 0)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained[name] for name in start) == 25165824
    assert sum(trained.values()) == 135067392
    assert all("lora_" in name or name.startswith("vision_tokenizer.") for name in trained)


def test_saved_and_loaded_again(model, batch, tmp_path):
    model.save_published(tmp_path)
    again = blip3.Blip3.load_published(model.section, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**batch), again(**batch))
    assert all(name.startswith("vlm.") for name in load_file(next(tmp_path.glob("*.safetensors"))))


def test_shards_are_loaded_one_tensor_at_a_time(tmp_path):
    """In a process of its own, loading in another dtype than the files' takes the model's size, not twice as much."""
    profile = tiny(
        model__language__hidden_size=768, model__language__intermediate_size=3072, model__language__layers=10
    )
    torch.manual_seed(0)
    model = blip3.Blip3(profile.model)
    size = sum(value.nbytes for value in model.state_dict().values())
    assert size > 300e6
    state = {blip3.PREFIX + name: value.bfloat16() for name, value in model.state_dict().items()}
    save_torch_state_dict(state, tmp_path, max_shard_size="50MB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 4
    config.save(profile, tmp_path / "profile.yaml")
    code = (
        "import re, sys\n"
        "from framseg import config; from framseg.backbones import blip3\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "section = config.load(sys.argv[1] + '/profile.yaml').model\n"
        "before = peak()\n"
        "model = blip3.Blip3.load_published(section, sys.argv[1])\n"
        "print(peak() - before)"
    )
    environment = os.environ | {"PYTHONPATH": str(config.REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 1.4 * size
    again = blip3.Blip3.load_published(profile.model, tmp_path).state_dict()
    assert all(torch.equal(again[name], state[blip3.PREFIX + name].float()) for name in again)


def test_a_checkpoint_of_another_shape_lists_all_that_is_wrong(model, tmp_path):
    model.save_published(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    state = load_file(file)
    state["vlm.vision_tokenizer.latents"] = torch.zeros(4, 72)
    del state["vlm.lang_model.lm_head.bias"]
    state["vlm.lang_model.what"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(CheckpointError) as caught:
        blip3.Blip3.load_published(model.section, tmp_path)
    message = str(caught.value)
    assert "vision_tokenizer.latents is [4, 72], the profile's is [8, 72]" in message
    assert "missing vlm.lang_model.lm_head.bias" in message
    assert "unexpected vlm.lang_model.what" in message


@pytest.mark.parametrize("content", [b"", b"\x80\x04not a tensor", b"\xff" * 64])
def test_a_damaged_checkpoint_names_its_file(model, tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        blip3.Blip3.load_published(model.section, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no .safetensors"):
        blip3.Blip3.load_published(model.section, tmp_path)


def test_adapting_changes_nothing_and_the_export_gives_the_trained_logits(model, batch, tmp_path):
    base = tmp_path / "base"
    model.save_published(base)
    profile = tiny(model__weights=str(base))
    adapted = load_base(profile)
    start = adapted.adapt(profile.adapter, seed=3)
    adapted.eval()
    with torch.no_grad():
        before, plain = model(**batch), adapted(**batch)
        assert relative(plain, before) < 1e-5
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
        trained = adapted(**batch)
        assert relative(trained, before) > 1e-2

    merged = tmp_path / "merged"

    tokenizer = prompt.load("framseg/demo/base")
    save_trained(tmp_path / "trained", adapted, start, profile, tokenizer, SCORES)
    loaded, again = load_trained(tmp_path / "trained")
    with torch.no_grad():
        assert relative(loaded(**batch), trained) < 1e-4
    assert again == profile
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_published(merged)
    with torch.no_grad():
        assert torch.equal(blip3.Blip3.load_published(profile.model, merged)(**batch), loaded(**batch))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
def test_peft_loads_the_exported_adapter_on_the_original_base(model, batch, tmp_path, dtype, tolerance):
    base = tmp_path / "base"
    model.save_published(base)
    profile = tiny(model__weights=str(base), model__dtype=dtype)
    batch["pixel_values"] = batch["pixel_values"].to(getattr(torch, dtype))
    plain, adapted = load_base(profile), load_base(profile)
    start = adapted.adapt(profile.adapter, seed=3)
    adapted.eval()
    with torch.no_grad():
        before = plain(**batch)
        assert relative(adapted(**batch), before) < tolerance
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)
        trained = adapted(**batch)
    lora, tensors = adapted.adapter(start)
    lora.save_pretrained(tmp_path / "adapter")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    assert relative(trained, before) > 3 * tolerance
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()  # not merged: peft's own forward
    with torch.no_grad():
        assert relative(loaded(**batch), trained) < max(tolerance, 1e-4)


def test_the_same_seed_gives_the_same_pissa(model, tmp_path):
    model.save_published(tmp_path)
    profile = tiny(model__weights=str(tmp_path))
    torch.manual_seed(5)
    one = load_base(profile).adapt(profile.adapter, seed=3)
    torch.manual_seed(6)
    other = load_base(profile).adapt(profile.adapter, seed=3)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_recomputed_layers_have_the_same_gradients_and_nothing_warns(batch):
    profile = tiny(adapter__init="gaussian")
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = blip3.Blip3(profile.model)
        model.adapt(profile.adapter, 0)
        computed = []
        model.lang_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, computed=computed: computed.append(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as the FutureWarning of a method that transformers has renamed
            if recompute:
                model.recompute_layers()
            model.train()
            torch.manual_seed(1)  # of dropout
            model(**batch).square().mean().backward()
        assert len(computed) == 1 + recompute
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert any("lora_" in name and value.abs().max() > 0 for name, value in plain.items())
