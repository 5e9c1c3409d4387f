"""The notebooks' tables as DataFrames, from the same plain values as the figures; `shown` makes one fit to read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from framseg import annotations, config, evaluate, moments, prompt
from framseg.predictions import answer_record, matched
from framseg.run import cost
from framseg.viz import paper_results

METRICS = evaluate.METRICS | {"MR-full-mAP@0.5": "mAP@0.5", "MR-full-mAP@0.75": "mAP@0.75"}
REPORTED = "reported, real QVHighlights"
# Policies for windows and saliency: the authors' submission, the runs of ones, the better ones, which round nothing.
READINGS = ("thresholds", "overlap"), ("mask", "overlap"), (moments.BEST_WINDOWS, moments.BEST_SALIENCY)
PARTS = {"vision_encoder": "vision encoder", "vision_tokenizer": "resampler", "lang_model": "language model"}
TABLE_II, TABLE_III = paper_results.TABLE_II, paper_results.TABLE_III  # keys by section of the profile


def shown(frame: pd.DataFrame, caption: str = "", floats: str = "{:.2f}") -> Styler:
    """A table to look at: counts without decimals, other numbers as `floats` says, "–" for what there is not."""

    def text(value: object) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,}" if isinstance(value, Integral) else floats.format(value)

    words = [place for place, column in enumerate(frame) if all(isinstance(value, str) for value in frame[column])]
    style = frame.style.format(text, na_rep="–", escape="html").set_caption(caption)
    return style.set_table_styles([{"selector": f".col{place}", "props": "text-align: left"} for place in words])


def splits(rows: Mapping[str, Sequence[annotations.Row]]) -> pd.DataFrame:
    """What can be counted in each split; moments and annotators only if its rows have labels. A column per split."""
    counted = {}
    for name, split in rows.items():
        durations = {row.vid: row.duration for row in split}
        usual = [duration == annotations.USUAL_SECONDS for duration in durations.values()]
        facts = {"queries": len(split), "videos": len(durations), "hours of video": sum(durations.values()) / 3600}
        facts["videos of 150 s, %"] = 100 * float(np.mean(usual))
        facts["words per query"] = float(np.mean([len(row.query.split()) for row in split]))
        if labelled := [row for row in split if isinstance(row, annotations.LabelledRow)]:
            distance = annotations.annotator_distance(labelled)
            facts["moments per query"] = float(np.mean([len(row.relevant_windows) for row in labelled]))
            facts["annotators give equal scores, %"] = 100 * float(distance.measured[0])
            facts["equal scores by chance, %"] = 100 * float(distance.chance[0])
        counted[name] = facts
    return pd.DataFrame(list(counted.values()), index=list(counted), dtype=object).T


def digit_positions(report: prompt.Report, mask: str) -> pd.DataFrame:
    """Where the logits of each digit of `mask` are read, a column per frame."""
    lines = [[*map(str, report.digit_positions)], ["<|assistant|>", *mask[:-1]], [*mask]]
    return pd.DataFrame(lines, index=["position", "token there", "digit predicted there"]).rename_axis(columns="frame")


def parameters(*profiles: config.Profile) -> pd.DataFrame:
    """Parameters of each part of the models, and how many of them are trained. No weights are made, only shapes."""
    from accelerate import init_empty_weights  # here, because it and the model take seconds to import

    from framseg.backbones import blip3

    counts: dict[tuple[str, str], dict[str, int]] = {}
    for profile in profiles:
        with init_empty_weights():
            model = blip3.Blip3(profile.model)
            base = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
            model.adapt(profile.adapter.model_copy(update={"init": False}), profile.seed)
        parts = model.named_children()
        trained = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts}
        counts |= {(profile.name, "base model"): base}
        counts |= {(profile.name, "trained"): trained} if profile.training.epochs else {}
    table = pd.DataFrame(counts).rename(index=PARTS)
    return pd.concat([table, table.sum().to_frame("all").T])


def settings(profile: config.Profile, keys: Mapping[str, str]) -> pd.DataFrame:
    """The published value of each key (names by section) next to this profile's; ≠ marks those that differ."""
    both, lines = (config.load("paper"), profile), {}
    for section, names in keys.items():
        for key in names.split():
            values = (getattr(getattr(setting, section), key) for setting in both)
            published, own = (str(value).strip("()").replace("'", "") for value in values)
            lines[f"{section}.{key}"] = published, own, "" if published == own else "≠"
    return pd.DataFrame(lines, index=["published", f"this run ({profile.name})", "differs"]).T


def work(*samples: tuple[config.Profile, int]) -> pd.DataFrame:
    """TFLOP per training sample, for profiles and the positions that their samples take."""
    names = [f"{profile.name}, {length} positions" for profile, length in samples]
    parts = {name: asdict(cost.operations(*sample)) for name, sample in zip(names, samples, strict=True)}
    return pd.DataFrame(parts).rename(index=lambda part: part.replace("_", " ")) / cost.TERA


