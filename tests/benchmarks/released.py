"""The profile `released` at full size, with random weights, on a CPU: all five chapters, from frames to figures.

python tests/benchmarks/released.py --tokenizer TOKENIZER     (10 GB of disk, about 10 GiB of memory, some 20 minutes)
python tests/benchmarks/released.py --sizes demo              (the demo's model: half a minute)

Weights are drawn at random, in the published layout, into a temporary folder. One val and one test query of the demo
are asked about their videos. A server on the loopback address has the videos' pictures in the layout of the published
frames, and they come through the hub's own client. The answers mean nothing; the record says what they cost. Writes
records/released_cpu.json.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import av
import common
import numpy as np
import psutil
import torch
from seconds import by_notebook

from framseg import annotations, config
from framseg.backbones import blip3
from framseg.demo import synthetic
from framseg.run import cost
from framseg.run.paths import Run

sys.path.insert(0, str(Path(__file__).parents[1]))
import hub_server  # of the tests
from small import unlabelled

SEED = 0
SPLITS = ("val", "test")
QUALITY = 75  # PIL's own, with which the published pictures were saved
LOOKS = 0.01  # seconds between two looks at the files; at the processes every fiftieth time


def random_weights(profile: config.Profile, folder: Path) -> None:
    """Write a model with random weights in the published layout; they are held once, in the profile's number format."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(getattr(torch, profile.model.dtype))
    blip3.Blip3(profile.model).save_published(folder)


def pictures(video: Path, profile: config.Profile) -> Iterator[tuple[int, int, bytes]]:
    """Frame from 1 on, variation from 1 on and JPEG file of each published picture of a video."""
    with av.open(str(video)) as container:
        rate = float(container.streams.video[0].average_rate)
        images = [frame.to_image() for frame in container.decode(video=0)]
    count, apart = profile.frames.count, max(1, round(profile.frames.neighbour_distance * rate))
    margin = round(len(images) / count / 2)
    for frame, middle in enumerate(np.linspace(margin, len(images) - margin, count).astype(int).tolist()):
        for variation in range(3):
            content = io.BytesIO()
            images[min(middle + (variation - 1) * apart, len(images) - 1)].save(content, "JPEG", quality=QUALITY)
            yield frame + 1, variation + 1, content.getvalue()


