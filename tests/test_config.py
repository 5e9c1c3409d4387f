import os
import shutil
import subprocess
import sys

import pytest

from framseg import config
from framseg.run.paths import Run


def flat(value, key=""):
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}.{name}" if key else name).items()}


PAPER = {  # Tables II and III, completed from the authors' logs
    "frames.count": 25,
    "frames.neighbours": 1,
    "frames.neighbour_distance": 3 / 30,
    "model.weights": "Salesforce/xgen-mm-phi3-mini-instruct-interleave-r-v1.5",
    "model.dtype": "bfloat16",
    "model.vision.hidden_size": 1152,
    "model.vision.image_size": 384,
    "model.vision.patch_size": 14,
    "model.resampler.latents": 128,
    "model.resampler.layers": 6,
    "model.resampler.heads": 16,
    "model.resampler.head_dim": 96,
    "model.language.hidden_size": 3072,
    "model.language.layers": 32,
    "model.language.heads": 32,
    "model.language.context": 4096,
    "model.language.rope_theta": 10000,
    "model.language.sliding_window": 2047,
    "model.tokens.zero": 29900,
    "model.tokens.one": 29896,
    "model.tokens.assistant": 32001,
    "model.tokens.end": 32007,
    "model.tokens.pad": 32011,
    "model.tokens.image": 32012,
    "adapter.rank": 16,
    "adapter.alpha": 16,
    "adapter.dropout": 0.025,
    "adapter.init": "pissa_niter_4",
    "adapter.rslora": True,
    "adapter.targets": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "losses.pos_weight": 2.3378,
    "losses.tversky_alpha": 0.3,
    "losses.tversky_beta": 0.7,
    "losses.eps": 1e-5,
    "losses.schedule": "linear",
    "losses.warmup_epochs": 6,
    "losses.start": (1, 0, 0, 0),
    "losses.end": (0.2, 0.2667, 0.2667, 0.2667),
    "training.processes": 2,
    "training.epochs": 11,
    "training.micro_batch": 16,
    "training.accumulation": 4,
    "training.learning_rate": 2e-5,
    "training.weight_decay": 0.005,
    "training.betas": (0.9, 0.999),
    "training.eps": 1e-8,
    "training.gradient_clip": 1.0,
    "training.warmup_steps": 282,
    "training.planned_steps": 1125,
    "training.floor": 0.1,
    "training.zero_stage": 2,
    "training.offload_optimizer": True,
    "training.gradient_checkpointing": True,
    "training.compile": True,
    "inference.beams": 2,
    "inference.batch": 6,
    "inference.windows": "mask",
    "inference.saliency": "overlap",
}


@pytest.mark.parametrize("key", PAPER)
def test_paper_has_the_papers_number(key):
    assert flat(config.load("paper").model_dump())[key] == pytest.approx(PAPER[key])


def test_effective_batch_and_steps_of_the_paper():
    training = config.load("paper").training
    batch = training.processes * training.micro_batch * training.accumulation
    assert batch == 128
    assert 7218 // batch * training.epochs <= 618 <= -(-7218 // batch) * training.epochs


def test_every_shipped_profile_loads():
    assert "paper" in config.names()
    for name in config.names():
        assert config.load(name).name == name


def test_saved_profile_reads_back_the_same(tmp_path):
    profile = config.load("paper", {"training.epochs": "3", "model.language.sliding_window": "null"})
    config.save(profile, tmp_path / "profile.yaml")
    assert config.load(tmp_path / "profile.yaml") == profile
    assert profile.training.epochs == 3 and profile.model.language.sliding_window is None


