"""Are a run's answers those of the paper's authors, and its labels theirs? Both query by query, as tables."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from framseg import annotations, evaluate, jsonl, moments
from framseg.annotations import AnnotationError, Row
from framseg.predictions import SALIENCY, WINDOWS, PredictionError
from framseg.viz import tables

# How far bfloat16 alone may move a frame's logit: 8 of its steps at 16 to 32 (1/8 each), where the authors' logits lie,
# as 93 % of their frames' values are multiples of 1/8 and all of 1/16. The 8 were measured on the demo's trained model,
# which has 3 layers and not 32: in bfloat16 and in float32 it differs by up to 0.26, 8 steps of its own logits (4 to 8,
# 1/32 each), by 0.020 in the mean, in 2 of 164 masks. Two runs of the authors differ in 325 of 1,548 masks.
NOISE = 1.0
SIDES = "this run", "the authors"
EDGE = 2.0**-24  # float32's step below 1: a probability nearer to 0 or 1 than this is read as this far away
LARGEST, BALANCE, WORST = "largest difference", "background frames per foreground frame", 10


def mask(record: dict) -> str:
    """The digits of a prediction; where its file has none, those that its listed windows say."""
    spans = [window for window in record[WINDOWS] if window[2]]
    times = annotations.frame_times(record["duration"], len(record["probability"]))
    return record.get("mask") or "".join(str(int(any(a <= at <= b for a, b, _ in spans))) for at in times)


def answers(ours: Sequence[dict], authors: Sequence[dict], rows: Sequence[Row]) -> tuple[pd.DataFrame, ...]:
    """This run's predictions next to the authors' (see `read_released`): summary, metrics of both, the worst queries.

    rows: the authors' queries, with labels. Our masks are read into windows and clip scores as theirs were. A frame is
    compared by its logit, log(p / (1 - p)). As that depends on the digits before it, only frames before which both have
    the same digits count. Raises PredictionError for answers to other queries, or with another number of frames.
    """
    known, theirs = {row.qid: row for row in rows}, {record["qid"]: record for record in authors}
    qids = [record["qid"] for record in ours if record["qid"] in known.keys() & theirs.keys()]
    sides = [r for r in ours if r["qid"] in qids], [theirs[qid] | {"vid": known[qid].vid} for qid in qids]
    facts = [[(r["vid"], r["duration"], len(r.get("probability") or ())) for r in side] for side in sides]
    if facts[0] != facts[1] or not qids:
        odd = [qid for qid, a, b in zip(qids, *facts, strict=True) if a != b] or [record["qid"] for record in ours]
        named = jsonl.shortlist(odd, most=3)
        raise PredictionError(f"this run answers other queries, or from other frames: qid {named}")
    p = np.array([[record["probability"] for record in side] for side in sides])  # [2, queries, f]
    logit = np.log(p.clip(EDGE, 1 - EDGE)) - np.log((1 - p).clip(EDGE, 1 - EDGE))
    wrong = np.not_equal(*np.array([[[*mask(record)] for record in side] for side in sides]))
    gap = np.where(wrong.cumsum(axis=1) == wrong, np.abs(logit[0] - logit[1]), np.nan)
    largest, frame = np.nanmax(gap, axis=1), np.nanargmax(gap, axis=1)
    read = [_read(record) for record in sides[0]], sides[1]
    spans = [[{(*window[:2],) for window in record[WINDOWS] if window[2]} for record in side] for side in read]
    differing = [a ^ b for a, b in zip(*spans, strict=True)]
    summary: dict = {"queries compared": len(qids)}
    summary["only this run has"] = jsonl.shortlist([r["qid"] for r in ours if r["qid"] not in qids]) or "none"
    summary["only the authors have"] = jsonl.shortlist([qid for qid in theirs if qid not in qids]) or "none"
    summary |= {"equal masks, %": 100 * (1 - wrong.any(axis=1).mean()), LARGEST: largest.max()}
    summary |= {"mean difference": np.nanmean(gap), f"queries with one above {NOISE:g}": (largest > NOISE).sum()}
    summary |= {"frames after another digit, left out": np.isnan(gap).sum()}
    summary |= {f"windows, {name}": sum(map(len, side)) for name, side in zip(SIDES, spans, strict=True)}
    summary |= {"windows that only one has": sum(map(len, differing)), "in so many queries": sum(map(bool, differing))}
    scores = [evaluate.evaluate(side, [known[qid] for qid in qids])["brief"] for side in read]
    metrics = tables.scores(dict(zip(SIDES, scores, strict=True)))
    metrics.loc["difference"] = metrics.iloc[0] - metrics.iloc[1]
    worst = pd.DataFrame({"qid": [*map(str, qids)], "query": [known[qid].query for qid in qids]})
    worst["equal masks"] = np.where(wrong.any(axis=1), "no", "yes")
    worst[LARGEST], worst["frame"] = largest, frame
    worst[[*SIDES]] = p[:, np.arange(len(qids)), frame].T
    worst = worst.sort_values(LARGEST, ascending=False, kind="stable", ignore_index=True)[:WORST]
    return pd.DataFrame({"": summary}, dtype=object), metrics, worst


def shown(frame: pd.DataFrame, caption: str = "") -> Styler:
    """`tables.shown`, with a largest difference beyond bfloat16's noise in red."""
    place = pd.IndexSlice[:, [LARGEST]] if LARGEST in frame else pd.IndexSlice[[LARGEST], :]
    return tables.shown(frame, caption, "{:.4g}").map(lambda gap: "color: red" if gap > NOISE else "", subset=place)


