"""The part of the widgets that only a page can do: show a picture, notice keys and clicks, play a clip.

The page's side is `player.js`. Clips are sent over the widget's own channel, so a notebook needs no file server. Their
packets are copied without encoding them again, so neither side holds more than the stretch that is played.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import anywidget
import av
import traitlets

from framseg.run.container import VideoError, anew, opened

PLAYED = 30  # seconds that a click outside of any window plays
MOST = 64 << 20  # bytes after which a clip is cut off
# What browsers play: a codec's container, and the sound that the container may hold.
CONTAINERS = {"h264": "mp4", "hevc": "mp4", "av1": "mp4", "vp8": "webm", "vp9": "webm"}
SOUND = {"mp4": {"aac", "mp3"}, "webm": {"opus", "vorbis"}}


class Player(anywidget.AnyWidget):
    """A picture of HTML and SVG that can be clicked, and a video under it.

    `value` is the HTML. In an element of class `timed` the child of class `axis` stretches over the seconds 0 to
    `data-duration`: a click there calls `play(second, end)`, with `end` the `data-end` of what was clicked, or None.
    The keys ← and → call `move(-1)` and `move(1)` wherever the focus is in the surrounding widget of class `framseg`,
    except in a text field. The page sends the next key only after `moved` has answered the last.
    """

    _esm = Path(__file__).with_name("player.js")
    value = traitlets.Unicode().tag(sync=True)

    def __init__(self, move: Callable[[int], None], play: Callable[[float, float | None], None]):
        super().__init__()
        self._move, self._play = move, play
        self.on_msg(lambda _, content, buffers: self._receive(content))

    def _receive(self, content: dict) -> None:
        if content["kind"] == "move":
            self._move(content["by"])
            self.send({"kind": "moved"})
        elif content["kind"] == "play":
            self._play(content["second"], content["end"])

    def play_clip(self, video: Path | None, start: float, end: float | None) -> str:
        """Play a video's seconds from `start` to `end`, by default 30; returns why that is impossible, else ""."""
        end = start + PLAYED if end is None else end
        try:
            if video is None:
                raise VideoError("there is no video file to play")
            content, begin, kind = cut(video, start, end)
        except VideoError as error:
            self.send({"kind": "no clip"})
            return str(error)
        self.send({"kind": "clip", "type": kind, "begin": begin, "start": start, "end": end}, [content])
        return ""


def cut(video: Path, start: float, end: float) -> tuple[bytes, float, str]:
    """A stretch of a video (seconds), with its sound, as a file of its own: content, its first second, media type.

    Seconds are the player's, as in `framseg.frames.Video`. The stretch begins with the last key frame up to `start`, or
    with the first one. Raises VideoError for what is no video or browsers cannot play, or has no pictures there.
    """
    try:
        return _copied(video, start, end)
    except av.FFmpegError as error:
        raise VideoError(f"{video}: cannot be played ({error})") from error


def _copied(video: Path, start: float, end: float) -> tuple[bytes, float, str]:
    content, begin, empty = io.BytesIO(), None, True
    with opened(video) as (source, picture):
        codec = picture.codec.canonical_name
        if codec not in CONTAINERS:
            raise VideoError(f"{video}: browsers cannot play {codec} video; {anew(video)} as H.264")
        form = CONTAINERS[codec]
        both = picture, *[sound for sound in source.streams.audio if sound.codec.canonical_name in SOUND[form]][:1]
        base = picture.time_base or Fraction(1)  # seconds per unit; every stream of an opened file has it
        zero = Fraction(
            source.start_time or 0, av.time_base
        )  # a player's second 0, also where the picture starts later
        source.seek(int((start + zero) / base), stream=picture)
        with av.open(content, "w", format=form) as target:
            copies = {stream.index: target.add_stream_from_template(stream, opaque=True) for stream in both}
            for packet, pts, dts, base in _timed(source.demux(*both)):
                second = float(pts * base - zero)
                if begin is None and packet.stream is picture:
                    begin = second
                if begin is None or second < begin and packet.stream is not picture:
                    continue  # sound before the first frame
                if content.tell() > MOST or packet.stream is picture and dts * base - zero > end:
                    break
                shift = round((begin + float(zero)) / base)
                packet.pts, packet.dts = pts - shift, dts - shift
                packet.stream = copies[packet.stream.index]
                target.mux(packet)
                empty = False
    if begin is None or empty:
        raise VideoError(f"{video}: shows no picture from second {start:g} to {end:g}")
    return content.getvalue(), begin, f"video/{form}"


def _timed(packets: Iterable[av.Packet]) -> Iterator[tuple[av.Packet, int, int, Fraction]]:
    """Packets with presentation time, decoding time, and seconds per unit of both.

    MP4 needs decoding times. Matroska's first packets after a jump have none: counted back from the stream's next one.
    """
    waiting: dict[int, list[tuple[av.Packet, int]]] = defaultdict(list)  # by stream
    for packet in packets:
        pts, dts, base = packet.pts, packet.dts, packet.time_base
        if pts is None or base is None:
            continue  # the mark of a stream's end
        waiting[packet.stream_index].append((packet, pts))
        if dts is not None:
            ready = waiting.pop(packet.stream_index)
            for back, (earlier, time) in zip(range(len(ready) - 1, -1, -1), ready, strict=True):
                yield earlier, time, dts - back * (packet.duration or 1), base
