"""Masks and frame probabilities out of the model: beam search over the two digits, and whole splits.

The prompt's keys and values are computed once per sample and shared by its beams, and a video is encoded once for all
queries that ask about it. An answer has exactly f digits.
"""

import glob
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from framseg import FramsegError, command_line, config, dataset, prompt
from framseg.annotations import Row
from framseg.backbones import blip3, fingerprint
from framseg.checkpoint import loaded, require_complete
from framseg.frames import Store, StoreError, VideoError
from framseg.jsonl import is_integer, numbered_lines, parse_object, write_lines
from framseg.predictions import answer_record, read_predictions
from framseg.run import launcher, resume
from framseg.run.paths import Run


class DecodeError(FramsegError, RuntimeError):
    """Decoding that did not end well; the message says where its log is."""


class Decoded(NamedTuple):
    """The k best masks of each of B samples, best first.

    masks: int8 [B, k, f]. scores: float32 [B, k], sums of the digits' log-probabilities. probabilities: float32
    [B, k, f], of '1' against '0' at each frame, given the mask's digits before it.
    """

    masks: Tensor
    scores: Tensor
    probabilities: Tensor


class _SharedLayer(DynamicLayer):
    """One layer's keys and values [B, heads, positions, width] of the prompt's last `kept` positions and of all beams.

    Each step adds a position per beam. There is `room` for all steps, so that the prompt's part is written only once.
    """

    def __init__(self, kept: int, room: int):
        super().__init__()
        self.used, self.room = kept, room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store what a layer has computed of new positions; returns what they may attend to."""
        if self.keys is None or self.values is None:
            room = (0, 0, 0, self.room)
            states = (each[:, :, each.shape[2] - self.used :] for each in (key_states, value_states))
            self.keys, self.values = (F.pad(each, room) for each in states)
            self.is_initialized = True
            return key_states, value_states
        begin, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, begin : self.used] = key_states
        self.values[:, :, begin : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


@torch.inference_mode()
def beam_search(
    model: blip3.Blip3, vision_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, frames: int, beams: int
) -> Decoded:
    """The best of all 2^f masks that beam search finds; a mask's score is its sum of log-softmax over the two digits.

    vision_tokens: [B, f, latents, width]. input_ids, attention_mask: [B, L], padded left, up to <|assistant|>. The
    result has k = min(beams, 2^frames) masks. Beams of equal score keep the order of their parents, '0' before '1'.
    The model must be in eval mode. Raises ValueError for prompts padded right or too long for the context.
    """
    if frames < 1 or beams < 1:
        raise ValueError(f"frames and beams must be at least 1, not {frames} and {beams}")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("the prompts must be padded on the left: their last position gives the first digit")
    beams = min(beams, 2**frames)
    language, head, tokens = model.lang_model.model, model.lang_model.lm_head, model.section.tokens
    digit_ids = torch.tensor([tokens.zero, tokens.one], device=input_ids.device)
    weight, bias = head.weight[digit_ids], head.bias[digit_ids]

    embeds, real, _ = model.expand(input_ids, attention_mask, vision_tokens)
    batch, length = real.shape
    context, window = model.section.language.context, model.section.language.sliding_window
    if length + frames > context:
        raise ValueError(f"prompt and answer take {length + frames} of {context} positions: shorten the query")
    # The answer's positions see nothing of what lies before the window of its first one.
    kept = length if window is None else min(length, window - 1)
    cache = Cache(layers=[_SharedLayer(kept, beams * (frames - 1)) for _ in language.layers])
    output = language(inputs_embeds=embeds, attention_mask=real, past_key_values=cache, use_cache=True)
    hidden = output.last_hidden_state[:, -1:]

    rows = torch.arange(batch, device=real.device)[:, None]
    prompt_seen = real[:, None, length - kept :].bool()
    places = torch.arange(length - kept, length, device=real.device)  # position of each cached key
    seen = real.new_zeros(batch, 1, 0, dtype=torch.bool)  # which of the steps' keys belong to a beam
    masks = real.new_zeros(batch, 1, 0, dtype=torch.int8)
    probabilities = hidden.new_zeros(batch, 1, 0, dtype=torch.float32)
    scores = hidden.new_zeros(batch, 1, dtype=torch.float32)
    chosen = language.config._attn_implementation
    # Attention has to take the mask below, which says which beam came from which; flash attention takes none.
    language.config._attn_implementation = "sdpa"
    try:
        for frame in range(frames):
            logits = F.linear(hidden, weight, bias).float()
            total = (scores[..., None] + logits.log_softmax(-1)).flatten(1)
            order = total.argsort(dim=1, descending=True, stable=True)[:, :beams]
            parent, digit = order // 2, order % 2
            scores = total.gather(1, order)
            masks = torch.cat([masks[rows, parent], digit[..., None].to(torch.int8)], dim=-1)
            probabilities = torch.cat([probabilities, logits.softmax(-1)[..., 1:]], dim=-1)[rows, parent]
            if frame == frames - 1:
                break
            position, width = length + frame, order.shape[1]
            own = torch.eye(width, dtype=torch.bool, device=real.device).expand(batch, -1, -1)
            seen = torch.cat([seen[rows, parent], own], dim=-1)
            places = torch.cat([places, places.new_full((width,), position)])
            allowed = torch.cat([prompt_seen.expand(-1, width, -1), seen], dim=-1)
            if window is not None:
                allowed = allowed & (places > position - window)
            where = {"attention_mask": allowed[:, None], "position_ids": places.new_full((1, width), position)}
            embeds = language.embed_tokens(digit_ids[digit])
            hidden = language(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **where).last_hidden_state
    finally:
        language.config._attn_implementation = chosen
    return Decoded(masks, scores, probabilities)


def records(model: blip3.Blip3, tokenizer: Tokenizer, profile: config.Profile, rows: Sequence[Row]) -> Iterator[dict]:
    """Prediction records of `rows`, as each is ready and in the order of the videos' names.

    The frames come from the profile's frame store, the middle variation of each. The records are `answer_record`s of
    framseg.predictions. A video whose frames cannot be read gives an invalid one, with all frames at 1 and the reason
    as `error`, and a warning. Puts the model into eval mode. Raises StoreError for frames that were made with other
    settings, PromptError for queries that are too long.
    """
    model.eval()
    store, inference, count = dataset.store(profile), profile.inference, profile.frames.count
    prompt.refuse_long(tokenizer, profile.model, count, {row.qid: row.query for row in rows})
    rows = sorted(rows, key=lambda row: row.vid)
    reading = _read_ahead(store, list(dict.fromkeys(row.vid for row in rows)), inference.batch)
    tokens: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    # Processes that work together show none: who started them does.
    with tqdm(desc="decoding", total=len(rows), unit="query", disable=torch.distributed.is_initialized()) as bar:
        for begin in range(0, len(rows), inference.batch):
            batch = rows[begin : begin + inference.batch]
            vids = dict.fromkeys(row.vid for row in batch)
            tokens = {vid: tokens[vid] for vid in vids if vid in tokens}
            images = {}
            new = len(vids.keys() - tokens.keys() - failed.keys())
            for vid, content in islice(reading, new):
                if isinstance(content, VideoError):
                    failed[vid] = store.failures().get(vid, str(content))
                    tqdm.write(f"warning: no frames, counted as failed: {failed[vid]}")
                else:
                    images[vid] = content
            if images:
                tokens |= zip(images, encoded(model, np.stack(list(images.values()))), strict=True)
            for row in batch:
                if row.vid in failed:
                    whole = answer_record(row, "1" * count, np.ones(count), inference)
                    yield whole | {"valid": False, "error": failed[row.vid]}
            readable = [row for row in batch if row.vid not in failed]
            if readable:
                vision = torch.stack([tokens[row.vid] for row in readable])
                masks, probabilities = answers(model, tokenizer, profile, [row.query for row in readable], vision)
                for row, mask, probability in zip(readable, masks, probabilities, strict=True):
                    yield answer_record(row, mask, probability, inference)
            bar.update(len(batch))


def split(
    model: blip3.Blip3, tokenizer: Tokenizer, profile: config.Profile, rows: Sequence[Row], path: Path
) -> list[dict]:
    """Decode `rows`, write the records (see `records`) to `path` as JSON lines and return them, in the rows' order.

    What is finished is kept next to it in `path`.part…, and a call that follows an interrupted one goes on from there
    if weights, settings and prompt are the same; videos that failed are tried again. Where torch.distributed is
    initialised, its processes share the work by videos, and the first one writes `path`.
    """
    rank, world = launcher.place()
    source = made_by(model, tokenizer, profile)
    parts, own = _parts(path), path.with_name(f"{path.name}.part{rank}")
    done = _finished(parts, source, rows)
    mine = share([row for row in rows if row.qid not in done], rank, world)
    launcher.gathered(None)  # nobody writes before all have read
    write_lines(own, [source, *_finished([own], source, rows).values()])
    new = []
    with own.open("a", encoding="utf-8") as file:
        for record in records(model, tokenizer, profile, mine):
            print(json.dumps(record), file=file, flush=True)
            new.append(record)
    done |= {record["qid"]: record for processed in launcher.gathered(new) for record in processed}
    predictions = [done[row.qid] for row in rows]
    if rank == 0:
        write_lines(path, predictions)
        for part in _parts(path):
            part.unlink()
    return predictions


def share(rows: Sequence[Row], rank: int, world: int) -> list[Row]:
    """A process's rows: every video belongs to one process, which encodes it once."""
    number = {vid: i for i, vid in enumerate(dict.fromkeys(row.vid for row in rows))}
    return [row for row in rows if number[row.vid] % world == rank]


