"""Which frames are read of files of every kind, and what becomes of files that are cut off.

python tests/benchmarks/video_corpus.py      (about a minute on two cores)

Makes the files of tests/videos.py and reads each as `predict` does. A file is right if every frame taken is one that a
player shows within half a frame's duration of that second, or if it is refused for its true reason. Writes
records/video_corpus.json: a row per file, and for each container what became of its cut files.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import av
import common

sys.path.insert(0, str(Path(__file__).parents[1]))
import videos

from framseg.frames import VideoError

SECONDS = 24  # of each file are read


def kind(path: Path) -> dict[str, str]:
    """The container and the codec by FFmpeg's names, as far as the file can be opened."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            return {"container": container.format.name, "codec": stream.codec.canonical_name if stream else ""}
    except av.FFmpegError:
        return {"container": "", "codec": ""}


def row(path: Path, case: videos.Case, truth: videos.Shown) -> dict:
    """What was read of a file."""
    about = {"name": case.name, **kind(path), "special": case.special}
    try:
        answer = videos.read(path, SECONDS)
    except VideoError as error:
        reason = str(error).replace(f"{path.parent}/", "")
        right = case.refused and re.search(case.refused, reason)
        return about | {"outcome": "refused rightly" if right else "wrong", "reason": reason}
    worst = max(answer.errors(truth), key=lambda error: error[2])
    right = not case.refused and worst[2] <= 0.5
    return about | {
        "outcome": "read right" if right else "wrong",
        "seconds": round(answer.length, 3),
        "frames": answer.count,
        "reader": answer.reader,
        "picture starts at": round(answer.offset, 3),
        "largest error, seconds": round(worst[1], 4),
        "largest error, frames": round(worst[2], 3),
    }


def cut(path: Path, truth: videos.Shown, folder: Path) -> dict[str, int]:
    """How many cuts of a file are refused, told, without a frame missing, or pass silently."""
    counts = dict.fromkeys(("refused", "told", "no frame missing", "silent"), 0)
    for place in videos.cuts(path, folder).values():
        try:
            answer = videos.read(place)
        except VideoError:
            counts["refused"] += 1
        else:
            whole = "no frame missing" if answer.count == len(truth.starts) else "silent"
            counts["told" if any(videos.UNKNOWN in note for note in answer.notes) else whole] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, parts = Path(temporary) / "corpus", Path(temporary) / "cut"
        folder.mkdir(), parts.mkdir()
        truth = videos.make(folder)
        rows = [row(folder / name, case, truth[name]) for name, case in videos.CASES.items()]
        cuts = {text: cut(folder / name, truth[name], parts) for name, text in videos.CUT.items()}
    outcomes = [each["outcome"] for each in rows]
    counts = {outcome: outcomes.count(outcome) for outcome in ("read right", "refused rightly", "wrong")}
    record = common.about("av", "decord2") | {"files": len(rows), **counts, "cut files": cuts, "rows": rows}
    common.write("video_corpus", record, options.out)


if __name__ == "__main__":
    main()
