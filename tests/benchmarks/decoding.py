"""How fast are answers? Our beam search and the library's `generate`, side by side, and how the cost grows.

python tests/benchmarks/decoding.py                                  (the demo's base on this machine)
python tests/benchmarks/decoding.py --profile released --random --videos 48 --batch 1 6 16   (full size, on a GPU)

Writes records/decoding_<profile>.json. Every measurement is the median of --repeats rounds in which both sides take
turns; both get the same weights, prompts and beams, and the record says for how many queries their masks are the same.
Of several --batch sizes, each is measured; the first one is also what the record gives as the profile's.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import common
import torch
from torch.utils.benchmark import timer
from transformers import LogitsProcessor, LogitsProcessorList, Phi3ForCausalLM

from framseg import config, decode, prompt
from framseg.backbones import blip3
from framseg.checkpoint import load_base
from framseg.run import cost

QUERY = "a {} walks over the {} with a {}"
NOUNS = ("dog", "bridge", "red umbrella", "bicycle", "friend")


class OnlyDigits(LogitsProcessor):
    def __init__(self, digits: torch.Tensor):
        self.digits = digits

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, self.digits, scores[:, self.digits])


def queries(count: int) -> list[str]:
    """Sentences of different lengths."""
    made = (QUERY.format(*three) for three in itertools.permutations(NOUNS, 3))
    return list(itertools.islice(itertools.cycle(made), count))


class Work:
    """`videos` random videos with `each` queries, ready for both sides."""

    def __init__(self, profile: config.Profile, model: blip3.Blip3, videos: int, each: int):
        tokenizer, tokens, size = (
            prompt.load("framseg/demo/base"),
            profile.model.tokens,
            profile.model.vision.image_size,
        )
        self.profile, self.model, self.each = profile, model, each
        draw = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(
            0, 256, (videos, profile.frames.count, 3, size, size), dtype=torch.uint8, generator=draw
        ).to(model.device)
        ids, mask = prompt.pad_left(
            [prompt.prompt_ids(tokenizer, tokens, query, profile.frames.count) for query in queries(videos * each)],
            tokens.pad,
        )
        self.ids, self.mask = (torch.from_numpy(x).to(model.device) for x in (ids, mask))

    def batches(self):
        size = self.profile.inference.batch
        for begin in range(0, len(self.ids), size):
            rows = torch.arange(begin, min(begin + size, len(self.ids)))
            yield rows, self.ids[rows], self.mask[rows]

    @torch.inference_mode()
    def ours(self) -> torch.Tensor:
        """Every video encoded once, every prompt read once; masks [queries, f]."""
        encoded = [self.model.vision_tokens(some) for some in self.pixels.split(self.profile.inference.batch)]
        vision = torch.cat(encoded)
        found = [
            decode.beam_search(
                self.model,
                vision[rows // self.each],
                ids,
                mask,
                self.profile.frames.count,
                self.profile.inference.beams,
            ).masks[:, 0]
            for rows, ids, mask in self.batches()
        ]
        return torch.cat(found).cpu()

    @torch.inference_mode()
    def librarys(self) -> torch.Tensor:
        """As `generate` is used: a video encoded for each query, a copy of the prompt for each beam."""
        model, tokens, count = self.model, self.profile.model.tokens, self.profile.frames.count
        library = Phi3ForCausalLM(model.lang_model.model.config).eval()
        library.model, library.lm_head = model.lang_model.model, model.lang_model.lm_head
        digits = torch.tensor([tokens.zero, tokens.one], device=model.device)
        found = []
        for rows, ids, mask in self.batches():
            vision = model.vision_tokens(self.pixels[rows // self.each])
            embeds, long_mask, _ = model.expand(ids, mask, vision)
            out = library.generate(
                inputs_embeds=embeds,
                attention_mask=long_mask,
                max_new_tokens=count,
                num_beams=self.profile.inference.beams,
                do_sample=False,
                length_penalty=0.0,
                logits_processor=LogitsProcessorList([OnlyDigits(digits)]),
                renormalize_logits=True,
                pad_token_id=tokens.pad,
            )
            found.append((out[:, -count:] == tokens.one).to(torch.int8))
        return torch.cat(found).cpu()


def clock() -> float:
    """Seconds; of one CPU thread its own, which other work does not add to; with a GPU, when that has finished."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else timer()


