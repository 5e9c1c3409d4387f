"""The measured tables in the README files, made from the records in this folder, and the plot of how the cost grows.

python tests/benchmarks/tables.py           writes every table between the markers with its name, in all README files,
                                            and records/growth.png
python tests/benchmarks/tables.py needs     prints a table, here the one of what each profile needs, and writes nothing
python tests/benchmarks/tables.py --check   exits with 1 if a README file shows other values
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

import common
import torch
import whole_run
from matplotlib.figure import Figure

from framseg import config
from framseg.evaluate import METRICS
from framseg.run import cost, precision
from framseg.viz import figures

FOLDERS = ("", "framseg", "framseg/demo", "notebooks", "tests/benchmarks")
READMES = [path for folder in FOLDERS if (path := config.REPOSITORY / folder / "README.md").is_file()]
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
POSITIONS = 3621  # of a sample with the published sizes (tests/test_prompt.py)
UNMEASURED = "unmeasured"


def record(name: str) -> dict:
    """A record; raises FileNotFoundError where nobody has measured it yet."""
    return json.loads((common.RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def measured(name: str) -> bool:
    """True if the record exists."""
    return (common.RECORDS / f"{name}.json").is_file()


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown of a table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def percentages(scores: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Scores with two decimals, in the order of `names`."""
    return [f"{scores[name]:.2f}" for name in names]


