"""What a video file tells of itself, in any container: its clock, the times of its frames, whether it is whole.

FFmpeg's libraries do the reading, through PyAV. Seconds are the player's: 0 is the container's start, that of the
earliest of its pictures and sounds.
"""

import errno
import os
import shlex
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from framseg import FramsegError

TELL_LENGTH = {"mov", "matroska", "avi", "asf"}  # containers whose header does; FFmpeg guesses others' lengths
BROKEN_OFF = ("File ended prematurely", "partial file")  # FFmpeg's words for a file that ends inside of its data
TS_PACKETS = (188, 192, 204)  # bytes
FLV_HEADER = 4096  # bytes in which an FLV's length stands, if anywhere
FLV_TAGS = (b"\x08", b"\x09", b"\x12")  # sound, picture, data
MP4_STARTS = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"}  # names of an mp4's first box
UPRIGHT: tuple[int, ...] = (65536, 0, 0, 65536)  # how an mp4 writes that a picture is shown as it is coded
NO_TIMES = 0x80  # FFmpeg's flag of a format without times (AVFMT_NOTIMESTAMPS), for which it would invent some
ROUNDING = 1e-6  # seconds
STILL = 0.5  # seconds of frames whose times may be no later than those of frames before them
Edit = tuple[float, float | None]  # its length and where it begins in the frames' own times (s), None if it is empty


class VideoError(FramsegError, ValueError):
    """A video whose frames cannot be read; the message names the video and the reason."""