def labels(path: Path, rows: Sequence[Row], frames: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The labels in a JSON of the published frames (p2/val_v1.json) next to those of `rows`: summary, the worst rows.

    Ours are made for the frames' exact times, for these cut to whole seconds, and for the times that the file gives.
    Targets within 1e-4 are equal: a file may round. Raises AnnotationError for a damaged file or one on other queries.
    """
    known = {row.qid: row for row in annotations.labelled(rows)}
    records, bad = jsonl.checked_records(_published(path, frames), f"{path}:", lambda record: ())
    given = [record for record in records if record["qid"] in known and record.get("vid") == known[record["qid"]].vid]
    if bad or not given:
        raise AnnotationError(jsonl.shortlist(bad, "\n") or f"{path}: has no labels of these queries")
    ours, digits = [known[record["qid"]] for record in given], np.array([record["digits"] for record in given])
    soft, own_times = (np.array([r[name] for r in given]) for name in ("saliency_scores", "video_timestamps"))
    exact = np.array([annotations.frame_times(row.duration, frames) for row in ours])
    summary: dict = {"their file": {"rows": len(records), BALANCE: (1 - digits).sum() / max(digits.sum(), 1)}}
    worst = pd.DataFrame([(str(row.qid), row.query) for row in ours], columns=["qid", "query"])
    for name, times in {"exact times": exact, "whole seconds": np.floor(exact), "their times": own_times}.items():
        made = [annotations.labels_at(row, at) for row, at in zip(ours, times, strict=True)]
        labels, targets = map(np.array, zip(*made, strict=True))
        wrong, gap = (labels != digits).sum(axis=1), np.abs(targets - soft)
        facts = {"rows": len(ours), BALANCE: (1 - labels).sum() / max(labels.sum(), 1)}
        facts |= {"equal digits, %": 100 - 100 * wrong.mean() / frames, "equal rows, %": 100 * (wrong < 1).mean()}
        facts |= {"equal soft targets, %": 100 * (gap < 1e-4).mean(), "largest difference of targets": gap.max()}
        summary[name] = facts | {"mean difference of targets": gap.mean()}
        worst[f"wrong digits, {name}"], worst[f"largest difference, {name}"] = wrong, gap.max(axis=1)
    worst = worst.sort_values([*worst.columns[2:]], ascending=False, kind="stable", ignore_index=True)[:WORST]
    return pd.DataFrame(summary, dtype=object), worst


def _read(record: dict) -> dict:
    """A record as the authors' code makes it: the mask's windows, ends rounded to the nearest second, filled up."""
    p, duration = record["probability"], record["duration"]
    listed = moments.windows(mask(record), p, duration, rounding="nearest")
    return record | {WINDOWS: moments.filled(listed, duration), SALIENCY: moments.saliency(p, duration).tolist()}


def _published(path: Path, frames: int) -> Iterator[jsonl.Entry]:
    """The rows of the authors' JSON with their qid and digits [f], and what is wrong with them."""
    for place, row, wrong in jsonl.listed(path):
        if isinstance(row, dict):
            # How a turn is laid out is not known here; the answer is the last text that is nothing but digits.
            answer = re.findall(rf'"([01]{{{frames}}})"', json.dumps(row.get("conversations")))[-1:]
            row |= {"qid": row.get("id"), "digits": [*map(int, "".join(answer))]}
            wrong = [] if answer else [f"conversations hold no answer of {frames} digits 0 and 1"]
            wrong += [] if jsonl.is_integer(row["qid"]) else [f"id must be an integer, not {row['qid']!r}"]
            for name, most in (("saliency_scores", 1), ("video_timestamps", annotations.LONGEST)):
                values = row.get(name)
                good = [jsonl.is_number(v) and 0 <= v <= most for v in values] if isinstance(values, list) else []
                if good != [True] * frames:
                    wrong.append(f"{name} must be {frames} numbers in 0..{most}, not {str(values)[:60]}")
        yield place, row, wrong
