"""Which chapters of a run are finished: beside each executed copy, a stamp of what it was made from."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

from framseg import config
from framseg.jsonl import parse_object
from framseg.run.paths import Run

KINDS = {"inputs": dict, "wrote": list, "device": str}  # of a stamp's entries
CODE = Path(__file__).parent.parent


@dataclass
class Step:
    """One notebook of one run."""

    notebook: Path
    profile: config.Profile
    run: Run

    def __post_init__(self):
        self.copy = self.run.notebooks / self.notebook.name
        self.stamp = self.copy.with_suffix(".json")

    def changed(self) -> str | None:
        """Why this step is to run, in words; None if it is finished and nothing has changed since."""
        stamp = read(self.copy)
        if not (stamp and self.copy.is_file()):
            return "not finished yet"
        now = self.inputs()
        if lost := [name for name in stamp["wrote"] if not os.path.exists(self.run.root / name)]:
            return f"{lost[0]} is gone"
        return ", ".join(f"{name} changed" for name in now if now[name] != stamp["inputs"].get(name)) or None

    def inputs(self) -> dict[str, str]:
        """A hash of everything that this step is made from."""
        cells = [[cell.cell_type, cell.source] for cell in nbformat.read(self.notebook, as_version=4).cells]
        code = [path for path in sorted(CODE.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        earlier = [path for path in sorted(self.run.notebooks.glob("*.json")) if path.name < self.stamp.name]
        return {
            "the notebook": _hash(cells),
            "the code": _hash([[str(path.relative_to(CODE)), _content(path)] for path in code]),
            "the profile": _hash(self.profile.model_dump(mode="json")),
            "the data": self._data(),
            "an earlier chapter": _hash([_content(path) for path in earlier]),
        }

    def _data(self) -> str:
        """Labels by content; videos and weights, which are large, by name, size and time; where the real set is."""
        data, folder = self.profile.data, config.data_folder(self.profile)
        labels = [folder / name for name in (data.train, data.val, data.test, data.test_labels)]
        large = (folder / data.videos, config.REPOSITORY / self.profile.model.weights)
        listed = [
            sorted((item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in os.scandir(path))
            for path in large
            if path.is_dir()
        ]
        return _hash([[_content(path) for path in labels if path.is_file()], listed, os.environ.get("FRAMSEG_SHARED")])

    def begin(self) -> None:
        """From here on the step is unfinished, until `finish`."""
        self.kept = read(self.copy).get("wrote", [])  # a finished training, for one, is not written again
        self.stamp.unlink(missing_ok=True)
        self.began, self.made_from = time.time(), self.inputs()

    def finish(self) -> None:
        """Write the stamp of a step that ended well, with the files that it wrote into the run folder."""
        from framseg.run import cost  # here, so that a run with nothing to do does without torch

        if self.profile.data.source == "demo":  # the first chapter has made it
            self.made_from["the data"] = self._data()
        files = [path for path in self.run.root.rglob("*") if path.is_file() and path.stat().st_mtime >= self.began]
        wrote = {str(path.relative_to(self.run.root)) for path in files if path != self.copy}
        wrote |= {name for name in self.kept if (self.run.root / name).is_file()}
        device = cost.device_name()
        stamp = {"inputs": self.made_from, "began": self.began, "device": device, "wrote": sorted(wrote)}
        aside = self.stamp.with_suffix(".part")
        aside.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        aside.replace(self.stamp)


def read(copy: Path) -> dict:
    """The stamp of an executed copy; empty if it has none, or a damaged one, which makes it unfinished."""
    stamp = copy.with_suffix(".json")
    about = (parse_object(stamp.read_bytes())[0] if stamp.is_file() else None) or {}
    whole = all(isinstance(about.get(name), kind) for name, kind in KINDS.items())
    return about if whole and all(isinstance(name, str) for name in about["wrote"]) else {}


def _hash(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
