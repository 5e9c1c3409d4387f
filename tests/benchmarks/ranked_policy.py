"""The policies `ranked` and `gaussian` of framseg.moments: fits their constants and measures them.

python tests/benchmarks/ranked_policy.py            fits, compares, tries variants and writes records/ranked_policy.json
python tests/benchmarks/ranked_policy.py --score    prints the README's tables of val and test, and writes nothing

Both read the folder that `framseg download --reference FOLDER` fills: the public annotations and the predictions that
the paper's authors published, with frame probabilities. --reference FOLDER names it (default: FRAMSEG_SHARED, else
data/reference).

The constants are fitted on the 1,550 val predictions. Many of the 1,519 val videos are cut from the same recording, so
folds and bootstrap go by the 474 recordings. Every figure called out of fold pools five folds, each predicted with
constants fitted on the other four, and is computed once on all queries. The test predictions are scored with the
constants in framseg/moments.py; nothing is fitted on them. What this prints as `fitted` are these constants.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from framseg import annotations, config, evaluate, moments
from framseg.annotations import LabelledRow
from framseg.predictions import SALIENCY, WINDOWS, read_released, reference

RECORD = Path(__file__).parent / "records" / "ranked_policy.json"
SHOWN = {short: official for official, short in evaluate.METRICS.items()}
FOLDS, SEEDS, RESAMPLED = 5, (0, 1, 2, 3, 4), 2000  # the first seed's folds give the reported figures
RIDGE = 1e-3  # on standardised features, for both fits
KERNELS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SOFTNESS = 0.1  # of the IoU thresholds while the ends are fitted
STEPS, RATE = 200, 0.02


@dataclass(frozen=True)
class Released:
    """The released predictions of a split in the order of its rows: masks and probabilities [N, f].

    recording: int [N], the number of the recording that each query's video was cut from.
    """

    rows: list[LabelledRow]
    masks: np.ndarray
    probabilities: np.ndarray
    recording: np.ndarray

    def fold(self, seed: int = SEEDS[0]) -> np.ndarray:
        """Which of the folds each query is in, int [N]; queries of a recording are in the same fold."""
        order = np.random.default_rng(seed).permutation(self.recording.max() + 1)
        return order[self.recording] % FOLDS


def labels(folder: Path, name: str) -> list[LabelledRow]:
    """Rows of the public annotation file highlight_`name`.jsonl."""
    return annotations.labelled(annotations.read(folder / f"qvhighlights/highlight_{name}.jsonl"))


def read(folder: Path, split: str = "val") -> Released:
    """The authors' predictions of `split` (val or test) in a folder of reference material, with its public labels."""
    rows = labels(folder, {"val": "val_release", "test": "test_with_gt"}[split])
    by_qid = {record["qid"]: record for record in read_released(reference(folder, split))}
    records = [by_qid[row.qid] for row in rows]
    masks = np.array([[int(digit) for digit in record.get("mask") or listed_mask(record)] for record in records])
    probabilities = np.array([record["probability"] for record in records])
    # vid: the recording's eleven characters, then the seconds it was cut at.
    recording = np.unique([row.vid[:11] for row in rows], return_inverse=True)[1]
    return Released(rows, masks, probabilities, recording)


def listed_mask(record: dict) -> np.ndarray:
    """The mask [f] that the listed windows were made of, for a file without the masks: 1 inside the windows."""
    mask = np.zeros(len(record["probability"]), dtype=int)
    edges = [round(i * record["duration"] / len(mask)) for i in range(len(mask) + 1)]
    for start, end, score in record[WINDOWS]:
        if score:  # the list is filled up with the whole video at score 0
            mask[edges.index(start) : edges.index(end)] = 1
    return mask


