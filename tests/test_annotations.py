import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framseg import annotations
from framseg.annotations import AnnotationError, LabelledRow, Row

GOOD = {
    "qid": 7,
    "query": "a red square",
    "duration": 10,
    "vid": "video_0",
    "relevant_clip_ids": [1, 2, 4],
    "saliency_scores": [[0, 2, 4], [3, 3, 3], [4, 4, 4]],
    "relevant_windows": [[2, 6], [8, 10]],
}
ROW = annotations.from_dict(GOOD)


def test_public_files_have_their_sizes_and_balance(shared):
    folder = shared / "qvhighlights"
    train = annotations.read(folder / "highlight_train_release.jsonl")
    val = annotations.read(folder / "highlight_val_release.jsonl")
    test = annotations.read(folder / "highlight_test_release.jsonl")
    public = annotations.read(folder / "highlight_test_with_gt.jsonl")
    assert [len(rows) for rows in (train, val, test, public)] == [7218, 1550, 1542, 1542]
    assert [all(isinstance(row, annotations.LabelledRow) for row in rows) for rows in (train, val, test, public)] == [
        True,
        True,
        False,
        True,
    ]
    assert [row.qid for row in test] == [row.qid for row in public]

    counted = annotations.class_balance(train, 25)
    assert (round(counted.ratio, 4), round(100 * counted.background_share, 2)) == (2.3582, 70.22)
    assert counted.foreground + counted.background == 7218 * 25
    assert round(annotations.class_balance(val, 25).ratio, 4) == 2.5583

    row = next(row for row in val if row.qid == 2579)
    twelfths = [5, 4, 7, 7, 8, 8, 8, 8, 7, 8, 7]
    assert annotations.soft_targets(row, 25).tolist() == [0.0] * 14 + [n / 12 for n in twelfths]
    assert "".join(map(str, annotations.frame_labels(row, 25))) == "0" * 14 + "1" * 11


def test_a_written_file_holds_the_same_json(shared, tmp_path):
    for name in ("highlight_val_release.jsonl", "highlight_test_release.jsonl"):
        rows = annotations.read(shared / "qvhighlights" / name)
        annotations.write(tmp_path / name, rows)
        assert annotations.read(tmp_path / name) == rows
        before = [json.loads(line) for line in (shared / "qvhighlights" / name).read_text().splitlines()]
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == before
    assert {path.name for path in tmp_path.iterdir()} == {"highlight_val_release.jsonl", "highlight_test_release.jsonl"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qid": "7"}, "qid must be an integer, not '7'"),
        ({"qid": True}, "qid must be an integer, not True"),
        ({"query": " "}, "query must be text"),
        ({"vid": "../x"}, "vid must be a plain file name of up to 200 bytes, not '../x'"),
        ({"vid": ".."}, "vid must be a plain file name"),
        ({"query": "half \ud83d"}, "query must be text, not 'half"),
        ({"vid": "half \ud83d"}, "vid must be a plain file name"),
        ({"vid": "ä" * 101}, "vid must be a plain file name of up to 200 bytes"),
        ({"duration": 150_000}, "duration must be at most 100000 seconds, not 150000"),
        ({"duration": 1e300, "relevant_windows": [[0, 1e300]]}, "duration must be at most 100000 seconds"),
        ({"duration": 0}, "duration must be a positive number of seconds, not 0"),
        ({"duration": float("nan")}, "duration must be a positive number"),
        ({"duration": "10"}, "duration must be a positive number"),
        ({"relevant_windows": []}, "relevant_windows must list at least one [start, end], not []"),
        ({"relevant_windows": [[2, 6], [8, 12]]}, "window [8, 12] is not ordered inside 0..10 s"),
        ({"relevant_windows": [[6, 2], [8, 10]]}, "window [6, 2] is not ordered"),
        ({"relevant_windows": [[-2, 6], [8, 10]]}, "window [-2, 6] is not ordered"),
        ({"relevant_windows": [[8, 10], [2, 6]]}, "window [2, 6] starts before the one listed before it ends (10 s)"),
        ({"relevant_windows": [[2, 6, 1], [8, 10]]}, "window [2, 6, 1] is not [start, end] in seconds"),
        ({"relevant_windows": [[2, float("inf")]]}, "is not [start, end] in seconds"),
        ({"relevant_clip_ids": [1, 2, 5]}, "clip ids [5] lie outside the video of 10 s"),
        ({"relevant_clip_ids": [1, 2, 2]}, "clip ids [2] are listed twice"),
        ({"relevant_clip_ids": [1, 2, 4.0]}, "relevant_clip_ids must be a list of integers"),
        ({"relevant_clip_ids": [1, 2, 3]}, "clips [4] lie in the relevant windows but are not in relevant_clip_ids"),
        ({"relevant_clip_ids": [1, 2, 3]}, "clips [3] are in relevant_clip_ids but in no relevant window"),
        ({"saliency_scores": [[0, 2, 4], [3, 3, 3]]}, "2 saliency scores for 3 relevant clips"),
        ({"saliency_scores": [[0, 2, 5], [3, 3, 3], [4, 4, 4]]}, "saliency scores [0, 2, 5] are not 3 integers 0..4"),
        ({"saliency_scores": [[0, 2], [3, 3, 3], [4, 4, 4]]}, "saliency scores [0, 2] are not 3 integers 0..4"),
        ({"saliency_scores": None}, "saliency_scores missing, although relevant_clip_ids, relevant_windows are given"),
    ],
)
def test_a_bad_row_says_what_is_wrong(change, reason):
    with pytest.raises(AnnotationError) as error:
        annotations.from_dict(GOOD | change)
    assert reason in str(error.value)
    assert str(error.value).startswith(f"qid {change.get('qid', 7)}: ")


