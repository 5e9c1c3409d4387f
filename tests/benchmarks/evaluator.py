"""How long does it take to score the 1,550 val predictions?

FRAMSEG_SHARED=… python tests/benchmarks/evaluator.py

Writes records/evaluator.json: seconds of `evaluate` on the golden predictions (read beforehand), and whether
every metric equals the official ones.
"""

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
    shared = Path(os.environ["FRAMSEG_SHARED"])
    rows = annotations.read(shared / "qvhighlights" / "highlight_val_release.jsonl")
    predictions = read_predictions(shared / "golden" / "official_val_predictions.jsonl")
    expected = json.loads((shared / "golden" / "official_val_metrics.json").read_text(encoding="utf-8"))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        found = evaluate.evaluate(predictions, rows)
        seconds.append(round(time.perf_counter() - began, 4))
    record = common.about(
        queries=len(rows), equal=found == expected, seconds=seconds, median=statistics.median(seconds)
    )
    print(record["median"], "s; equal to the official metrics:", record["equal"])
    common.write("evaluator", record)


if __name__ == "__main__":
    main()
