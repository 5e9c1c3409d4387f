"""The folder of a trained checkpoint: what is written and read, the model card, and what is refused."""

import json
import shutil

import pytest
import torch
from small import SCORES, tiny

from framseg import checkpoint, config, hub, prompt
from framseg.backbones import CheckpointError, blip3


@pytest.fixture
def made(tmp_path):
    """A tiny model with its adapter, how that began, and a profile whose base is on disk."""
    profile = tiny(model__weights=str(tmp_path / "base"), name="tiny")
    torch.manual_seed(0)
    blip3.Blip3(profile.model).save_published(tmp_path / "base")
    model = checkpoint.load_base(profile)
    return model, model.adapt(profile.adapter, 0), profile, prompt.load("framseg/demo/base")


def test_one_call_writes_the_whole_folder_and_replaces_another(made, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "old.safetensors").touch()
    checkpoint.save_trained(folder, *made, SCORES)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "profile.yaml",
        "tokenizer.json",
        "metrics.json",
        "README.md",
        "resampler.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert list(folder.parent.iterdir()) == [folder]
    assert json.loads((folder / "metrics.json").read_text()) == SCORES
    assert checkpoint.require_complete(folder) == checkpoint.local_folder(folder) == folder
    model, profile = checkpoint.load_trained(folder)
    assert not model.training and profile == made[2]
    assert prompt.load(folder).to_str() == made[3].to_str()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(made, tmp_path):
    folder = tmp_path / "checkpoint"
    checkpoint.save_trained(folder, *made, SCORES)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(KeyError):
        checkpoint.save_trained(folder, *made, metrics={})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_card_says_what_was_trained_and_measured(made, tmp_path):
    checkpoint.save_trained(tmp_path / "checkpoint", *made, SCORES)
    text = (tmp_path / "checkpoint" / checkpoint.CARD).read_text(encoding="utf-8")
    assert "| 12.50 | 12.50 | 12.50 | 12.50 | 12.50 |" in text
    assert "profile `tiny`" in text and "128 samples per step" in text
    paper = checkpoint.model_card(config.load("paper"), SCORES)
    assert "base_model: Salesforce/xgen-mm-phi3-mini-instruct-interleave-r-v1.5\n" in paper


def test_a_base_model_that_is_not_here_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder; set model.weights"):
        checkpoint.load_base(tiny(model__weights=str(tmp_path / "gone")))


def test_an_incomplete_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="resampler.safetensors.*notebook 03"):
        checkpoint.load_trained(tmp_path)


def test_the_checkpoint_of_a_profile_that_trains_nothing_names_its_weights(made, tmp_path):
    model, _, profile, tokenizer = made
    nothing = profile.model_copy(update={"training": profile.training.model_copy(update={"epochs": 0})})
    folder = tmp_path / "checkpoint"
    with pytest.raises(CheckpointError, match="profile.yaml, resampler.safetensors, .* missing"):
        checkpoint.require_complete(folder)
    checkpoint.save_trained(folder, None, {}, nothing, tokenizer, {})
    assert {path.name for path in folder.iterdir()} == {"profile.yaml", "tokenizer.json", "README.md"}
    assert f"Nothing was trained here: the model is {tmp_path / 'base'}: what" in (folder / "README.md").read_text()
    assert checkpoint.require_complete(folder) == checkpoint.local_folder(folder) == folder
    loaded, own = checkpoint.load_trained(folder)
    assert own == nothing
    base = checkpoint.load_base(profile).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(CheckpointError, match="nothing was trained, so there is nothing to share but the name"):
        hub.push(folder, "somebody/moments")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'base'}"):
        checkpoint.load_trained(folder)