def true_windows(data: Released) -> np.ndarray:
    """True windows in frames, float64 [N, most, 2]; places that a query does not fill lie far away: IoU 0."""
    frames = data.masks.shape[1]
    out = np.full((len(data.rows), max(len(row.relevant_windows) for row in data.rows), 2), [-1e6, -1e6 + 1])
    for i, row in enumerate(data.rows):
        out[i, : len(row.relevant_windows)] = np.array(row.relevant_windows) * frames / row.duration
    return out


def features(data: Released) -> np.ndarray:
    """[N, runs, 6] of `moments.run_features`."""
    return np.stack([moments.run_features(m, p) for m, p in zip(data.masks, data.probabilities, strict=True)])


def targets(data: Released) -> np.ndarray:
    """Each true window gives its share of a query to the run nearest to it: [N, runs], rows sum to 1."""
    first, after = moments.run_edges(data.masks.shape[1])
    out = np.zeros((len(data.rows), len(first)))
    for i, (row, windows) in enumerate(zip(data.rows, true_windows(data), strict=True)):
        start, end = windows[: len(row.relevant_windows)].T
        shared = np.minimum(after, end[:, None]) - np.maximum(first, start[:, None])
        hull = np.maximum(after, end[:, None]) - np.minimum(first, start[:, None])
        np.add.at(out[i], (shared / hull).argmax(axis=1), 1 / len(start))
    return out


