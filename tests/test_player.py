import av
import pytest
from small import make_video

from framseg.frames import VideoError
from framseg.viz import player


def times(content: bytes, folder) -> tuple[list[float], list[str]]:
    """Times of the decoded frames of a clip, and its streams' codecs."""
    (folder / "clip").write_bytes(content)
    with av.open(str(folder / "clip")) as clip:
        codecs = [stream.codec_context.codec.canonical_name for stream in clip.streams]
        return sorted(frame.time for frame in clip.decode(video=0)), codecs


@pytest.mark.parametrize(
    "name, settings, kind, codecs",
    [
        ("a.mp4", {"sound": "aac"}, "mp4", ["h264", "aac"]),
        ("a.mkv", {"sound": "libopus"}, "mp4", ["h264"]),  # what MP4 does not hold in all browsers is left out
        ("a.webm", {"codec": "libvpx-vp9", "sound": "libopus"}, "webm", ["vp9", "opus"]),
        ("a.mp4", {"codec": "libsvtav1"}, "mp4", ["av1"]),
    ],
)
def test_a_stretch_is_cut_with_its_sound(tmp_path, name, settings, kind, codecs):
    video = make_video(tmp_path / name, 60, rate=10, **settings)
    content, begin, media = player.cut(video, 40.05, 44)
    seconds, streams = times(content, tmp_path)
    assert media == f"video/{kind}" and streams == codecs
    assert 0 <= begin <= 40.05 and seconds[0] == pytest.approx(0, abs=0.02)
    assert 44 <= begin + seconds[-1] < 46  # a few frames more, where their order in the file is another
    assert len(content) < video.stat().st_size
    content, begin, _ = player.cut(video, 0, 1000)
    assert begin == pytest.approx(0, abs=0.01) and len(times(content, tmp_path)[0]) == 600  # the sound's lead-in


def test_seconds_count_from_the_start_of_the_file_where_the_picture_starts_later(shared, tmp_path):
    late = shared / "cases/late-video/starts_at_8s.mp4"
    content, begin, _ = player.cut(late, 0, 10)
    assert begin == pytest.approx(8) and 10 <= begin + times(content, tmp_path)[0][-1] < 11
    with pytest.raises(VideoError, match="shows no picture from second 2 to 4"):
        player.cut(late, 2, 4)


def test_a_clip_is_no_longer_than_its_limit(tmp_path, monkeypatch):
    video = make_video(tmp_path / "a.mp4", 60, rate=10)
    whole = len(player.cut(video, 0, 60)[0])
    monkeypatch.setattr(player, "MOST", whole // 2)
    assert len(player.cut(video, 0, 60)[0]) < 0.9 * whole


def test_what_no_browser_plays_is_refused(tmp_path):
    old = make_video(tmp_path / "a.avi", 2, codec="mpeg4")
    with pytest.raises(VideoError, match="browsers cannot play mpeg4 video; `ffmpeg -i .* writes it anew as H.264"):
        player.cut(old, 0, 1)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="cannot be opened"):
        player.cut(tmp_path / "text.mp4", 0, 1)
