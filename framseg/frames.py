"""Which frames of a video the model sees, how they are decoded, and the frame store that keeps them.

Videos are read from the first packet to the last, never by seeking: after a seek decord counts from the key frame and
is wrong by a few frames where a group of pictures is open. Only a whole pass shows that every frame can be decoded.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import decord
import numpy as np
import pebble
from PIL import Image
from tqdm.auto import tqdm

from framseg.jsonl import whole_file, write_lines
from framseg.run.container import Container, VideoError, anew, ffmpeg, upright

decord.logging.set_level(decord.logging.QUIET)

ABOUT = "frames.json"  # member of a store file that says what made it
MEMBER = "{:03d}_{}.jpg"  # member of a store file: a frame's number in 0..f-1 and the number of its variation
FAILURES = "failures.jsonl"
DECODER_ERRORS = (RuntimeError, AssertionError, StopIteration, decord.DECORDError, decord.DECORDLimitReachedError)
# decord shows the frame before in place of a lost one, unless the share of such repeats is limited; 0 means no limit.
NO_REPEATED_FRAMES = 1e-9
CLOCK = 1e-4  # seconds; finer differences between timestamps are rounding
LATE = 0.1  # seconds that a picture may start after the file does before that is told


class StoreError(VideoError):
    """A frame store that cannot be used or written; the message names the file or folder and what to do."""


def frame_numbers(
    duration: float, fps: float, count: int, neighbours: int, neighbour_distance: float, available: int | None = None
) -> np.ndarray:
    """Frame numbers of a video with a constant frame rate: v_i = (t/f) * fps * (0.5 + i), floored, and its variations.

    `duration` is t in seconds, `count` is f. Each v_i has `neighbours` variations on either side, which are
    `neighbour_distance` seconds (0.1 s is 3 frames at 30 fps), but at least one frame, from each other. Returns int64
    [f, 2 * neighbours + 1] in time order, the middle column being v_i, clipped to 0 .. `available` - 1.
    """
    seconds = duration / count * (0.5 + np.arange(count))
    middle = np.floor(seconds * fps + 1e-6).astype(np.int64)  # a product meant to be whole may come out just below
    step = max(1, round(neighbour_distance * fps))
    numbers = middle[:, None] + step * np.arange(-neighbours, neighbours + 1)
    return np.clip(numbers, 0, None if available is None else available - 1)


class Video:
    """One video file, opened for reading.

    Seconds are the player's, see `framseg.run.container`. `count` is the number of frames, `starts` float64 [count] the
    second at which each is first shown, `offset` the first of them, `length` the second at which the last frame ends,
    `fps` the average frame rate and `constant` whether all frames keep to it. `reader` is "decord" for what the data
    sets consist of, H.264 in mp4 with a plain list of times, and "PyAV" for everything else. `container` tells whether
    the file is whole. `alive` is called after every step of a decoder. VideoError for a file that is missing, no video,
    damaged or without known times, and for one that ends in the middle of its data, unless `allow_partial`.
    """

    def __init__(self, path: Path | str, allow_partial: bool = False, alive: Callable[[], object] = lambda: None):
        self.path, self._alive = Path(path), alive
        self.container = Container(self.path, alive)
        self._unread = self._trusted() if self.container.plain else None
        self.reader = "decord" if self._unread else "PyAV"
        # Which of the decoded frames are shown. decord has no others.
        self._places = np.arange(len(self.container.times)) if self._unread else self.container.decode_times()
        starts, self.fps = self.container.times, self.container.fps
        self.starts = starts - starts[0] if abs(starts[0]) < CLOCK else starts
        self.offset = max(0.0, float(self.starts[0]))
        self.count = len(starts)
        self.length = float(self.starts[-1] + (self.container.last or 1 / (self.fps or 25)))
        steps = (self.starts - self.starts[0]) * self.fps - np.arange(self.count)
        self.constant = bool(np.abs(steps).max() < 0.5)
        if self.container.cut and not allow_partial:
            raise self.cut_off()

    def cut_off(self) -> VideoError:
        """What to tell and to do about a file that does not hold all that its header says."""
        claimed, copy = self.container.claimed, ffmpeg(self.path, "", "-c copy", f"part-{self.path.name}")
        why = f"its header says {claimed:.2f} s" if claimed else "it ends in the middle of its data"
        return VideoError(
            f"{self.path}: cut off: {why}, and its pictures end at {self.length:.2f} s; get the file again, or ask "
            f"about the part that is there with allow_partial=True (--allow-partial), or make that a file by itself: "
            f"{copy}"
        )

    def _trusted(self) -> decord.VideoReader | None:
        """decord's reader of the file, if its list of times is the container's."""
        times = self.container.times
        with suppress(*DECODER_ERRORS):
            reader = self._by_decord()
            listed = np.array(reader.get_frame_timestamp(list(range(len(reader)))), float)[:, 0]
            if len(listed) == len(times) and np.ptp(listed - times) < 0.5 / self.container.fps:
                return reader
        return None

    def _by_decord(self) -> decord.VideoReader:
        return decord.VideoReader(os.path.abspath(self.path), num_threads=1, fault_tol=NO_REPEATED_FRAMES)

    def numbers(self, duration: float, count: int, neighbours: int = 0, neighbour_distance: float = 0.1) -> np.ndarray:
        """`frame_numbers` of this video, int64 [count, 2 * neighbours + 1].

        Where the frame rate varies or the picture starts late, v_i is the frame that a player shows at second
        (t/f) * (0.5 + i), the first one before there is any, and its neighbours are those shown `neighbour_distance`
        seconds earlier and later, or the frames next to it if these are further away.
        """
        if self.constant and not self.offset:
            return frame_numbers(duration, self.fps, count, neighbours, neighbour_distance, self.count)
        sides = np.arange(-neighbours, neighbours + 1)
        middle = duration / count * (0.5 + np.arange(count))
        seconds = middle[:, None] + neighbour_distance * sides
        shown = np.searchsorted(self.starts, seconds + CLOCK, side="right") - 1
        adjacent = shown[:, neighbours, None] + sides
        shown = np.where(sides < 0, np.minimum(shown, adjacent), np.maximum(shown, adjacent))
        return np.clip(shown, 0, self.count - 1)

    def frames(self, numbers: np.ndarray, image_size: int, file: BinaryIO | None = None) -> np.ndarray:
        """Decode the frames of these numbers, RGB uint8 [*numbers.shape, image_size, image_size, 3].

        Frames are resized with PIL's bicubic filter without keeping their proportions. With an open `file` the array is
        kept there, memory holds one frame. The whole video is decoded: VideoError if a frame is damaged or missing.
        """
        shape = (*numbers.shape, image_size, image_size, 3)
        out = np.empty(shape, np.uint8) if file is None else np.memmap(file, np.uint8, "w+", shape=shape)
        flat = out.reshape(-1, image_size, image_size, 3)
        for number, picture in self._pictures(set(numbers.ravel().tolist())):
            resized = Image.fromarray(picture).resize((image_size, image_size), Image.Resampling.BICUBIC)
            flat[numbers.ravel() == number] = np.asarray(resized)
        return out

    def _pictures(self, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The wanted numbers' pictures, uint8 [H, W, 3]; some come twice if decord gives up on the way."""
        if self.reader == "decord":
            with suppress(*DECODER_ERRORS):
                yield from self._pictures_by_decord(wanted)
                return
            self.reader = "PyAV"  # which tells what is damaged, if anything is
        numbers, place = np.array(sorted(wanted)), -1
        places = self._places[numbers]
        for place, frame in enumerate(self.container.decoded()):
            for number in numbers[places == place].tolist():  # an edit list may show a frame more than once
                yield number, upright(frame)
        if place < self._places.max():
            raise VideoError(
                f"{self.path}: damaged: {place + 1} frames can be decoded, and its list of times has {self.count}; "
                f"get the file again, or keep what can be shown: {anew(self.path)}"
            )

    def _pictures_by_decord(self, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        reader, self._unread = self._unread or self._by_decord(), None
        # Skipping over a key frame would make decord seek: stop at the frame in front of each and read it.
        stops = {key - 1 for key in reader.get_key_indices() if 0 < key <= self.count}
        position = 0
        for number in sorted(stops | wanted | {self.count - 1}):
            if number > position:
                reader.skip_frames(number - position)
            frame = reader.next()
            position = number + 1
            self._alive()
            if number in wanted:
                picture = frame.asnumpy()
                height, width, _ = picture.shape
                # decord returns padded rows as if they had more than three channels.
                packed = picture.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
                yield number, np.ascontiguousarray(packed)


def read_apart(
    path: Path | str,
    min_count: int,
    interval: float,
    image_size: int,
    time_limit: float,
    file: BinaryIO,
    allow_partial: bool = False,
) -> tuple[np.ndarray, float, list[str]]:
    """Frames of your own video, evenly spread, uint8 [n, image_size, image_size, 3] RGB; its length in seconds; and
    what the user should know: that the picture starts late, that the end is missing, or that nobody can know this.

    n is the length divided by `interval` seconds, rounded, but at least `min_count`. The array is kept in the open
    `file`. A process of its own decodes, because a decoder that hangs or crashes in native code would take the caller
    (a notebook's kernel) with it. `time_limit` is the longest time in seconds without a new frame: a long video may
    take as long as it needs. A file that is cut off is refused, or with `allow_partial` read as far as it goes. Raises
    VideoError for a video that cannot be decoded or a disk without room.
    """
    from framseg.config import import_path  # here, because the process that decodes has no use for the profiles

    request = [str(path), min_count, interval, image_size, time_limit, file.fileno(), allow_partial]
    # multiprocessing would run the caller's script again where that has no `if __name__ == "__main__"`.
    command = [sys.executable, "-P", "-m", "framseg.frames", json.dumps(request)]
    environment = os.environ | {"PYTHONPATH": import_path()}
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    done = subprocess.run(command, env=environment, stdin=null, stdout=pipe, pass_fds=[file.fileno()])
    if done.returncode:
        why = f"the decoder crashed (exit code {done.returncode})"
        if done.returncode == -signal.SIGALRM:
            why = f"decoding stood still for {time_limit:g} s and was ended"
        raise VideoError(f"{path}: {why}; get the file again, or try what {anew(Path(path))}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise VideoError(answer["error"])
    images = np.memmap(file, np.uint8, "r", shape=(answer["count"], image_size, image_size, 3))
    return images, answer["length"], answer["notes"]


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """An RGB picture as the frame store keeps it."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality, subsampling=0)
    return content.getvalue()


@dataclass(frozen=True, slots=True)
class Store:
    """Folder with one file per video: a zip of JPEG pictures (4:4:4) and a JSON member that says what made them."""

    folder: Path
    # Settings; StoreError for a file made with others.
    image_size: int  # pixels of a square picture's side
    count: int  # frames f
    neighbours: int  # variations on either side of each frame
    neighbour_distance: float  # seconds between two variations
    quality: int  # of the JPEG pictures, 1..100

    def path(self, vid: str) -> Path:
        """The video's file. Raises VideoError for a name that would leave the folder."""
        if not vid or any(character in vid for character in "/\\\0"):
            raise VideoError(f"{vid!r}: a video's name must not be empty or contain path separators")
        return self.folder / f"{vid}.zip"

    def __contains__(self, vid: str) -> bool:
        return self.path(vid).is_file()

    def bytes(self, vid: str) -> int:
        """Size of the video's file in bytes."""
        return self.path(vid).stat().st_size

    def about(self, vid: str) -> dict:
        """What made the video's file: settings, numbers [f][2 * neighbours + 1], fps, reader, duration, length, offset.

        The last three are seconds, as in `Video`; `duration` is the annotated one. "published" has no numbers and fps.
        """
        with self._opened(vid) as (_, about):
            return about

    def read(self, vid: str, choice: np.ndarray | None = None) -> np.ndarray:
        """Frames of a video, uint8 [f, image_size, image_size, 3] RGB.

        `choice`, int [f] in 0 .. 2 * neighbours, picks each frame's variation; without it all are the middle one, v_i.
        VideoError if the video is not in the store or its file is damaged, StoreError if made with other settings.
        """
        choice = np.full(self.count, self.neighbours) if choice is None else np.asarray(choice)
        if choice.shape != (self.count,) or choice.min() < 0 or choice.max() > 2 * self.neighbours:
            raise ValueError(f"choice must be {self.count} integers in 0..{2 * self.neighbours}, one per frame")
        out = np.empty((self.count, self.image_size, self.image_size, 3), np.uint8)
        with self._opened(vid) as (archive, _):
            for frame, variation in enumerate(choice.tolist()):
                with Image.open(io.BytesIO(archive.read(MEMBER.format(frame, variation)))) as picture:
                    out[frame] = np.asarray(picture)
        return out

    def write(self, vid: str, frames: np.ndarray, about: dict) -> None:
        """Store uint8 [f, 2 * neighbours + 1, image_size, image_size, 3]; the JSON holds `about`. Raises OSError."""
        with whole_file(self.path(vid)) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
            archive.writestr(zipfile.ZipInfo(ABOUT), self.described(vid, about))
            for place in np.ndindex(frames.shape[:2]):
                picture = jpeg(Image.fromarray(frames[place]), self.quality)
                archive.writestr(zipfile.ZipInfo(MEMBER.format(*place)), picture)

    def described(self, vid: str, about: dict) -> str:
        """The content of the member ABOUT of the video's file."""
        return json.dumps({"vid": vid, "settings": self._settings(), **about})

    def failures(self) -> dict[str, str]:
        """Videos whose extraction failed, with the reason."""
        path = self.folder / FAILURES
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {row["vid"]: row["reason"] for row in map(json.loads, lines)}

    def _settings(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @contextmanager
    def _opened(self, vid: str) -> Iterator[tuple[zipfile.ZipFile, dict]]:
        path = self.path(vid)
        if not path.is_file():
            raise VideoError(f"{vid}: is not in the frame store {self.folder}; extract it first")
        with path.open("rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    about = json.loads(archive.read(ABOUT))
                    settings = about["settings"], self._settings()
                    if settings[0] != settings[1]:
                        made, wanted = (", ".join(f"{name} {value}" for name, value in s.items()) for s in settings)
                        raise StoreError(
                            f"{path}: was made with {made}, but {wanted} are asked for; use another folder for the "
                            f"frames, or delete this one and extract again"
                        )
                    yield archive, about
            except VideoError:
                raise
            except Exception as error:  # zipfile, json and Pillow raise a dozen kinds for a damaged file
                raise VideoError(f"{vid}: its file {path} is damaged; delete it and extract again") from error


@dataclass
class Report:
    """Result of `extract`; the dictionaries are by vid."""

    done: int  # videos stored now
    skipped: int  # videos that were stored already
    failed: dict[str, str]  # why a video is not stored
    seconds: float  # taken
    readers: dict[str, str]  # what read each stored video: "decord", "PyAV" or "published"
    late: dict[str, float] = field(default_factory=dict)  # seconds a picture starts after its file, if more than LATE


def extract(
    videos: dict[str, float], folder: Path, store: Store, *, time_limit: float, duration_tolerance: float
) -> Report:
    """Decode the videos `folder`/{vid}.mp4 into the store, in a worker process per CPU, and report what failed.

    `videos` maps vid to the annotated duration in seconds, from which the frames' times are taken. A video fails if it
    is missing or damaged, takes more than `time_limit` seconds, crashes the decoder, or is longer or shorter than
    annotated by more than `duration_tolerance` seconds; `failures.jsonl` in the store's folder lists vid and reason.
    Stored videos are skipped. Raises StoreError, and keeps what is stored, if the store cannot be written or holds
    frames made with other settings.
    """
    begin = time.monotonic()
    stored = {vid: about for vid in videos if (about := stored_already(store, vid))}
    waiting = {vid: duration for vid, duration in videos.items() if vid not in stored}
    skipped, failed = len(stored), dict[str, str]()
    failures = {vid: reason for vid, reason in store.failures().items() if vid not in videos}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A fresh interpreter per worker: a fork would copy the locks of torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        # Workers that are ended in the middle of a file leave it in this folder, which goes away.
        with tempfile.TemporaryDirectory(prefix=".extracting-", dir=store.folder) as aside:
            count = min(cpus, max(len(waiting), 1))
            pool = pebble.ProcessPool(count, context=context, initializer=_silence_decoders)
            try:
                vids: dict[Future[dict], str] = {}
                for vid, duration in waiting.items():
                    arguments = vid, duration, folder, store, duration_tolerance, Path(aside)
                    vids[pool.schedule(_store_video, arguments, timeout=time_limit)] = vid
                for task in tqdm(as_completed(vids), "extracting frames", len(vids), unit="video", disable=not vids):
                    vid = vids[task]
                    path = folder / f"{vid}.mp4"
                    try:
                        stored[vid] = task.result()
                    except VideoError as error:
                        failed[vid] = str(error)
                    except TimeoutError:
                        failed[vid] = f"{path}: decoding took more than {time_limit:g} s and was ended"
                    except pebble.ProcessExpired as error:
                        failed[vid] = f"{path}: the decoder crashed (exit code {error.exitcode})"
            finally:
                pool.stop()
                pool.join()
                rows = sorted((failures | failed).items())
                write_lines(store.folder / FAILURES, ({"vid": vid, "reason": reason} for vid, reason in rows))
    except OSError as error:
        raise StoreError(
            f"{store.folder}: the frame store cannot be written ({error.strerror or error}); make room or choose "
            f"another folder and extract again: {len(stored) - skipped} videos were stored now and are kept"
        ) from error
    readers = {vid: about["reader"] for vid, about in stored.items()}
    late = {vid: about["offset"] for vid, about in stored.items() if about["offset"] > LATE}
    return Report(len(stored) - skipped, skipped, failed, time.monotonic() - begin, readers, late)


def _store_video(vid: str, duration: float, folder: Path, store: Store, duration_tolerance: float, aside: Path) -> dict:
    """In a worker process: store a video, written in `aside` first; returns what the file says of it. VideoError."""
    store.path(vid)
    video = Video(folder / f"{vid}.mp4")
    if abs(video.length - duration) > duration_tolerance:
        raise VideoError(
            f"{video.path}: {video.length:.2f} s can be decoded, but the annotations say {duration:g} s "
            f"(tolerance {duration_tolerance:g} s); it is cut off or another video"
        )
    numbers = video.numbers(duration, store.count, store.neighbours, store.neighbour_distance)
    pictures = video.frames(numbers, store.image_size)
    about = {"numbers": numbers.tolist(), "fps": video.fps, "duration": duration, "length": video.length}
    about |= {"offset": video.offset, "reader": video.reader}
    unfinished = replace(store, folder=aside)
    unfinished.write(vid, pictures, about)
    os.replace(unfinished.path(vid), store.path(vid))
    return about


def stored_already(store: Store, vid: str) -> dict | None:
    """What made the video's file; None if missing, damaged or older than its clock. StoreError for other settings."""
    try:
        about = store.about(vid)
    except StoreError:
        raise
    except VideoError:
        return None
    return about if "offset" in about else None


def _notes(video: Video, allow_partial: bool) -> list[str]:
    """What the user should know about the video's seconds. VideoError for one cut off, unless it is allowed."""
    whole, out, there = video.container, [], f"the answer is about the {video.length:.2f} s that are there"
    if whole.missing and not allow_partial:
        raise video.cut_off()
    if whole.missing or whole.cut:
        out.append(f"the file is cut off: {there}" + (f", of {whole.claimed:.2f} s" if whole.claimed else ""))
    elif not whole.claimed:
        out.append(f"the file tells no length, so it cannot be known whether its end is missing: {there}")
    if video.offset > LATE:
        out.append(f"the picture starts {video.offset:.2f} s after the file does: seconds count from the file's start")
    return out


def _silence_decoders() -> None:
    """Send what native code writes to standard error nowhere: decord has lines that cannot be turned off."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # so that Python's own lines are still seen
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _decode_request() -> None:
    """The process that `read_apart` starts: reads its JSON request, prints count and length (s) or an error as JSON."""
    if len(sys.argv) != 2:
        sys.exit("error: this is started by framseg.predict; see framseg predict --help")
    path, min_count, interval, image_size, time_limit, descriptor, allow_partial = json.loads(sys.argv[1])
    _silence_decoders()
    # When the timer runs out, its signal ends the process in native code too.
    alive = partial(signal.setitimer, signal.ITIMER_REAL, time_limit)
    alive()
    try:
        video = Video(path, allow_partial, alive)
        answer: dict[str, object] = {"length": video.length, "notes": _notes(video, allow_partial)}
        answer["count"] = count = max(min_count, round(video.length / interval))
        needed, disk = count * image_size**2 * 3, os.fstatvfs(descriptor)
        if needed > disk.f_bavail * disk.f_frsize:  # a damaged header may claim a length of months
            raise VideoError(
                f"{video.path}: is {video.length:.2f} s long by its timestamps, and its frames take {needed / 1e9:.1f} "
                f"GB of temporary files; make room or set TMPDIR to a folder that has it"
            )
        with os.fdopen(descriptor, "r+b") as file:
            video.frames(video.numbers(video.length, count)[:, 0], image_size, file)
    except VideoError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _decode_request()
