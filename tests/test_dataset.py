import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_profile

from framseg import annotations, config, dataset, decode, evaluate, frames, prompt, train
from framseg.checkpoint import load_base
from framseg.predictions import WINDOWS, PredictionError


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


def test_labels_at_whole_seconds_are_an_option_of_the_profile(samples):
    profile = small_profile(samples.profile.data.folder, frames__whole_seconds=True)
    assert dataset.store(profile).folder == dataset.store(samples.profile).folder  # the frames are the same
    # Of 80 seconds, the frame at 17.6 s is in a moment that ends at 17 s, but only by whole seconds.
    row = replace(
        samples.rows[0], duration=80.0, relevant_windows=((10, 17),), relevant_clip_ids=(), saliency_scores=()
    )
    digits = {}
    for some in (samples.profile, profile):
        made = dataset.Samples(some, samples.tokenizer, [row])[0, 0]
        digits[some.frames.whole_seconds] = np.array([int(i == some.model.tokens.one) for i in made["ids"][-26:-1]])
    assert np.flatnonzero(digits[True] - digits[False]).tolist() == [5]


def test_a_query_that_is_too_long_is_named_before_training_and_decoding(samples):
    row = replace(samples.rows[0], query="square " * 5000)
    profile, tokenizer = samples.profile, samples.tokenizer
    for start in (
        lambda: dataset.Samples(profile, tokenizer, [row]),
        lambda: next(decode.records(load_base(profile), tokenizer, profile, [row])),
    ):
        with pytest.raises(prompt.PromptError, match=f"qid {row.qid}: .* tokens too many"):
            start()


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


LENGTHS = np.random.default_rng(0).integers(5, 40, 7218).tolist()


def batches(profile, rank, first, number):
    stream = iter(dataset.MicroBatches(LENGTHS, profile, rank, first))
    return [next(stream) for _ in range(number)]


def test_processes_share_an_epoch_without_loss_or_doubling():
    profile = config.load("paper")
    shares = [batches(profile, rank, 0, 225) for rank in range(2)]
    seen = [index for share in shares for batch in share for index in batch]
    assert len(set(seen)) == len(seen) == 7200
    assert {epoch for epoch, _ in seen} == {0}
    assert {epoch for epoch, _ in batches(profile, 0, 225, 1)[0]} == {1}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_carried_remainder_is_neither_lost_nor_doubled(processes):
    profile = config.load("paper", {"training.remainder": "carry", "training.processes": processes})
    number = 3 * 7218 // (16 * processes)  # what fills whole micro-batches of three epochs
    shares = [batches(profile, rank, 0, number + number % 4) for rank in range(processes)]
    seen = [index for share in shares for batch in share for index in batch]
    assert len(set(seen)) == len(seen)
    for epoch in range(2):
        assert sorted(n for e, n in seen if e == epoch) == list(range(7218))
    assert all(len(batch) == 16 for share in shares for batch in share)


def test_samples_of_similar_length_share_a_micro_batch_within_their_step():
    profile = config.load("paper")
    lengths = [[LENGTHS[number] for _, number in batch] for batch in batches(profile, 0, 8, 4)]
    assert all(max(batch) <= min(after) for batch, after in zip(lengths, lengths[1:], strict=False))
    unsorted = config.load("paper", {"training.accumulation": 1})
    step = {index for rank in range(2) for batch in batches(profile, rank, 8, 4) for index in batch}
    assert step == {index for rank in range(2) for batch in batches(unsorted, rank, 8, 4) for index in batch}


def test_no_micro_batch_of_a_step_leaves_its_epoch():
    """Step 56 of the paper takes one micro-batch from the first epoch, three from the second."""
    step = batches(config.load("paper"), 1, 224, 4)
    assert [{epoch for epoch, _ in batch} for batch in step] == [{0}, {1}, {1}, {1}]


def test_resuming_in_the_middle_of_an_epoch_gives_the_same_batches():
    profile = config.load("paper")
    assert batches(profile, 1, 0, 240)[230:] == batches(profile, 1, 230, 10)


def test_two_processes_see_the_step_of_one_with_twice_the_accumulation():
    one = batches(config.load("paper", {"training.processes": 1, "training.accumulation": 8}), 0, 0, 8)
    two = [batch for rank in range(2) for batch in batches(config.load("paper"), rank, 0, 4)]
    assert sorted(sum(one, [])) == sorted(sum(two, []))


def test_the_paper_trains_618_steps():
    assert train.total_steps(config.load("paper"), 7218) == 618
    assert train.total_steps(config.load("h100"), 7218) == 620