def test_a_profile_changes_the_one_it_extends(tmp_path):
    (tmp_path / "near.yaml").write_text("extends: paper\nname: near\ntraining: {epochs: 2}\n")
    (tmp_path / "far.yaml").write_text("extends: near\nname: far\nlosses: {schedule: table}\n")
    far, paper = config.load(tmp_path / "far.yaml"), config.load("paper")
    changed = {k: v for k, v in flat(far.model_dump()).items() if flat(paper.model_dump())[k] != v}
    assert changed == {"name": "far", "training.epochs": 2, "losses.schedule": "table"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.epoch": 3}, "training.epoch: no such key, the nearest is 'epochs'"),
        ({"trainin.epochs": 3}, "trainin: no such key, the nearest is 'training'"),
        ({"training.epochs": -1}, "training.epochs: .*greater than or equal to 0"),
        ({"training.epochs": "many"}, "training.epochs: .*valid integer"),
        ({"training.epochs": "[1"}, "training.epochs: not plain YAML"),
        ({"training": 3}, "training: "),
        ({"losses.schedule": "linaer"}, "losses.schedule: .*'linear' or 'table'"),
        ({"losses.start": [1, 0, 0]}, "losses.start.*: Field required"),
        ({"losses.start": [0, 0, 0, 0]}, "weights sum to 0"),
        ({"losses.end": [1, -1, 0, 0]}, "losses.end.1: .*greater than or equal to 0"),
        ({"losses.schedule": "table", "losses.table": []}, "losses.table: .*at least 1 item"),
        ({"training.learning_rate": 0}, "training.learning_rate: .*greater than 0"),
        ({"training.learning_rate": float("inf")}, "training.learning_rate: .*finite number"),
        ({"inference.windows": "masks"}, "inference.windows: .*'mask', 'thresholds' or 'ranked'"),
        ({"adapter.dropout": 1}, "adapter.dropout"),
        ({"frames.count": 40}, "frames.count: 40 frames of 128 vectors need more than the model's context"),
        ({"training.warmup_steps": 1125}, "warmup_steps must be smaller"),
        ({"training.micro_batch": 0}, "training.micro_batch: .*greater than or equal to 1"),
        ({"training.betas": [0.9, 1]}, "training.betas.1: .*less than 1"),
        ({"inference.beams": 0}, "inference.beams: .*greater than or equal to 1"),
        ({"inference.beam": 2}, "inference.beam: no such key, the nearest is 'beams'"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"seed": 2**40}, "seed: .*less than"),
        (
            {"adapter.targets": ["qkv_proj", "q_proj"]},
            "adapter.targets.1: .*'qkv_proj', 'o_proj', 'gate_up_proj' or 'down",
        ),
        ({"adapter.targets": []}, "adapter.targets: .*at least 1 item"),
        ({"adapter.init": "pizza"}, "adapter.init: .*pissa"),
        ({"adapter.rank": 4096}, "adapter.rank: 4096 is more than"),
        ({"model.vision.heads": 7}, "model.vision: hidden_size 1152 cannot be divided among 7 heads"),
        ({"model.vision.image_size": 13}, "model.vision: image_size 13 is smaller than one patch"),
        ({"model.language.heads": 36}, "model.language: hidden_size 3072 cannot be divided among 36 heads"),
        ({"model.language.heads": 1024}, "model.language: .*1024 heads of even size"),
        ({"model.language.used_vocab": 32065}, "model.language: used_vocab 32065 is more than the vocab_size"),
        ({"model.language.layers": 10**9}, "model.language.layers: .*less than or equal to 1000"),
        ({"model.resampler.latents": 2**53}, "model.resampler.latents: .*less than or equal to"),
        ({"model.tokens.image": 32015}, "tokens.image: 32015 is not one of the model's ids 0..32014"),
        ({"model.tokens.pad": -1}, "tokens.pad: -1 is not one of"),
        ({"model.tokens.one": 29900}, "tokens.zero: 29900 is the id of tokens.one too"),
        (
            {"model.attention": "flash_attention_2", "model.dtype": "float32"},
            "flash_attention_2 does not work in float32",
        ),
        ({"data.videos": "2001-99-99"}, "data.videos: not plain YAML"),
        ({"data.videos": "[" * 5000}, "data.videos: not plain YAML"),
        ({"data.videos": "!!float ''"}, "data.videos: not plain YAML"),
    ],
)
def test_a_wrong_value_is_named(overrides, message):
    with pytest.raises(config.ProfileError, match=message):
        config.load("paper", overrides)


