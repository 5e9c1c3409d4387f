import numpy as np
import pytest
import torch
from conftest import small_profile

from framseg import annotations, config, dataset, frames, prompt, train


@pytest.fixture(scope="module")
def samples(small_set) -> dataset.Samples:
    profile = small_profile(small_set)
    return dataset.Samples(profile, prompt.load(profile.model.tokenizer), dataset.rows(profile, "train"))


def test_a_sample_holds_what_its_row_says(samples):
    row, sample = samples.rows[1], samples[0, 1]
    tokens = samples.profile.model.tokens
    digits = [int(i == tokens.one) for i in sample["ids"][-26:-1]]
    assert digits == annotations.frame_labels(row, 25).tolist()
    assert sample["ids"][-1] == tokens.end
    assert sample["ids"].count(tokens.image) == 25
    assert sample["frames"].shape == (25, 48, 48, 3) and sample["frames"].dtype == np.uint8
    assert sample["soft_targets"].tolist() == annotations.soft_targets(row, 25).tolist()


def test_each_epoch_draws_its_variations_from_the_seed(samples):
    first, again, next_epoch = (samples[epoch, 0]["frames"] for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, next_epoch)
    # Every frame is one of its own position's three.
    every = np.stack([samples.store.read(samples.rows[0].vid, np.full(25, k)) for k in range(3)])
    assert (every == first).all((2, 3, 4)).any(0).all()


def test_a_batch_reads_the_answer_where_it_is_predicted(samples):
    batch = samples.collate([samples[0, 0], samples[0, 4]])
    assert batch["pixel_values"].shape == (2, 25, 3, 48, 48) and batch["pixel_values"].dtype == torch.uint8
    assert batch["answer_ids"].shape == batch["positions"].shape == (2, 26)
    assert torch.equal(batch["input_ids"].gather(1, batch["positions"] + 1), batch["answer_ids"])
    assistant = batch["input_ids"].gather(1, batch["positions"][:, :1])
    assert (assistant == samples.profile.model.tokens.assistant).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(samples[0, i]["ids"]) for i in (0, 4)]


def batches(count, profile, rank, world, first, number):
    stream = iter(dataset.MicroBatches(count, profile, rank, world, first))
    return [next(stream) for _ in range(number)]


def test_processes_share_an_epoch_without_loss_or_doubling():
    profile = config.load("paper")
    shares = [batches(7218, profile, rank, 2, 0, 225) for rank in range(2)]
    seen = [index for share in shares for batch in share for index in batch]
    assert len(set(seen)) == len(seen) == 7200
    assert {epoch for epoch, _ in seen} == {0}
    assert {epoch for epoch, _ in batches(7218, profile, 0, 2, 225, 1)[0]} == {1}


def test_going_on_in_the_middle_gives_the_same_batches():
    profile = config.load("paper")
    assert batches(7218, profile, 1, 2, 0, 240)[230:] == batches(7218, profile, 1, 2, 230, 10)


def test_two_processes_see_the_step_of_one_with_twice_the_accumulation():
    profile = config.load("paper")
    one = batches(7218, profile, 0, 1, 0, 2)
    two = [batches(7218, profile, rank, 2, 0, 1)[0] for rank in range(2)]
    assert one == two


def test_the_paper_trains_618_steps():
    assert train.total_steps(config.load("paper"), 7218) == 618


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="5 training rows do not fill one micro-batch of 16 on 2 processes"):
        dataset.MicroBatches(5, config.load("paper"), 0, 2)


def test_a_missing_video_is_reported_and_the_others_are_extracted(small_set, tmp_path):
    (tmp_path / "videos").mkdir()
    profile = small_profile(tmp_path)
    rows = dataset.rows(small_profile(small_set), "val")
    annotations.write(tmp_path / profile.data.val, rows)
    kept = rows[0].vid
    (tmp_path / "videos" / f"{kept}.mp4").symlink_to(small_set / "videos" / f"{kept}.mp4")
    report = dataset.extract(profile, ("val",), progress=False)
    lost = {row.vid for row in rows} - {kept}
    assert report.done == 1 and set(report.failed) == lost
    assert all(f"{vid}.mp4" in reason for vid, reason in report.failed.items())
    with pytest.raises(frames.VideoError, match=next(iter(lost))):
        dataset.store(profile).read(next(iter(lost)))
