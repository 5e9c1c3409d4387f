"""Get the real data: QVHighlights' annotation files and videos, fetched or from a folder that has them already.

python -m framseg.download [FOLDER] [--annotations-only]   fetch into FOLDER, by default the paper profile's data folder
python -m framseg.download [FOLDER] --from HAVE            fetch nothing: link what the folder HAVE holds into FOLDER

Whatever ends a run (a cut connection, Ctrl-C, a full disk, a kill), the same command goes on where it stopped.

The annotation files come from one commit of the dataset authors' repository and must have the SHA-256 below. For the
videos' archive no checksum was found: it must have the length that the server names, the checksum inside the gzip file
must be right, and every video is decoded whole when its frames are extracted. None of the addresses could be reached
where this was written. The checksums are those of copies of the files; other public projects name the same ones for
train, val and test_with_gt at this commit.
"""

import argparse
import errno
import fcntl
import gzip
import hashlib
import json
import os
import queue
import shutil
import sys
import tarfile
import threading
import time
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from framseg import FramsegError, annotations, config
from framseg.jsonl import write_lines

ANNOTATIONS = "https://raw.githubusercontent.com/jayleicn/moment_detr/b7e553ac3b0c898ee6b85e03ee507c064eab89ca/data/"
SHA256 = {
    "highlight_train_release.jsonl": "fd28404187468f57cf99242be2963127dc9b4aef26c7de3cb9469569801f2625",
    "highlight_val_release.jsonl": "f668a1eaea156ec5315e14718999cea043a8cf948d3cafbd8e8d655318c3cd02",
    "highlight_test_release.jsonl": "0462f0cb582b54913671ba5ebfc325931ffa6d422c60cb72520749fc6d5d05a3",
    "highlight_test_with_gt.jsonl": "bd50ec6bb5dd3f72571126ba5fdc7418efdd9219a9487984e483a02e2ce5d493",
}
ARCHIVE = "https://nlp.cs.unc.edu/data/jielei/qvh/qvhilights_videos.tar.gz"
VIDEOS = "videos"
ABSENT = "not_in_archive.txt"  # vids that the whole archive did not hold, so that it is not fetched for them again
CHUNK = 1 << 20
ANSWER = 9.0  # seconds until the server must have answered
STALL = 60.0  # seconds without a byte that count as a cut
TRIES = 5  # in a row that bring nothing
PAUSE = 1.0  # seconds before the next try, doubled each time


class DownloadError(FramsegError, ValueError):
    """Data that cannot be had; the message names the address or file and says what to do."""


class _Cut(Exception):
    """A transfer that ended early and may be tried again; `reached`: the server was there."""

    def __init__(self, reason: str, reached: bool = True):
        super().__init__(reason)
        self.reached = reached


def fetch(address: str, path: Path, sha256: str | None = None) -> None:
    """Bring the file at `address` to `path`, which is there only when it is whole.

    What has come so far is kept in {path}.part, and {path}.part.json says of which version it is; both survive any end
    of the process. A file that has changed at the server is fetched anew, never glued. Raises DownloadError.
    """
    part, about = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    most, vain, first = _size(part), 0, True
    while True:
        try:
            _transfer(address, part, about)
            break
        except _Cut as cut:
            size = _size(part)
            # A server that knows no ranges may cut at the same place for ever: only more than ever before is progress.
            most, vain = (size, 0) if size > most else (most, vain + 1)
            if vain == TRIES or (first and not cut.reached):
                raise DownloadError(
                    f"{address}: {cut}; {f'{_words(size)} are kept: ' if size else ''}give the same command again to "
                    f"go on, or take a folder that has the data with --from"
                ) from None
            first = False
            time.sleep(PAUSE * 2**vain)
    if sha256 and (found := _sha256(part)) != sha256:
        part.unlink()
        about.unlink()
        raise DownloadError(
            f"{path}: what {address} sends has SHA-256 {found}, expected is {sha256}; it was not kept: give the same "
            f"command again, or take a folder that has the file with --from"
        )
    part.replace(path)
    about.unlink()