def scores(metrics: Mapping, columns: Sequence[str] = paper_results.TABLE_I_COLUMNS) -> pd.DataFrame:
    """{name: metrics by their official names} as a table with short titles, a row per name."""
    return pd.DataFrame(metrics).T.reindex(columns=list(columns)).rename(columns=METRICS)


def readings(split: str, answers: Sequence[dict], rows: Sequence[annotations.LabelledRow]) -> pd.DataFrame:
    """A split's scores for each of the `READINGS` of the same masks and probabilities, under what the paper reports."""
    reported = {"val": paper_results.VAL["final predictions"], "test": paper_results.TEST["the paper"]}
    lines, both = {f"the paper ({REPORTED})": reported[split]}, list(zip(*matched(answers, rows), strict=True))
    for windows, saliency in READINGS:  # ends rounded as in the authors' final predictions
        names = {"beams": 1, "batch": 1, "windows": windows, "saliency": saliency, "rounding": "nearest"}
        way = config.Inference.model_validate(names)
        again = [answer_record(row, old["mask"], np.array(old["probability"]), way) for old, row in both]
        lines[f"windows {windows}, saliency {saliency}"] = evaluate.evaluate(again, rows)["brief"]
    return scores(lines)


def table_i(profile: config.Profile, brief: Mapping[str, float]) -> pd.DataFrame:
    """Table I of the paper (test split) under this run's own row, whose scores are `brief`."""
    counts = parameters(profile)[profile.name].loc["all"]
    own = profile.model.weights, f"{counts['base model'] / 1e9:.2f} B", counts.get("trained"), profile.frames.count
    known = {"this model": (*own, "frame segmentation"), "the paper": paper_results.SYSTEM}
    numbers = scores({"this model": brief} | paper_results.TEST)
    table = pd.DataFrame(known, paper_results.SYSTEM_COLUMNS, dtype=object).T.reindex(numbers.index).join(numbers)
    data = "synthetic demo set" if profile.data.source == "demo" else profile.data.folder.name
    return pd.concat({f"measured here, {data}": table[:1], REPORTED: table[1:]})


def by_epoch(log: Sequence[dict], name: str) -> pd.DataFrame:
    """Table IV of the paper (val by epoch) next to this run's validation log; epoch 0 is the untouched base model."""
    columns = paper_results.BY_EPOCH_COLUMNS
    measured = scores({record["epoch"]: record["metrics"]["brief"] for record in log}, columns)
    measured["invalid, %"] = [100 * record["invalid"] for record in log]
    reported = scores(dict(enumerate(paper_results.BY_EPOCH, 1)), columns)
    both = {f"measured here, {name}": measured} if log else {}
    return pd.concat(both | {REPORTED: reported}, axis=1).rename_axis("epoch")


def lengths(rows: Sequence[annotations.LabelledRow], metrics: Mapping) -> pd.DataFrame:
    """A split's scores by the moments' length; none for a length that it does not have."""
    seconds = [end - start for row in rows for start, end in row.relevant_windows]
    lines = {}
    for name, (above, up_to) in evaluate.LENGTHS.items():
        lines[name] = {"true moments": sum(above < length <= up_to for length in seconds)}
        if lines[name]["true moments"]:
            lines[name] |= {f"R1@{threshold}": metrics[name]["MR-R1"][threshold] for threshold in ("0.5", "0.7")}
            lines[name]["mAP"] = metrics[name]["MR-mAP"]["average"]
    return pd.DataFrame(list(lines.values()), index=list(lines))


def intervals(systems: Mapping[str, dict]) -> pd.DataFrame:
    """Scores with their intervals, as `figures.intervals` draws them."""
    lines = {}
    for name, system in systems.items():
        both = {key: (score, *system["interval"][key]) for key, score in system["scores"].items()}
        lines[name] = {key: "{:.2f} ({:.1f} to {:.1f})".format(*values) for key, values in both.items()}
    return pd.DataFrame(lines).T


def answers(rows: Sequence[annotations.Row], windows: Sequence[Sequence[Sequence[float]]]) -> pd.DataFrame:
    """The first three windows that answer each query, next to the true ones."""

    def text(spans: Sequence[Sequence[float]]) -> str:
        return ", ".join(f"{round(start, 1):g}–{round(end, 1):g}" for start, end, *_ in spans)

    table = pd.DataFrame({"query": [row.query for row in rows]})
    table["first three windows, s"] = [text(listed[:3]) for listed in windows]
    table["true windows, s"] = [text(getattr(row, "relevant_windows", ())) for row in rows]
    return table
