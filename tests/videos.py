"""Short files made from one numbered clip, in many containers and codecs, each with what a player shows of it.

A frame's number is burned into it as twelve black or white columns, and a strip of colours is below them. What a player
shows is known by construction: each case writes its frames at times that it states. Seconds count from the file's
start, which is that of the earliest of its pictures and sounds.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import numpy as np

from framseg import frames

BITS = 12
SIZE = (160, 96)
COLOURS = np.array([[200, 60, 60], [60, 180, 70], [60, 80, 200], [210, 200, 80], [190, 80, 190], [128, 128, 128]])
STRIP = 3 / 4  # of the height; the columns are above it
NTSC = Fraction(24000, 1001)
CENTI, MILLI, TS_CLOCK = Fraction(1, 100), Fraction(1, 1000), Fraction(1, 90000)
TS_WRAP = Fraction(1 << 33, 90000)  # seconds after which a transport stream's clock starts anew
SOUND = {  # the codec and its samples per second, by the ending of the file's name; none of them starts before 0
    **dict.fromkeys((".mp4", ".mkv", ".nut"), ("flac", 48000)),
    **dict.fromkeys((".mov", ".avi"), ("pcm_s16le", 48000)),
    **dict.fromkeys((".ts", ".mpg", ".vob"), ("mp2", 48000)),
    ".m2ts": ("ac3", 48000),
    **dict.fromkeys((".webm", ".ogv"), ("libopus", 48000)),
    **dict.fromkeys((".flv",), ("aac", 44100)),
    **dict.fromkeys((".wmv",), ("wmav2", 44100)),
}


@dataclass(frozen=True)
class Shown:
    """What a player shows: the frame `numbers[i]` from second `starts[i]` on, the last one until second `end`."""

    starts: Sequence[float] = ()
    numbers: Sequence[int] = ()
    end: float = 0.0

    def error(self, second: float, number: int) -> tuple[float, float]:
        """How far from `second` the frame `number` is shown: in seconds, and as a share of that frame's duration."""
        ends = [*self.starts[1:], self.end]
        far = []
        for place, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            if self.numbers[place] == number and start < end:
                begin = -np.inf if place == 0 else start  # the first frame is shown before there is any
                distance = max(begin - second, second - end, 0.0)
                far.append((distance, distance / (end - start)))
        return min(far, default=(np.inf, np.inf))


@dataclass(frozen=True)
class Case:
    """A file, what is special about it, what writes it, and what must be said if it is to be refused."""

    name: str
    special: str
    write: Callable[[Path], Shown]
    refused: str = ""
    colours: bool = True  # whether they come out as they went in


