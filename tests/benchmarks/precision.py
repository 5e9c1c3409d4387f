"""What do fewer bits change in the answers of a model that has learned? The demo's, on a CPU.

python tests/benchmarks/precision.py [--checkpoint runs/demo/checkpoint]     (a minute, after ./run_all.sh demo)

Every val query is answered in each number format with the same trained weights. Compared with float32: the masks, the
frame probabilities as decoded, and the logits of '1' minus those of '0' at each frame, given the digits that float32
answered before it, so that a digit that changed does not count in the frames after it. int8: the language model's
layers keep int8 weights and compute in the format that is named. Writes records/precision.json.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import common
import numpy as np
import torch
from tokenizers import Tokenizer

from framseg import checkpoint, config, dataset, decode, evaluate, prompt
from framseg.annotations import Row
from framseg.backbones.blip3 import Blip3
from framseg.run.paths import Run

WAYS = {  # the format that a checkpoint computes in, and what is asked for
    "float32": ("float32", "auto"),
    "bfloat16": ("bfloat16", "auto"),
    "float16": ("float32", "float16"),
    "int8, computed in float32": ("float32", "int8"),
    "int8, computed in bfloat16": ("bfloat16", "int8"),
}


@torch.inference_mode()
def logits(
    model: Blip3, profile: config.Profile, tokenizer: Tokenizer, rows: list[Row], masks: list[str]
) -> np.ndarray:
    """Logit of '1' minus that of '0', float64 [queries, f], each frame given the digits of `masks` before it."""
    store, tokens, count = dataset.store(profile), profile.model.tokens, profile.frames.count
    out = []
    for row, mask in zip(rows, masks, strict=True):
        vision = decode.encoded(model, store.read(row.vid)[None])
        ids = prompt.prompt_ids(tokenizer, tokens, row.query, count)
        positions = torch.arange(len(ids) - 1, len(ids) - 1 + count)[None]
        whole = torch.tensor([ids + prompt.answer_ids(tokens, mask)[:-1]])
        digits = model.digit_logits(model(None, whole, torch.ones_like(whole), positions, vision)[0]).double()
        out.append((digits[:, 1] - digits[:, 0]).numpy())
    return np.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Run("demo").checkpoint)
    parser.add_argument("--queries", type=int, help="so many of val; all by default")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    own = config.load(options.checkpoint / config.FILE)
    rows = sorted(dataset.rows(own, "val"), key=lambda row: row.vid)[: options.queries]
    ways, exact = {}, {}
    for name, (computed, asked) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(options.checkpoint, folder, dirs_exist_ok=True)
            section = own.model.model_copy(update={"dtype": computed})
            config.save(own.model_copy(update={"model": section}), Path(folder) / config.FILE)
            model, profile, tokenizer = checkpoint.loaded(folder, "cpu", asked)
        answers = list(decode.records(model, tokenizer, profile, rows))
        masks, probability = [answer["mask"] for answer in answers], np.array([a["probability"] for a in answers])
        exact = exact or {"masks": masks, "probability": probability}
        logit = logits(model, profile, tokenizer, rows, exact["masks"])
        exact.setdefault("logit", logit)
        far = {"probability": abs(probability - exact["probability"]), "logit": abs(logit - exact["logit"])}
        brief = evaluate.evaluate(answers, rows)["brief"]
        ways[name] = {
            "equal masks": sum(a == b for a, b in zip(masks, exact["masks"], strict=True)),
            "difference": {what: {"largest": float(x.max()), "mean": float(x.mean())} for what, x in far.items()},
            "scores": {metric: brief[metric] for metric in evaluate.METRICS},
        }
        print(name, ways[name])
    versions = common.about("torch", "transformers", "torchao")
    common.write("precision", versions | {"queries": len(rows), "ways": ways}, options.out)


if __name__ == "__main__":
    main()