def mean(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric."""
    listed = list(scores)
    return {name: sum(each[name] for each in listed) / len(listed) for name in METRICS}


# ---- the demo --------------------------------------------------------------------------------------------------------


def demo_results() -> str:
    """The trained demo model (mean of the seeds) next to the base model and the best trivial answer."""
    demo = record("demo_seeds")
    seeds, trivial = demo["seeds"].values(), demo["trivial"]
    best = max(trivial, key=lambda name: trivial[name]["MR-full-R1@0.7"])
    answers = {
        f"trained, mean of {len(seeds)} seeds": mean(seed["epochs"][-1] for seed in seeds),
        "base model before training": next(iter(seeds))["base"],
        f"best trivial answer: {best}": trivial[best],
    }
    rows = [[name, *percentages(scores, METRICS)] for name, scores in answers.items()]
    return table((f"demo, {demo['val queries']} val queries", *METRICS.values()), rows)


def demo() -> str:
    """Every answer to the demo's val queries that was scored."""
    demo = record("demo_seeds")
    seeds = demo["seeds"]
    first = next(iter(seeds.values()))
    answers = {
        f"trained, seed {seed} ({run['training seconds']:.0f} s)": run["epochs"][-1] for seed, run in seeds.items()
    }
    answers |= {
        f"seed {seed}, read by the authors' policies": run["read as"]["2 beams: mask, overlap"]
        for seed, run in seeds.items()
    }
    answers |= {"base model before training": first["base"], **demo["trivial"]}
    answers["query ignored (seed 1's answers shuffled among videos)"] = first["query ignored"]
    rows = [[name, *percentages(scores, METRICS)] for name, scores in answers.items()]
    return f"{table(('', *METRICS.values()), rows)}\n\nDevice: {device(demo)}."


def readings() -> str:
    """The demo's answers by policy and beams, mean over the seeds."""
    seeds = record("demo_seeds")["seeds"].values()
    rows = [
        [name, *percentages(mean(seed["read as"][name] for seed in seeds), METRICS)]
        for name in next(iter(seeds))["read as"]
    ]
    return table((f"mean of {len(seeds)} seeds", *METRICS.values()), rows)


def run_time() -> str:
    """How long the first command takes."""
    seconds = record("seconds")
    minutes = sum(seconds["demo, seconds"].values()) / 60
    return (
        f"It takes about {minutes:.0f} minutes on two CPU cores once the packages are installed and the videos drawn."
    )


def seconds() -> str:
    """Where the seconds of the demo go."""
    taken = record("seconds")["demo, seconds"]
    return table(("notebook", "seconds"), [[f"`{name}`", str(count)] for name, count in taken.items()])


# ---- the paper's predictions -----------------------------------------------------------------------------------------

SYSTEMS = {
    "as submitted": "as the authors submitted them (`thresholds`, `overlap`)",
    "mask": "windows of the mask (`mask`, `overlap`)",
    "ranked": "**`ranked`, `gaussian`**, constants of val",
    "ranked, out of fold": "**`ranked`, `gaussian`**, out of fold",
}


def released() -> str:
    """The paper's val and test predictions by how they are read."""
    policy = record("ranked_policy")
    splits = {
        f"val ({policy['queries']:,} queries)": {name: each["scores"] for name, each in policy["systems"].items()},
        f"test ({policy['test']['queries']:,} queries)": policy["test"]["systems"],
    }
    rows = [
        [f"{split}, {SYSTEMS[name]}", *percentages(scores, METRICS.values())]
        for split, systems in splits.items()
        for name, scores in systems.items()
    ]
    return table(("the paper's predictions", *METRICS.values()), rows)


def val() -> str:
    """The paper's val predictions with intervals, and a simple way to read them in between."""
    policy = record("ranked_policy")
    tried = policy["trials"]["mask first, then cuts .95 to .05 by mean probability"]
    tried |= policy["trials"]["saliency: interpolation of (.1 .8 .1)-smoothed"]
    rows = []
    for name, system in policy["systems"].items():
        if name == "ranked, out of fold":
            text = (
                "mask first, then windows at cuts .95 to .05 by mean probability; smoothed probabilities, interpolated"
            )
            rows.append([text, *percentages(tried, METRICS.values())])
        rows += with_interval(SYSTEMS[name], system)
    rows += with_interval("difference to as submitted", policy["difference of ranked, out of fold, to"]["as submitted"])
    return table(("val", *METRICS.values()), rows)


def with_interval(name: str, system: Mapping[str, dict]) -> list[list[str]]:
    """Two lines: scores, and their interval."""
    ends = [system["interval"][metric] for metric in METRICS.values()]
    interval = ["95 % interval", *(f"{low:.1f} to {high:.1f}" for low, high in ends)]
    return [[name, *percentages(system["scores"], METRICS.values())], interval]


# ---- cost ------------------------------------------------------------------------------------------------------------


def operations() -> str:
    """What a sample with the published sizes costs, counted."""
    paper, h100 = (cost.operations(config.load(name), POSITIONS) for name in ("paper", "h100"))
    parts = {
        "SigLIP, forward (frozen)": paper.encoder,
        "resampler, forward and backward": paper.resampler + paper.resampler_backward,
        "Phi-3 with its adapter, forward and backward": paper.language + paper.language_backward,
        "Phi-3, layers recomputed (`training.gradient_checkpointing`)": paper.recomputation,
        "a training sample, layers not recomputed (`h100`)": h100.training,
        "a training sample, layers recomputed (`paper`)": paper.training,
        "a query answered": paper.inference,
    }
    return table(("work", "TFLOP"), [[name, f"{count / cost.TERA:.0f}"] for name, count in parts.items()])


def features() -> str:
    """What keeping the encoder's output saves and takes."""
    profile = config.load("paper")
    counted = cost.operations(config.load("h100"), POSITIONS)
    vision, pictures = profile.model.vision, profile.frames.count * (2 * profile.frames.neighbours + 1)
    patches = (vision.image_size // vision.patch_size) ** 2
    video = pictures * patches * vision.hidden_size * 2
    text = (
        f"`training.cache_features=true` keeps the frozen encoder's output on disk: it then runs once per picture, not "
        f"once per epoch. That saves {counted.encoder / counted.training:.0%} of a training sample's operations if its "
        f"layers are not recomputed. With the published sizes it takes {video / 1e6:.0f} MB per video "
        f"({profile.frames.count} x {pictures // profile.frames.count} pictures of {patches} x {vision.hidden_size} "
        f"bfloat16 numbers); {video / 3e6:.0f} MB are read for each sample."
    )
    return textwrap.fill(text, 120)


def needs() -> str:
    """What each profile needs: counted by whole_run.py and cost.py, of the demo measured."""
    demo, seconds = record("training_demo")["memory GiB"], sum(record("seconds")["demo, seconds"].values())
    hours = f"{seconds / 3600:.2f} in all, measured"
    rows = [["`demo`", "none, two CPU cores", "–", f"{demo:.1f} GiB, measured", "–", hours, "–"]]
    for name in ("paper", "h100", "24gb", "released", "released_train"):
        profile = config.load(name)
        gpu, training, decoding = whole_run.hours(profile)
        disk = {what: size / 1e9 for what, size in whole_run.disk_bytes(profile).items() if size}
        parts = ", ".join(f"{what} {size:.0f}" for what, size in disk.items())
        more = " + the frames' archive" if profile.data.source == "frames" else ""
        rows.append(
            [
                f"`{name}`",
                f"{profile.training.processes} x {gpu}",
                f"{cost.gpu_bytes(profile) / 2**30:.1f} GiB",
                f"{whole_run.host_bytes(profile) / 2**30:.0f} GiB",
                f"{sum(disk.values()):.0f} GB{more} ({parts})",
                f"{training:.1f}" if training else "–",
                f"{decoding:.1f}",
            ]
        )
    head = ("profile", "GPUs", "memory of each", "host memory", "disk", "hours of training", "hours of decoding")
    return table(head, rows)


def needs_counted() -> str:
    """How the table of what each profile needs was counted, and what it assumes."""
    rates = " and ".join(f"{speed / cost.TERA:.0f} on one {name}" for name, (_, speed) in whole_run.GPUS.items())
    extraction = next(value for key, value in record("frame_store").items() if key.startswith("extraction"))
    hours = sum(whole_run.VIDEOS.values()) / extraction["workers: 1"]["videos/s"] / 3600
    text = (
        f"Nothing of this was measured at full size. Hours are counted operations, divided by a share of what the GPU "
        f"can do by its data sheet (TFLOP/s in bfloat16: {rates}). The share is assumed to be the one that the "
        f"authors' logs show on an H100: {whole_run.TRAINING_SHARE:.1%} in training, {whole_run.DECODING_SHARE:.1%} in "
        f"decoding. The size of the frames' archive is not known here; chapter 01 tells it before it fetches. "
        f"Videos are decoded once, in {hours:.0f} hours of one CPU core at the measured speed. Host memory counts "
        f"{whole_run.PROCESS / 2**30:.0f} GiB per process, which is assumed, too."
    )
    return textwrap.fill(text, 120)


def store() -> str:
    """What the frame store takes."""
    content = record("frame_store")
    video, sample = (
        {key: f"{value / 1e6:.2f}" for key, value in content[f"stored bytes per {what}"].items()}
        for what in ("video", "sample")
    )
    extraction = next(value for key, value in content.items() if key.startswith("extraction"))
    cpu = {name: ways["CPU seconds per video"] for name, ways in content["decoding in one process"].items()}
    read = content["reading a sample in one process"]
    total = next(value for key, value in content.items() if key.startswith("GB for"))
    rows = [
        ["a video in the store (75 pictures)", f"{video['mean']} MB ({video['min']} to {video['max']})"],
        ["all 10,148 videos", f"{total} GB"],
        ["a sample (25 pictures)", f"{sample['mean']} MB ({sample['min']} to {sample['max']})"],
        *(
            [
                f"extraction, {name.replace(': ', ' ')}",
                f"{rate['videos/s']:.2f} videos/s, {rate['frames/s']:,} frames/s",
            ]
            for name, rate in extraction.items()
        ),
        ["decoding, CPU seconds per video", "; ".join(f"{name} {seconds:.1f}" for name, seconds in cpu.items())],
        ["reading a sample, one core", f"{read['ms, median']} ms, {read['samples/s']:.0f} samples/s"],
    ]
    if turns := content.get("whole pass by two commits, in turns"):
        before, ratio = next(iter(turns)).split(",")[0], turns["ratio"]
        value = f"{ratio['median']} ({ratio['min']} to {ratio['max']}), the same pictures"
        rows.append([f"whole pass, CPU seconds compared with those of {before}", value])
    return table(("what", "measured"), rows)


def performance() -> str:
    """A line per measurement: what, how fast, next to what, share of what the device's matrix products reach."""
    rows = [
        ["training, demo model", *_training(record("training_demo"))],
        ["decoding, demo model", *_decoding(record("decoding_demo"))],
    ]
    scoring = record("evaluator")
    speed = f"{scoring['median']:.2f} s for {scoring['queries']:,} queries"
    rows.append(["scoring val", speed, "every metric as the dataset's own evaluator", "–", scoring["device"]])
    return table(("what", "measured", "compared with", "share of the matrix rate", "device"), rows)


def full_size(names: Sequence[str] = ("h100", "24gb", "paper"), batches: Sequence[int] = (1, 6, 16)) -> str:
    """Speed and memory at full size with random weights on a GPU: training by profile, decoding by batch."""
    rows = []
    for name in names:
        cells = [UNMEASURED, "–", "–", f"{cost.gpu_bytes(config.load(name)) / 2**30:.1f} GiB", UNMEASURED, "–"]
        if measured(f"training_{name}"):
            run = record(f"training_{name}")
            limit = f", memory of {run['memory of']}" if run["memory of"] else ""
            taken = [f"{run['counted GiB']:.1f} GiB", f"{run['memory GiB']:.1f} GiB"]
            speed, compared, share, place = _training(run)
            cells = [speed, compared, share, *taken, f"{place}{limit}"]
        rows.append([f"training, `{name}`", *cells])
    runs = record("decoding_released")["by batch"] if measured("decoding_released") else {}
    for size in batches:
        counted = cost.gpu_bytes(config.load("released", {"inference.batch": size})) / 2**30
        cells = [UNMEASURED, "–", "–", f"{counted:.1f} GiB", UNMEASURED, "–"]
        if run := runs.get(str(size)):
            speed, compared, share, place = _decoding(record("decoding_released") | run)
            cells = [
                speed,
                compared,
                share,
                f"{run['counted GiB']:.1f} GiB",
                f"{run['peak GiB']['ours']:.1f} GiB",
                place,
            ]
        rows.append([f"decoding, `released`, batch {size}", *cells])
    head = ("what", "measured", "compared with", "share of the matrix rate", "memory, counted", "measured", "device")
    return table(head, rows)


def full_size_cpu() -> str:
    """What the profile `released` takes at full size on a CPU, with random weights."""
    names = ("01_data", "02_prompt_tokenizer", "03_training", "04_evaluation_codalab", "05_figures")
    if not measured("released_cpu"):
        rows = [[f"`{name}`", UNMEASURED] for name in names]
        return table(("what", "measured"), [*rows, ["a query", UNMEASURED], ["memory of all processes", UNMEASURED]])
    run = record("released_cpu")
    rows = [[f"`{name}`", f"{run['seconds by chapter'][name]} s"] for name in names]
    queries = ", ".join(f"{seconds:.0f} s ({split})" for split, seconds in run["seconds per query"].items())
    taken = f"{run['run']['peak GiB']:.1f} GiB, for {run['bytes of weights'] / 1e9:.1f} GB of weights in {run['dtype']}"
    rows += [["a query", queries], ["memory of all processes", taken]]
    others = f"{run['threads']} threads, load average {run['load average']:.1f} (above the threads, others worked too)"
    return table(("what", "measured"), rows) + f"\n\nDevice: {device(run)}, {others}."


def _training(run: dict) -> list[str]:
    compared = "2.49 samples/s reported per GPU of 2 x H100" if run["profile"] != "demo" else "–"
    speed = f"{run['samples per second']['median']:.2f} samples/s"
    return [speed, compared, f"{run['share of the matrix rate']:.1%}", run["device"]]


def _decoding(run: dict) -> list[str]:
    speed = run["queries per second"]
    compared = f"{speed['generate']:.2f} with the library's `generate` ({run['ratio']:.1f} x)"
    if run["profile"] != "demo":
        compared += "; 0.98 reported for one H100"
    return [f"{speed['ours']:.2f} queries/s", compared, f"{run['share of the matrix rate']:.1%}", run["device"]]


def formats() -> str:
    """What number formats change in the answers of the trained demo model."""
    run = record("precision")
    rows = []
    for name, way in run["ways"].items():
        logit, probability = way["difference"]["logit"], way["difference"]["probability"]
        cells = [f"{x:.{digits}f}" for digits, part in ((3, logit), (4, probability)) for x in part.values()]
        cells = cells if name != "float32" else ["–"] * 4
        equal = f"{way['equal masks']} of {run['queries']}"
        rows.append([name, *cells, equal, *percentages(way["scores"], METRICS)])
    far = (f"{what}, {how} difference" for what in ("logit", "probability") for how in ("largest", "mean"))
    return f"{table(('weights', *far, 'equal masks', *METRICS.values()), rows)}\n\nDevice: {device(run)}."


def answering() -> str:
    """Memory that an answer of the paper's model takes, counted, by number format."""
    profile, rows = config.load("paper"), []
    for name, dtype, int8 in (
        ("float32", "float32", False),
        ("bfloat16 or float16", "bfloat16", False),
        ("int8, computed in bfloat16 or float16", "bfloat16", True),
    ):
        own = profile.model_copy(update={"model": profile.model.model_copy(update={"dtype": dtype})})
        gpu, main = precision.memory(own, torch.device("cuda"), int8).values()
        [cpu] = precision.memory(own, torch.device("cpu"), int8).values()
        rows.append([name, *(f"{size / 2**30:.1f} GiB" for size in (gpu, main, cpu))])
    head = ("weights", "on the GPU", "in main memory, while they are loaded", "without a GPU, in main memory")
    return table(head, rows)


def memory() -> str:
    """What a training sample keeps on the GPU at full size."""
    rows = [
        [
            f"`{name}`, layers {'' if kept['recomputes layers'] else 'not '}recomputed",
            f"{kept['MB per layer']:.0f} MB",
            f"{kept['MB resampler'] / 1e3:.1f} GB",
            f"{kept['GiB per sample']:.1f} GiB",
            f"{kept['GiB weights and trained state']:.1f} GiB",
            str(kept["samples that fit"]),
            str(kept["micro_batch"]),
        ]
        for name, kept in record("activations").items()
        if isinstance(kept, dict) and "MB per layer" in kept
    ]
    kept = ("a sample keeps", "per layer", "resampler", "in all")
    return table((*kept, "weights and trained state", "samples that fit 80 GB", "`micro_batch`"), rows)


def growth() -> str:
    """How the cost of a query grows."""
    rows = []
    for name, values in record("decoding_demo")["milliseconds per query by"].items():
        cells = " · ".join(f"{value}: {float(milliseconds):.1f} ms" for value, milliseconds in values.items())
        rows.append([name, cells])
    return table(("a query's cost by", "milliseconds"), rows)


def browser() -> str:
    """How long the prediction browser takes."""
    run = record("browser")
    opening = run["seconds in the page"]
    few, many = opening
    steps = {count: opening[count]["next, with frames"] for count in opening}
    rows = [
        [
            f"{int(count):,}",
            f"{opening[count]['open']:.1f} s",
            f"{steps[count]['median']:.2f} s",
            f"{steps[count]['slowest']:.2f} s",
        ]
        for count in (few, many)
    ]
    return (
        table(("predictions", "opening", "next query, with frames", "slowest"), rows) + f"\n\nDevice: {run['device']}."
    )


def corpus() -> str:
    """What was read of the corpus, by container; files that cannot be opened have none."""
    rows = []
    for name in sorted({run["container"] for run in record("video_corpus")["rows"]}, key=lambda name: (not name, name)):
        runs = [run for run in record("video_corpus")["rows"] if run["container"] == name]
        outcomes = [run["outcome"] for run in runs]
        worst = max((run["largest error, frames"] for run in runs if "frames" in run), default=None)
        rows.append(
            [
                name.replace(",", ", ") or "none",
                ", ".join(sorted({run["codec"] for run in runs} - {""})) or "–",
                str(len(runs)),
                *(str(outcomes.count(outcome)) for outcome in ("read right", "refused rightly", "wrong")),
                "–" if worst is None else f"{worst:.2f}",
            ]
        )
    return table(("container", "codecs", "files", "right", "refused", "wrong", "largest error, frames"), rows)


def cuts() -> str:
    """What became of the files of the corpus that were cut off."""
    cut = record("video_corpus")["cut files"]
    columns = ("refused", "told", "no frame missing", "silent")
    rows = [
        [name, str(sum(counts.values())), *(str(counts[column]) for column in columns)] for name, counts in cut.items()
    ]
    return table(("cut file", "cuts", *columns), rows)


def plot() -> Figure:
    """A query's milliseconds over frames, beams and queries per video, and what growth in proportion would be."""
    cost_by = record("decoding_demo")["milliseconds per query by"]
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(cost_by)), cost_by.items(), strict=True):
        at = [int(value) for value in values]
        milliseconds = list(values.values())
        axes.plot(at, milliseconds, marker="o", color=figures.BLUE)
        if name == "frames":
            axes.plot(at, [milliseconds[0] * x / at[0] for x in at], linestyle=":", color=figures.GREY)
        axes.set(xlabel=name, xticks=at, ylim=(0, 1.1 * max(milliseconds)))
    figure.axes[0].set(ylabel="milliseconds per query", title="dotted: in proportion")
    return figure