def _transfer(address: str, part: Path, about: Path) -> None:
    """One connection: add to `part` until it is whole, or raise _Cut."""
    known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {"version": None}
    size = _size(part) if known["version"] else 0
    if size and size == known["length"]:
        return
    headers = {"User-Agent": "framseg", "Accept-Encoding": "identity"}
    with _answer(
        address, headers | ({"Range": f"bytes={size}-", "If-Range": known["version"]} if size else {})
    ) as answer:
        said, status = answer.headers, f"the server answers {answer.status} {answer.reason}"
        if answer.status == 200:  # the whole file: the first time, where it has changed, or without ranges
            if "Content-Length" not in said:
                raise DownloadError(f"{address}: the server does not say how long the file is; get it by another way")
            part.unlink(missing_ok=True)  # before the note changes: old bytes must never pass for the new version's
            # A weak ETag does not say that two answers are parts of the same bytes.
            version = said["ETag"] or said["Last-Modified"] or "W/"
            version = None if version.startswith("W/") else version
            size, known = 0, {"version": version, "length": int(said["Content-Length"])}
            write_lines(about, [known])
        elif answer.status in (206, 416):
            right = (said["Content-Range"] or "").startswith(f"bytes {size}-")
            if not right or said.get("ETag", known["version"]) != known["version"]:
                part.unlink()
                raise _Cut(f"{status}, which is not the rest of the file")
        elif answer.status >= 500 or answer.status in (408, 429):
            raise _Cut(status)
        else:
            raise DownloadError(f"{address}: {status}; get the file by another way and take its folder with --from")
        length = known["length"]
        bar = tqdm(desc=part.stem, total=length, initial=size, unit="B", unit_scale=True)
        try:
            with bar, part.open("ab") as file:
                if length - size > shutil.disk_usage(part.parent).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                while size < length:
                    chunk = _read(answer, min(CHUNK, length - size))
                    if not chunk:
                        raise _Cut(f"the connection was cut after {size} of {length} bytes")
                    size += file.write(chunk)
                    bar.update(len(chunk))
        except OSError as error:
            raise _unwritable(part, length - _size(part), error) from None


def _answer(address: str, headers: dict[str, str]) -> HTTPResponse | HTTPError:
    """The server's answer of whatever status, its body still to be read. Raises _Cut if there is none."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urlopen(Request(address, headers=headers), timeout=STALL))
        except (OSError, HTTPException) as error:
            answers.put(error)

    # In a thread of its own: looking a name up and trying its addresses one by one share no time limit.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER)
    except queue.Empty:
        raise _Cut(f"no answer within {ANSWER:g} s", reached=False) from None
    if isinstance(answer, Exception) and not isinstance(answer, HTTPError):
        raise _Cut(f"cannot be reached ({getattr(answer, 'reason', answer)})", reached=False)
    return answer


def _read(answer: HTTPResponse, count: int) -> bytes:
    try:
        return answer.read1(count)
    except (OSError, HTTPException) as error:
        raise _Cut(f"the connection broke ({error})") from None


def unpack(archive: Path, folder: Path, vids: set[str]) -> list[str]:
    """Take {vid}.mp4 of these vids out of the archive, from whatever folder in it, into `folder`.

    A video that is there with its full size is skipped, so the call may be repeated. Returns the names of members that
    were left alone: links, devices, other names, a name for the second time. Raises DownloadError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total, names, taken, ignored = _size(archive), {f"{vid}.mp4" for vid in vids}, set(), []
    with archive.open("rb") as raw:
        try:
            with (
                tqdm.wrapattr(raw, "read", total, desc=f"unpacking {archive.name}") as read,
                gzip.open(read) as stream,
                tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as members,
            ):
                for member in members:
                    name = PurePosixPath(member.name).name
                    if not member.isfile() or name in taken or name not in names:
                        ignored += [] if member.isdir() else [member.name]
                        continue
                    taken.add(name)
                    if _size(folder / name) != member.size:
                        part = folder / f"{name}.part"
                        with part.open("wb") as file:
                            shutil.copyfileobj(members.extractfile(member), file, CHUNK)
                        part.replace(folder / name)
                while stream.read(CHUNK):  # on to the end, where gzip keeps its checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DownloadError(
                f"{archive}: is damaged ({error}); delete it and what came out of it in {folder}, and give the same "
                f"command again"
            ) from None
        except OSError as error:
            raise _unwritable(folder, total - raw.tell(), error) from None
    return ignored


