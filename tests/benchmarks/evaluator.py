"""How long it takes to score the 1,550 val predictions.

FRAMSEG_SHARED=FOLDER python tests/benchmarks/evaluator.py

FOLDER holds the golden files of the tests. Writes records/evaluator.json: seconds of `evaluate.evaluate` on the golden
predictions, reading them not included, and whether every metric equals that of the dataset's own evaluator.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import common

from framseg import annotations, evaluate
from framseg.predictions import read_predictions

REPEATS = 9


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shared = Path(os.environ["FRAMSEG_SHARED"])
    rows = annotations.read(shared / "qvhighlights" / "highlight_val_release.jsonl")
    predictions = read_predictions(shared / "golden" / "official_val_predictions.jsonl")
    expected = json.loads((shared / "golden" / "official_val_metrics.json").read_text(encoding="utf-8"))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        metrics = evaluate.evaluate(predictions, rows)
        seconds.append(round(time.perf_counter() - began, 4))
    record = common.about(
        queries=len(rows), equal=metrics == expected, seconds=seconds, median=statistics.median(seconds)
    )
    print(record["median"], "s; equal to the official metrics:", record["equal"])
    common.write("evaluator", record)


if __name__ == "__main__":
    main()
