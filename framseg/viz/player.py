"""The part of the widgets that a page must do itself: show a picture, tell of keys and clicks, play a clip.

The page's side is `player.js`. Clips come over the widget's own channel, so a notebook needs no file server; they are
cut out of their video without encoding it again, so neither side holds more than the stretch that is played.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import anywidget
import av
import traitlets

from framseg.frames import VideoError

PLAYED = 30  # seconds that a click outside of any window plays
MOST = 64 << 20  # bytes of a clip; what would be longer ends sooner
# What browsers play: a codec's container, and the sound that may go with it.
CONTAINERS = {"h264": "mp4", "hevc": "mp4", "av1": "mp4", "vp8": "webm", "vp9": "webm"}
SOUND = {"mp4": {"aac", "mp3"}, "webm": {"opus", "vorbis"}}


class Stage(anywidget.AnyWidget):
    """A picture of HTML and SVG that can be clicked.

    `value` is its HTML. In an element of class `timed` the child of class `axis` stretches over the seconds 0 to
    `data-duration`: a click there calls `play(second, end)`, with `end` the `data-end` of what was clicked, or None.
    The keys ← and → call `move(-1)` and `move(1)` wherever the focus is in the surrounding `framseg` widget, but in a
    field of text; a key that comes before `answered` is not sent.
    """

    _esm = Path(__file__).with_name("player.js")
    value = traitlets.Unicode().tag(sync=True)

    def __init__(self, move: Callable[[int], None], play: Callable[[float, float | None], None]):
        super().__init__()
        self._move, self._play = move, play
        self.on_msg(lambda _, content, buffers: self._told(content))

    def _told(self, content: dict) -> None:
        if content["kind"] == "move":
            self._move(content["by"])
            self.send({"kind": "answered"})
        elif content["kind"] == "play":
            self._play(content["second"], content["end"])

    def show_clip(self, video: Path, start: float, end: float | None) -> None:
        """Play a video's stretch of seconds. Raises VideoError for one that browsers cannot play."""
        end = start + PLAYED if end is None else end
        content, begin, kind = cut(video, start, end)
        self.send({"kind": "clip", "type": kind, "begin": begin, "start": start, "end": end}, [content])


def cut(video: Path, start: float, end: float) -> tuple[bytes, float, str]:
    """A stretch of a video, with its sound, as a file of its own: content, the second it begins at, media type.

    It begins with the last key frame up to `start`, because the packets are copied as they are. Raises VideoError for
    a file that is no video or that browsers cannot play.
    """
    try:
        with av.open(str(video)) as source:
            return _copied(video, source, start, end)
    except (OSError, av.FFmpegError, IndexError) as error:
        raise VideoError(f"{video}: cannot be played ({error})") from error


def _copied(video: Path, source: av.container.InputContainer, start: float, end: float) -> tuple[bytes, float, str]:
    picture = source.streams.video[0]
    codec = picture.codec_context.codec.canonical_name
    if codec not in CONTAINERS:
        raise VideoError(f"{video}: browsers cannot play {codec} video; convert it to H.264")
    form = CONTAINERS[codec]
    sound = [one for one in source.streams.audio if one.codec_context.codec.canonical_name in SOUND[form]][:1]
    zero = (picture.start_time or 0) * picture.time_base
    source.seek(int((start + zero) / picture.time_base), stream=picture)
    content, begin = io.BytesIO(), None
    with av.open(content, "w", format=form) as target:
        copies = {stream.index: target.add_stream_from_template(stream, opaque=True) for stream in (picture, *sound)}
        for packet in _timed(source.demux(picture, *sound)):
            second = float(packet.pts * packet.time_base - zero)
            if begin is None and packet.stream is picture:
                begin = second
            if begin is None or second < begin and packet.stream is not picture:
                continue  # sound before the first frame
            if content.tell() > MOST or packet.stream is picture and packet.dts * packet.time_base - zero > end:
                break
            shift = round((begin + float(zero)) / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copies[packet.stream.index]
            target.mux(packet)
    if begin is None:
        raise VideoError(f"{video}: has no frame at second {start:g}")
    return content.getvalue(), begin, f"video/{form}"


def _timed(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """Packets with decoding times, which MP4 needs, also where Matroska has none for the first ones after a jump."""
    early: list[av.Packet] = []
    for packet in packets:
        if packet.pts is None:
            continue  # the mark of a stream's end
        if packet.dts is None:
            early.append(packet)
            continue
        mine = [one for one in early if one.stream_index == packet.stream_index]
        early = [one for one in early if one.stream_index != packet.stream_index]
        for back, one in enumerate(reversed(mine), start=1):
            one.dts = packet.dts - back * (packet.duration or 1)
        yield from (*mine, packet)
