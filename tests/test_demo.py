import numpy as np
import pytest
import torch
from demo_tokenizer import build_tokenizer
from safetensors.torch import load_file

from framseg import annotations, config, dataset, frames, prompt
from framseg.checkpoint import load_base
from framseg.demo import base_model, synthetic


def test_a_scene_is_drawn_the_same_every_time(tmp_path):
    vid, scene = next(iter(synthetic.scenes("val").items()))
    assert synthetic.scenes("val")[vid] == scene
    for name in ("one.mp4", "two.mp4"):
        synthetic.write_video(tmp_path / name, scene)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    video = frames.Video(tmp_path / "one.mp4")
    assert (video.length, video.fps) == (scene.duration, synthetic.FPS)


def test_splits_share_no_scene():
    seeds = [scene.seed for split in synthetic.VIDEOS for scene in synthetic.scenes(split).values()]
    assert len(set(seeds)) == len(seeds) == sum(synthetic.VIDEOS.values())


def test_annotations_are_in_the_dataset_s_format(tmp_path):
    rows = {split: synthetic.rows(split) for split in synthetic.VIDEOS}
    everything = [row for split in rows.values() for row in split]
    annotations.write(tmp_path / "rows.jsonl", everything)
    assert annotations.read(tmp_path / "rows.jsonl") == everything  # every check of the reader passes
    assert len(rows["val"]) >= 150
    share = annotations.class_balance(rows["train"], 25).background_share
    assert 0.65 < share < 0.75
    durations = np.array([row.duration for row in everything])
    assert 0.85 < (durations == 150).mean() < 1 and (durations < 150).any()
    scores = np.concatenate([row.saliency_scores for row in everything])
    assert 0.1 < (scores.max(1) != scores.min(1)).mean() < 0.9  # annotators disagree, a little
    assert np.abs(scores.max(1) - scores.min(1)).max() <= 3
    assert set(np.unique(scores)) == {0, 1, 2, 3, 4}
    assert any(len(row.relevant_windows) > 1 for row in rows["val"])
    within = [np.ptp(np.mean(row.saliency_scores, axis=1)) for row in everything]
    assert np.median(within) > 1


def test_the_base_has_not_read_the_demo_s_sentences():
    queries = {row.query for split in synthetic.VIDEOS for row in synthetic.rows(split)}
    read = {q.format(phrase=a.phrase, verb=a.verb) for q in base_model.BASE_QUERIES for a in synthetic.ACTIVITIES}
    assert len(queries) == len(synthetic.QUERIES) * len(synthetic.ACTIVITIES) and not queries & read


def test_what_a_query_names_is_on_screen_in_its_windows_only():
    for vid, scene in list(synthetic.scenes("val").items())[:3]:
        for row in (row for row in synthetic.rows("val") if row.vid == vid):
            (what,) = [activity for activity in synthetic.ACTIVITIES if activity.phrase in row.query]
            times = annotations.frame_times(row.duration, 25)
            images = synthetic.render(scene, times).astype(int)
            near = (np.abs(images - np.array(what.rgb)).max(-1) < 22).sum((1, 2)) > 60
            assert near.tolist() == annotations.frame_labels(row, 25).astype(bool).tolist()


def test_making_the_set_again_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "VIDEOS", {"train": 2, "val": 1, "test": 1})
    profile = config.load("demo", {"data.folder": tmp_path})
    data = profile.data
    synthetic.prepare(profile)
    files = sorted((tmp_path / data.videos).glob("*.mp4"))
    assert len(files) == 4
    assert not isinstance(annotations.read(tmp_path / data.test)[0], annotations.LabelledRow)
    assert isinstance(annotations.read(tmp_path / data.test_labels)[0], annotations.LabelledRow)
    kept, lost = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    (tmp_path / "made.json").unlink()
    synthetic.prepare(profile)
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].read_bytes() == lost


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tmp_path):
    build_tokenizer(tmp_path)
    same = (tmp_path / prompt.FILE).read_bytes() == (base_model.BASE / prompt.FILE).read_bytes()
    assert same, "write it anew: python tests/demo_tokenizer.py"
    profile = config.load("demo")
    tokenizer = prompt.load(base_model.BASE)
    assert prompt.check(tokenizer, profile.model, 25).sample_positions < 300
    text = "Ein Mädchen öffnet 3 Türen — 第一"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert max(ids) < 32000
    assert tokenizer.decode(ids) == text


def test_the_shipped_base_is_small_and_fits():
    assert sum(file.stat().st_size for file in base_model.BASE.glob("*.safetensors")) <= 12e6
    profile = config.load("demo")
    model = load_base(profile)
    assert model.lang_model.lm_head.weight is model.lang_model.model.embed_tokens.weight
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.slow
def test_make_base_writes_a_loadable_base_from_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "BASE_SCENES", 4)
    monkeypatch.setattr(base_model, "BASE_STEPS", (2, 2, 2))
    states = []
    for name in ("one", "two"):
        base_model.make_base(tmp_path / name, seed=1)
        states.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    profile = config.load("demo", {"model.weights": str(tmp_path / "one")})
    start = load_base(config.load("demo")).state_dict()
    assert {k: v.shape for k, v in load_base(profile).state_dict().items()} == {k: v.shape for k, v in start.items()}


def test_no_room_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "VIDEOS", {"train": 1, "val": 1, "test": 1})
    profile = config.load("demo", {"data.folder": tmp_path / "file" / "folder"})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="demo set could not be written"):
        synthetic.prepare(profile)


def test_the_demo_differs_from_the_paper_by_its_profile_only():
    paper, small = config.load("paper"), config.load("demo")
    assert dataset.store(small).count == dataset.store(paper).count == 25
    for section in ("adapter",):
        assert getattr(small, section) == getattr(paper, section)
    assert small.losses.end == paper.losses.end and small.losses.pos_weight == paper.losses.pos_weight
    assert small.training.zero_stage == paper.training.zero_stage == 2
    assert small.inference.beams == paper.inference.beams == 2