def get_videos(folder: Path, vids: set[str]) -> None:
    """Fetch and unpack the archive, unless it holds none of the videos that are missing. Raises DownloadError."""
    archive, absent = folder / ARCHIVE.rsplit("/", 1)[1], folder / ABSENT
    known = set(absent.read_text(encoding="utf-8").split()) if absent.is_file() else set()
    if not missing(folder, vids) - known:
        return
    if not archive.is_file():
        free = _words(shutil.disk_usage(folder).free)
        print(f"videos: an archive of about 144 GB, and as much again when it is unpacked; {free} are free")
        fetch(ARCHIVE, archive)
    ignored = unpack(archive, folder / VIDEOS, vids)
    if ignored:
        print(f"{archive}: {len(ignored)} members are none of the annotated videos, left alone: {_few(ignored)}")
    absent.write_text("".join(f"{vid}\n" for vid in sorted(missing(folder, vids))), encoding="utf-8")
    print(f"{archive}: everything is unpacked; delete it to have its {_words(_size(archive))} back")


def missing(folder: Path, vids: set[str]) -> set[str]:
    """Those of the vids that have no video."""
    return {vid for vid in vids if not (folder / VIDEOS / f"{vid}.mp4").is_file()}


def link(have: Path, folder: Path) -> None:
    """Link into `folder` what the folder `have` holds: annotation files, and videos in have/videos or in itself."""
    sources = {folder / name: have / name for name in SHA256 if (have / name).is_file()}
    videos = have / VIDEOS if (have / VIDEOS).is_dir() else have
    if any(videos.glob("*.mp4")):
        sources[folder / VIDEOS] = videos
    if not sources:
        raise DownloadError(f"{have}: holds neither an annotation file ({', '.join(SHA256)}) nor videos (*.mp4)")
    for target, source in sources.items():
        if target.exists() and not target.samefile(source):
            raise DownloadError(f"{target}: is there already; move it away to take {source}")
        if not target.exists():
            target.unlink(missing_ok=True)  # a link that leads nowhere
            target.symlink_to(source.resolve())


def _unwritable(path: Path, needed: int, error: OSError) -> DownloadError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DownloadError(f"{path}: {error.strerror or error}")
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    return DownloadError(
        f"{path}: no room ({error.strerror}): {_words(needed)} more are needed, {_words(free)} are free; what has come "
        f"is kept: make room and give the same command again"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(size: int) -> str:
    return tqdm.format_sizeof(size, "B")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def get(folder: Path, have: Path | None = None, with_videos: bool = True) -> None:
    """Fill the data folder, from the folder `have` or from the public addresses, and print what is there.

    Raises DownloadError, and AnnotationError for an annotation file that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".download.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # two would write into one file
            raise DownloadError(f"{folder}: another download is at work here; wait for it or end it") from None
        if have:
            link(have, folder)
        vids = set()
        for name, published in SHA256.items():
            path = folder / name
            if have and not path.is_file():
                print(f"{path}: is not there; --annotations-only fetches it")
                continue
            if not path.is_file():
                fetch(ANNOTATIONS + name, path, published)
            rows, found = annotations.read(path), _sha256(path)
            vids |= {row.vid for row in rows}
            same = "as published" if found == published else f"usable, but NOT the published file (SHA-256 {found})"
            print(f"{path}: {len(rows)} rows, {same}")
        if with_videos and not have:
            get_videos(folder, vids)
    lacking = sorted(missing(folder, vids))
    print(f"{folder / VIDEOS}: {len(vids) - len(lacking)} of {len(vids)} videos are there")
    if lacking:
        print(f"without a video: {_few(lacking)}")


def main(arguments: list[str] | None = None) -> None:
    usual = config.data_folder(config.load("paper"))
    parser = argparse.ArgumentParser(prog="python -m framseg.download", description="Get QVHighlights.")
    parser.add_argument("folder", type=Path, nargs="?", default=usual, help="data folder to fill (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--annotations-only", action="store_true", help="do not fetch the videos (144 GB)")
    which.add_argument("--from", dest="have", type=Path, metavar="HAVE", help="fetch nothing: link what HAVE holds")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    try:
        get(folder, options.have, not options.annotations_only)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or folder}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what has come is kept, the same command goes on")
    print(f"the profile finds it with ./run_all.sh paper{'' if folder == usual else f' --set data.folder={folder}'}")


if __name__ == "__main__":
    main()