def timed(work) -> tuple[float, torch.Tensor]:
    began = clock()
    masks = work()  # ends on the CPU, so the device has finished
    return clock() - began, masks


def seconds_a_query(profile, model, videos, each, repeats) -> float:
    work = Work(profile, model, videos, each)
    work.ours()
    return statistics.median(timed(work.ours)[0] for _ in range(repeats)) / (videos * each)


def compared(profile: config.Profile, model: blip3.Blip3, videos: int, repeats: int) -> dict:
    """Both sides in turns, a query per video, with what memory each needs at most."""
    work = Work(profile, model, videos, each=1)
    work.ours(), work.librarys()  # warm-up
    sides: dict[str, list] = {"ours": [], "generate": []}
    peaks = {}
    for _ in range(repeats):
        for name, side in (("ours", work.ours), ("generate", work.librarys)):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            sides[name].append(timed(side))
            peaks[name] = common.peak_gib()
    median = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in sides.items()}
    dtype = getattr(torch, profile.model.dtype)
    positions = work.ids.shape[1] + profile.frames.count * profile.model.resampler.latents
    reached = cost.operations(profile, positions).inference * len(work.ids) / median["ours"]
    alone = profile.model_copy(update={"training": profile.training.model_copy(update={"epochs": 0})})
    return {
        "queries": len(work.ids),
        "batch": profile.inference.batch,
        "seconds": {name: [round(seconds, 4) for seconds, _ in runs] for name, runs in sides.items()},
        "same masks": sum(map(torch.equal, sides["ours"][0][1], sides["generate"][0][1])),
        "queries per second": {name: round(len(work.ids) / seconds, 3) for name, seconds in median.items()},
        "ratio": round(median["generate"] / median["ours"], 2),
        "share of the matrix rate": round(reached / cost.matrix_rate(model.device, dtype, clock=clock), 4),
        "peak GiB": peaks,
        "counted GiB": round(cost.gpu_bytes(alone) / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--random", action="store_true", help="random weights: a speed does not depend on them")
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", help="queries a batch; as in the profile without it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; one is disturbed least by other work")
    parser.add_argument("--no-growth", action="store_true", help="leave out the tables of how the cost grows")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    profile = config.load(options.profile)
    sizes = options.batch or [profile.inference.batch]
    overrides = {"inference.batch": sizes[0]}
    profile = config.load(options.profile, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.random:
        with torch.device(device):
            torch.set_default_dtype(getattr(torch, profile.model.dtype))
            model = blip3.Blip3(profile.model).eval()
            torch.set_default_dtype(torch.float32)
    else:
        model = load_base(profile).to(device)

    runs = [
        compared(config.load(profile.name, {"inference.batch": size}), model, options.videos, options.repeats)
        for size in sizes
    ]
    record = common.about(
        profile=profile.name,
        weights="random" if options.random else profile.model.weights,
        dtype=profile.model.dtype,
        beams=profile.inference.beams,
        frames=profile.frames.count,
        threads=torch.get_num_threads(),
        **runs[0],
    )
    if len(runs) > 1:
        record["by batch"] = {run["batch"]: run for run in runs}
    if not options.no_growth:
        few, each = max(1, options.videos // 4), options.repeats
        change = {
            "frames": [("frames.count", count) for count in (10, 25, 50, 100)],
            "beams": [("inference.beams", beams) for beams in (1, 2, 4, 8)],
        }
        record["milliseconds per query by"] = {
            name: {
                value: round(
                    1e3 * seconds_a_query(config.load(profile.name, overrides | {key: value}), model, few, 1, each), 2
                )
                for key, value in changes
                if value * (profile.model.resampler.latents if name == "frames" else 1) < profile.model.language.context
            }
            for name, changes in change.items()
        }
        record["milliseconds per query by"]["queries per video"] = {
            number: round(1e3 * seconds_a_query(profile, model, few, number, each), 2) for number in (1, 2, 4, 8)
        }
    for run in runs:
        print(run["batch"], run["queries per second"], f"{run['same masks']} of {run['queries']} masks the same")
    common.write(f"decoding_{profile.name}", record, options.out)


if __name__ == "__main__":
    main()
