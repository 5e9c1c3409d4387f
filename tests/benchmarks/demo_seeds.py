"""Does the demo learn? Trains the demo profile with three seeds and records what it scores on val.

python tests/benchmarks/demo_seeds.py [--seeds 1 2 3]      (about five minutes a seed on two cores)

Writes records/demo_seeds.json: for each seed the metrics of the untouched base, of every epoch and of the trained
model, all decoded, beside the trivial answers.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from framseg import config, dataset, evaluate, train

RECORD = Path(__file__).parent / "records" / "demo_seeds.json"
SHOWN = ("MR-full-R1@0.5", "MR-full-R1@0.7", "MR-full-mAP", "HL-min-VeryGood-mAP", "HL-min-VeryGood-Hit1")


def short(metrics: dict) -> dict:
    return {name: metrics["brief"][name] for name in SHOWN}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    profile = config.load("demo")
    dataset.prepare(profile)
    dataset.extract(profile)
    val, rows = dataset.rows(profile, "val"), dataset.rows(profile, "train")
    record = {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
        "val queries": len(val),
        "trivial": {
            name: short(evaluate.evaluate(answer, val))
            for name, answer in evaluate.trivial(val, rows, profile.seed, profile.frames.count).items()
        },
        "seeds": {},
    }
    for seed in parser.parse_args().seeds:
        profile = config.load("demo", {"seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            run = config.Run(profile, folder)
            began = time.monotonic()
            train.launch(profile, run)
            seconds = time.monotonic() - began
            epochs = [short(entry["metrics"]) for entry in train.read_log(run.validation_log)]
            predictions = evaluate.read_predictions(run.predicted("val", profile.training.epochs))
            ignored = evaluate.evaluate(evaluate.shuffled(predictions, val, seed), val)
            steps = len(train.read_log(run.step_log))
        record["seeds"][seed] = {
            "training seconds": round(seconds, 1),
            "steps": steps,
            "base": epochs[0],
            "epochs": epochs[1:],
            "query ignored": short(ignored),
        }
        print(seed, record["seeds"][seed]["base"], epochs[-1])
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
