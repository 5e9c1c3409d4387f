"""Get the real data: QVHighlights' annotations and videos, and the predictions that the paper's authors published.

framseg download [FOLDER] [--annotations-only]   fetch QVHighlights into FOLDER (data/qvhighlights)
framseg download [FOLDER] --from HAVE            fetch nothing: link what the folder HAVE holds into FOLDER
framseg download --reference [FOLDER]            fetch annotations and the authors' predictions (data/reference), 15 MB

However a run ends (a cut connection, Ctrl-C, a full disk), the same command continues where it stopped. The annotation
files must have the SHA-256 of download.yaml. The others have none: the videos' archive must have the length that the
server names and the checksum inside the gzip file; the predictions must belong to the annotations, query by query.
"""

import argparse
import errno
import gzip
import json
import os
import shlex
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, TextIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pebble
import yaml
from tqdm.auto import tqdm

from framseg import FramsegError, annotations, command_line, config, predictions
from framseg.jsonl import checksum, shortlist, whole_file, write_lines
from framseg.run.paths import hold

SOURCES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ANNOTATIONS, RELEASED, ARCHIVE, SHA256 = (SOURCES[name] for name in ("annotations", "released", "archive", "sha256"))
ARCHIVE_BYTES = SOURCES["archive_bytes"]
VIDEOS = "videos"
REFERENCE = config.WORKSPACE / "data" / "reference"
ABSENT = "not_in_archive.txt"  # vids that the archive does not hold: it is not fetched again for them
CHUNK = 1 << 20
ANSWER = 9.0  # seconds until the server must have answered
STALL = 60.0  # seconds without a byte after which a connection counts as cut
TRIES = 5  # connections in a row that bring nothing
PAUSE = 1.0  # seconds before the next try, doubled each time
LINK_IT = ", or take a folder that has the file with --from"  # another way to the data


class DownloadError(FramsegError, ValueError):
    """Data that cannot be fetched; the message names the address or file and says what to do."""


class _Cut(FramsegError):
    """A transfer that ended early and may be tried again; says why."""


def fetch(
    address: str,
    path: Path,
    sha256: str | None = None,
    headers: dict[str, str] | None = None,
    otherwise: str = LINK_IT,
    name: str = "",
) -> None:
    """Fetch the file at `address` to `path`, which appears when it is complete.

    Until then its bytes are in {path}.part, and {path}.part.json says of which version they are; the next call goes on
    with them, unless the file has changed at the server. headers: further ones to send. otherwise: another way to the
    file, for the messages. name: what the progress bar shows, by default the path's. Raises DownloadError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    most, failures, first = _size(part), 0, True
    while True:
        try:
            _transfer(address, part, note, headers or {}, name or path.name)
            break
        except (_Cut, ConnectionError) as cut:
            size = _size(part)
            # A server that ignores ranges may cut at the same byte every time: only more bytes than ever are progress.
            most, failures = (size, 0) if size > most else (most, failures + 1)
            if failures == TRIES or (first and isinstance(cut, ConnectionError)):
                raise DownloadError(
                    f"{_shown(address)}: {cut}; {f'{words(size)} are kept: ' if size else ''}give the same command "
                    f"again to go on{otherwise}"
                ) from None
            first = False
            time.sleep(PAUSE * 2**failures)
    if sha256 and (actual := checksum(part)) != sha256:
        part.unlink()
        note.unlink()
        raise DownloadError(
            f"{path}: what {_shown(address)} sends has SHA-256 {actual}, expected is {sha256}; it was not kept: give "
            f"the same command again{otherwise}"
        )
    part.replace(path)
    note.unlink()


def _transfer(address: str, part: Path, note: Path, more: dict[str, str], name: str) -> None:
    """One connection: add to `part` until it is complete, or raise _Cut."""
    known: dict = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {"version": "", "length": 0}
    version, length = known["version"], known["length"]
    size = _size(part) if version else 0
    if size and size == length:
        return
    headers = {"User-Agent": "framseg"} | more | {"Accept-Encoding": "identity"}
    if size:
        headers |= {"Range": f"bytes={size}-", "If-Range": version}
    with _answer(address, headers) as answer:
        status = f"the server answers {answer.status} {answer.reason}"
        if answer.status == 200:  # the whole file: the first time, where it has changed, or without ranges
            if "Content-Length" not in answer.headers:
                raise DownloadError(f"{_shown(address)}: the server tells no length of the file; get it by another way")
            part.unlink(missing_ok=True)  # before the note changes: old bytes must never pass for the new version's
            # A weak ETag, unlike a strong one, may be the same for files of different bytes.
            version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
            version = "" if version.startswith("W/") else version
            size, length = 0, int(answer.headers["Content-Length"])
            write_lines(note, [{"version": version, "length": length}])
        elif answer.status in (206, 416):
            continues = (answer.headers["Content-Range"] or "").startswith(f"bytes {size}-")
            if not continues or answer.headers.get("ETag", version) != version:
                part.unlink(missing_ok=True)
                raise _Cut(f"{status}, which is not the rest of the file")
        elif answer.status in (408, 429, *range(500, 600)):
            raise _Cut(status)
        else:
            raise DownloadError(f"{_shown(address)}: {status}; get it by another way and take its folder with --from")
        bar = tqdm(desc=name, total=length, initial=size, unit="B", unit_scale=True)
        try:
            with bar, part.open("ab") as file:
                if length - size > shutil.disk_usage(part.parent).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                while size < length:
                    try:
                        chunk = answer.read1(min(CHUNK, length - size))
                    except (OSError, HTTPException) as error:
                        raise _Cut(f"the connection broke ({error})") from None
                    if not chunk:
                        raise _Cut(f"the connection was cut after {size} of {length} bytes")
                    size += file.write(chunk)
                    bar.update(len(chunk))
        except OSError as error:
            raise _unwritable(part, length - _size(part), error) from None


def _answer(address: str, headers: dict[str, str]) -> HTTPResponse | HTTPError:
    """The server's answer of whatever status, its body still to be read. Raises ConnectionError if there is none."""
    # In a thread, because no time limit covers looking up a name and trying each of its addresses.
    answer = pebble.concurrent.thread(urlopen)(Request(address, headers=headers), timeout=STALL)
    try:
        return answer.result(timeout=ANSWER)
    except HTTPError as error:
        return error
    except TimeoutError:
        raise ConnectionError(f"no answer within {ANSWER:g} s") from None
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"cannot be reached ({getattr(error, 'reason', error)})") from None


