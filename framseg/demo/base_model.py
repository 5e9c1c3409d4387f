"""What made the demo's base model: ``framseg demo make-base``. None of it is part of the method."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from framseg import config, losses, prompt
from framseg.annotations import frame_labels, frame_times, soft_targets
from framseg.backbones.blip3 import Blip3, Resampler
from framseg.demo.synthetic import ACTIVITIES, DURATION, WORDS, labelled_row, nearness, render, scene

BASE = Path(__file__).parent / "base"
BASE_SEED = 7
BASE_QUERIES: list[str] = WORDS["base queries"]
BASE_SCENES = 500
BASE_STEPS = (300, 300, 250)
HEAD_FLOOR = -20.0  # the head's bias for every id that is not part of an answer


class Pictures(NamedTuple):
    """Pictures of scenes, those of a scene in random order, with what they show and questions about them."""

    pixels: Tensor  # uint8 [scenes, frames, 3, size, size]
    shown: Tensor  # int64 [scenes, frames]: 0 for the background alone, else 1 + index into ACTIVITIES
    near: Tensor  # float32 [scenes, frames]
    questions: Tensor  # int64 [questions, 2]: a scene and an index into ACTIVITIES
    labels: Tensor  # int64 [questions, frames], 0 or 1
    soft: Tensor  # float32 [questions, frames], soft targets


def draw(rng: np.random.Generator, count: int, image_size: int, frames: int, noise: tuple[float, float]) -> Pictures:
    """Draw `frames` pictures each of `count` new scenes, with backgrounds of a noise from the range `noise`."""
    scenes = [scene(rng) for _ in range(count)]
    pixels = torch.empty(count, frames, 3, image_size, image_size, dtype=torch.uint8)
    shown = np.zeros((count, frames), dtype=np.int64)
    near = np.zeros((count, frames), dtype=np.float32)
    questions, labels, soft = [], [], []
    for i, drawn in enumerate(scenes):
        order = rng.permutation(frames)
        times = frame_times(DURATION, frames)[order]
        image = torch.from_numpy(render(drawn, times, rng.uniform(*noise))).permute(0, 3, 1, 2)
        pixels[i] = functional.interpolate(image, (image_size, image_size), mode="bicubic", antialias=True)
        for stretch in drawn.stretches:
            if stretch.activity is not None:
                inside = (times >= stretch.start) & (times < stretch.end)
                shown[i, inside] = 1 + stretch.activity
                near[i, inside] = nearness(stretch, times[inside])
        for activity in drawn.activities:
            row = labelled_row(drawn, activity, rng)
            questions.append((i, activity))
            labels.append(frame_labels(row, frames)[order])
            soft.append(soft_targets(row, frames)[order])
    answers = torch.from_numpy(np.stack(labels)).long(), torch.from_numpy(np.stack(soft)).float()
    return Pictures(pixels, torch.from_numpy(shown), torch.from_numpy(near), torch.tensor(questions), *answers)


class BaseTraining:
    """The base model while it is trained, with the parts that are thrown away and the pictures that it is shown.

    Linear probes of each answer's hidden state must tell which picture it is about, what that picture shows and what
    the query names, so that each answer depends on its picture and on the query.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int):
        profile = config.load("demo")
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.tokenizer, self.section, self.losses = tokenizer, profile.model, profile.losses
        self.frames = profile.frames.count
        self.model = Blip3(self.section).train()
        tokens, self.head = self.section.tokens, self.model.lang_model.lm_head
        self.answers = torch.tensor([tokens.zero, tokens.one, tokens.end])
        with torch.no_grad():
            self.head.bias.fill_(HEAD_FLOOR)
            self.head.additional_fc.bias.fill_(HEAD_FLOOR)
            self.head.bias[self.answers] = 0
        width, kinds = self.section.language.hidden_size, len(ACTIVITIES)
        outputs = {"shown": kinds + 1, "frame": self.frames, "named": kinds, "near": 1}
        self.probes = nn.ModuleDict({name: nn.Linear(width, count) for name, count in outputs.items()})
        vision = self.section.vision
        self.varied = draw(self.rng, BASE_SCENES, vision.image_size, self.frames, (0.0, 0.9))
        self.plain = draw(self.rng, BASE_SCENES, vision.image_size, self.frames, (0.0, 0.0))
        self.resampler = Resampler(self.section.resampler, vision.hidden_size, width)  # for the first stage alone

    def picture_loss(self) -> tuple[Tensor, str]:
        """Of 128 pictures: what each shows and how near, told from the vision encoder; with the share told right."""
        scenes, frames = (torch.from_numpy(self.rng.integers(most, size=128)) for most in (BASE_SCENES, self.frames))
        tokens = self.resampler(self.model.vision_features(self.varied.pixels[scenes, frames]))[:, 0]
        shown, near = self.varied.shown[scenes, frames], self.varied.near[scenes, frames]
        logits = self.probes["shown"](tokens)
        distance = (self.probes["near"](tokens)[:, 0] - near).square().mean()
        right = (logits.argmax(-1) == shown).float().mean()
        return functional.cross_entropy(logits, shown) + distance, f"frames told {right:.2f}"

    def answer_loss(self, full: bool, weight: float, batch: int) -> tuple[Tensor, str]:
        """Of the answers to `batch` questions: the method's four losses, and `weight` times those of the probes.

        full: ask with the method's whole prompt, else with the query alone.
        """
        chosen = torch.from_numpy(self.rng.integers(len(self.plain.questions), size=batch))
        scenes, activities = self.plain.questions[chosen].T
        labels, soft = self.plain.labels[chosen], self.plain.soft[chosen]
        hidden = self._hidden([self._prompt(activity, full) for activity in activities.tolist()], labels, scenes)
        # Three rows of the head suffice: the bias of all others keeps them far below.
        logits = functional.linear(hidden, self.head.weight[self.answers], self.head.bias[self.answers])
        digits = logits[:, : self.frames, :2]
        target, settings = torch.cat([labels, torch.full((batch, 1), 2)], 1), self.losses
        loss = (
            losses.lm(logits, target)
            + losses.bce(digits, soft, settings.pos_weight)
            + losses.tversky(digits, soft, settings.tversky_alpha, settings.tversky_beta, settings.eps)
            + losses.generalized_dice(digits, soft, settings.eps)
        ) / 4
        about = hidden[:, : self.frames]
        named = activities[:, None].expand(-1, self.frames)
        which = self._probe_loss("frame", about, torch.arange(self.frames).expand(batch, -1))
        what = self._probe_loss("shown", about, self.plain.shown[scenes]) + self._probe_loss("named", about, named)
        right = (digits.argmax(-1) == labels).float().mean()
        return loss + weight * (which + what), f"digits {right:.3f}, frame {which:.2f}, content {what:.2f}"

    def _prompt(self, activity: int, full: bool) -> list[int]:
        """Token ids of a question about an activity, in one of four wordings that the demo set does not have."""
        query = ACTIVITIES[activity].query(BASE_QUERIES[int(self.rng.integers(len(BASE_QUERIES)))])
        tokens = self.section.tokens
        if full:
            return prompt.prompt_ids(self.tokenizer, tokens, query, self.frames)
        text = self.tokenizer.encode(query, add_special_tokens=False).ids
        return [tokens.image] * self.frames + text + [tokens.assistant]

    def _hidden(self, prompts: list[list[int]], labels: Tensor, scenes: Tensor) -> Tensor:
        """Hidden states from which the digits and the end token are predicted, [B, frames + 1, width]."""
        answered = [ids + digits for ids, digits in zip(prompts, self.answers[labels].tolist(), strict=True)]
        ids, mask = map(torch.from_numpy, prompt.pad_left(answered, self.section.tokens.pad))
        embeds, mask, _ = self.model.expand(ids, mask, self.model.vision_tokens(self.plain.pixels[scenes]))
        hidden = self.model.lang_model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return hidden[:, -self.frames - 1 :]

    def _probe_loss(self, name: str, hidden: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(self.probes[name](hidden).flatten(0, 1), target.flatten())


def optimize(
    title: str, parts: list[nn.Module], steps: int, peak: float, warmup: int, loss: Callable[[], tuple[Tensor, str]]
) -> None:
    """Train `parts` for `steps` steps of AdamW: a linear warm-up to the learning rate `peak`, then a cosine to 0."""
    parameters = list(nn.ModuleList(parts).parameters())
    optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), title)
    for step in bar:
        rate = peak * min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        value, note = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix_str(note)


def make_base(folder: Path = BASE, seed: int = BASE_SEED) -> None:
    """Train the base model from random weights and write model.safetensors (bf16), with the shipped tokenizer.json.

    SigLIP learns to tell pictures on all kinds of background, with a resampler that is then thrown away; resampler and
    Phi-3 learn to answer about pictures on plain grey, in random order, so that copying a digit does not help.
    """
    torch.set_num_threads(2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / prompt.FILE).write_bytes((BASE / prompt.FILE).read_bytes())
    base = BaseTraining(prompt.load(folder), seed)
    model = base.model
    seeing = [model.vision_encoder, base.resampler, base.probes]
    answering = [model.vision_tokenizer, model.lang_model, base.probes]
    optimize("1 of 3: frames", seeing, BASE_STEPS[0], 2e-3, 20, base.picture_loss)
    optimize("2 of 3: short prompt", answering, BASE_STEPS[1], 1e-3, 30, lambda: base.answer_loss(False, 0.3, 32))
    optimize("3 of 3: full prompt", answering, BASE_STEPS[2], 1e-3, 10, lambda: base.answer_loss(True, 0.2, 16))
    model.to(torch.bfloat16).save_published(folder)
