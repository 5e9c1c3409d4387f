"""Are a run's answers those of the paper's authors, and its labels theirs? Both query by query, as tables."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from framseg import annotations, evaluate, jsonl, moments
from framseg.annotations import CLIP_SECONDS, LONGEST, AnnotationError, Row, frame_times
from framseg.predictions import SALIENCY, WINDOWS, PredictionError, list_reasons
from framseg.viz import tables

# How far bfloat16 alone may move a frame's logit: 8 steps of it at 16 to 32 (1/8 each), where the authors' logits lie, as
# 93 % of their differences are multiples of 1/8 (all of 1/16). That it is 8 was measured on the demo's trained model (3
# layers; for 32 nobody has): in bfloat16 and in float32 it differs by up to 0.26, 8 steps of its own logits (4 to 8, 1/32
# each), by 0.020 in the mean, and 162 of 164 masks are equal. Of two runs of the authors, 79.0 % are (1,223 of 1,548).
NOISE = 1.0
EDGE = 2.0**-24  # float32's step below 1; a probability nearer to 0 or 1 is read as this far away
LARGEST, WORST = "largest difference", 10


def mask(record: dict) -> str:
    """The digits of a prediction; where its file has none, those that its listed windows say."""
    spans, frames = [window for window in record[WINDOWS] if window[2]], len(record["probability"])
    times = frame_times(record["duration"], frames)
    return record.get("mask") or "".join(str(int(any(a <= at <= b for a, b, _ in spans))) for at in times)


def answers(ours: Sequence[dict], authors: Sequence[dict], rows: Sequence[Row]) -> tuple[pd.DataFrame, ...]:
    """This run's predictions next to the authors' (`read_released`): summary, metrics of both, and the worst queries.

    rows: the authors' queries, with labels. Our masks are read into windows and clip scores as theirs were. A frame is
    compared by its logit, log(p / (1 - p)). As it depends on the digits before it, only frames before which both have
    the same digits count. Raises PredictionError for answers to other queries or of another number of frames.
    """
    known, theirs = ({row.qid: row for row in rows}, {record["qid"]: record for record in authors})
    asked = {qid: (row.vid, row.duration) for qid, row in known.items()}
    other = [record["qid"] for record in ours if (record["vid"], record["duration"]) != asked.get(record["qid"])]
    pairs = [(record, theirs[record["qid"]]) for record in ours if record["qid"] in theirs]
    if other or not pairs:
        raise PredictionError(f"these answers are not to the authors' queries (qid {jsonl.shortlist(other)})")
    counts = [[len(record.get("probability") or ()) for record in pair] for pair in pairs]
    if odd := [a["qid"] for (a, _), count in zip(pairs, counts, strict=True) if count != [max(counts[0])] * 2]:
        raise PredictionError(f"not a probability for each of as many frames on both sides: qid {jsonl.shortlist(odd)}")
    qids = [record["qid"] for record, _ in pairs]
    p = np.array([[record["probability"] for record in pair] for pair in pairs])  # [queries, 2, f]
    logit = np.log(p.clip(EDGE, 1 - EDGE)) - np.log((1 - p).clip(EDGE, 1 - EDGE))
    digit = np.array([[[*mask(record)] for record in pair] for pair in pairs])
    differs = digit[:, 0] != digit[:, 1]
    gap = np.where(differs.cumsum(axis=1) - differs == 0, np.abs(logit[:, 0] - logit[:, 1]), np.nan)
    frame = np.nanargmax(gap, axis=1)
    largest = np.nanmax(gap, axis=1)
    both = [_read(record) for record, _ in pairs], [record for _, record in pairs]
    spans = [[{(*window[:2],) for window in record[WINDOWS] if window[2]} for record in side] for side in both]
    apart = [a ^ b for a, b in zip(*spans, strict=True)]
    summary = {
        "queries compared": len(pairs),
        "only this run has": jsonl.shortlist([r["qid"] for r in ours if r["qid"] not in theirs]) or 0,
        "only the authors have": jsonl.shortlist([qid for qid in theirs if qid not in qids]) or 0,
        "equal masks, %": 100 * float(np.mean(~differs.any(axis=1))),
        LARGEST: float(largest.max()),
        "mean difference": float(np.nanmean(gap)),
        f"queries with one above {NOISE:g}": int((largest > NOISE).sum()),
        "frames after another digit, not compared": int(np.isnan(gap).sum()),
        "probabilities read as 2^-24 from 0 or 1": int((np.minimum(p, 1 - p) < EDGE).sum()),
        "windows, this run": sum(map(len, spans[0])),
        "windows, the authors": sum(map(len, spans[1])),
        "windows that only one has": sum(map(len, apart)),
        "queries whose windows differ": sum(map(bool, apart)),
    }
    scores = [evaluate.evaluate(side, [known[qid] for qid in qids])["brief"] for side in both]
    metrics = tables.scores(dict(zip(("this run", "the authors"), scores, strict=True)))
    metrics.loc["difference"] = metrics.iloc[0] - metrics.iloc[1]
    worst = pd.DataFrame({"qid": [*map(str, qids)], "query": [known[qid].query for qid in qids]})
    worst["equal masks"] = np.where(differs.any(axis=1), "no", "yes")
    worst[[LARGEST, "frame"]] = pd.DataFrame({0: largest, 1: frame})
    worst[["this run", "the authors"]] = p[np.arange(len(p)), :, frame]
    worst = worst.sort_values(LARGEST, ascending=False, kind="stable", ignore_index=True)[:WORST]
    return pd.DataFrame({"": summary}, dtype=object), metrics, worst


def shown(frame: pd.DataFrame, caption: str = "") -> Styler:
    """`tables.shown`, with the largest difference in red where it is beyond bfloat16's noise."""
    place = pd.IndexSlice[[LARGEST], :] if LARGEST in frame.index else frame.columns.intersection([LARGEST])
    red = "color: #c00; font-weight: bold"
    return tables.shown(frame, caption, "{:.4g}").map(lambda value: red if value > NOISE else "", subset=place)