def test_every_bad_row_of_a_file_is_listed_with_line_and_qid(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(GOOD | {"extra": {"passes": 1}}),
        "",
        json.dumps(GOOD | {"qid": 8, "duration": -1, "vid": ""}),
        '{"qid": 9',
        "[1]",
        json.dumps({"qid": 10, "query": "q"}),
        json.dumps(GOOD),
        "[" * 100_000,
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(AnnotationError) as error:
        annotations.read(path)
    told = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in told] == [f"{path}:{n}" for n in (3, 4, 5, 6, 7, 8)]
    assert "qid 8" in told[0] and "duration" in told[0] and "vid" in told[0]
    assert "not JSON" in told[1] and "expected a JSON object, found list" in told[2]
    assert "qid 10: duration, vid missing" in told[3]
    assert f"qid 7: the query is at {path}:1 already" in told[4]

    path.write_text(lines[0] + "\n")
    assert annotations.read(path) == [ROW]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "holds no records"), (b"\xff\xfe{", "is not UTF-8 text"), (None, "cannot be read: No such file")],
)
def test_an_unreadable_file_is_named(tmp_path, content, reason):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnnotationError, match=reason) as error:
        annotations.read(path)
    assert str(path) in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    annotations.write(path, [ROW])
    with pytest.raises(AnnotationError, match="qid 8: cannot be written"):
        annotations.write(path, [ROW, replace(ROW, qid=8, duration=float("nan"))])
    assert annotations.read(path) == [ROW] and len(list(tmp_path.iterdir())) == 1


def test_windows_that_cut_a_clip_may_list_it_or_not():
    cut = GOOD | {"duration": 9.5, "relevant_windows": [[2, 6], [8.5, 9.5]]}
    assert annotations.from_dict(cut).relevant_clip_ids == (1, 2, 4)
    without = cut | {"relevant_clip_ids": [1, 2], "saliency_scores": [[0, 2, 4], [3, 3, 3]]}
    assert annotations.from_dict(without).relevant_clip_ids == (1, 2)
    nothing = cut | {"relevant_windows": [[8.5, 9.5]], "relevant_clip_ids": [], "saliency_scores": []}
    assert not annotations.soft_targets(annotations.from_dict(nothing), 5).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(1, 60), st.data())
