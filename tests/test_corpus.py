"""Every file of the corpus is read as a player shows it or refused for its true reason, be it whole or cut off."""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import videos
from videos import CASES, CUT, Shown

from framseg import config, frames

CUT_OFF = "cut off"
AT_ONCE = ("plain.mp4", "late.ts", "holed.mp4")  # of these the process is started in the short run of the tests, too
HELD_BACK = 6  # frames: B-frames that lie in front of a cut file's last picture may be behind the cut


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, Shown]]:
    """The folder of all files, and what a player shows of each."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, videos.make(folder)


def apart(path: Path, allow_partial: bool = False) -> tuple[np.ndarray, float, list[str]]:
    """Twelve frames, the length and what is told, by the reader that `predict` uses."""
    with tempfile.TemporaryFile() as file:
        images, length, told = frames.read_apart(path, 12, 1000, 96, 60, file, allow_partial)
        return np.array(images), length, told


def test_the_corpus_is_wide():
    assert len(CASES) >= 140 and sum(bool(case.refused) for case in CASES.values()) < 20
    assert len({Path(name).suffix for name in CASES}) >= 20


@pytest.mark.parametrize("name", CASES)
def test_what_a_player_shows_is_read_or_the_reason_given(corpus, name):
    folder, truth = corpus
    case, shown = CASES[name], truth[name]
    if case.refused:
        with pytest.raises(frames.VideoError, match=f"(?s){re.escape(name)}: .*{case.refused}"):
            videos.read(folder / name)
        return
    answer = videos.read(folder / name)
    assert answer.length == pytest.approx(shown.end, abs=0.01)
    for second, error, share in answer.errors(shown):
        assert share <= 0.5, f"the frame at {second:.3f} s is off by {error:.3f} s"
    assert answer.offset == pytest.approx(shown.starts[0], abs=0.01) or shown.starts[0] <= frames.LATE
    assert any("picture starts" in note for note in answer.notes) == (answer.offset > frames.LATE)
    assert not any(CUT_OFF in note for note in answer.notes)
    if case.colours:
        assert np.abs(videos.colours(answer.images.mean(0)) - videos.COLOURS).max() < 20


@pytest.mark.parametrize("name", ["bt601", "bt709", "bt709_full", "untagged"])
def test_both_readers_give_the_same_colours(corpus, name):
    by_decord, by_av = (videos.read(corpus[0] / f"{name}.{ending}") for ending in ("mp4", "mkv"))
    assert (by_decord.reader, by_av.reader) == ("decord", "PyAV")
    assert np.abs(by_decord.images.astype(int) - by_av.images).max() <= 3


def test_a_relative_name_with_colons_is_no_address(corpus, monkeypatch):
    monkeypatch.chdir(corpus[0])
    images, length, told = apart(Path("2024-05-01T12:30:05.mp4"))
    assert length == 5 and not told
    assert [videos.number(image) for image in images] == [int(12.5 * (0.5 + place)) for place in range(12)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in AT_ONCE else pytest.mark.slow) for name in CASES]
)
def test_the_process_that_predict_starts_says_the_same(corpus, name):
    try:
        answer = videos.read(corpus[0] / name)
    except frames.VideoError as error:
        with pytest.raises(frames.VideoError) as refused:
            apart(corpus[0] / name)
        assert str(refused.value) == str(error)
    else:
        images, length, told = apart(corpus[0] / name)
        assert length == answer.length and told == answer.notes
        assert np.array_equal(images, answer.images)


# ---- cut off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUT)
def test_no_cut_passes_silently(corpus, tmp_path, name):
    """Refused as cut off, or told, or every frame is there; where a part is allowed, it is read right."""
    shown, answered = corpus[1][name], 0
    for place, path in videos.cuts(corpus[0] / name, tmp_path).items():
        try:
            answer = videos.read(path)
        except frames.VideoError as error:
            assert CUT_OFF in str(error), (place, str(error))
            assert "--allow-partial" not in str(error) or "`ffmpeg -i" in str(error)
        else:
            everything = answer.count == len(shown.starts)
            assert everything or any(videos.UNKNOWN in note for note in answer.notes), (place, answer.notes)
        try:
            answer = videos.read(path, allow_partial=True)
        except frames.VideoError as error:
            assert CUT_OFF in str(error) and "--allow-partial" not in str(error), (place, str(error))
            continue
        answered += 1
        everything = answer.count == len(shown.starts)
        told = [note for note in answer.notes if f"about the {answer.length:.2f} s that are there" in note]
        assert told or everything, (place, answer.notes)
        assert answer.length <= shown.end + 0.01
        for second, error, share in answer.errors(shown):
            held_back = second > answer.length - HELD_BACK / 30
            assert share <= (HELD_BACK if held_back else 0.5), (place, second, error)
    assert answered >= (0 if "index last" in CUT[name] else 10)


@pytest.mark.parametrize("name", ["late_2.mp4", "trim_sound.mp4", "turned_270.mp4"])
def test_an_mp4_cut_inside_its_index_is_refused(corpus, tmp_path, name):
    """What is lost there is a track, whose start may be the file's, or how pictures are to be decoded or turned."""
    content = (corpus[0] / name).read_bytes()
    for place in range(content.index(b"moov") + 12, len(content), 97):
        (tmp_path / name).write_bytes(content[:place])
        for allow_partial in (False, True):
            with pytest.raises(frames.VideoError, match=r"cut off inside its index \(moov\)"):
                videos.read(tmp_path / name, allow_partial=allow_partial)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_the_process_that_predict_starts_says_the_same_of_what_is_cut_off(corpus, tmp_path, name):
    for path in videos.cuts(corpus[0] / name, tmp_path).values():
        for allow_partial in (False, True):
            try:
                answer = videos.read(path, allow_partial=allow_partial)
            except frames.VideoError as error:
                with pytest.raises(frames.VideoError) as refused:
                    apart(path, allow_partial)
                assert str(refused.value) == str(error)
            else:
                images, length, told = apart(path, allow_partial)
                assert length == answer.length and told == answer.notes
                assert np.array_equal(images, answer.images)


# ---- the record ------------------------------------------------------------------------------------------------------


def test_the_record_is_about_these_files_and_finds_none_wrong():
    record = json.loads((config.REPOSITORY / "tests/benchmarks/records/video_corpus.json").read_text(encoding="utf-8"))
    outcomes = {row["name"]: row["outcome"] for row in record["rows"]}
    assert outcomes == {name: "refused rightly" if case.refused else "read right" for name, case in CASES.items()}
    assert record["wrong"] == 0 and record["files"] == len(CASES)
    assert list(record["cut files"]) == list(CUT.values())
    assert not any(counts["silent"] for counts in record["cut files"].values())