def unpack(archive: Path, folder: Path, vids: set[str]) -> list[str]:
    """Extract {vid}.mp4 of these vids, from whatever folder in the archive, into `folder`.

    A video that is there with its full size is skipped, so the call may be repeated. Returns the names of members that
    were not extracted: links, devices, other names, a name for the second time. Raises DownloadError.
    """
    names, ignored = {f"{vid}.mp4" for vid in vids}, []

    def take(member: tarfile.TarInfo, source: IO[bytes] | None) -> None:
        name = PurePosixPath(member.name).name
        if source is None or name not in names:
            ignored.extend([] if member.isdir() else [member.name])
            return
        names.remove(name)  # a second member of this name is left out
        if _size(folder / name) != member.size:
            with whole_file(folder / name) as unfinished, unfinished.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)

    read(archive, folder, f"delete it and what came out of it in {folder}", take)
    return ignored


def read(archive: Path, folder: Path, advice: str, take: Callable[[tarfile.TarInfo, IO[bytes] | None], None]) -> None:
    """Read a tar.gz in one pass: `take` gets each member with its content, None for what is no file.

    Raises DownloadError for a damaged archive, with the advice, and if `folder`, where `take` writes, has no room.
    """
    with archive.open("rb") as raw:
        try:
            with (
                tqdm(desc=f"unpacking {archive.name}", total=_size(archive), unit="B", unit_scale=True) as bar,
                gzip.open(raw) as stream,
                tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as members,
            ):
                for member in members:
                    bar.update(raw.tell() - bar.n)
                    take(member, members.extractfile(member) if member.isfile() else None)
                    members.members.clear()  # type: ignore[attr-defined]  # it would remember a million of them
                while stream.read(CHUNK):  # on to the end, where gzip keeps its checksum
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DownloadError(f"{archive}: is damaged ({error}); {advice}, and give the same command again") from None
        except OSError as error:
            raise _unwritable(folder, _size(archive) - raw.tell(), error) from None


def get_videos(folder: Path, vids: set[str]) -> None:
    """Fetch and unpack the archive, unless it holds none of the videos that are missing. Raises DownloadError."""
    archive, absent = folder / ARCHIVE.rsplit("/", 1)[1], folder / ABSENT
    known = set(absent.read_text(encoding="utf-8").split()) if absent.is_file() else set()
    if not missing(folder, vids) - known:
        return
    if not archive.is_file():
        size, free = map(words, (ARCHIVE_BYTES, shutil.disk_usage(folder).free))
        print(f"videos: an archive of about {size}, and as much again for the unpacked videos; {free} are free")
        fetch(ARCHIVE, archive)
    if ignored := unpack(archive, folder / VIDEOS, vids):
        few = shortlist(ignored, most=5)
        print(f"{archive}: {len(ignored)} members that are no annotated videos were left out: {few}")
    absent.write_text("".join(f"{vid}\n" for vid in sorted(missing(folder, vids))), encoding="utf-8")
    print(f"{archive}: everything is unpacked; delete it to free its {words(_size(archive))}")