def whole(profile: config.Profile, run: Run, name: str) -> list[dict]:
    """Decode split `name` (val or test) with the run's checkpoint into `run.predicted(name)`; the records in row order.

    With several processes in the profile, the DeepSpeed launcher starts them and each decodes its share. Goes on after
    an interruption as `split` does. Raises CheckpointError for a run without a checkpoint, ResumeError for one that was
    trained with other frames or another model, DecodeError if a process fails.
    """
    require_complete(run.checkpoint)
    resume.changes(profile, run, trains=False, sections=("frames", "model"))
    rows, path, section = dataset.rows(profile, name), run.predicted(name), profile.training
    gpus = torch.cuda.device_count() if section.device == "auto" else 0
    processes = min(section.processes, gpus or section.processes)
    if processes == 1:
        model, _, tokenizer = loaded(run.checkpoint, section.device)
        return split(model, tokenizer, profile, rows, path)
    run.predictions.mkdir(parents=True, exist_ok=True)
    own_profile, log = run.predictions / f"{name}.profile.yaml", run.predictions / f"{name}.log"
    # Trained on several nodes, decoded on this one.
    section = section.model_copy(update={"processes": processes})
    profile = profile.model_copy(update={"training": section})
    config.save(profile, own_profile)
    arguments = ["--profile", str(own_profile), "--run-dir", str(run.root), "--split", name]
    before = path.stat().st_mtime_ns if path.is_file() else 0
    with (
        launcher.Job("framseg.decode", profile, log, arguments) as job,
        tqdm(desc=f"decoding {name}", total=len(rows), unit="query") as bar,
    ):
        for _ in job.polls():
            with suppress(FileNotFoundError):  # the parts are removed at the end
                # The first line of each part says what made it.
                lines = [part.read_text(encoding="utf-8").count("\n") - 1 for part in _parts(path)]
                bar.update(max(0, sum(lines)) - bar.n if lines else 0)
    # The launcher ends with the code 0 where what it had started was killed from outside.
    if job.process.returncode or not path.is_file() or path.stat().st_mtime_ns == before:
        raise DecodeError(f"decoding {name} failed: {job.failure()}")
    return read_predictions(path)


