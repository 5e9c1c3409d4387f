"""The embedded demo: a synthetic video set in QVHighlights' format and a small base model that can read it.

A video shows one coloured shape at a time, moving over a noisy background that changes; each stretch of it is
one activity. The nearer (larger) the shape, the higher its saliency. Annotations, videos, tokenizer and base
weights are made from seeds alone; nothing is fetched.
"""

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from tqdm.auto import tqdm

from framseg.annotations import CLIP_SECONDS, Row, write
from framseg.config import Data

VERSION = 1  # of the set: another number makes it anew
SEED = 2026
VIDEOS = {"train": 220, "val": 60, "test": 60}
WIDTH, HEIGHT, FPS = 96, 72, 4
DURATION = 150
SHORT_SHARE = 0.08  # of videos shorter than DURATION
STRETCH = (14, 44)  # seconds of one activity
ANNOTATORS = 3


@dataclass(frozen=True)
class Activity:
    """What a stretch of video shows, and how queries name it."""

    rgb: tuple[int, int, int]
    shape: str
    phrase: str
    verb: str


ACTIVITIES = (
    Activity((220, 30, 40), "circle", "crimson ball", "bouncing"),
    Activity((40, 90, 230), "square", "sapphire box", "sliding"),
    Activity((40, 180, 60), "triangle", "emerald kite", "gliding"),
    Activity((250, 220, 40), "cross", "lemon windmill", "turning"),
    Activity((240, 130, 20), "diamond", "tangerine lantern", "swinging"),
    Activity((150, 50, 200), "ring", "violet hoop", "rolling"),
    Activity((60, 215, 225), "circle", "turquoise bubble", "rising"),
    Activity((250, 130, 190), "square", "rosy cushion", "tumbling"),
)
QUERIES = (
    "A {phrase} is {verb} across the scene.",
    "Someone filmed a {phrase} {verb} about",
    "the {phrase} keeps {verb}",
    "We see a {phrase} that is {verb} past the camera.",
)


@dataclass(frozen=True)
class Stretch:
    start: int  # seconds, on the clip grid
    end: int
    activity: int | None  # index into ACTIVITIES; None shows the background alone
    nearness: tuple[float, float, float]  # mean, amplitude and phase of its course


@dataclass(frozen=True)
class Scene:
    """One video, before it is drawn."""

    duration: int
    stretches: tuple[Stretch, ...]
    seed: int


def scene(rng: np.random.Generator, duration: int = DURATION) -> Scene:
    """Draw a scene: three activities in turns, each on screen for about 30 % of the time."""
    cast = rng.choice(len(ACTIVITIES), 3, replace=False)
    stretches, start, last = [], 0, None
    while start < duration:
        low, high = STRETCH
        length = CLIP_SECONDS * int(rng.integers(low // CLIP_SECONDS, high // CLIP_SECONDS + 1))
        if duration - start - length < low:  # what remains is too short for a stretch of its own
            length = duration - start
        choices = [None if rng.random() < 0.12 else int(a) for a in cast if a != last]
        last = choices[int(rng.integers(len(choices)))]
        course = (float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.2, 0.45)), float(rng.uniform(0, 2 * math.pi)))
        stretches.append(Stretch(start, start + length, last, course))
        start += length
    return Scene(duration, tuple(stretches), int(rng.integers(2**31)))


def _nearness(stretch: Stretch, times: np.ndarray) -> np.ndarray:
    mean, amplitude, phase = stretch.nearness
    turn = 2 * math.pi * (times - stretch.start) / max(stretch.end - stretch.start, 24)
    return np.clip(mean + amplitude * np.sin(turn + phase), 0, 1)