@contextmanager
def opened(path: Path, whole_media: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and its picture track, opened by PyAV. VideoError for a file that is missing or no video.

    whole_media: leave an mp4's edit list aside.
    """
    beginning = b""
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such video file")
    try:
        if path.is_file():  # opening a pipe would wait for whoever writes into it
            with path.open("rb") as file:
                beginning = file.read(8)
            if beginning[4:] in MP4_STARTS:
                _index(path)
        # The whole path, as a relative one with a colon would be taken for a protocol; no protocol but files, as a
        # playlist could send us into the network; titles may be written in any alphabet.
        options = {"protocol_whitelist": "file"} | ({"ignore_editlist": "1"} if whole_media else {})
        container = av.open(os.path.abspath(path), options=options, metadata_errors="replace")
    except (OSError, av.FFmpegError) as error:
        # FFmpeg calls it an input/output error, too, where a file ends in the middle of a header.
        if isinstance(error, OSError) and not (isinstance(error, av.FFmpegError) and error.errno == errno.EIO):
            raise VideoError(f"{path}: cannot be read ({error.strerror}); get the file again") from error
        why = f" as a video ({error.strerror}): it is another kind of file, or cut off or damaged"
        if beginning[4:] in MP4_STARTS:
            why = ": the index of this mp4 (moov) is missing or damaged, as in a file that is cut off"
        if not path.stat().st_size:
            why = ": it is empty"
        raise VideoError(f"{path}: cannot be opened{why}; get the file again") from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise VideoError(f"{path}: cannot be opened as a video: it holds no pictures")
        if stream.codec_context is None:
            raise VideoError(f"{path}: cannot be opened as a video: nobody here can decode pictures of its kind")
        stream.thread_type = "AUTO"
        yield container, stream


def ffmpeg(path: Path, before: str, behind: str, target: str) -> str:
    """A command to type, in backticks, with options before and behind the input."""
    # ffmpeg takes what stands in front of a colon for a protocol, and a leading dash for an option.
    names = [f"./{name}" if name[0] == "-" or ":" in name and name[0] != "/" else name for name in (str(path), target)]
    return f"`{shlex.join(['ffmpeg', *before.split(), '-i', names[0], *behind.split(), names[1]])}`"


def anew(path: Path, options: str = "") -> str:
    """The command that encodes a file anew, as a part of a sentence."""
    return f"{ffmpeg(path, options, '', f'{path.stem}-anew.mp4')} writes it anew"


class Container:
    """A video file, its packets listed without decoding any. Raises VideoError for a file that is no video.

    `begin` is the container's start in its own seconds, `fps` the average frame rate (0 if it tells none), `times` the
    seconds of the frames that are shown, in their order, and `last` how long the last one is; `plain` whether that is
    the whole truth: H.264 in mp4, every packet a frame with a time of its own. `claimed` is the length in seconds by
    the header, None where that tells none, `missing` how many of these seconds are not in the file, `cut` whether it
    ends in the middle of its data. `alive` is called after every step.
    """

    def __init__(self, path: Path, alive: Callable[[], object]):
        self.path, self.alive, self.cut, self.last = path, alive, False, 0.0
        self._numbers: list[int | None] = []  # decoding times, in frames where that is their unit
        with opened(self.path) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else 0.0
            self._name = container.format.name.split(",")[0]
            pts = self._list(container, stream)
            if not pts:
                raise VideoError(f"{self.path}: damaged or cut off: it holds not one frame; get the file again")
            known = [time for time in pts if time is not None]
            if container.format.flags & NO_TIMES or self._name.endswith("_pipe") or self._name == "image2":
                raise VideoError(
                    f"{self.path}: its frames carry no times; {anew(self.path, '-framerate 30')}, at its true rate"
                )
            base = float(stream.time_base or 0)
            first = min(known, default=0) * base
            self.begin = first if container.start_time is None else container.start_time / av.time_base
            matrix, self._edits = UPRIGHT, list[Edit]()
            if self._name == "mov":
                with suppress(struct.error, IndexError, ZeroDivisionError):  # FFmpeg has made sense of a damaged header
                    matrix, self._edits = _track(self.path, stream.id)
            self.plain = (self._name, stream.codec_context.codec.canonical_name, matrix) == ("mov", "h264", UPRIGHT)
            self.plain &= not self._edits and not self.cut and self.fps > 0 and len(set(known)) == len(pts)
            self.times = np.array(sorted(known), float) * base - self.begin

    def decoded(self) -> Iterator[av.VideoFrame]:
        """Every frame in the order in which they are shown.

        VideoError if one cannot be decoded and others follow it; if none does, the file is `cut`. What cannot be
        decoded in front of the first key frame is no damage: a recording may begin anywhere.
        """
        good, damage = None, ""
        with opened(self.path, whole_media=bool(self._edits)) as (container, stream):
            for number, packet in enumerate(self._packets(container, stream)):
                if self.cut and not self._edits and packet.size and number >= len(self._numbers) - 1:
                    continue  # it may be a part of a frame
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    frames, damage = [], damage or str(error.strerror)
                for frame in frames:
                    if frame.is_corrupt:
                        damage = damage or "a part of it is missing"
                    elif damage and good and packet.size:  # the last, empty packet asks for frames held back
                        second = (good.time or 0) - self.begin
                        raise VideoError(
                            f"{self.path}: damaged: the frame that follows {second:.2f} s cannot be decoded "
                            f"({damage}); get the file again, or keep what can be shown: {anew(self.path)}"
                        )
                    elif not (damage and good):
                        good, damage = frame, ""
                        yield frame
            self._delay = stream.codec_context.reorder_depth
        self.cut |= bool(damage)

    def decode_times(self) -> np.ndarray:
        """Sets `times` and `last` to what the decoded frames themselves tell; returns which of these are shown when.

        A whole pass over the file; int64 [shown] places in the order of `decoded`. VideoError if times are unknown.
        """
        found: list[float | None] = []
        for frame in self.decoded():
            found.append(None if frame.time is None else frame.time - self.begin)
            self.last = float((frame.duration or 0) * (frame.time_base or 0))
        if not found:
            raise VideoError(f"{self.path}: damaged or cut off: not one frame can be decoded; get the file again")
        if self._name == "avi" and self.fps:  # which has no times, but a constant rate and numbers in decoding order
            numbers = np.sort([number for number in self._numbers if number is not None])
            if len(numbers) != len(found):  # two frames in a packet, for example
                numbers = np.arange(len(found))
            delay = self._delay  # the decoder gives each frame when it has read so many more
            found = [*(np.append(numbers[delay:], numbers[-1] + 1 + np.arange(delay)) - delay) / self.fps]
        times = self._filled(np.array(found, float))
        if self._edits:
            return self._edited(times)
        latest = np.maximum.accumulate(times)
        still = times[1:] <= latest[:-1]
        if still.sum() > STILL * self.fps:
            second = times[1:][still][0]
            raise VideoError(f"{self.path}: its times stand still or jump back at {second:.2f} s; {anew(self.path)}")
        if self._name == "mpeg" and still.any() and abs(np.ptp(times) * self.fps - len(times) + 1) < 0.5:
            # Of small frames that share a packet FFmpeg may take one's time for another's.
            times = latest = times[0] + np.arange(len(times)) / self.fps
        late = times < latest  # a player has shown a later frame by then and leaves these out
        self.times = times[~late]
        return np.flatnonzero(~late)

    def _edited(self, times: np.ndarray) -> np.ndarray:
        """As `decode_times`, where an edit list says which stretches of the frames' own times are shown one by one.

        FFmpeg shows the only stretch of such a list right, but errs by frames or seconds where there are several.
        """
        now, places, starts = 0.0, list[int](), list[float]()
        for length, begin in self._edits:
            if begin is not None:
                begin -= self.begin
                first = max(0, int(np.searchsorted(times, begin + ROUNDING, side="right")) - 1)
                behind = int(np.searchsorted(times, begin + length - ROUNDING))
                places += range(first, behind)
                starts += (now + np.maximum(times[first:behind] - begin, 0)).tolist()
            now += length
        if not starts:
            raise VideoError(f"{self.path}: its edit list shows no frame; {anew(self.path, '-ignore_editlist 1')}")
        self.times, self.last = np.array(starts) - self.begin, now - starts[-1] if np.isfinite(now) else self.last
        return np.array(places)

    def _filled(self, times: np.ndarray) -> np.ndarray:
        """Times of every frame; some containers state that of the first of a few, and the rate does the rest.

        times: float64 [frames], NaN where a frame has none. VideoError where the rate does not fill a gap.
        """
        known = np.flatnonzero(np.isfinite(times))
        if len(known) == len(times):
            return times
        if len(known) and not known[0] and self.fps:
            times = np.append(times, times[known[-1]] + (len(times) - known[-1]) / self.fps)
            known = np.append(known, len(times) - 1)
            if (np.abs(np.diff(times[known]) * self.fps - np.diff(known)) < 0.5).all():
                return np.interp(np.arange(len(times) - 1), known, times[known])
        raise VideoError(f"{self.path}: some of its frames carry no time; {anew(self.path)}")

    def _packets(self, container: InputContainer, *streams: VideoStream) -> Iterator[av.Packet]:
        """The packets of these streams, or of all; where the data break off, `cut` is set."""
        try:
            with suppress(IndexError):  # PyAV's, at the end of a file in which FFmpeg has met one more stream
                for packet in container.demux(*streams):
                    self.alive()
                    yield packet
        except av.FFmpegError:
            self.cut = True

    def _list(self, container: InputContainer, stream: VideoStream) -> list[int | None]:
        """The time of each of the picture's packets, None where it has none or is not shown; sets the other fields."""
        pts: list[int | None] = []
        bases = {each.index: float(each.time_base or 0) for each in container.streams}
        ends, broken, latest = dict.fromkeys(bases, -np.inf), dict.fromkeys(bases, False), -np.inf
        with _ffmpeg_log() as log:
            for packet in self._packets(container):
                if not packet.size or packet.stream_index not in bases:
                    continue  # the mark of a stream's end, or a stream that nothing announced
                index, time = packet.stream_index, packet.dts if packet.pts is None else packet.pts
                broken[index] = packet.is_corrupt
                seconds = (packet.duration or 0) * bases[index]
                if time is not None:
                    ends[index] = max(ends[index], time * bases[index] + seconds)
                if index == stream.index:
                    pts.append(None if packet.is_discard else packet.pts)
                    self._numbers.append(packet.dts)
                    if time is not None and time > latest:
                        latest, self.last = time, seconds
        tells, inside = self._bytes_tell()
        self.cut |= inside or any(broken.values()) or any(text in line for *_, line in log for text in BROKEN_OFF)
        claimed = container.duration / av.time_base if container.duration and tells else None
        if self._name == "avi" and self.fps:  # FFmpeg corrects the duration by the file's size, not the frames' number
            claimed = stream.frames / self.fps
        missing = (claimed or 0) - (max(ends.values()) - min(0, (container.start_time or 0) / av.time_base))
        slack = max(0.1, 2 / self.fps if self.fps else 0)  # by which an intact file's header may claim too much
        if self._name == "mov":
            whole = ((stream.start_time or 0) + (stream.duration or 0)) * bases[stream.index]
            missing = max(missing, whole - ends[stream.index])
            if not stream.frames:  # fragments: the length is that of those that are there
                self.cut |= missing > slack
                claimed = None
        self.claimed, self.missing = claimed, missing if missing > slack else 0.0
        return pts

    def _bytes_tell(self) -> tuple[bool, bool]:
        """Whether the header tells the length, and whether the bytes end inside a packet, where FFmpeg does not say."""
        size = self.path.stat().st_size
        if self._name == "mpegts":
            return False, all(size % packet for packet in TS_PACKETS)
        if self._name != "flv":
            return self._name in TELL_LENGTH, False
        with self.path.open("rb") as file:
            _, named, number = file.read(FLV_HEADER).partition(b"duration\0")
            file.seek(max(0, size - 4))  # the last four bytes are the size of the tag in front of them
            file.seek(max(0, size - 4 - int.from_bytes(file.read(4))))
            return bool(named) and any(number[:8]), file.read(1) not in FLV_TAGS


def upright(frame: av.VideoFrame) -> np.ndarray:
    """The picture as a player shows it, uint8 [H, W, 3] RGB: turned and mirrored as the file asks."""
    picture = frame.to_ndarray(format="rgb24")
    if matrix := frame.side_data.get("DISPLAYMATRIX"):
        a, b, _, c, d = struct.unpack_from("5i", matrix)  # type: ignore[arg-type]  # PyAV does not call it a buffer
        turned = abs(b) > abs(a)  # the sides change places
        picture = picture.transpose(1, 0, 2) if turned else picture
        picture = picture[:: -1 if (b if turned else d) < 0 else 1, :: -1 if (c if turned else a) < 0 else 1]
    return np.ascontiguousarray(picture)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each box of an mp4's header."""
    rest = memoryview(data)  # its slices are no copies
    while len(rest) >= 8 and (size := int.from_bytes(rest[:4])) >= 8:
        yield bytes(rest[4:8]), bytes(rest[8:size])
        rest = rest[size:]


def _inside(data: bytes, *names: bytes) -> bytes:
    """The content of the first box of the last name inside of the first one of each name before it."""
    for name in names:
        data = next((content for each, content in _boxes(data) if each == name), b"")
    return data


def _index(path: Path) -> bytes:
    """The content of an mp4's index, if any. VideoError if the file ends inside it: FFmpeg would take what is there."""
    place, size, end = 0, 8, path.stat().st_size
    with path.open("rb") as file:
        while size >= 8 and place + 8 <= end:
            file.seek(place)
            head = file.read(16)
            size = int.from_bytes(head[:4])
            if head[4:8] == b"moov":
                if place + size > end:
                    raise VideoError(f"{path}: cannot be opened: cut off inside its index (moov); get the file again")
                file.seek(place + 8)
                return file.read(max(size - 8, 0))
            size = int.from_bytes(head[8:]) if size == 1 else size
            place += size
    return b""


def _track(path: Path, number: int) -> tuple[tuple[int, ...], list[Edit]]:
    """How an mp4 turns a track's pictures (a, b, c, d of its matrix), and its edits, unless FFmpeg follows these."""
    for name, track in _boxes(movie := _index(path)):
        about, media = _inside(track, b"tkhd"), _inside(track, b"mdia", b"mdhd")
        if name != b"trak" or not about or struct.unpack_from(">I", about, 20 if about[0] else 12)[0] != number:
            continue
        head, listed = _inside(movie, b"mvhd"), _inside(track, b"edts", b"elst")
        scales = [struct.unpack_from(">I", box, 20 if box[0] else 12)[0] for box in (head, media)]
        layout = struct.Struct(">Qqhh" if listed[:1] == b"\1" else ">Iihh")
        edits = [
            (length / scales[0] or np.inf, None if begin == -1 else begin / scales[1])
            for length, begin, *_ in layout.iter_unpack(listed[8 : 8 + (len(listed) - 8) // layout.size * layout.size])
        ]
        a, b, _, c, d = struct.unpack_from(">5i", about, 52 if about[0] else 40)
        followed = len(edits) < 2 or len(edits) == 2 and edits[0][1] is None  # a single one, also behind an empty one
        return (a, b, c, d), [] if followed else edits
    return UPRIGHT, []


@contextmanager
def _ffmpeg_log() -> Iterator[list[tuple[int, str, str]]]:
    """What FFmpeg's libraries say meanwhile, as PyAV lists it: (level, who, line)."""
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as log:
            yield log
    finally:
        av.logging.set_level(before[0])
        av.logging.set_skip_repeated(before[1])
