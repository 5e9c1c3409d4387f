"""How long it takes to score the 1,550 val predictions.

FRAMSEG_SHARED=FOLDER python tests/benchmarks/evaluator.py

FOLDER holds the golden files of the tests. Writes records/evaluator.json: seconds of `evaluate.evaluate` on the golden
predictions, reading them not included; and for each golden file, one of them with IoUs that lie on thresholds, how many
of its metrics equal those of the dataset's own evaluator.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import common
import pandas as pd

from framseg import annotations, evaluate
from framseg.predictions import read_predictions

REPEATS = 9


def flat(metrics: dict) -> dict:
    """The numbers by keys like "brief.MR-full-mAP"."""
    return pd.json_normalize(metrics).to_dict("records")[0]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shared = Path(os.environ["FRAMSEG_SHARED"])
    rows = annotations.read(shared / "qvhighlights" / "highlight_val_release.jsonl")
    seconds, equal = [], {}
    for name in ("official", "rounding"):
        predictions = read_predictions(shared / f"golden/{name}_val_predictions.jsonl")
        expected = flat(json.loads((shared / f"golden/{name}_val_metrics.json").read_text(encoding="utf-8")))
        for _ in range(REPEATS):
            began = time.perf_counter()
            metrics = evaluate.evaluate(predictions, rows)
            seconds.append(round(time.perf_counter() - began, 4))
        right = flat(metrics).items() & expected.items()
        equal[name] = f"{len(right)} of {len(expected)} metrics"
    record = common.about(queries=len(rows), equal=equal, seconds=seconds, median=statistics.median(seconds))
    print(record["median"], "s; equal to the official metrics:", equal)
    common.write("evaluator", record)


if __name__ == "__main__":
    main()
