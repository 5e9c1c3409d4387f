"""The README's tables of measurements, made from the records beside this file, and the plot of how the cost grows.

python tests/benchmarks/tables.py           writes them into README.md, between the markers with their names, and
                                            records/growth.png
python tests/benchmarks/tables.py --check   exits with 1 if README.md holds others
"""

import argparse
import json
import re
import statistics
import sys

import common
from matplotlib.figure import Figure

from framseg import config
from framseg.evaluate import METRICS
from framseg.viz import figures

README = config.REPOSITORY / "README.md"
UNMEASURED = "unmeasured"


def record(name: str) -> dict | None:
    """A record, or None where nobody has measured it yet."""
    path = common.RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo() -> str:
    found = record("demo_seeds")
    first = next(iter(found["seeds"].values()))
    answers = {
        f"trained, seed {seed} ({one['training seconds']:.0f} s)": one["epochs"][-1]
        for seed, one in found["seeds"].items()
    }
    answers |= {
        f"seed {seed}, read as the authors do": one["read as"]["2 beams: mask, overlap"]
        for seed, one in found["seeds"].items()
    }
    answers |= {"untouched base": first["base"], **found["trivial"]}
    answers["query ignored (seed 1's answers shuffled among videos)"] = first["query ignored"]
    rows = [[name, *(f"{scores[column]:.2f}" for column in METRICS)] for name, scores in answers.items()]
    return f"{table(('', *METRICS.values()), rows)}\n\nDevice: {about(found)}."


def readings() -> str:
    """The demo's answers by policy and beams, mean over the seeds."""
    seeds = record("demo_seeds")["seeds"].values()
    rows = []
    for name in next(iter(seeds))["read as"]:
        means = [sum(one["read as"][name][metric] for one in seeds) / len(seeds) for metric in METRICS]
        rows.append([name, *(f"{mean:.2f}" for mean in means)])
    return table((f"mean of {len(seeds)} seeds", *METRICS.values()), rows)


def val() -> str:
    """The released val predictions, read in three ways."""
    found = record("ranked_policy")
    first = found["trials"]["mask first, then cuts .95 to .05 by mean probability"]
    tried = first | found["trials"]["saliency: interpolation of (.1 .8 .1)-smoothed"]
    best, more = found["systems"]["ranked, out of fold"], found["difference of ranked, out of fold, to"]["as submitted"]
    answers = {
        "as the authors submitted it (`thresholds`, `overlap`)": found["systems"]["as submitted"]["scores"],
        "the mask's own windows, padded (`mask`, `overlap`)": found["systems"]["mask"]["scores"],
        "mask first, then windows at cuts .95 to .05 by mean probability; linear interpolation of (.1 .8 .1)-smoothed "
        "probabilities": tried,
        "**`ranked`, `gaussian`, out of fold**": best["scores"],
        "more than as submitted": more["scores"],
    }
    rows = [[name, *(f"{scores[metric]:.2f}" for metric in METRICS.values())] for name, scores in answers.items()]
    for place, one in ((4, best), (6, more)):
        ends = [one["interval"][metric] for metric in METRICS.values()]
        rows.insert(place, ["95 % interval", *(f"{low:.1f} to {high:.1f}" for low, high in ends)])
    return table(("val", *METRICS.values()), rows)


def store() -> str:
    found = record("frame_store")
    video, sample = (
        {key: f"{value / 1e6:.2f}" for key, value in found[f"stored bytes a {what}"].items()}
        for what in ("video", "sample")
    )
    extraction = next(value for key, value in found.items() if key.startswith("extraction"))
    cpu = {name: one["CPU seconds a video"] for name, one in found["decoding in one process"].items()}
    read = found["reading a sample in one process"]
    total = next(value for key, value in found.items() if key.startswith("GB for"))
    rows = [
        [
            "a video in the store (75 pictures)",
            f"{video['mean']} MB ({video['min']} to {video['max']}); {total} GB for all",
        ],
        ["a sample (25 pictures)", f"{sample['mean']} MB ({sample['min']} to {sample['max']})"],
        *(
            [f"extraction, {name.replace(': ', ' ')}", f"{one['videos/s']:.2f} videos/s, {one['frames/s']:,} frames/s"]
            for name, one in extraction.items()
        ),
        ["decoding, CPU seconds a video", "; ".join(f"{name} {seconds:.1f}" for name, seconds in cpu.items())],
        ["reading a sample, one core", f"{read['ms, median']} ms, {read['samples/s']:.0f} samples/s"],
    ]
    return table(("", ""), rows)


