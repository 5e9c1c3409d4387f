"""What the demo learns: trains it with several seeds and scores the decoded answers on its val queries.

python tests/benchmarks/demo_seeds.py [--seeds 1 2 3]      (about three minutes per seed on two cores)

Writes records/demo_seeds.json. For each seed: the metrics of the untouched base and of every epoch; the trained model's
answers read by several policies (the authors', the demo's, and the demo's where 2 to 8 beams have a say in windows and
saliency by their probability); and its answers shuffled among the queries of other videos. The trivial answers are
scored once. Seed 1's answer to the query that the rule "excellent" of notebook 05 chooses becomes the README's picture,
records/demo_example.png.
"""

import argparse
import json
import tempfile
import time

import common
import numpy as np
import torch
from matplotlib.figure import Figure

from framseg import annotations, config, dataset, decode, evaluate, frames, moments, prompt, train
from framseg.checkpoint import loaded
from framseg.demo import synthetic
from framseg.predictions import SALIENCY, WINDOWS, read_predictions
from framseg.run.paths import Run
from framseg.viz import figures

BEAMS = (2, 4, 8)


def short(metrics: dict) -> dict[str, float]:
    """The metrics that the tables show, by their official names."""
    return {name: metrics["brief"][name] for name in evaluate.METRICS}


def beams_of(run: Run, rows: list[annotations.Row], beams: int) -> list[tuple[np.ndarray, ...]]:
    """Each row's masks [k, f], scores [k] and probabilities [k, f], best beam first."""
    model, profile, tokenizer = loaded(run.checkpoint)
    store, count, tokens, by_qid = dataset.store(profile), profile.frames.count, profile.model.tokens, {}
    for vid in dict.fromkeys(row.vid for row in rows):
        asked = [row for row in rows if row.vid == vid]
        ids = [prompt.prompt_ids(tokenizer, tokens, row.query, count) for row in asked]
        vision = decode.encoded(model, store.read(vid)[None]).expand(len(asked), -1, -1, -1)
        padded = (torch.from_numpy(x) for x in prompt.pad_left(ids, tokens.pad))
        decoded = decode.beam_search(model, vision, *padded, count, beams)
        answers = (decoded.masks.numpy(), decoded.scores.double().numpy(), decoded.probabilities.double().numpy())
        by_qid |= {row.qid: answer for row, *answer in zip(asked, *answers, strict=True)}
    return [by_qid[row.qid] for row in rows]


def answer(row: annotations.Row, windows: list, saliency: np.ndarray) -> dict:
    """A prediction record."""
    return {"qid": row.qid, WINDOWS: windows, SALIENCY: saliency.tolist()}


def read_best(
    row: annotations.Row, masks: np.ndarray, probabilities: np.ndarray, policy: moments.Policy, method: moments.Method
) -> dict:
    """The best beam's answer, read by a policy for windows and a method for saliency."""
    windows = moments.windows(masks[0], probabilities[0], row.duration, policy)
    return answer(row, windows, moments.saliency(probabilities[0], row.duration, method))


def read_beams(row: annotations.Row, masks: np.ndarray, scores: np.ndarray, probabilities: np.ndarray) -> dict:
    """The best policies over all beams, each weighted by its probability; the first window is the best beam's."""
    weight = np.exp(scores - scores.max())
    weight /= weight.sum()
    likely = weight @ [moments.run_probability(m, p) for m, p in zip(masks, probabilities, strict=True)]
    first = moments.moved(moments.best_run(masks[0], probabilities[0]), probabilities[0])
    windows = moments.ranked(first, likely, row.duration)
    return answer(row, windows, moments.gaussian(weight @ probabilities, row.duration))


def readings(run: Run, rows: list[annotations.Row]) -> dict[str, dict[str, float]]:
    """Scores of the trained model by how its answers are read."""
    out = {}
    for beams in BEAMS:
        pairs = list(zip(rows, beams_of(run, rows, beams), strict=True))
        read = {
            "mask, overlap": [read_best(row, m, p, "mask", "overlap") for row, (m, _, p) in pairs],
            "ranked, gaussian": [read_best(row, m, p, "ranked", "gaussian") for row, (m, _, p) in pairs],
            "ranked, gaussian, every beam": [read_beams(row, *answers) for row, answers in pairs],
        }
        out |= {f"{beams} beams: {name}": short(evaluate.evaluate(records, rows)) for name, records in read.items()}
    return out


def example(predictions: list[dict], rows: list[annotations.Row], store: frames.Store) -> Figure:
    """The qualitative figure of the query that the rule "excellent" chooses."""
    chosen = figures.choose(rows, predictions, evaluate.per_query(predictions, rows))["excellent"]
    row = next(row for row in rows if row.qid == chosen)
    return figures.qualitative(
        row, next(record for record in predictions if record["qid"] == chosen), store.read(row.vid)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    profile = config.load("demo")
    synthetic.prepare(profile)
    dataset.extract(profile)
    val, rows = dataset.rows(profile, "val"), dataset.rows(profile, "train")
    record = common.about() | {
        "val queries": len(val),
        "trivial": {
            name: short(evaluate.evaluate(records, val))
            for name, records in evaluate.trivial(val, rows, profile.seed, profile.frames.count).items()
        },
        "seeds": {},
    }
    for seed in seeds:
        profile = config.load("demo", {"seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            run = Run(profile, folder)
            began = time.monotonic()
            train.launch(profile, run)
            seconds = time.monotonic() - began
            epochs = [short(entry["metrics"]) for entry in train.read_log(run.validation_log)]
            predictions = read_predictions(run.predicted("val", profile.training.epochs))
            ignored = evaluate.evaluate(evaluate.shuffled(predictions, val, seed), val)
            steps = len(train.read_log(run.step_log))
            read = readings(run, val)
            picture = example(predictions, val, dataset.store(profile))
        record["seeds"][seed] = {
            "training seconds": round(seconds, 1),
            "steps": steps,
            "base": epochs[0],
            "epochs": epochs[1:],
            "query ignored": short(ignored),
            "read as": read,
        }
        print(seed, record["seeds"][seed]["base"], epochs[-1], json.dumps(read, indent=1))
        if seed == 1:
            picture.savefig(common.RECORDS / "demo_example.png", dpi=160)
    common.write("demo_seeds", record)


if __name__ == "__main__":
    main()