def render(scene: Scene, times: np.ndarray, noise: float = 1.0) -> np.ndarray:
    """Draw the scene at the given times (seconds). Returns [n, HEIGHT, WIDTH, 3], uint8 RGB.

    noise: how far the background strays from a plain grey, 1 for the demo set.
    """
    width, height = WIDTH, HEIGHT
    rng = np.random.default_rng(scene.seed)
    # The background changes at moments of its own, so that it says nothing about the activity.
    changes = np.sort(rng.uniform(0, scene.duration, 6))
    tones = rng.uniform(-58, 57, (7, 1, 1, 1)) + rng.uniform(-28, 28, (7, 1, 1, 3))
    coarse = rng.normal(0, 22, (7, 9, 12, 1))
    rows, columns = np.arange(height) * 9 // height, np.arange(width) * 12 // width
    backgrounds = (128 + noise * (tones + coarse[:, rows][:, :, columns])).astype(np.int16)
    grain = rng.normal(0, 8 * noise, (16, height, width, 1)).astype(np.int16)
    frames = backgrounds[np.searchsorted(changes, times)] + grain[rng.integers(16, size=len(times))]

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = (y + 0.5) / height, (x + 0.5) / height
    for stretch in scene.stretches:
        path = rng.uniform(0.5, 1.6, 2), rng.uniform(0, 2 * math.pi, 2)
        if stretch.activity is None:
            continue
        activity = ACTIVITIES[stretch.activity]
        colour = np.asarray(activity.rgb) + rng.integers(-14, 15, 3)
        shown = np.flatnonzero((times >= stretch.start) & (times < stretch.end))
        if not len(shown):
            continue
        now = times[shown]
        radius = 0.10 + 0.16 * _nearness(stretch, now)
        angle = path[0][:, None] * now + path[1][:, None]
        centre_x = (width / height) * (0.5 + 0.32 * np.sin(angle[0]))
        centre_y = 0.5 + 0.24 * np.cos(angle[1])
        dx, dy = (
            ((grid - centre[:, None, None]) / radius[:, None, None]).astype(np.float32)
            for grid, centre in ((x, centre_x), (y, centre_y))
        )
        part = frames[shown]
        part[_inside(activity.shape, dx, dy)] = colour
        frames[shown] = part
    return np.clip(frames, 0, 255).astype(np.uint8)


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Which pixels belong to the shape; offsets from its centre in units of its radius."""
    if shape in ("circle", "ring"):
        distance = dx * dx + dy * dy
        return (distance < 1) & (distance > 0.25) if shape == "ring" else distance < 1
    dx, dy = np.abs(dx), dy if shape == "triangle" else np.abs(dy)
    if shape == "square":
        return np.maximum(dx, dy) < 0.88
    if shape == "diamond":
        return dx + dy < 1.15
    if shape == "cross":
        return (np.minimum(dx, dy) < 0.36) & (np.maximum(dx, dy) < 1)
    return (dy < 0.7) & (dy > 2 * dx - 1)  # triangle


def label(scene: Scene, activity: int, rng: np.random.Generator) -> dict:
    """Windows, clip ids and three annotators' scores of one activity, as QVHighlights writes them.

    The scores follow the shape's nearness; each annotator has a leaning of his own and wavers a little.
    """
    windows, clips, scores = [], [], []
    leaning = rng.uniform(-0.6, 0.6, ANNOTATORS)
    for stretch in scene.stretches:
        if stretch.activity != activity:
            continue
        ids = np.arange(stretch.start // CLIP_SECONDS, stretch.end // CLIP_SECONDS)
        near = _nearness(stretch, CLIP_SECONDS * (ids + 0.5))
        votes = 0.6 + 3.6 * near[:, None] + leaning + rng.normal(0, 0.25, (len(ids), ANNOTATORS))
        windows.append((stretch.start, stretch.end))
        clips += ids.tolist()
        scores += np.clip(np.rint(votes), 0, 4).astype(int).tolist()
    return {
        "relevant_windows": tuple(windows),
        "relevant_clip_ids": tuple(clips),
        "saliency_scores": tuple(tuple(vote) for vote in scores),
    }


def scenes(split: str) -> dict[str, Scene]:
    """All scenes of a split by video id."""
    rng = np.random.default_rng([SEED, list(VIDEOS).index(split)])
    out = {}
    for number in range(VIDEOS[split]):
        short = rng.random() < SHORT_SHARE
        duration = CLIP_SECONDS * int(rng.integers(40, 74)) if short else DURATION
        out[f"shapes-{split}-{number:03d}_0.0_{duration:.1f}"] = scene(rng, duration)
    return out


def rows(split: str) -> list[Row]:
    """Annotations of a split: one query for each activity that a video shows, worded in one of four ways."""
    # Apart from the scenes' generator, so that wording and votes leave the videos as they are.
    rng = np.random.default_rng([SEED, 10 + list(VIDEOS).index(split)])
    out = []
    for vid, one in scenes(split).items():
        for activity in sorted({stretch.activity for stretch in one.stretches} - {None}):
            what = ACTIVITIES[activity]
            query = QUERIES[int(rng.integers(len(QUERIES)))].format(phrase=what.phrase, verb=what.verb)
            qid = 10_000 * (1 + list(VIDEOS).index(split)) + len(out)
            out.append(Row(qid, query, one.duration, vid, **label(one, activity, rng)))
    return out


def write_video(path: Path, scene: Scene) -> None:
    """Encode a scene as H.264 mp4; the bytes depend on the scene alone."""
    frames = render(scene, np.arange(scene.duration * FPS) / FPS)
    aside = path.with_suffix(f".{os.getpid()}.part")
    with av.open(aside, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "36", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(aside, path)


def make(data: Data, folder: Path) -> None:
    """Write the demo set into `folder`, laid out as `data` names it; what is already there is kept.

    Raises OSError, saying how much room it needs, when the disk is full.
    """
    stamp = folder / "made.json"
    made = {"version": VERSION, "seed": SEED, "videos": VIDEOS, "size": [WIDTH, HEIGHT, FPS]}
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == made:
        return
    videos = folder / data.videos
    try:
        videos.mkdir(parents=True, exist_ok=True)
        missing = {
            videos / f"{vid}.mp4": one
            for split in VIDEOS
            for vid, one in scenes(split).items()
            if not (videos / f"{vid}.mp4").is_file()
        }
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
            jobs = [pool.submit(write_video, path, one) for path, one in missing.items()]
            for job in tqdm(as_completed(jobs), "demo videos", len(jobs), disable=not jobs, unit="video"):
                job.result()
        for split in VIDEOS:
            write(folder / getattr(data, split), [unlabelled(row) if split == "test" else row for row in rows(split)])
        write(folder / data.test_labels, rows("test"))
        stamp.write_text(json.dumps(made) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"{folder}: the demo set could not be written ({error}); it needs 150 MB") from error


def unlabelled(row: Row) -> Row:
    """The row as the test split shows it."""
    return replace(row, relevant_windows=None, relevant_clip_ids=None, saliency_scores=None)


# --- the base model -------------------------------------------------------------------------------------------
# What follows makes framseg/base: run `python -m framseg.demo make-base`. None of it is part of the method.
#
# What the base has seen: pictures of the demo's shapes on plain grey, 25 at a time and in no order, with the full
# prompt, the shapes' names in sentences of its own (BASE_QUERIES) and a 0/1 answer for each picture. So it can look at
# a picture and tell whether it fits a name. (Its vision encoder alone has also seen coloured, noisy backgrounds, as
# SigLIP has seen the web.) What it has not seen: a video. That what one frame shows the next one mostly shows too,
# backgrounds that change, H.264, the demo's sentences and every scene of the demo set are new to it.

BASE = Path(__file__).parent / "base"
BASE_SEED = 7
BASE_QUERIES = ("{phrase}", "{verb}: {phrase}", "look for a {phrase}", "is there a {phrase}?")
BASE_SCENES = 500
BASE_STEPS = (300, 300, 250)
HEAD_FLOOR = -20.0  # bias of every id that is no answer


def build_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json that keeps BLIP-3's contract with a vocabulary from the project's own text.

    Digits and control tokens have their published ids and a 0/1 string is one token a digit. Pieces of the prompt
    may be longer than a word; a query's never are.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from framseg import prompt

    splitting = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never", split=False), pre_tokenizers.Digits(individual_digits=True)]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitting
    words = {f" {word.strip('.?:')}" for query in _all_queries() for word in query.split()} | {"a", "A", "the", "We"}
    template = [prompt.SYSTEM, *prompt.user_text("{}", 25).replace("<image>", "{}").split("{}")]
    trainer = trainers.BpeTrainer(vocab_size=4000, max_token_length=24, show_progress=False, special_tokens=[])
    learner.train_from_iterator(template * 2 + sorted(words) * 2, trainer)
    learned = json.loads(learner.to_str())["model"]

    digits = (29900, 29896, 29906, 29941, 29946, 29945, 29953, 29955, 29947, 29929)
    ids = {str(digit): id for digit, id in enumerate(digits)}
    ids |= {"▁": 29871, "<unk>": 0, "<s>": 1, "</s>": 2}
    ids |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = {chr(code) for code in range(33, 127)} | set(learned["vocab"])
    pieces = sorted(letters - ids.keys(), key=lambda piece: (len(piece), piece))
    ids |= {piece: 259 + i for i, piece in enumerate(pieces)}
    # The tables have 32,000 rows before the control tokens; ids without a piece get a name that no text spells.
    ids |= {f"<unused {id}>": id for id in set(range(32000)) - set(ids.values())}
    control = {32000: "<|endoftext|>", 32001: "<|assistant|>", 32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>"}
    control |= {32011: "<pad>", 32012: "<image>", 32013: "<image placeholder>", 32014: "<|endofchunk|>"}
    tokenizer = json.loads(
        Tokenizer(
            models.BPE(ids, [tuple(pair) for pair in learned["merges"]], unk_token="<unk>", byte_fallback=True)
        ).to_str()
    )
    tokenizer["pre_tokenizer"] = json.loads(splitting.__getstate__())
    joined = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer["decoder"] = json.loads(joined.__getstate__())
    tokenizer["added_tokens"] = [
        {
            "id": id,
            "content": control.get(id, f"<|placeholder {id}|>"),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id in range(32000, 32015)
    ]
    (folder / prompt.FILE).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _all_queries() -> list[str]:
    return [query.format(phrase=activity.phrase, verb=activity.verb) for activity in ACTIVITIES for query in QUERIES]


def _pictures(rng: np.random.Generator, count: int, image_size: int, frames: int, noise: tuple[float, float]) -> dict:
    """`count` new scenes as pictures in no order, what each shows and how near it is, and the scenes' questions."""
    import torch

    from framseg.annotations import frame_labels, frame_times, soft_targets

    drawn = [scene(rng) for _ in range(count)]
    times = frame_times(DURATION, frames)
    pixels = torch.empty(count, frames, 3, image_size, image_size, dtype=torch.uint8)
    shown = np.zeros((count, frames), dtype=np.int64)  # 0: background alone
    near = np.zeros((count, frames), dtype=np.float32)
    questions = []
    for i, one in enumerate(drawn):
        order = rng.permutation(frames)
        image = torch.from_numpy(render(one, times[order], rng.uniform(*noise))).permute(0, 3, 1, 2)
        pixels[i] = torch.nn.functional.interpolate(image, (image_size, image_size), mode="bicubic", antialias=True)
        for stretch in one.stretches:
            inside = ((times >= stretch.start) & (times < stretch.end))[order]
            if stretch.activity is not None:
                shown[i, inside] = 1 + stretch.activity
                near[i, inside] = _nearness(stretch, times[order][inside])
        for activity in sorted({stretch.activity for stretch in one.stretches} - {None}):
            row = Row(i, "", DURATION, "", **label(one, activity, rng))
            questions.append((i, activity, frame_labels(row, frames)[order], soft_targets(row, frames)[order]))
    return {
        "pixels": pixels,
        "shown": torch.from_numpy(shown),
        "near": torch.from_numpy(near),
        "questions": questions,
    }