@torch.inference_mode()
def encoded(model: blip3.Blip3, images: np.ndarray) -> Tensor:
    """uint8 [N, f, H, W, 3] RGB -> vision tokens [N, f, latents, width]."""
    return model.vision_tokens(dataset.pixels(images).to(model.device))


def answers(
    model: blip3.Blip3, tokenizer: Tokenizer, profile: config.Profile, queries: list[str], vision_tokens: Tensor
) -> tuple[list[str], np.ndarray]:
    """Masks of f characters and probabilities float64 [B, f] for B queries, each with its vision tokens."""
    count, tokens = profile.frames.count, profile.model.tokens
    prompts = [prompt.prompt_ids(tokenizer, tokens, query, count) for query in queries]
    ids, mask = (torch.from_numpy(array).to(model.device) for array in prompt.pad_left(prompts, tokens.pad))
    decoded = beam_search(model, vision_tokens, ids, mask, count, profile.inference.beams)
    masks = ["".join(map(str, digits)) for digits in decoded.masks[:, 0].tolist()]
    return masks, decoded.probabilities[:, 0].cpu().double().numpy()


def _read_ahead(store: Store, vids: Sequence[str], ahead: int) -> Iterator[tuple[str, np.ndarray | VideoError]]:
    """Frames of the videos in their order, or why there are none, while the next `ahead` are being read."""
    with ThreadPoolExecutor(max_workers=min(ahead, 8)) as pool:
        tasks = ((vid, pool.submit(store.read, vid)) for vid in vids)
        waiting = deque(islice(tasks, ahead))
        while waiting:
            vid, task = waiting.popleft()
            waiting.extend(islice(tasks, 1))
            error = task.exception()
            # A StoreError is raised: the set-up is wrong, not this video.
            yield vid, error if isinstance(error, VideoError) and not isinstance(error, StoreError) else task.result()