def test_too_few_rows_are_refused():
    with pytest.raises(config.ProfileError, match="5 training rows do not fill one micro-batch of 16 on 2 processes"):
        dataset.MicroBatches(LENGTHS[:5], config.load("paper"), 0)


def test_a_missing_video_is_reported_and_the_others_are_extracted(small_set, tmp_path):
    (tmp_path / "videos").mkdir()
    profile = small_profile(tmp_path)
    rows = dataset.rows(small_profile(small_set), "val")
    annotations.write(tmp_path / profile.data.val, rows)
    kept = rows[0].vid
    (tmp_path / "videos" / f"{kept}.mp4").symlink_to(small_set / "videos" / f"{kept}.mp4")
    report = dataset.extract(profile, ("val",))
    lost = {row.vid for row in rows} - {kept}
    assert report.done == 1 and set(report.failed) == lost
    assert all(f"{vid}.mp4" in reason for vid, reason in report.failed.items())
    with pytest.raises(frames.VideoError, match=next(iter(lost))):
        dataset.store(profile).read(next(iter(lost)))


def test_bad_videos_are_reported_counted_as_failed_and_named(small_set, tmp_path):
    """From extraction to metrics: a val video is cut off, another hangs the decoder, and one of train is text."""
    profile = small_profile(tmp_path, frames__time_limit=5)
    train_rows, rows = (dataset.rows(small_profile(small_set), split) for split in ("train", "val"))
    cut, hangs, _ = dict.fromkeys(row.vid for row in rows)
    text = train_rows[0].vid
    videos = dataset.videos(profile)
    videos.mkdir()
    for split, some in {"train": train_rows, "val": rows}.items():
        annotations.write(dataset.annotation_file(profile, split), some)
        for vid in {row.vid for row in some} - {cut, hangs, text}:
            (videos / f"{vid}.mp4").symlink_to(small_set / "videos" / f"{vid}.mp4")
    (videos / f"{cut}.mp4").write_bytes((small_set / "videos" / f"{cut}.mp4").read_bytes()[:-2000])
    (videos / f"{text}.mp4").write_text("no video\n" * 500)
    os.mkfifo(videos / f"{hangs}.mp4")

    report = dataset.extract(profile, ("train", "val"))
    assert report.failed.keys() == {cut, hangs, text} and report.done == 6
    assert "took more than 5 s" in report.failed[hangs]

    model, tokenizer = load_base(profile), prompt.load(profile.model.tokenizer)
    records = decode.split(model, tokenizer, profile, rows, tmp_path / "val.jsonl")
    assert [record["qid"] for record in records] == [row.qid for row in rows]
    for record in records:
        assert record.get("error") == report.failed.get(record["vid"])
        assert "error" not in record or record["valid"] is False

    # Were every other answer perfect, the failed ones would still count.
    answers = [
        record if "error" in record else record | {WINDOWS: [[*window, 1.0] for window in row.relevant_windows]}
        for record, row in zip(records, rows, strict=True)
    ]
    sound = [row for row in rows if row.vid not in report.failed]
    assert 0 < len(sound) < len(rows)
    scores = evaluate.evaluate(answers, rows)["brief"]
    assert scores["MR-full-R1@0.7"] == round(100 * len(sound) / len(rows), 2)
    readable = [record for record in answers if "error" not in record]
    alone = evaluate.evaluate(readable, sound)["brief"]
    assert alone["MR-full-R1@0.7"] == 100 > scores["MR-full-R1@0.7"] and scores["MR-full-mAP"] < alone["MR-full-mAP"]
    with pytest.raises(PredictionError, match="without a prediction"):
        evaluate.evaluate(readable, rows)

    with pytest.raises(train.TrainError, match=f"1 of the training videos .*{text}.*training.may_lack=1"):
        train.readable(profile)
    kept, warning = train.readable(small_profile(tmp_path, training__may_lack=1))
    assert text in warning and kept == [row for row in train_rows if row.vid != text]


def test_rows_without_labels_are_refused_before_training(samples):
    row = samples.rows[0]
    unlabelled = annotations.Row(row.qid, row.query, row.duration, row.vid)
    with pytest.raises(annotations.AnnotationError, match=f"no labels .qid {row.qid}"):
        dataset.Samples(samples.profile, samples.tokenizer, [unlabelled])


@pytest.mark.parametrize("module, unneeded", [("dataset", ["framseg.demo"]), ("annotations", ["av", "framseg.demo"])])
def test_reading_rows_loads_no_generator_and_no_decoder(module, unneeded):
    code = f"import sys, framseg.{module}; print([name for name in {unneeded} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
