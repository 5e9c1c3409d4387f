"""What made the demo's base model: run `python -m framseg.demo make-base`. None of it is part of the method."""

import json
import math
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from framseg.annotations import LabelledRow
from framseg.demo.synthetic import ACTIVITIES, DURATION, QUERIES, label, nearness, render, scene

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
                near[i, inside] = nearness(stretch, times[order][inside])
        for activity in sorted({stretch.activity for stretch in one.stretches} - {None}):
            row = LabelledRow(i, "", DURATION, "", **label(one, activity, rng))
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
    from framseg.backbones.blip3 import Blip3, Resampler

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