def fit_runs(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [6] of the softmax over runs by maximum likelihood with a ridge: Newton's method, convex."""
    mean, deviation = features.mean(axis=(0, 1)), features.std(axis=(0, 1))
    x = (features - mean) / deviation

    def state(weights: np.ndarray) -> tuple[float, np.ndarray]:
        score = x @ weights
        score -= score.max(axis=1, keepdims=True)
        score -= np.log(np.exp(score).sum(axis=1, keepdims=True))
        return RIDGE * weights @ weights - (targets * score).sum() / len(x), np.exp(score)

    weights = np.zeros(x.shape[-1])
    loss, likely = state(weights)
    for _ in range(50):
        expected = np.einsum("nr,nrk->nk", likely, x)
        gradient = np.einsum("nr,nrk->k", likely - targets, x) / len(x) + 2 * RIDGE * weights
        hessian = np.tensordot(x * likely[..., None], x, axes=([0, 1], [0, 1])) - expected.T @ expected
        step = np.linalg.solve(hessian / len(x) + 2 * RIDGE * np.eye(len(weights)), gradient)
        if np.abs(step).max() < 1e-6:
            break
        while (tried := state(weights - step))[0] > loss:
            step = step / 2
        weights, (loss, likely) = weights - step, tried
    return weights / deviation


def fit_ends(features: np.ndarray, runs: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Weights [2, 3] that move the ends of each query's first run to the best R1 at .5 and .7, made smooth.

    features: [N, 2, 3] of `moments.edge_features`. runs: [N, 2] in frames. true: [N, most, 2] in frames.
    """
    frames = 25
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    mean[:, 0], deviation[deviation == 0] = 0, 1
    x = torch.from_numpy((features - mean) / deviation)
    base, start, end = torch.from_numpy(runs).double(), *torch.from_numpy(true).unbind(-1)
    # Not from zero: unmoved ends lie exactly on those of true windows, where IoU has a kink and no gradient helps.
    weights = torch.tensor([[-0.05, 0.01, 0.01]] * 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        moved = (base + (x * weights).sum(-1)).clamp(0, frames)[..., None]
        shared = torch.minimum(moved[:, 1], end) - torch.maximum(moved[:, 0], start)
        hull = torch.maximum(moved[:, 1], end) - torch.minimum(moved[:, 0], start)
        iou = (shared / hull).amax(1)
        reached = sum(torch.sigmoid((iou - threshold) / SOFTNESS).mean() for threshold in (0.5, 0.7))
        (RIDGE * (weights**2).sum() - reached).backward()
        optimizer.step()
    out = weights.detach().numpy() / deviation
    out[:, 0] -= (out * mean)[:, 1:].sum(axis=1)
    return out


def first_runs(data: Released) -> np.ndarray:
    """Start and end of the mask's best run of frames, of every query, int [N, 2]."""
    return np.array([moments.best_run(m, p) for m, p in zip(data.masks, data.probabilities, strict=True)])


def ends_features(data: Released, runs: np.ndarray) -> np.ndarray:
    """[N, 2, 3] of `moments.edge_features` at the runs [N, 2]."""
    return np.stack([moments.edge_features(p, *run) for p, run in zip(data.probabilities, runs, strict=True)])


def fit_kernel(hits: np.ndarray, some: np.ndarray) -> int:
    """Which of KERNELS has the best sum of HL mAP and HIT@1; hits: [kernels, folds], `some` says which folds count."""
    return int(hits[:, some].mean(axis=1).argmax())


def fit(data: Released) -> moments.Ranking:
    """The policy's constants from all queries, as they ship: three decimals."""
    runs = first_runs(data)
    start, end = fit_ends(ends_features(data, runs), runs, true_windows(data))
    weights = fit_runs(features(data), targets(data))
    return moments.Ranking(*(tuple(x.round(3).tolist()) for x in (weights, start, end)))


# ---- out of fold -----------------------------------------------------------------------------------------------------


def likely_runs(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """P(run) [N, runs], of each fold by weights fitted on the others."""
    out = np.empty(x.shape[:2])
    for k in range(FOLDS):
        score = x[fold == k] @ fit_runs(x[fold != k], y[fold != k])
        out[fold == k] = np.exp(score - score.max(axis=1, keepdims=True))
    return out / out.sum(axis=1, keepdims=True)


def moved_ends(data: Released, x: np.ndarray, fold: np.ndarray) -> list[tuple[float, float]]:
    """Each query's first run with its ends moved by weights fitted on the other folds; x: [N, 2, 3] edge features."""
    runs, true = first_runs(data), true_windows(data)
    by_fold = [moments.Ranking((), *fit_ends(x[fold != k], runs[fold != k], true[fold != k])) for k in range(FOLDS)]
    each = zip(runs.tolist(), data.probabilities, fold, strict=True)
    return [moments.moved(tuple(run), p, by_fold[k]) for run, p, k in each]


def expected_first(likely: np.ndarray) -> list[tuple[int, int]]:
    """The run that finds most in expectation, of every query."""
    first, after = moments.run_edges(25)
    shared = (np.minimum(after[:, None], after) - np.maximum(first[:, None], first)).clip(min=0)
    iou = shared / (np.maximum(after[:, None], after) - np.minimum(first[:, None], first))
    best = (likely @ ((iou - 0.45) / 0.5).clip(0, 1)).argmax(axis=1)
    return list(zip(first[best].tolist(), after[best].tolist(), strict=True))


def listed(data: Released, best: Sequence[tuple[float, float]], likely: np.ndarray) -> list[list[list[float]]]:
    """Windows by `moments.ranked` of every query: first `best` (frames), then runs by their probability [N, runs]."""
    return [moments.ranked(*given, row.duration) for *given, row in zip(best, likely, data.rows, strict=True)]


def each(data: Released, policy: str, *rounding: str) -> list[list[list[float]]]:
    """Windows of every query by a policy of `moments.windows`."""
    triples = zip(data.masks, data.probabilities, data.rows, strict=True)
    return [moments.windows(m, p, row.duration, policy, *rounding) for m, p, row in triples]


def first_trials(data: Released) -> list[list[list[float]]]:
    """The mask's windows, then those at cuts of .95 to .05 by mean probability."""
    out = []
    for m, p, row in zip(data.masks, data.probabilities, data.rows, strict=True):
        windows = moments.windows(m, p, row.duration)
        cut = [
            w for c in range(95, 0, -5) if (p >= c / 100).any() for w in moments.windows(p >= c / 100, p, row.duration)
        ]
        for window in sorted(cut, key=lambda w: -w[2]):
            if window[:2] not in [w[:2] for w in windows]:
                windows.append(window)
        out.append([[start, end, 1 - rank / 100] for rank, (start, end, _) in enumerate(windows)])
    return out


def smoothed(values: np.ndarray, data: Released, width: float = moments.KERNEL) -> list[np.ndarray]:
    """Clip saliency of every query: frame values [N, f] smoothed by a kernel `width` frames wide."""
    return [moments.gaussian(v, row.duration, width) for v, row in zip(values, data.rows, strict=True)]


def answers(data: Released, windows: Sequence | None, saliency: Sequence | None) -> list[dict]:
    """Prediction records of every query from windows, clip saliency or both."""
    out: list[dict] = [{"qid": row.qid} for row in data.rows]
    for name, values in ((WINDOWS, windows), (SALIENCY, saliency)):
        for record, value in zip(out, values or (), strict=values is not None):
            record[name] = value if name == WINDOWS else value.tolist()
    return out


def score(data: Released, windows: Sequence | None = None, saliency: Sequence | None = None) -> dict[str, float]:
    """Metrics in percent by their short names."""
    brief = evaluate.evaluate(answers(data, windows, saliency), data.rows)["brief"]
    return {name: brief[key] for name, key in SHOWN.items() if key in brief}


def by_recording(data: Released, windows: Sequence, saliency: Sequence) -> np.ndarray:
    """Sums of the metrics over each recording's queries, percent: [recordings, 5]."""
    given, out = answers(data, windows, saliency), []
    for number in range(data.recording.max() + 1):
        at = np.flatnonzero(data.recording == number)
        brief = evaluate.evaluate([given[i] for i in at], [data.rows[i] for i in at])["brief"]
        out.append([brief[key] * len(at) for key in SHOWN.values()])
    return np.array(out)


def intervals(values: np.ndarray, sizes: np.ndarray) -> dict[str, list[float]]:
    """95-% bootstrap intervals over recordings of the means over queries; values: sums [recordings, metrics]."""
    random = np.random.default_rng(SEEDS[0])
    drawn = random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLED)
    means = drawn @ values / (drawn @ sizes)[:, None]
    return dict(zip(SHOWN, np.percentile(means, (2.5, 97.5), axis=0).T.round(2).tolist(), strict=True))


def kernel_folds(data: Released, fold: np.ndarray) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Saliency by kernel, and HL mAP + HIT@1 summed over each fold's queries [kernels, folds], of a mean per query."""
    smooth = [smoothed(data.probabilities, data, kernel) for kernel in KERNELS]
    sums = np.zeros((len(KERNELS), FOLDS))
    for j, saliency in enumerate(smooth):
        given = answers(data, None, saliency)
        for k in range(FOLDS):
            at = np.flatnonzero(fold == k)
            brief = evaluate.evaluate([given[i] for i in at], [data.rows[i] for i in at])["brief"]
            sums[j, k] = sum(brief[SHOWN[name]] for name in ("HL mAP", "HIT@1")) * len(at)
    return smooth, sums


def chosen_saliency(data: Released, fold: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Saliency by the kernel that is best on the other folds, and which it was, fold by fold."""
    smooth, sums = kernel_folds(data, fold)
    choice = [fit_kernel(sums, np.arange(FOLDS) != k) for k in range(FOLDS)]
    return [smooth[choice[k]][i] for i, k in enumerate(fold)], [KERNELS[c] for c in choice]


def out_of_fold(data: Released, seed: int = SEEDS[0]) -> tuple[list, list[np.ndarray], list[float]]:
    """Windows and saliency of every query with all constants chosen on the other folds; the kernels chosen."""
    fold = data.fold(seed)
    best = moved_ends(data, ends_features(data, first_runs(data)), fold)
    return listed(data, best, likely_runs(features(data), targets(data), fold)), *chosen_saliency(data, fold)


def train_prior(rows: list[LabelledRow]) -> np.ndarray:
    """Log of the share of true windows near each run, [runs]; both ends weigh by a normal density 1 frame wide."""
    counts = targets(Released(rows, np.zeros((1, 25)), np.empty(0), np.empty(0))).sum(axis=0)
    ends = np.stack(moments.run_edges(25), axis=1)
    near = np.exp(-((ends[:, None] - ends) ** 2).sum(axis=-1) / 2)
    return np.log(near / near.sum(axis=0) @ counts + 0.5)


def trials(data: Released, train: list[LabelledRow]) -> dict[str, dict[str, float]]:
    """Scores of variants, out of fold where something is fitted."""
    fold, x, y, runs = data.fold(), features(data), targets(data), first_runs(data)
    best, likely = moved_ends(data, ends_features(data, runs), fold), likely_runs(x, y, fold)
    kept = [tuple(run) for run in runs.tolist()]
    independent = likely_runs(x[..., :2], y, fold)
    edges = np.stack(moments.run_edges(25), axis=1)
    by_probability = []
    for i, row in enumerate(data.rows):
        order = edges[likely[i].argsort()[::-1][:9]] * row.duration / 25
        first = moments.ranked(best[i], likely[i], row.duration)[0]
        by_probability.append([first] + [[s, e, first[2] * (1 - r / 10)] for r, (s, e) in enumerate(order.tolist(), 1)])
    prior = np.broadcast_to(train_prior(train)[:, None], (*x.shape[:2], 1))
    windows = {
        "mask first, then cuts .95 to .05 by mean probability": first_trials(data),
        "ranked, first window's ends as in the mask": listed(data, kept, likely),
        "ranked, first the run expected to find most": listed(data, expected_first(likely), likely),
        "ranked, first the most likely run": listed(data, [tuple(e) for e in edges[likely.argmax(1)].tolist()], likely),
        "ranked, next the most likely runs, near or not": by_probability,
        "independent frames, first the run expected to find most": listed(
            data, expected_first(independent), independent
        ),
        "ranked by independent frames": listed(data, best, independent),
        "ranked with the train windows' prior of length and place": listed(
            data, best, likely_runs(np.concatenate((x, prior), axis=2), y, fold)
        ),
    }
    names = ("sum", "length", "steps at the ends", "video's ends", "mask's ends", "soft IoU")
    for i, name in enumerate(names):
        windows[f"ranked without {name}"] = listed(data, best, likely_runs(np.delete(x, i, axis=2), y, fold))
    inside = (np.arange(25) >= edges[:, :1]) & (np.arange(25) < edges[:, 1:])
    logit = np.log(data.probabilities.clip(1e-6, 1 - 1e-6) / (1 - data.probabilities.clip(1e-6, 1 - 1e-6)))
    outer = np.pad(data.probabilities, ((0, 0), (1, 1)), mode="edge")
    three = 0.1 * outer[:, :-2] + 0.8 * data.probabilities + 0.1 * outer[:, 2:]
    saliency = {
        "interpolation": [
            moments.saliency(p, r.duration, "interpolation") for p, r in zip(data.probabilities, data.rows, strict=True)
        ],
        "interpolation of (.1 .8 .1)-smoothed": [
            moments.saliency(p, r.duration, "interpolation") for p, r in zip(three, data.rows, strict=True)
        ],
        "gaussian of tanh(logit / 4)": smoothed((np.tanh(logit / 4) + 1) / 2, data),
        "gaussian of P(frame in a likely run)": smoothed((likely @ inside).clip(0, 1), data),
        "gaussian, half of each": smoothed(
            (data.probabilities + (likely @ inside).clip(0, 1)) / 2, data, moments.KERNEL
        ),
    }
    saliency |= {f"gaussian, {kernel} frames": smoothed(data.probabilities, data, kernel) for kernel in KERNELS}
    out = {name: score(data, windows=listed_windows) for name, listed_windows in windows.items()}
    return out | {f"saliency: {name}": score(data, saliency=scores) for name, scores in saliency.items()}


def as_the_authors(data: Released) -> dict[str, tuple[list, list[np.ndarray]]]:
    """Windows and saliency as the authors submitted them, and with the mask's own windows, filled up to ten."""
    overlap = [moments.saliency(p, row.duration) for p, row in zip(data.probabilities, data.rows, strict=True)]
    masked = zip(each(data, "mask", "nearest"), data.rows, strict=True)
    return {
        "as submitted": (each(data, "thresholds", "nearest"), overlap),
        "mask": ([moments.filled(windows, row.duration) for windows, row in masked], overlap),
    }


def shipped(data: Released) -> tuple[list, list[np.ndarray]]:
    """Windows and saliency by the best policies with the constants in framseg/moments.py."""
    return each(data, "ranked"), smoothed(data.probabilities, data)


def test_scores(folder: Path) -> dict:
    """The test predictions scored with the constants of val."""
    data = read(folder, "test")
    systems = as_the_authors(data) | {"ranked": shipped(data)}
    return {"queries": len(data.rows), "systems": {name: score(data, *given) for name, given in systems.items()}}


def show(split: str, systems: dict[str, dict[str, float]]) -> None:
    """Print the scores as a table."""
    print(f"{split:22}", *(f"{metric:>7}" for metric in SHOWN))
    for name, scores in systems.items():
        print(f"{name:22}", *(f"{scores[metric]:7.2f}" for metric in SHOWN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", action="store_true", help="score val (out of fold) and test; write nothing")
    default = os.environ.get("FRAMSEG_SHARED") or config.WORKSPACE / "data/reference"
    parser.add_argument("--reference", type=Path, metavar="FOLDER", default=default)
    options = parser.parse_args()
    folder = options.reference
    torch.set_num_threads(1)  # more are slower on arrays this small
    data = read(folder)
    windows, saliency, kernels = out_of_fold(data)
    systems = as_the_authors(data) | {"ranked, out of fold": (windows, saliency)}
    if options.score:
        show("val", {name: score(data, *given) for name, given in systems.items()})
        show("test", test_scores(folder)["systems"])
        return
    sizes = np.bincount(data.recording)
    fitted = fit(data)
    kernel = KERNELS[fit_kernel(kernel_folds(data, data.fold())[1], np.ones(FOLDS, dtype=bool))]
    print("fitted:", fitted, kernel)
    began = time.perf_counter()
    in_sample = shipped(data)
    seconds = time.perf_counter() - began
    sums = {name: by_recording(data, *given) for name, given in systems.items()}
    mine = sums["ranked, out of fold"]
    record = {
        "queries": len(data.rows),
        "videos": len({row.vid for row in data.rows}),
        "recordings": len(sizes),
        "fitted on all": {**fitted._asdict(), "kernel": kernel},
        "seconds for all queries": round(seconds, 2),
        "systems": {
            name: {"scores": score(data, *given), "interval": intervals(sums[name], sizes)}
            for name, given in systems.items()
        },
        "difference of ranked, out of fold, to": {
            name: {
                "scores": dict(
                    zip(SHOWN, ((mine - sums[name]).sum(axis=0) / sizes.sum()).round(2).tolist(), strict=True)
                ),
                "interval": intervals(mine - sums[name], sizes),
            }
            for name in ("as submitted", "mask")
        },
        "in sample, as shipped": score(data, *in_sample),
        "test": test_scores(folder),
        "kernels chosen by fold": kernels,
        "other folds": {seed: score(data, *out_of_fold(data, seed)[:2]) for seed in SEEDS[1:]},
        "trials": trials(data, labels(folder, "train_release")),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