def missing(folder: Path, vids: set[str]) -> set[str]:
    """Those of the vids that have no video."""
    return {vid for vid in vids if not (folder / VIDEOS / f"{vid}.mp4").is_file()}


def link(have: Path, folder: Path) -> None:
    """Link into `folder` the annotation files of the folder `have`, and its videos (have/videos, or `have` itself)."""
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
        f"{path}: no room ({error.strerror}): {words(needed)} more are needed, {words(free)} are free; what has "
        f"arrived is kept: make room and give the same command again"
    )


def _shown(address: str) -> str:
    return address.partition("?")[0]  # what follows may be a key


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def words(size: float) -> str:
    """A number of bytes as people read it."""
    return tqdm.format_sizeof(size, "B")


def locked(folder: Path) -> TextIO:
    """Keep a second download, which would write into the same files, out of `folder`. Raises DownloadError."""
    busy = DownloadError(f"{folder}: another process is filling it; wait for it or end it")
    return hold(folder, ".download.lock", 0, busy)


def get_annotations(folder: Path, may_fetch: bool = True) -> dict[str, list[annotations.Row]]:
    """The rows of each annotation file in `folder`, fetched where one is missing, unless `may_fetch` is False.

    Prints for each file whether it is the published one. Raises DownloadError and AnnotationError.
    """
    rows = {}
    for name, published in SHA256.items():
        path = folder / name
        if not path.is_file():
            if not may_fetch:
                print(f"{path}: is not there; --annotations-only fetches it")
                continue
            fetch(ANNOTATIONS + name, path, published)
        rows[name], actual = annotations.read(path), checksum(path)
        same = "as published" if actual == published else f"usable, but NOT the published file (SHA-256 {actual})"
        print(f"{path}: {len(rows[name])} rows, {same}")
    return rows


def get(folder: Path, have: Path | None = None, with_videos: bool = True) -> None:
    """Fill the data folder, from the folder `have` or from the public addresses, and print what it holds.

    Raises DownloadError, and AnnotationError for an annotation file that cannot be used.
    """
    with locked(folder):
        if have:
            link(have, folder)
        vids = {row.vid for rows in get_annotations(folder, may_fetch=not have).values() for row in rows}
        if with_videos and not have:
            get_videos(folder, vids)
    lacking = sorted(missing(folder, vids))
    print(f"{folder / VIDEOS}: {len(vids) - len(lacking)} of {len(vids)} videos are there")
    if lacking:
        print(f"without a video: {shortlist(lacking, most=5)}")


def get_reference(folder: Path) -> None:
    """Fetch the annotations into `folder`/qvhighlights and the authors' predictions into `folder`/released; check both.

    Raises DownloadError, and AnnotationError for an annotation file that cannot be used.
    """
    with locked(folder):
        rows = get_annotations(folder / "qvhighlights")
        for split, name in (("val", "highlight_val_release.jsonl"), ("test", "highlight_test_with_gt.jsonl")):
            path = folder / "released" / f"hl_{split}_predictions.json"
            if not path.is_file():
                fetch(RELEASED + path.name, path)
            try:
                durations = {record["qid"]: record["duration"] for record in predictions.read_released(path)}
                if durations != {row.qid: row.duration for row in rows[name]}:
                    raise DownloadError(f"{path}: has other queries or durations than {name}")
            except ValueError as error:
                raise DownloadError(f"{error}\ndelete {path} and give the same command again") from None
            print(f"{path}: {len(durations)} predictions, one for each query of {name}")


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command `framseg download`."""
    usual = config.data_folder(config.load("paper"))
    parser = argparse.ArgumentParser(prog="framseg download", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help=f"folder to fill ({usual}; for --reference, {REFERENCE})")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--annotations-only", action="store_true", help=f"fetch no videos ({words(ARCHIVE_BYTES)})")
    which.add_argument("--from", dest="have", type=Path, metavar="HAVE", help="fetch nothing: link what HAVE holds")
    which.add_argument("--reference", action="store_true", help="annotations and the authors' predictions")
    options = parser.parse_args(arguments)
    folder = (options.folder or (REFERENCE if options.reference else usual)).absolute()
    try:
        get_reference(folder) if options.reference else get(folder, options.have, not options.annotations_only)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what has arrived is kept, the same command goes on") from None
    print("QVHighlights' annotations are licensed CC BY-NC-SA 4.0, which rules out commercial use.")
    if options.reference:
        print("With this line, notebooks 01, 04 and 05 and tests/benchmarks/ranked_policy.py use the real data:")
        print(f"export FRAMSEG_SHARED={shlex.quote(str(folder))}")
    else:
        setting = "" if folder == usual else f" --set data.folder={folder}"
        print(f"the profile finds it with ./run_all.sh paper{setting}")


if __name__ == "__main__":
    main()