def test_every_wrong_value_is_listed_at_once():
    with pytest.raises(config.ProfileError) as caught:
        config.load("paper", {"training.epochs": -1, "frames.count": 0, "losses.eps": -1})
    assert len(str(caught.value).splitlines()) == 3


def test_a_wrong_name_gets_the_nearest_right_one():
    with pytest.raises(config.ProfileError, match="no profile named 'papre': did you mean 'paper'"):
        config.load("papre")
    with pytest.raises(config.ProfileError, match="no such profile file"):
        config.load("absent.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "a profile is a mapping"),
        (b"", "a profile is a mapping"),
        (b"a: [", "not plain YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"extends: wrong\n", "no profile named 'wrong'"),
        (b"extends: self\n", "round in a circle"),
        (b"extends: [paper]\n", "extends: write the name of one profile, not list"),
        (b"extends: " + b"x" * 5000, "no profile named"),
        (b"name: alone\n", "seed: Field required"),
        (b"!!python/object/apply:os.getcwd []", "not plain YAML"),
        (b"extends: paper\ntraining: {epochs: 2}\ntraining: {eps: 1}\n", "training is written twice .*line 3"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / "self.yaml").write_bytes(content)
    with pytest.raises(config.ProfileError, match=message):
        config.load(tmp_path / "self.yaml")


def test_paths_of_a_run(tmp_path):
    profile = config.load("paper")
    assert Run(profile).root == config.REPOSITORY / "runs/paper"
    run = Run(profile, tmp_path)
    assert run.predicted("val") == tmp_path / "predictions/val.jsonl"
    assert run.predicted("val", 3) == tmp_path / "predictions/val_epoch_03.jsonl"
    for path in vars(run).values():
        assert path.is_relative_to(tmp_path)


def test_data_folder_is_absolute(tmp_path, monkeypatch):
    assert config.data_folder(config.load("paper")) == config.WORKSPACE / "data/qvhighlights"
    assert config.data_folder(config.load("paper", {"data.folder": str(tmp_path)})) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.data_folder(config.load("paper", {"data.folder": "~/videos"})) == tmp_path / "videos"


def test_the_workspace_is_the_repository_or_for_an_installed_package_the_current_folder(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "framseg").symlink_to(config.REPOSITORY / "framseg")
    (tmp_path / "work").mkdir()
    code = (
        "from framseg import config; print(config.WORKSPACE, config.local_weights(config.load('demo').model.weights))"
    )
    for package, workspace in (
        (tmp_path / "site-packages", tmp_path / "work"),
        (config.REPOSITORY, config.REPOSITORY),
    ):
        environment = os.environ | {"PYTHONPATH": str(package)}
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path / "work", capture_output=True, text=True)
        assert done.stdout == f"{workspace} {package / 'framseg/demo/base'}\n", done.stderr


def test_weights_and_tokenizers_are_looked_up_from_the_current_folder_on(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("current", "workspace", "repository")]
    for place in places:
        (place / "a").mkdir(parents=True)
        (place / "a" / "tokenizer.json").touch()
    monkeypatch.chdir(places[0])
    monkeypatch.setattr(config, "WORKSPACE", places[1])
    monkeypatch.setattr(config, "REPOSITORY", places[2])
    for place in places:
        for name in ("a", "a/tokenizer.json"):
            assert config.local_path(name).resolve() == place / name
        assert config.local_weights("a").resolve() == place / "a"
        assert config.local_weights("a/tokenizer.json") is None  # weights are a folder
        shutil.rmtree(place / "a")
    assert config.local_path("a") is None


def test_the_home_folder_and_names_that_are_no_path(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.local_weights("~/weights") == config.local_path(tmp_path / "weights") == tmp_path / "weights"
    for name in ("owner/repository", "x" * 5000, "a\0b"):
        assert config.local_path(name) is None
