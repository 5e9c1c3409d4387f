"""Which chapters of a run are finished: a stamp next to each executed copy says what it was made from."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

from framseg import config
from framseg.jsonl import checksum, parse_object, whole_file
from framseg.run.paths import Run

KINDS = {"inputs": dict, "wrote": list, "device": str}  # types of a stamp's entries
CODE = Path(__file__).parents[1]


@dataclass
class Chapter:
    """One notebook of one run, with its executed `copy` and that one's `stamp`."""

    notebook: Path
    profile: config.Profile
    run: Run

    def __post_init__(self) -> None:
        self.copy = self.run.notebooks / self.notebook.name
        self.stamp = self.copy.with_suffix(".json")

    def changed(self) -> str | None:
        """Why this chapter is to run, in words; None if it is finished and nothing has changed since."""
        stamp = read(self.copy)
        if not (stamp and self.copy.is_file()):
            return "not finished yet"
        now = self.inputs()
        if lost := [name for name in stamp["wrote"] if not os.path.exists(self.run.root / name)]:
            return f"{lost[0]} is gone"
        return ", ".join(f"{name} changed" for name in now if now[name] != stamp["inputs"].get(name)) or None

    def inputs(self) -> dict[str, str]:
        """Hashes of everything that this chapter is made from, by what the user calls it."""
        cells = [[cell.cell_type, cell.source] for cell in nbformat.read(self.notebook, as_version=4).cells]
        code = [path for path in sorted(CODE.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        section = self.profile.model
        model = [_listing(config.local_path(name)) for name in (section.weights, *section.tokenizers)]
        earlier = [path for path in sorted(self.run.notebooks.glob("*.json")) if path.name < self.stamp.name]
        return {
            "the notebook": _hash(cells),
            "the code": _hash([[str(path.relative_to(CODE)), checksum(path)] for path in code]),
            "the profile": _hash(self.profile.model_dump(mode="json")),
            "the data": self._data(),
            "the model's files": _hash(model),
            "an earlier chapter": _hash([checksum(path) for path in earlier]),
        }

    def _data(self) -> str:
        """Hash of the annotations' content, the videos' names, sizes and times, and of where the real set lies.

        Of published frames, the files in the frame store are the videos.
        """
        data, folder = self.profile.data, config.data_folder(self.profile)
        files = [folder / name for name in (data.train, data.val, data.test, data.test_labels)]
        annotations = [checksum(path) for path in files if path.is_file()]
        videos = _listing(folder / data.videos)
        if data.source == "frames":
            from framseg import dataset  # loads torch

            videos = _listing(dataset.store(self.profile).folder, "*.zip")
        return _hash([annotations, videos, os.environ.get("FRAMSEG_SHARED")])

    def begin(self) -> None:
        """From here on the chapter is unfinished, until `finish`."""
        self.kept = read(self.copy).get("wrote", [])  # a second execution leaves a finished training as it is
        self.stamp.unlink(missing_ok=True)
        self.began, self.made_from = time.time(), self.inputs()

    def finish(self) -> None:
        """Write the stamp of a chapter that ended well, with the files that it wrote into the run folder."""
        from framseg.run import cost  # loads torch; a run with nothing to do does without it

        if self.profile.data.source != "folder":  # the first chapter makes the data
            self.made_from["the data"] = self._data()
        files = [path for path in self.run.root.rglob("*") if path.is_file() and path.stat().st_mtime >= self.began]
        wrote = {str(path.relative_to(self.run.root)) for path in files if path != self.copy}
        wrote |= {name for name in self.kept if (self.run.root / name).is_file()}
        device = cost.device_name(self.profile.training.device)
        stamp = {"inputs": self.made_from, "began": self.began, "device": device, "wrote": sorted(wrote)}
        with whole_file(self.stamp) as unfinished:
            unfinished.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def read(copy: Path) -> dict:
    """The stamp of an executed copy; empty if it has none, or a damaged one, which makes it unfinished."""
    stamp = copy.with_suffix(".json")
    entries = (parse_object(stamp.read_bytes())[0] if stamp.is_file() else None) or {}
    whole = all(isinstance(entries.get(name), kind) for name, kind in KINDS.items())
    return entries if whole and all(isinstance(name, str) for name in entries["wrote"]) else {}


def _listing(path: Path | None, pattern: str = "*") -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of each in a folder: of files that are too large to be read through."""
    files = path.glob(pattern) if path and path.is_dir() else [path] if path and path.is_file() else []
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