def made_by(model: blip3.Blip3, tokenizer: Tokenizer, profile: config.Profile) -> dict[str, str]:
    """The first line of a part file: a hash of settings, prompt and weights, all that records depend on but the row."""
    tokens, count = profile.model.tokens, profile.frames.count
    sections = {name: getattr(profile, name).model_dump(mode="json") for name in ("frames", "model", "inference")}
    example = prompt.prompt_ids(tokenizer, tokens, prompt.EXAMPLE_QUERY, count)
    about = json.dumps([sections, example, fingerprint(model)], sort_keys=True)
    return {"made_by": hashlib.sha256(about.encode()).hexdigest()}


def _parts(path: Path) -> list[Path]:
    """The files next to `path` that hold what each process has finished."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part*"))


def _finished(parts: Sequence[Path], source: dict, rows: Sequence[Row]) -> dict[int, dict]:
    """Records by qid that the same settings made of the same rows; not those of failed videos, nor cut-off lines."""
    asked = {row.qid: (row.query, row.vid, row.duration) for row in rows}
    out = {}
    for part in filter(Path.exists, parts):
        first, *found = [parse_object(line)[0] or {} for _, line in numbered_lines(part)] or [{}]
        for record in found if first == source else []:
            qid, about = record.get("qid"), tuple(record.get(name) for name in ("query", "vid", "duration"))
            if is_integer(qid) and about == asked.get(qid) and "error" not in record:
                out[qid] = record
    return out


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """One process of a split's decoding, as `whole` starts it."""
    purpose = "One process of a split's decoding."
    with launcher.started("framseg.decode", purpose, arguments, ("val", "test")) as (profile, run, options):
        model, _, tokenizer = loaded(run.checkpoint)
        rows = dataset.rows(profile, options.split)
        split(model, tokenizer, profile, rows, run.predicted(options.split))


if __name__ == "__main__":
    main()