@cache
def picture(number: int, width: int = SIZE[0], height: int = SIZE[1]) -> np.ndarray:
    """A numbered picture, uint8 [height, width, 3]."""
    out = np.empty((height, width, 3), np.uint8)
    column = np.arange(width) * BITS // width
    out[:] = (255 * (number >> (BITS - 1 - column) & 1))[:, None]
    out[int(STRIP * height) :] = COLOURS[np.arange(width) * len(COLOURS) // width]
    return out


def by_palette(image: np.ndarray) -> av.VideoFrame:
    """A picture whose pixels are numbers of a palette's colours."""
    used = np.concatenate([[[0] * 3, [255] * 3], COLOURS])
    palette = np.full((256, 4), 255, np.uint8)  # opaque
    palette[: len(used), 1:] = used
    places = (image[:, :, None] == used).all(-1).argmax(-1)
    return av.VideoFrame.from_ndarray((places.astype(np.uint8), palette), "pal8")


def number(image: np.ndarray) -> int:
    """The number in a (resized) picture."""
    height, width, _ = image.shape
    row = image[height // 4 : height * 5 // 8].mean((0, 2))
    return sum(1 << (BITS - 1 - k) for k in range(BITS) if row[int((k + 0.5) * width / BITS)] > 128)


def colours(image: np.ndarray) -> np.ndarray:
    """The colours of a (resized) picture's strip, float64 [len(COLOURS), 3]."""
    height, width, _ = image.shape
    rows = image[int((STRIP + 0.1) * height) : int((1 - 0.05) * height)].mean(0)
    return np.array([rows[int((k + 0.5) * width / len(COLOURS))] for k in range(len(COLOURS))])


# ---- writing ---------------------------------------------------------------------------------------------------------


def even(seconds: float = 5, rate: Fraction | int = 30, first: Fraction | int = 0) -> list[Fraction]:
    """The times of frames at a constant rate."""
    return [first + Fraction(place) / rate for place in range(round(seconds * rate))]


def x264(bframes: int = 0, key: int = 30, more: str = "") -> dict[str, str]:
    """Options of an encoder that makes groups of pictures of the same length, whatever they show."""
    return {
        "preset": "veryfast",
        "crf": "20",
        "x264-params": f"bframes={bframes}:keyint={key}:min-keyint={key}:scenecut=0:b-adapt=0:threads=1{more}",
    }


OPTIONS = {
    "libx264": x264(),
    "libx265": {"preset": "ultrafast", "x265-params": "keyint=30:scenecut=0:pools=1:log-level=none"},
    "libsvtav1": {"preset": "8", "svtav1-params": "lp=1:keyint=30", "crf": "20"},
    "libvpx": {"deadline": "good", "cpu-used": "8", "b": "600k", "g": "30"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "600k", "g": "30"},
    **dict.fromkeys(("mpeg4", "mpeg2video", "mpeg1video", "wmv2", "flv", "msmpeg4", "h263"), {"qscale": "3"}),
}


def write(
    path: Path,
    times: Sequence[Fraction] | None = None,
    codec: str = "libx264",
    *,
    rate: Fraction | int = 30,
    tick: Fraction | None = None,
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    size: tuple[int, int] = SIZE,
    muxer: dict[str, str] | None = None,
    kind: str | None = None,
    sound: tuple[float, float] | None = None,
    sound_codec: tuple[str, int] | None = None,
    last: Fraction | None = None,
    draw: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    prepare: Callable = lambda stream: None,
    convert: dict | None = None,
    change: Callable[[list], list] = lambda packets: packets,
    moved: Fraction | int = 0,
) -> Shown:
    """Write the clip's frames at these `times` (seconds), 5 s by default, and a silence from one second to another.

    `tick` is the clock's unit in seconds, `kind` the container's name where the file's ending does not tell it, `last`
    the last frame's duration, `draw` changes each picture, `prepare` the stream before and `change` the packets after
    encoding, `moved` is added to all times of the packets, sound included.
    """
    times = even(rate=rate) if times is None else times
    tick = tick or 1 / Fraction(rate)
    with av.open(str(path), "w", format=kind, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height = size
        stream.pix_fmt, stream.codec_context.time_base = pixels, tick
        stream.options = OPTIONS.get(codec, {}) if options is None else options
        stream.codec_context.thread_count = 1  # some encoders' threads wait for each other at full speed
        prepare(stream)
        heard = None
        if sound:
            name, hertz = sound_codec or SOUND[path.suffix]
            heard = container.add_stream(name, rate=hertz, layout="stereo", bit_rate=128_000)
        container.start_encoding()
        packets = []
        for place, time in enumerate(times):
            image = draw(picture(place))
            frame = by_palette(image) if pixels == "pal8" else av.VideoFrame.from_ndarray(image, "rgb24")
            if convert:
                frame = frame.reformat(format=pixels, **convert)
            frame.pts, frame.time_base = round(time / tick), tick
            packets += stream.encode(frame)
        packets += stream.encode() if times else []
        if last:
            packets[-1].duration = round(last / packets[-1].time_base)
        packets = change(packets)
        if heard is not None and sound:
            packets += silence(heard, *sound)
        for packet in packets:
            shift = round(moved / packet.time_base)
            packet.pts, packet.dts = (None if t is None else t + shift for t in (packet.pts, packet.dts))
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)
    if codec == "libsvtav1":  # where it may, it makes its caller a real-time process, and two of those starve two cores
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return shown(times, last or 1 / Fraction(rate), sound)


def shown(times: Sequence[Fraction], last: Fraction, sound: tuple[float, float] | None = None) -> Shown:
    """What a player shows of frames numbered in their order: 0 is the earliest of pictures and sound."""
    if not times:
        return Shown()
    begin = min(times[0], Fraction(max(0, sound[0])) if sound else times[0])  # sound before 0 is never heard
    return Shown([float(time - begin) for time in times], list(range(len(times))), float(times[-1] + last - begin))


def silence(stream, start: float, end: float) -> list:
    """The packets of a silence that begins exactly at second `start`."""
    encoder, packets = stream.codec_context, []
    planar, length = encoder.format.is_planar, int((end - start) * encoder.sample_rate)
    kind = {"fltp": np.float32, "flt": np.float32}.get(encoder.format.name, np.int16)
    block = encoder.frame_size or 1024
    for first in range(0, length, block):
        shape = (2, block) if planar else (1, 2 * block)
        frame = av.AudioFrame.from_ndarray(np.zeros(shape, kind), encoder.format.name, "stereo")
        frame.sample_rate, frame.pts, frame.time_base = encoder.sample_rate, first, Fraction(1, encoder.sample_rate)
        packets += stream.encode(frame)
    packets += stream.encode()
    shift = round(Fraction(start) / packets[0].time_base) - packets[0].pts
    for packet in packets:
        packet.pts += shift
        packet.dts = packet.pts
    return packets


# ---- changing what was written ---------------------------------------------------------------------------------------

HOLDS_BOXES = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}  # those of an mp4
TRACK = (b"moov", b"trak")
EDITS, HEADER, TABLES = (*TRACK, b"edts"), (*TRACK, b"tkhd"), (*TRACK, b"mdia", b"minf", b"stbl")


def box(kind: bytes, payload: bytes) -> bytes:
    """A box of an mp4."""
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def rebuilt(content: bytes, changes: dict[tuple[bytes, ...], Callable[[bytes], bytes]], above: tuple = ()) -> bytes:
    """The boxes of an mp4 whose index (moov) is last, with the payload of those that `changes` names changed."""
    out, place = [], 0
    while place < len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        payload, here = content[place + 8 : place + size], (*above, kind)
        if kind in HOLDS_BOXES:
            payload = rebuilt(payload, changes, here)
        out.append(box(kind, changes.get(here, lambda same: same)(payload)))
        place += size
    return b"".join(out)


def put(at: int, layout: str, *values: int) -> Callable[[bytes], bytes]:
    """Puts numbers into a payload at this byte; `layout` is that of struct."""
    return lambda payload: payload[:at] + struct.pack(layout, *values) + payload[at + struct.calcsize(layout) :]


Edit = tuple[float | None, float]  # from a second of the clip on, or None for nothing; for so many seconds


def edited(path: Path, edits: Sequence[Edit], speed: float = 1, **options) -> Shown:
    """An mp4 whose edit list plays these parts of the clip one after the other, frame by frame at 30 per second."""
    whole = write(path, **options)
    content = path.read_bytes()
    clock = content[content.index(b"mdhd") + 4 :]
    (ticks,) = struct.unpack_from(">I", clock, 12)
    first = struct.unpack_from(">i", content, content.index(b"elst") + 4 + 12)[0]  # the track's time of frame 0
    rows = [(round(1000 * length), -1 if at is None else first + round(at * ticks)) for at, length in edits]
    table = b"".join(struct.pack(">IiI", *row, round(speed * 65536)) for row in rows)
    total = sum(length for length, _ in rows)
    changes = {
        EDITS: lambda _: box(b"elst", struct.pack(">II", 0, len(rows)) + table),
        HEADER: put(20, ">I", total),
        (b"moov", b"mvhd"): put(16, ">I", total),
    }
    path.write_bytes(rebuilt(content, changes))
    starts, numbers, now = [], [], 0.0
    for at, length in edits:
        if at is not None:
            places = range(round(at * 30), min(round((at + length) * 30), len(whole.starts)))
            starts += [now + (place / 30 - at) for place in places]
            numbers += places
        now += length
    return Shown([start - starts[0] for start in starts], numbers, now - starts[0])


def turned(path: Path, matrix: Sequence[int], draw: Callable[[np.ndarray], np.ndarray], size: tuple[int, int]) -> Shown:
    """An mp4 whose header turns or mirrors the picture, by a, b, c, d of its matrix."""
    out = write(path, draw=draw, size=size)
    a, b, c, d = (65536 * value for value in matrix)
    x, y = (65536 * (size[0] * (across < 0) + size[1] * (down < 0)) for across, down in ((a, c), (b, d)))
    path.write_bytes(rebuilt(path.read_bytes(), {HEADER: put(40, ">9i", a, b, 0, c, d, 0, x, y, 1 << 30)}))
    return out


def with_cover(path: Path) -> Shown:
    """An mp4 with a cover, a picture that players do not show as a video."""
    out = write(path, options=x264(2))
    cover = path.with_suffix(".png")
    with av.open(str(cover), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "rgb24"
        packets = stream.encode(av.VideoFrame.from_ndarray(np.full((240, 320, 3), 255, np.uint8), "rgb24"))
        container.mux(packets + stream.encode())
    data = box(b"data", struct.pack(">II", 14, 0) + cover.read_bytes())  # 14: PNG
    cover.unlink()
    kind = box(b"hdlr", struct.pack(">II4s", 0, 0, b"mdir") + bytes(13))
    entry = box(b"udta", box(b"meta", bytes(4) + kind + box(b"ilst", box(b"covr", data))))
    path.write_bytes(rebuilt(path.read_bytes(), {(b"moov",): lambda payload: payload + entry}))
    return out


def two_tracks(path: Path) -> Shown:
    """Two picture tracks; players show the first."""
    times = even()
    with av.open(str(path), "w") as container:
        streams = []
        for size in (SIZE, (SIZE[0] // 2, SIZE[1] // 2)):
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt, stream.options = *size, "yuv420p", x264()
            streams.append(stream)
        for place in range(len(times)):
            for stream, shift in zip(streams, (0, 1000), strict=True):
                frame = av.VideoFrame.from_ndarray(picture(place + shift, stream.width, stream.height), "rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return shown(times, Fraction(1, 30))


def two_sizes(path: Path) -> Shown:
    """A recording whose pictures become smaller in the middle, as a conference's do."""
    times = even(6)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.options = *SIZE, "yuv420p", x264()
        smaller = av.CodecContext.create("libx264", "w")
        smaller.width, smaller.height, smaller.pix_fmt = 2 * SIZE[0] // 3 // 2 * 2, 2 * SIZE[1] // 3, "yuv420p"
        smaller.options, smaller.time_base = x264(), Fraction(1, 30)
        for encoder, numbers in ((stream.codec_context, range(90)), (smaller, range(90, 180))):
            packets = []
            for place in numbers:
                frame = av.VideoFrame.from_ndarray(picture(place, encoder.width, encoder.height), "rgb24")
                frame.pts, frame.time_base = place, Fraction(1, 30)
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode():
                packet.stream, packet.time_base = stream, Fraction(1, 30)
                container.mux(packet)
    return shown(times, Fraction(1, 30))


def packed(packets: list) -> list:
    """MPEG-4 as DivX 5 put it into AVI: a frame and the B-frame after it in one packet, and an empty one behind."""
    mark = b"\0\0\1\xb2DivX503b1393p\0"
    bare = b"\0\0\1\xb6\x51\x7f"  # a frame that says of itself that it was not coded
    contents = [bytes(packet) for packet in packets]
    first = contents[0].index(b"\0\0\1\xb6")
    contents[0] = contents[0][:first] + mark + contents[0][first:]
    out = [contents[0]]
    for place in range(1, len(contents), 2):
        out.append(b"".join(contents[place : place + 2]))
        out += [bare] * (place + 1 < len(contents))
    return [replaced(packet, content) for packet, content in zip(packets, out, strict=True)]


def replaced(packet, content: bytes):
    """The packet with other bytes."""
    new = av.Packet(content)
    new.pts, new.dts, new.time_base, new.duration = packet.pts, packet.dts, packet.time_base, packet.duration
    new.stream, new.is_keyframe = packet.stream, packet.is_keyframe
    return new


def without(places: Callable[[int], bool], packets: list) -> list:
    """Some packets are missing."""
    return [packet for place, packet in enumerate(packets) if not places(place)]


def without_a_second(path: Path, **options) -> Shown:
    """What lies before second 0 of a container that starts there is not shown."""
    out = write(path, **options)
    return Shown(out.starts[:-30], out.numbers[30:], out.end - 1)


def doubled(path: Path) -> Shown:
    """Every tenth frame has the time of the one before it, which is never seen."""

    def tied(packets: list) -> list:
        for place in range(5, len(packets), 10):
            packets[place].pts = packets[place].dts = packets[place - 1].pts
        return packets

    out = write(path, change=tied)
    return replace(out, starts=[out.starts[place - (place % 10 == 5)] for place in range(len(out.starts))])


def hidden(path: Path) -> Shown:
    """VP8 in IVF with frames that are decoded and never shown, each at the time of the one behind it."""
    out = write(path, codec="libvpx")
    content, at = bytearray(path.read_bytes()), 32  # the file's header; 12 bytes lead each frame: its size and time
    for place in range(len(out.starts)):
        if place % 10 == 5:
            content[at + 4 : at + 12] = struct.pack("<Q", place + 1)
            content[at + 12] &= ~0x10  # the bit that asks to show it
        at += 12 + struct.unpack_from("<I", content, at)[0]
    path.write_bytes(content)
    kept = [place for place in range(len(out.starts)) if place % 10 != 5]
    return Shown([out.starts[place] for place in kept], kept, out.end)


def timeless(path: Path, every: int = 4) -> Shown:
    """A transport stream in which only one picture in `every` states its time."""
    out = write(path, even())
    content = bytearray(path.read_bytes())
    count, place = 0, content.find(b"\0\0\1\xe0")
    while place >= 0:
        if content[place + 7] & 0xC0:
            if count % every:
                length = content[place + 8]
                content[place + 7] &= 0x3F
                content[place + 9 : place + 9 + length] = b"\xff" * length
            count += 1
        place = content.find(b"\0\0\1\xe0", place + 4)
    path.write_bytes(content)
    return out


def headless(path: Path) -> Shown:
    """A recording that begins with frame 45, which cannot be decoded, as the first key frame is 60."""
    out = write(path, change=partial(without, lambda place: place < 45))
    return Shown([start - 1.5 for start in out.starts[60:]], out.numbers[60:], out.end - 1.5)


def joined(path: Path) -> Shown:
    """Two recordings of a transport stream, one copied behind the other."""
    out = write(path, sound=(0, 5))
    path.write_bytes(2 * path.read_bytes())
    return out


def one_early(path: Path) -> Shown:
    """An mp4 of which one frame in the middle, number 75, says that it is to be shown before all others."""
    out = write(path, options=x264())
    content = path.read_bytes()
    place = content.index(b"stts") + 4
    *_, gap = struct.unpack_from(">IIII", content, place)
    offsets = struct.pack(">IIIiIiIi", 1 << 24, 3, 75, 0, 1, -80 * gap, len(out.starts) - 76, 0)
    path.write_bytes(rebuilt(content, {TABLES: lambda payload: payload + box(b"ctts", offsets)}))
    kept = [place for place in range(len(out.starts)) if place != 75]
    return Shown([out.starts[place] for place in kept], kept, out.end)


def nothing(path: Path, content: bytes = b"") -> Shown:
    """A file of these bytes, with nothing to show."""
    path.write_bytes(content)
    return Shown()


def sound_alone(path: Path) -> Shown:
    """A file without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=48000, layout="stereo")
        container.start_encoding()
        container.mux(silence(stream, 0, 3))
    return Shown()


def holed(path: Path) -> Shown:
    """Pictures overwritten in the middle of the file."""
    write(path)
    content = path.read_bytes()
    start, end = content.index(b"mdat") + 8, content.index(b"moov")
    middle, tenth = (start + end) // 2, (end - start) // 10
    path.write_bytes(content[:middle] + bytes(tenth) + content[middle + tenth :])
    return Shown()


# ---- the cases -------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Every file of the corpus."""

    def case(name: str, special: str, make: Callable[..., Shown] = write, **options) -> Case:
        own = {key: options.pop(key) for key in ("refused", "colours") if key in options}
        return Case(name, special, partial(make, **options), **own)

    three = x264(3, more=":b-pyramid=normal")
    live, fragments = {"live": "1"}, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    # Containers.
    yield case("plain.mp4", "index last, no B-frames")
    yield case("bframes2.mp4", "index first, two B-frames", options=x264(2), muxer={"movflags": "faststart"})
    yield case("pyramid.mp4", "three B-frames that others refer to", options=three)
    yield case("open.mp4", "open groups of pictures", options=x264(3, more=":open-gop=1"))
    yield case("one_group.mp4", "a single key frame", options=x264(3, key=250))
    yield case("key_frames.mp4", "key frames only", options=x264(0, key=1))
    yield case("fragments.mp4", "fragmented", options=three, muxer=fragments)
    with_edits = {"movflags": "frag_keyframe+delay_moov+default_base_moof"}
    yield case("sound_fragments.mp4", "fragmented", options=three, muxer=with_edits, sound=(0, 5))
    held = even(5, 30, Fraction(2, 30))  # no edit list takes away what B-frames delay
    yield case("held_fragments.mp4", "fragmented", times=held, options=x264(2), muxer=fragments, sound=(0, 5))
    yield case("sound.mp4", "with sound", options=three, sound=(0, 5))
    yield case("negative.mp4", "offsets below 0", options=three, muxer={"movflags": "negative_cts_offsets"})
    dash = {"movflags": "frag_keyframe+empty_moov+default_base_moof+dash+global_sidx"}
    yield case("dash.mp4", "fragmented, with an index", muxer=dash)
    yield case("bframes.mov", "three B-frames, with sound", options=three, sound=(0, 5))
    yield case("bframes.mkv", "three B-frames, with sound", options=three, sound=(0, 5))
    yield case("live.mkv", "no length in its header", options=three, muxer=live)
    yield case("vp8.webm", "with sound", codec="libvpx", sound=(0, 5))
    yield case("vp8_live.webm", "no length in its header", codec="libvpx", muxer=live, sound=(0, 5))
    ahead = OPTIONS["libvpx-vp9"] | {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}
    yield case("vp9.webm", "its encoder looked ahead", codec="libvpx-vp9", options=ahead)
    yield case("vp9_live.webm", "no length in its header", codec="libvpx-vp9", muxer=live)
    yield case("av1.webm", "AV1", codec="libsvtav1")
    yield case("h264.avi", "three B-frames, packets without times", options=three)
    yield case("plain.avi", "H.264 without B-frames, with sound", sound=(0, 5))
    yield case("bframes.flv", "three B-frames, with sound", options=three, sound=(0, 5))
    no_length = {"flvflags": "no_duration_filesize"}
    yield case("no_length.flv", "no length in its header", options=three, muxer=no_length)
    yield case("flv1.flv", "Sorenson's H.263", codec="flv")
    yield case("bframes.ts", "three B-frames, with sound", options=three, sound=(0, 5))
    yield case("plain.ts", "no B-frames")
    blu_ray = {"mpegts_m2ts_mode": "1"}
    yield case("bframes.m2ts", "packets of 192 bytes", options=three, muxer=blu_ray, sound=(0, 5))
    mpeg2 = {"qscale": "3", "bf": "2", "g": "15"}
    yield case("mpeg1.mpg", "MPEG-1, two B-frames", codec="mpeg1video", options=mpeg2, sound=(0, 5))
    yield case("mpeg2.vob", "MPEG-2, two B-frames", codec="mpeg2video", options=mpeg2, kind="dvd", sound=(0, 5))
    small = {"codec": "mpeg2video", "options": mpeg2, "kind": "vob", "sound": (0, 5)}
    yield case("small.vob", "several frames per packet, of which one states its time", **small)
    yield case("vp8.ogv", "VP8 in Ogg", codec="libvpx", sound=(0, 5))
    yield case("wmv2.wmv", "Windows Media", codec="wmv2", kind="asf", sound=(0, 5))
    yield case("h263.3gp", "H.263 of a phone", codec="h263", size=(176, 144))
    yield case("vp8.ivf", "VP8", codec="libvpx")
    yield case("av1.ivf", "AV1", codec="libsvtav1")
    yield case("bframes.nut", "three B-frames, with sound", options=three, sound=(0, 5))
    yield case("mpeg2.mxf", "MPEG-2 of a camera", codec="mpeg2video", options=mpeg2, rate=25)
    yield case("raw.y4m", "uncompressed", codec="rawvideo", kind="yuv4mpegpipe")
    yield case("animated.gif", "ten per second", codec="gif", pixels="rgb8", rate=10, tick=CENTI, colours=False)
    yield case("animated.png", "ten per second", codec="apng", pixels="rgb24", rate=10, kind="apng")
    # Codecs.
    yield case("baseline.mp4", "baseline profile", options=x264() | {"profile": "baseline"})
    yield case("ten_bits.mp4", "high 10 profile", pixels="yuv420p10le", options=three)
    yield case("422.mp4", "4:2:2", pixels="yuv422p", options=three)
    yield case("444.mp4", "4:4:4", pixels="yuv444p", options=three)
    yield case("interlaced.mp4", "interlaced", options=x264(2, more=":tff=1"))
    yield case("hevc.mp4", "HEVC", codec="libx265")
    yield case("hevc.mkv", "HEVC", codec="libx265")
    yield case("hevc.ts", "HEVC", codec="libx265")
    yield case("av1.mp4", "AV1", codec="libsvtav1")
    yield case("vp9.mp4", "VP9", codec="libvpx-vp9")
    xvid = {"qscale": "3", "bf": "2", "b_strategy": "0", "g": "30"}
    yield case("mpeg4.mp4", "MPEG-4 ASP, two B-frames", codec="mpeg4", options=xvid)
    yield case("xvid.avi", "MPEG-4 ASP, two B-frames", codec="mpeg4", options=xvid, sound=(0, 5))
    single = xvid | {"bf": "1"}
    yield case("packed.avi", "packed B-frames", codec="mpeg4", options=single, change=packed)
    yield case("msmpeg4.avi", "DivX 3", codec="msmpeg4")
    yield case("mpeg2.avi", "MPEG-2, two B-frames", codec="mpeg2video", options=mpeg2)
    yield case("mjpeg.avi", "a camera's JPEGs", codec="mjpeg", pixels="yuvj420p", sound=(0, 5))
    yield case("mjpeg.mov", "a camera's JPEGs", codec="mjpeg", pixels="yuvj422p")
    yield case("mpeg2.ts", "MPEG-2, two B-frames", codec="mpeg2video", options=mpeg2)
    yield case("prores.mov", "ProRes", codec="prores_ks", pixels="yuv422p10le", times=even(3))
    yield case("png.mov", "PNG", codec="png", pixels="rgb24", times=even(3))
    yield case("ffv1.mkv", "FFV1", codec="ffv1", times=even(3))
    yield case("raw.avi", "uncompressed", codec="rawvideo", pixels="bgr24", times=even(3))
    yield case("utvideo.avi", "Ut Video", codec="utvideo", times=even(3))
    yield case("palette.avi", "a palette in the container", codec="msrle", pixels="pal8", rate=10)
    yield case("palette.mov", "a palette in the container", codec="smc", pixels="pal8", rate=10)
    yield case("palette_raw.avi", "a palette, uncompressed", codec="rawvideo", pixels="pal8", rate=10)
    yield case("rgb.mov", "QuickTime animation", codec="qtrle", pixels="rgb24", times=even(3))
    yield case("alpha.mov", "transparency", codec="qtrle", pixels="argb", times=even(3))
    yield case("grey.mkv", "shades of grey", pixels="gray", colours=False)
    # Rates.
    yield case("film.mp4", "24000/1001 per second", options=three, rate=NTSC)
    yield case("film.mkv", "24000/1001 per second, in milliseconds", options=three, rate=NTSC)
    yield case("film.avi", "24000/1001 per second", codec="mpeg4", options=xvid, rate=NTSC)
    yield case("25.mp4", "25 per second", rate=25)
    yield case("50.mp4", "50 per second", options=three, rate=50)
    yield case("60.mkv", "60 per second, in milliseconds", options=three, rate=60)
    yield case("120.mp4", "120 per second", times=even(3, 120), options=three, rate=120)
    yield case("rounded.mp4", "30 per second, in milliseconds", options=three, muxer={"video_track_timescale": "1000"})
    yield case("10.mp4", "10 per second", rate=10)
    yield case("1.mp4", "1 per second", rate=1, times=even(10, 1), options=x264(0, key=5))
    random = np.random.default_rng(1)
    jitter = [Fraction(33 * n + int(random.integers(-14, 15)) * (n > 0), 1000) for n in range(150)]
    yield case("jitter.mp4", "every frame off by up to 14 ms", times=jitter, tick=MILLI)
    yield case("jitter.webm", "every frame off by up to 14 ms", codec="libvpx", times=jitter, tick=MILLI)
    gaps = [Fraction(n, 30) + 2 * (n >= 40) + 2 * (n >= 100) for n in range(150)]
    yield case("gaps.mp4", "two gaps of 2 s", times=gaps, options=three)
    yield case("gaps.mkv", "two gaps of 2 s", times=gaps, options=three)
    yield case("gaps.ts", "two gaps of 2 s", times=gaps, tick=TS_CLOCK)
    yield case("gaps.avi", "two gaps of 2 s", times=gaps, codec="mpeg4")
    dropped = [Fraction(n, 30) for n in range(150) if n % 7 != 3 and not 50 < n < 60]
    yield case("dropped.avi", "dropped frames", times=dropped, codec="mjpeg", pixels="yuvj420p", sound=(0, 5))
    yield case("dropped_b.avi", "dropped frames, two B-frames", times=dropped, codec="mpeg4", options=xvid)
    yield case("dropped_pyramid.avi", "dropped frames, H.264 with three B-frames", times=dropped, options=three)
    phone = np.cumsum([0, *random.choice([33, 34, 50, 67, 8], 149)])
    yield case("phone.mp4", "a phone's variable rate", times=[Fraction(int(t), 1000) for t in phone], tick=MILLI)
    slides = [Fraction(int(t), 1000) for t in np.cumsum([0, *random.integers(200, 900, 12)])]
    yield case("slides.mkv", "a few frames per second, uneven", times=slides, tick=MILLI)
    yield case("last.mp4", "its last frame is 4 s long", last=Fraction(4), times=even(3))
    # The clock.
    for late in (Fraction(1, 20), Fraction(7, 10), 2, 8):
        times, until = even(4, 30, late), float(late + 4)
        name = f"late_{float(late):g}.mp4"
        yield case(name, "sound first", times=times, tick=TS_CLOCK, options=three, sound=(0, until))
    late = even(4, 30, Fraction(7, 10))
    yield case("late.mkv", "sound first", times=late, options=three, sound=(0, 4.7))
    yield case("late.webm", "sound first", times=late, codec="libvpx", sound=(0, 4.7))
    yield case("late.ts", "sound first", times=late, options=three, sound=(0, 4.7))
    yield case("late.flv", "sound first", times=late, options=three, sound=(0, 4.7))
    yield case("late.mpg", "sound first", times=late, codec="mpeg1video", options=mpeg2, sound=(0, 4.7))
    yield case("late_fragments.mp4", "sound first, fragmented", times=late, sound=(0, 4.7), muxer=with_edits)
    yield case("early.mp4", "picture first", options=three, sound=(2, 5))
    yield case("early.mkv", "picture first", options=three, sound=(2, 5))
    minus = {"moved": -1, "muxer": {"avoid_negative_ts": "disabled"}}
    yield case("minus.mp4", "starts at -1 s", without_a_second, **minus)
    yield case("minus.mkv", "starts at -1 s", without_a_second, **minus, refused="some .* no time; `ffmpeg -i")
    yield case("day.mkv", "starts after an hour", moved=3600, sound=(0, 5), options=three)
    yield case("ten_hours.ts", "starts after ten hours", moved=36000, sound=(0, 5), options=three)
    yield case(
        "wrap.ts", "its clock starts anew after 2 s", moved=TS_WRAP - 2, tick=TS_CLOCK, sound=(0, 5), options=three
    )
    yield case("long_sound.mp4", "sound 5 s longer than the picture", options=three, sound=(0, 10))
    yield case("long_sound.mkv", "sound 5 s longer than the picture", options=three, sound=(0, 10))
    yield case("short_sound.mp4", "picture 3 s longer than the sound", options=three, sound=(0, 2))
    primed = ("aac", 44100)
    yield case("aac.mp4", "sound that begins before 0", options=three, sound=(-1024 / 44100, 5), sound_codec=primed)
    # Edit lists.
    for name, coded in (("", x264()), ("_b", x264(3))):

        def edits(what: str, special: str, *edits: Edit, name=name, coded=coded, **more) -> Case:
            return case(f"{what}{name}.mp4", f"edit list: {special}", edited, edits=edits, options=coded, **more)

        yield edits("trim_start", "begins between key frames", (1.5, 3.5))
        yield edits("trim_end", "ends early", (0, 3.2))
        yield edits("trim_both", "both ends trimmed", (1.7, 2.1))
        yield edits("delayed", "nothing for 1.5 s", (None, 1.5), (0, 5))
        yield edits("two_edits", "a part left out", (0.5, 1.5), (3, 1.5))
        yield edits("three_edits", "two parts left out", (0, 1), (1.8, 1.2), (4, 1))
        yield edits("repeat", "a part twice", (0, 2), (1, 2))
        yield edits("hole", "nothing in the middle", (0, 2), (None, 1), (2, 3))
    both = {"sound": (0, 5), "muxer": {"video_track_timescale": "48000"}}  # one clock for both tracks' edits
    yield case("trim_sound.mp4", "edit list: both ends trimmed, with sound", edited, edits=[(1.7, 2.1)], **both)
    two = [(0.5, 1.5), (3.2, 1.5)]
    yield case("edits_sound.mp4", "edit list: a part left out, with sound", edited, edits=two, **both)
    yield case("twice.mp4", "edit list: at twice the speed", edited, edits=[(0, 2.5)], speed=2)
    # Pictures turned and of odd sizes.
    tall = SIZE[::-1]
    turns = {"90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0)}
    for quarter, (angle, matrix) in enumerate(turns.items(), 1):
        draw = partial(np.rot90, k=quarter)
        size = tall if quarter % 2 else SIZE
        yield case(f"turned_{angle}.mp4", f"turned by {angle} degrees", turned, matrix=matrix, draw=draw, size=size)
    yield case("mirrored.mp4", "mirrored", turned, matrix=(-1, 0, 0, 1), draw=np.fliplr, size=SIZE)
    yield case("upside_down.mp4", "mirrored", turned, matrix=(1, 0, 0, -1), draw=np.flipud, size=SIZE)
    for name, sign, k in (("transposed", 1, 0), ("antitransposed", -1, 2)):

        def transposed(image, k=k):
            return np.rot90(image, k).transpose(1, 0, 2)

        matrix = (0, sign, sign, 0)
        yield case(f"{name}.mp4", "turned and mirrored", turned, matrix=matrix, draw=transposed, size=tall)

    def turn(stream):
        stream.set_display_rotation(90)

    yield case("turned.mkv", "turned by 270 degrees", draw=partial(np.rot90, k=-1), size=tall, prepare=turn)
    yield case("odd.mp4", "161 x 97 pixels, 4:4:4", pixels="yuv444p", size=(161, 97))
    yield case("odd.webm", "161 x 97 pixels", codec="libvpx", size=(161, 97))
    yield case("odd.mjpeg.avi", "161 x 97 pixels", codec="mjpeg", pixels="yuvj420p", size=(161, 97))
    yield case("two_sizes.ts", "smaller pictures from 3 s on", two_sizes)
    # Colours.
    for name, matrix, wide in (
        ("bt601", 6, False),
        ("bt709", 1, False),
        ("bt709_full", 1, True),
        ("untagged", 2, False),
    ):

        def tag(stream, matrix=matrix, wide=wide):
            stream.codec_context.colorspace = stream.codec_context.color_primaries = matrix
            stream.codec_context.color_trc, stream.codec_context.color_range = matrix, 2 if wide else 1

        convert = {"dst_colorspace": 1 if matrix == 1 else 5, "dst_color_range": 2 if wide else 1}
        yield case(f"{name}.mp4", f"colours by {name}", prepare=tag, convert=convert, options=x264(2))
        yield case(f"{name}.mkv", f"colours by {name}", prepare=tag, convert=convert, options=x264(2))
    # Names.
    yield case("2024-05-01T12:30:05.mp4", "colons in its name")
    yield case("a b ü 100% [1] 'x'.mp4", "spaces, umlaut, percent, brackets and quotes in its name")
    yield case("no_ending", "its name has no ending", kind="mp4")
    yield case("wrong_ending.mp4", "in truth Matroska", kind="matroska")
    # Times that cannot be taken as they are.
    yield case("doubled.mkv", "every tenth frame at the time of the one before", doubled)
    yield case("joined.ts", "its clock starts anew with a second recording", joined, refused="jump back.*`ffmpeg -i")
    for ending in ("ts", "mkv"):
        yield case(f"headless.{ending}", "begins between key frames", headless)
    yield case("hidden.ivf", "frames that are never shown, at the time of the next", hidden)
    yield case("timeless.ts", "one picture in four states its time", timeless)
    yield case("one_early.mp4", "one frame's time lies before all others", one_early)
    # Few and many pictures.
    yield case("single.mp4", "one frame", times=even(Fraction(1, 30)))
    yield case("single.webm", "one frame", times=even(Fraction(1, 30)), codec="libvpx")
    yield case("single.ts", "one frame", times=even(Fraction(1, 30)))
    yield case("cover.mp4", "a cover", with_cover)
    yield case("two_tracks.mkv", "two picture tracks", two_tracks)
    yield case("two_tracks.mp4", "two picture tracks", two_tracks)
    # Refused.
    no_times = "no times.*`ffmpeg -framerate 30 -i"
    yield case("raw.h264", "no container", kind="h264", options=three, refused=no_times)
    yield case("raw.hevc", "no container", codec="libx265", kind="hevc", refused=no_times)
    yield case("raw.m2v", "no container", codec="mpeg2video", options=mpeg2, kind="mpeg2video", refused="no times")
    yield case("raw.mjpeg", "no container", codec="mjpeg", pixels="yuvj420p", kind="mjpeg", refused="no times")
    yield case("no_frames.mp4", "no frame", times=[], refused="not one frame|no pictures")
    yield case("empty.mp4", "no bytes", nothing, refused="is empty")
    yield case("text.mp4", "text", nothing, content=b"no video\n" * 500, refused="another kind of file")
    yield case("sound_alone.mp4", "sound alone", sound_alone, refused="holds no pictures")
    lost = partial(without, lambda place: place == 60)
    yield case("key_lost.mp4", "a key frame left out", change=lost, refused="damaged.*`ffmpeg -i")
    yield case("holed.mp4", "a tenth overwritten", holed, refused="damaged.*`ffmpeg -i")


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What was read of a file: evenly spread pictures, uint8 [n, 96, 96, 3], and what is told about it."""

    images: np.ndarray
    length: float
    offset: float
    count: int
    reader: str
    notes: list[str]

    def errors(self, truth: Shown) -> list[tuple[float, float, float]]:
        """For each picture its second, and how far off it is: in seconds, and as a share of that frame's duration."""
        seconds = self.length / len(self.images) * (0.5 + np.arange(len(self.images)))
        pairs = zip(seconds.tolist(), self.images, strict=True)
        return [(second, *truth.error(second, number(image))) for second, image in pairs]


def read(path: Path, count: int = 12, allow_partial: bool = False) -> Answer:
    """Read a file as `predict` does, but in this process. Raises VideoError."""
    video = frames.Video(path, allow_partial)
    notes = frames._notes(video, allow_partial)
    images = video.frames(video.numbers(video.length, count)[:, 0], SIZE[1])
    return Answer(images, video.length, video.offset, video.count, video.reader, notes)


def cuts(path: Path, folder: Path) -> dict[int, Path]:
    """Writes the file cut off after each twentieth of its bytes, between some packets, near its end; by bytes left."""
    content = path.read_bytes()
    with av.open(str(path)) as container:
        between = [packet.pos for packet in container.demux(video=0) if packet.pos]
    places = [len(content) * part // 20 for part in range(1, 20)] + between[7::17]
    places += [len(content) - lost for lost in (1, 10, 100, 400, 1000)]
    for place in places:
        (folder / f"{place} {path.name}").write_bytes(content[:place])
    return {place: folder / f"{place} {path.name}" for place in places}


def make(folder: Path) -> dict[str, Shown]:
    """Write every file into `folder`; what a player shows of each, by its name."""
    return {case.name: case.write(folder / case.name) for case in CASES.values()}


CASES = {case.name: case for case in cases()}
CUT = {  # files that are cut off at many places
    "bframes2.mp4": "mp4, index first",
    "sound.mp4": "mp4, index last",
    "late_2.mp4": "mp4, index last, sound first",
    "sound_fragments.mp4": "mp4, fragmented",
    "bframes.mov": "mov, index last",
    "bframes.mkv": "mkv",
    "live.mkv": "mkv without a length",
    "vp8.webm": "webm",
    "vp8_live.webm": "webm without a length",
    "bframes.flv": "flv",
    "no_length.flv": "flv without a length",
    "bframes.ts": "transport stream",
    "xvid.avi": "avi",
    "mpeg1.mpg": "program stream",
    "vp8.ogv": "ogg",
}

UNKNOWN = "cannot be known whether its end is missing"  # told of a file without a length