def test_labels_and_targets_follow_the_frame_times(half_seconds, frames, data):
    duration = half_seconds / 2
    count = -(-half_seconds // 4)
    ids = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    scores = {clip: tuple(data.draw(st.tuples(*[st.integers(0, 4)] * 3))) for clip in ids}
    windows = [(2.0 * clip, min(2.0 * clip + 2, duration)) for clip in ids]
    row = LabelledRow(1, "q", duration, "v", tuple(windows), tuple(ids), tuple(scores.values()))
    labels, targets = annotations.frame_labels(row, frames), annotations.soft_targets(row, frames)
    assert labels.dtype == np.int8 and targets.dtype == np.float64
    for i in range(frames):
        # Twice f times the time in half seconds is whole: no rounding to argue about.
        time = half_seconds * (2 * i + 1)
        assert labels[i] == any(4 * frames * start <= time <= 4 * frames * end for start, end in windows)
        assert targets[i] == sum(scores.get(time // (8 * frames), (0,))) / 12
        assert annotations.frame_times(duration, frames)[i] == pytest.approx(time / (4 * frames), rel=1e-15)


def test_a_frame_at_a_windows_end_is_in_it():
    # Five frames of 10 s lie at 1, 3, 5, 7 and 9 s.
    row = replace(ROW, relevant_windows=((1.0, 3.0), (5.01, 6.99)))
    assert annotations.frame_labels(row, 5).tolist() == [1, 1, 0, 0, 0]


def test_labels_at_whole_seconds_next_to_a_plain_loop():
    """Thousands of rows whose windows end at whole and at other seconds."""
    random, changed = np.random.default_rng(14), 0
    for _ in range(3000):
        duration, frames = float(random.choice([10, 75.5, 126, 149.97, 150])), int(random.integers(1, 40))
        ends = np.sort(random.choice(int(2 * duration), 4, replace=False)) / 2
        windows = ((float(ends[0]), float(ends[1])), (float(ends[2]), float(ends[3])))
        clips = tuple(range(annotations.clips(duration)))
        scores = tuple(map(tuple, random.integers(0, 5, (len(clips), 3)).tolist()))
        row = LabelledRow(1, "q", duration, "v", windows, clips, scores)
        labels, exact = (annotations.frame_labels(row, frames, whole) for whole in (True, False))
        for i in range(frames):
            second = int(duration * (i + 0.5) / frames)
            assert labels[i] == any(start <= second <= end for start, end in windows)
        assert annotations.frame_times(duration, frames, True).tolist() == (
            [int(duration * (i + 0.5) / frames) for i in range(frames)]
        )
        # The targets stay: a time and its whole second lie in the same clip of 2 seconds.
        seconds = annotations.frame_times(duration, frames, True)
        assert annotations.labels_at(row, seconds)[1].tolist() == annotations.soft_targets(row, frames).tolist()
        changed += (labels != exact).any()
    assert changed > 300


def test_past_the_end_a_label_and_a_target_are_0():
    labels, targets = annotations.labels_at(ROW, np.array([9.0, 10.0, 11.0, 99.0]))
    assert (labels.tolist(), targets.tolist()) == ([1, 1, 0, 0], [1, 0, 0, 0])  # ends are included


def test_what_whole_seconds_change_in_the_public_files(shared):
    """They move the class balance a little towards the paper's 2.3378; see chapter 1."""
    counts = {}
    for name, changed in {"train_release": 52, "val_release": 11, "test_with_gt": 13}.items():
        rows = annotations.labelled(annotations.read(shared / f"qvhighlights/highlight_{name}.jsonl"))
        exact, whole = (np.array([annotations.frame_labels(row, 25, cut) for row in rows]) for cut in (False, True))
        assert (whole > exact).sum() == changed and not (whole < exact).any()
        counts[name] = round(annotations.class_balance(rows, 25, True).ratio, 4)
    assert counts == {"train_release": 2.3550, "val_release": 2.5547, "test_with_gt": 2.4941}


def test_rows_without_labels_give_no_targets():
    row = Row(3, "q", 10, "v")
    assert not isinstance(row, annotations.LabelledRow)
    with pytest.raises(AnnotationError, match=r"1 rows have no labels \(qid 3\)"):
        annotations.frame_labels(row, 5)
    with pytest.raises(AnnotationError, match=r"1 rows have no labels \(qid 3\)"):
        annotations.soft_targets(row, 5)
    assert annotations.labelled([ROW, ROW]) == [ROW, ROW]
    with pytest.raises(AnnotationError, match=r"25 rows have no labels \(qid 0, 1, .* 19, and 5 more\); take a split"):
        annotations.labelled([ROW, *(replace(row, qid=qid) for qid in range(25))])


def test_clip_saliency_counts_a_shorter_last_clip():
    row = LabelledRow(1, "a cat", 9, "v", ((6, 9),), (3, 4), ((1, 2, 3), (4, 4, 4)))
    assert annotations.clip_saliency(row).tolist() == [0, 0, 0, 0.5, 1]
    assert annotations.clip_saliency(replace(row, saliency_scores=((4, 2, 1), (0, 0, 1)))).tolist()[3:] == [
        7 / 12,
        1 / 12,
    ]


def test_class_balance_needs_both_classes():
    balance = annotations.class_balance([ROW], 5)
    assert (balance.ratio, balance.background_share) == (2 / 3, 0.4)
    assert (balance.foreground, balance.background) == (3, 2)
    with pytest.raises(AnnotationError, match="0 background"):
        annotations.class_balance([replace(ROW, relevant_windows=((0, 10),))], 5)


def test_annotators_are_compared_in_pairs_and_with_chance():
    row = replace(ROW, relevant_clip_ids=(1,), saliency_scores=((4, 4, 2),))
    distance = annotations.annotator_distance([Row(1, "no labels", 10, "video_0"), row])
    np.testing.assert_allclose(distance.measured, [1 / 3, 0, 2 / 3, 0, 0])
    np.testing.assert_allclose(distance.chance, [5 / 9, 0, 4 / 9, 0, 0])
    with pytest.raises(AnnotationError, match="no row has a relevant clip"):
        annotations.annotator_distance([Row(1, "no labels", 10, "video_0")])