def make_base(folder: Path = BASE, seed: int = BASE_SEED) -> None:
    """Train the base model from random weights and write tokenizer.json and model.safetensors (bf16).

    Three stages: SigLIP learns to tell pictures of all kinds, with a resampler that is then thrown away; resampler and
    Phi-3 learn to answer a short prompt about pictures on plain grey; then the full prompt. As the pictures are in no
    order, copying the previous digit is of no use, and they have to look. Beside the method's four losses, linear
    probes at each answer position must tell which picture it is about, what that one shows and what the query names.
    """
    import torch
    from torch import nn

    from framseg import config, losses, prompt
    from framseg.blip3 import Blip3, Resampler

    profile = config.load("demo")
    section, frames = profile.model, profile.frames.count
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    tokenizer = prompt.load(folder)
    model = Blip3(section).train()
    head = model.lang_model.lm_head
    answers = torch.tensor([section.tokens.zero, section.tokens.one, section.tokens.end])
    with torch.no_grad():
        head.bias.fill_(HEAD_FLOOR)
        head.additional_fc.bias.fill_(HEAD_FLOOR)
        head.bias[answers] = 0
    width, kinds = section.language.hidden_size, len(ACTIVITIES)
    probes = nn.ModuleDict(
        {
            "shown": nn.Linear(width, kinds + 1),
            "frame": nn.Linear(width, frames),
            "named": nn.Linear(width, kinds),
            "near": nn.Linear(width, 1),
        }
    )
    varied = _pictures(rng, BASE_SCENES, section.vision.image_size, frames, (0.0, 0.9))
    data = _pictures(rng, BASE_SCENES, section.vision.image_size, frames, (0.0, 0.0))
    eye = Resampler(section.resampler, section.vision.hidden_size, width)  # only to teach the encoder

    def stage(what, parameters, count, peak, warmup, compute):
        optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.98), weight_decay=0.01)
        bar = tqdm(range(count), what)
        for step in bar:
            rate = peak * min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / count))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, note = compute()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            bar.set_postfix_str(note)

    def tell_frames():
        videos = torch.from_numpy(rng.integers(BASE_SCENES, size=128))
        which = torch.from_numpy(rng.integers(frames, size=128))
        tokens = eye(model.vision_features(varied["pixels"][videos, which]))[:, 0]
        target, near = varied["shown"][videos, which], varied["near"][videos, which]
        logits = probes["shown"](tokens)
        distance = (probes["near"](tokens)[:, 0] - near).square().mean()
        loss = nn.functional.cross_entropy(logits, target) + distance
        return loss, f"frames told {(logits.argmax(-1) == target).float().mean():.2f}"

    def answer(full, weight, batch):
        chosen = [data["questions"][i] for i in rng.integers(len(data["questions"]), size=batch)]
        videos = torch.tensor([q[0] for q in chosen])
        labels = torch.from_numpy(np.stack([q[2] for q in chosen]).astype(np.int64))
        soft = torch.from_numpy(np.stack([q[3] for q in chosen])).float()
        rows = []
        for _, activity, _, _ in chosen:
            what = ACTIVITIES[activity]
            query = BASE_QUERIES[int(rng.integers(len(BASE_QUERIES)))].format(phrase=what.phrase, verb=what.verb)
            if full:
                rows.append(prompt.prompt_ids(tokenizer, section.tokens, query, frames))
            else:
                text = tokenizer.encode(query, add_special_tokens=False).ids
                rows.append([section.tokens.image] * frames + text + [section.tokens.assistant])
        ids, mask = (torch.from_numpy(x) for x in prompt.pad_left(rows, section.tokens.pad))
        start = ids.shape[1] - 1
        ids = torch.cat([ids, answers[labels]], 1)
        mask = torch.cat([mask, torch.ones_like(labels)], 1)
        tokens = model.vision_tokens(data["pixels"][videos])
        embeds, long_mask, where = model.expand(ids, mask, tokens)
        hidden = model.lang_model.model(inputs_embeds=embeds, attention_mask=long_mask).last_hidden_state
        hidden = hidden[:, where[0, start] : where[0, start] + frames + 1]
        # Three rows of the head suffice: all the others are held down by their bias.
        logits = nn.functional.linear(hidden, head.weight[answers], head.bias[answers])
        target = torch.cat([labels, torch.full((batch, 1), 2)], 1)
        settings = profile.losses
        digits = logits[:, :frames, :2]
        loss = (
            nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            + losses.bce(digits, soft, settings.pos_weight)
            + losses.tversky(digits, soft, settings.tversky_alpha, settings.tversky_beta, settings.eps)
            + losses.generalized_dice(digits, soft, settings.eps)
        ) / 4
        about = hidden[:, :frames]
        index = torch.arange(frames).expand(batch, -1)
        named = torch.tensor([q[1] for q in chosen])[:, None].expand(-1, frames)
        where_loss = nn.functional.cross_entropy(probes["frame"](about).flatten(0, 1), index.flatten())
        what_loss = nn.functional.cross_entropy(
            probes["shown"](about).flatten(0, 1), data["shown"][videos].flatten()
        ) + nn.functional.cross_entropy(probes["named"](about).flatten(0, 1), named.flatten())
        right = (digits.argmax(-1) == labels).float().mean()
        return loss + weight * (
            where_loss + what_loss
        ), f"digits {right:.3f}, frame {where_loss:.2f}, content {what_loss:.2f}"

    both = [*model.vision_encoder.parameters(), *eye.parameters(), *probes.parameters()]
    others = [*model.vision_tokenizer.parameters(), *model.lang_model.parameters(), *probes.parameters()]
    first, second, third = BASE_STEPS
    stage("1 of 3: frames", both, first, 2e-3, 20, tell_frames)
    stage("2 of 3: short prompt", others, second, 1e-3, 30, lambda: answer(False, 0.3, 32))
    stage("3 of 3: full prompt", others, third, 1e-3, 10, lambda: answer(True, 0.2, 16))
    model.to(torch.bfloat16).save_published(folder)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m framseg.demo")
    parser.add_argument("command", choices=["make-base"], help="train the demo's base model anew from its seed")
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=BASE_SEED)
    arguments = parser.parse_args()
    make_base(arguments.out, arguments.seed)