def labels(path: Path, rows: Sequence[Row], frames: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The labels in a JSON of the published frames (p2/val_v1.json) next to those of rows: a column, the worst rows.

    Ours are those at the frames' exact times, at these cut to whole seconds, and at the times that the file gives.
    Raises AnnotationError for a damaged file, and for one of other queries.
    """
    known, name = {row.qid: row for row in annotations.labelled(rows)}, f"{path}:"
    entries = ((at, v | {"qid": v.get("id")} if isinstance(v, dict) else v, bad) for at, v, bad in jsonl.listed(path))
    records, bad = jsonl.checked_records(entries, name, partial(_reasons, frames=frames))
    pairs = [(r, known[r["qid"]]) for r in records if r["qid"] in known and r.get("vid") == known[r["qid"]].vid]
    if bad or not pairs:
        raise AnnotationError(jsonl.shortlist(bad, "\n") or f"{name} has none of these queries")
    digits = np.array([[*map(int, _answer(record, frames))] for record, _ in pairs])
    soft = np.array([record["saliency_scores"] for record, _ in pairs])
    facts = {"rows compared": len(pairs), "only in this file": len(records) - len(pairs), "only ours": len(known) - len(pairs)}
    facts["background per foreground frame, theirs"] = float((digits == 0).sum() / max(digits.sum(), 1))
    for at in ("exact times", "whole seconds", "their times"):
        own, targets = np.zeros_like(digits), np.zeros_like(soft)
        for i, (record, row) in enumerate(pairs):
            times = np.array(record["video_timestamps"]) if at == "their times" else frame_times(row.duration, frames, at != "exact times")
            saliency = np.append(annotations.clip_saliency(row), 0)
            own[i] = annotations.labels_at(row, times)
            targets[i] = saliency[np.minimum(times // CLIP_SECONDS, len(saliency) - 1).astype(int)]
        ...