def device(run: dict) -> str:
    """What a record was measured on."""
    return f"{run['device']}, torch {run['versions']['torch']}"


TABLES: dict[str, Callable[[], str]] = {
    "demo-results": demo_results,
    "demo": demo,
    "readings": readings,
    "run-time": run_time,
    "seconds": seconds,
    "released": released,
    "val": val,
    "operations": operations,
    "features": features,
    "needs": needs,
    "needs-counted": needs_counted,
    "store": store,
    "performance": performance,
    "full-size": full_size,
    "full-size-cpu": full_size_cpu,
    "formats": formats,
    "answering": answering,
    "memory": memory,
    "growth": growth,
    "browser": browser,
    "corpus": corpus,
    "cuts": cuts,
}


def filled(text: str) -> str:
    """A README's text with every marked table made anew; raises KeyError for a name that is not in TABLES."""
    return MARKED.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=TABLES, help="print this table alone")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    if options.name:
        print(TABLES[options.name]())
        return
    texts = {path: path.read_text(encoding="utf-8") for path in READMES}
    if absent := TABLES.keys() - {place[2] for text in texts.values() for place in MARKED.finditer(text)}:
        sys.exit(f"no README file has a place for: {', '.join(sorted(absent))}")
    changed = {path: new for path, text in texts.items() if (new := filled(text)) != text}
    if options.check:
        names = ", ".join(str(path.relative_to(config.REPOSITORY)) for path in changed)
        sys.exit(f"{names}: not what the records say: run python tests/benchmarks/tables.py" if changed else 0)
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    plot().savefig(common.RECORDS / "growth.png", dpi=160)


if __name__ == "__main__":
    main()