def archive(vid: str, scene: synthetic.Scene, profile: config.Profile, folder: Path) -> bytes:
    """The archive of published pictures that holds one of the demo's videos."""
    synthetic.write_video(folder / f"{vid}.mp4", scene)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for frame, variation, content in pictures(folder / f"{vid}.mp4", profile):
            member = tarfile.TarInfo(f"{vid}_frame{frame:03}_var{variation}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def data(profile: config.Profile, folder: Path) -> dict[str, dict[str, bytes]]:
    """Write the annotations of one val and one test query into `folder`; the repositories with their pictures."""
    folder.mkdir()
    annotations.write(folder / profile.data.train, synthetic.rows("train")[:2])  # nothing is trained, so no pictures
    repositories = {}
    for split in SPLITS:
        row = synthetic.rows(split)[0]
        annotations.write(folder / getattr(profile.data, "test_labels" if split == "test" else split), [row])
        if split == "test":
            annotations.write(folder / profile.data.test, [unlabelled(row)])
        scene = synthetic.scenes(split)[row.vid]
        repositories[profile.data.frames[split]] = {"videos.tar.gz": archive(row.vid, scene, profile, folder)}
    return repositories


class Watch(threading.Thread):
    """The most memory that this process's children took together, and when the files `seen` appeared."""

    def __init__(self, *seen: Path):
        super().__init__(daemon=True)
        self.peak, self.seen, self.ended = 0, dict.fromkeys(seen, 0.0), threading.Event()

    def run(self) -> None:
        looks = 0
        while not self.ended.wait(LOOKS):
            for path, first in self.seen.items():
                if not first and path.exists():
                    self.seen[path] = time.monotonic()
            if looks % 50 == 0:
                self.peak = max(self.peak, sum(map(memory, psutil.Process().children(recursive=True))))
            looks += 1


def memory(process: psutil.Process) -> int:
    """Resident bytes of a process, 0 if it has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


@contextmanager
def watched(record: dict, name: str, *seen: Path) -> Iterator[Watch]:
    """Note seconds and memory of what the children of this process do meanwhile."""
    watch, began = Watch(*seen), time.monotonic()
    watch.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        watch.join()
    record[name] = {"seconds": round(time.monotonic() - began, 1), "peak GiB": round(watch.peak / 2**30, 2)}


def finished(command: list[str], environment: dict[str, str], log: Path) -> str:
    """What a command printed. It is ended with this process; exits with what it printed last if it fails."""
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)  # its own processes end, too
            raise
    text = log.read_text(encoding="utf-8")
    if code:
        sys.exit(f"the run failed:\n{text[-6000:]}")
    return text


def chapters(profile: config.Profile, settings: dict, folder: Path, record: dict) -> None:
    """Run all chapters on what `folder` holds and note what they cost."""
    run = Run(profile, folder / "run")
    with hub_server.serving() as server:
        server.files = data(profile, folder / "data")
        environment = hub_server.environment(server, folder)
        changes = settings | {"data.folder": str(folder / "data"), "model.weights": str(folder / "weights")}
        command = [sys.executable, "-P", "-m", "framseg.run", "released", "--run-dir", str(run.root)]
        command += [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        parts = {split: run.predicted(split).with_name(f"{run.predicted(split).name}.part0") for split in SPLITS}
        with watched(record, "run", *parts.values(), *map(run.predicted, SPLITS)) as watch:
            text = finished(command, environment, folder / "run.log")
        record["load average"] = round(os.getloadavg()[1], 1)  # of five minutes: above the threads, others worked too
        record["archives fetched"] = sorted({name for name, _ in server.fetched if name.endswith(".tar.gz")})
    record["seconds by chapter"] = by_notebook(text)
    # A part file appears when the weights are loaded, the split's file when its query is answered.
    record["seconds per query"] = {
        split: round(watch.seen[run.predicted(split)] - watch.seen[part], 1) if watch.seen[part] else None
        for split, part in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="framseg/demo/base", help="its tokenizer.json, or the folder of that")
    parser.add_argument("--sizes", default="released", metavar="PROFILE", help="the profile whose model is made")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made, by default the system's place")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    model = config.load(options.sizes).model.model_dump(mode="json", exclude={"weights", "tokenizer"})
    tokenizer = config.local_path(options.tokenizer)
    if tokenizer is None:
        parser.error(f"--tokenizer {options.tokenizer}: there is no such file or folder")
    settings = {"model": model, "model.tokenizer": str(tokenizer.resolve()), "training.device": "cpu"}
    profile = config.load("released", settings)
    needs, place = cost.fixed_bytes(profile)[0], options.folder or Path(tempfile.gettempdir())
    if shutil.disk_usage(place).free < 1.1 * needs:
        parser.error(f"{place} has no {1.1 * needs / 1e9:.0f} GB free for the weights; name another --folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # the temporary folder goes, too
    # A shell starts background processes with Ctrl-C ignored, and what is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    record = common.about(
        profile="released",
        weights=f"random, seed {SEED}",
        sizes=options.sizes,
        dtype=profile.model.dtype,
        parameters=cost.parameters(profile)[0],
        threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        queries=dict.fromkeys(SPLITS, 1),
        beams=profile.inference.beams,
    )
    record["device"] = cost.device_name("cpu")
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        # In a process of its own, so that its memory is free afterwards.
        maker = get_context("spawn").Process(target=random_weights, args=(profile, folder / "weights"))
        with watched(record, "making the weights"):
            maker.start()
            try:
                maker.join()
            finally:
                maker.kill()
                maker.join()
        if maker.exitcode:
            sys.exit("the weights could not be made: see above")
        print(f"the weights are made, {record['making the weights']}; the chapters write {folder}/run.log", flush=True)
        record["bytes of weights"] = sum(file.stat().st_size for file in (folder / "weights").iterdir())
        chapters(profile, settings, folder, record)
    name = "released_cpu" if options.sizes == "released" else f"released_cpu_{options.sizes}"
    common.write(name, record, options.out)


if __name__ == "__main__":
    main()