def performance() -> str:
    """One line a measurement: what, how fast, beside what, share of what the device's matrix products reach."""
    rows = []
    for name, where in (("demo", "demo model"), ("h100", "full size, random weights")):
        found = record(f"training_{name}")
        rows.append([f"training, {where}", *_training(found)] if found else _missing(f"training, {where}", name))
    for name, where in (("demo", "demo model"), ("h100", "full size, random weights")):
        found = record(f"decoding_{name}")
        rows.append([f"decoding, {where}", *_decoding(found)] if found else _missing(f"decoding, {where}", name))
    if found := record("evaluator"):
        evaluated = f"{found['median']:.2f} s for {found['queries']:,} queries"
        rows.append(["scoring val", evaluated, "every metric as the dataset's own evaluator", "–", found["device"]])
    return table(("what", "here", "beside", "share of the matrix rate", "device"), rows)


def memory() -> str:
    """What a training sample keeps on the GPU at full size."""
    found = record("activations")
    rows = [
        [
            f"`{name}`, layers {'' if one['recomputes layers'] else 'not '}recomputed",
            f"{one['MB a layer']:.0f} MB",
            f"{one['MB resampler'] / 1e3:.1f} GB",
            f"{one['GiB a sample']:.1f} GiB",
            f"{one['GiB weights and trained state']:.1f} GiB",
            str(one["samples that fit"]),
            str(one["micro_batch"]),
        ]
        for name, one in found.items()
        if isinstance(one, dict) and "MB a layer" in one
    ]
    head = ("a sample keeps", "a layer", "resampler", "in all", "beside weights and state", "80 GB hold", "micro_batch")
    return table(head, rows)


def growth() -> str:
    found = record("decoding_demo")["milliseconds a query by"]
    lines = []
    for name, values in found.items():
        cells = " · ".join(f"{value}: {float(milliseconds):.1f} ms" for value, milliseconds in values.items())
        lines.append([name, cells])
    return table(("a query's cost by", "milliseconds"), lines)


def seconds() -> str:
    """Where the seconds of a demo run go, and what was made faster: medians of measurements taken in turns."""
    found = record("seconds")
    steps = " · ".join(f"{name.split('_')[0]}: {taken} s" for name, taken in found["demo, seconds"].items())
    tests = list(found["slowest tests, seconds"].items())[:5]
    slow = " · ".join(f"`{name.split('::')[-1].split('[')[0].split()[0]}` {taken} s" for name, taken in tests)
    rows = [
        ["`./run_all.sh`, by notebook", steps, ""],
        ["`./run_all.sh test --all`, the slowest", slow, ""],
    ]
    for what, sides in found["rounds"].items():
        name, unit = what.rsplit(", ", 1)
        before, now = (f"{statistics.median(sides[side]):.1f} {unit}" for side in ("before", "after"))
        rows.append([name, f"before: {before}", f"now: {now}"])
    return table(("what", "", ""), rows)


def plot() -> Figure:
    """A query's milliseconds over frames, beams and queries a video, and what growth in proportion would be."""
    found = record("decoding_demo")["milliseconds a query by"]
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        at = [int(value) for value in values]
        measured = list(values.values())
        axes.plot(at, measured, marker="o", color=figures.BLUE)
        if name == "frames":
            axes.plot(at, [measured[0] * x / at[0] for x in at], linestyle=":", color=figures.GREY)
        axes.set(xlabel=name, xticks=at, ylim=(0, 1.1 * max(measured)))
    figure.axes[0].set(ylabel="milliseconds a query", title="dotted: in proportion")
    return figure


def about(found: dict) -> str:
    versions = found["versions"]
    return f"{found['device']}, torch {versions['torch']}"


def _training(found: dict) -> list[str]:
    beside = "2.49 samples/s reported for a GPU of 2 x H100" if found["profile"] != "demo" else "–"
    speed = f"{found['samples a second']['median']:.2f} samples/s"
    return [speed, beside, f"{found['share of the matrix rate']:.1%}", found["device"]]


def _decoding(found: dict) -> list[str]:
    speed = found["queries a second"]
    beside = f"{speed['generate']:.2f} with the library's `generate` ({found['ratio']:.1f} x)"
    if found["profile"] != "demo":
        beside += "; 0.98 reported for one H100"
    return [f"{speed['ours']:.2f} queries/s", beside, f"{found['share of the matrix rate']:.1%}", found["device"]]


def _missing(what: str, profile: str) -> list[str]:
    return [what, UNMEASURED, "–", "–", f"needs a GPU (profile `{profile}`)"]


TABLES = {
    "demo": demo,
    "readings": readings,
    "val": val,
    "store": store,
    "performance": performance,
    "memory": memory,
    "growth": growth,
    "seconds": seconds,
}


def filled(text: str) -> str:
    """The README's text with every table made anew."""
    for name, make in TABLES.items():
        marked = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"{README}: has no place for the table {name!r}")
        content = make()
        text = marked.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)  # noqa: B023
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if options.check and before != after:
        sys.exit("README.md does not show what the records say: run python tests/benchmarks/tables.py")
    README.write_text(after, encoding="utf-8")
    plot().savefig(common.RECORDS / "growth.png", dpi=160)


if __name__ == "__main__":
    main()
