"""The prompt (paper's appendix) in Phi-3's chat form, as token ids, and what the method needs of a tokenizer.

Control tokens (<|system|>, <|user|>, <|assistant|>, <|end|>, <image>) are inserted as ids. All text is encoded so that
their spellings in it are ordinary text: no query can begin another turn or add a frame.
"""

import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from tokenizers import Tokenizer

from framseg import FramsegError, config
from framseg.jsonl import is_text

FILE = "tokenizer.json"
# What BLIP-3 adds to Phi-3's vocabulary, in the order of their ids.
ADDED = ("<pad>", "<image>", "<image placeholder>", "<|endofchunk|>")
SPELLING = {"assistant": "<|assistant|>", "end": "<|end|>", "pad": "<pad>", "image": "<image>"}

# The system's turn, and the user's before and after its images.
SYSTEM, OPENING, TASK = re.split("{user}\n|{images}", Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
EXAMPLE_QUERY = "A man in a red jacket rides a bicycle along the beach."

RANDOM_MASKS = 10_000
EXHAUSTIVE_LENGTH = 10  # every mask of up to this many frames is tried


class PromptError(FramsegError, ValueError):
    """A query or a tokenizer that the method cannot use; the message says why."""


@dataclass(frozen=True)
class Report:
    """Result of `check`. Positions are those of the expanded sample, where each <image> is `latents` vectors."""

    frames: int
    zero: int  # id of '0'
    one: int  # id of '1'
    masks_tried: int  # 0/1 strings that became exactly one digit token per character
    prompt_ids: int  # ids up to and with <|assistant|>, an image counted once
    prompt_positions: int  # the same with every vector of an image counted
    sample_positions: int  # with the answer's f + 1 tokens
    context: int
    digit_positions: tuple[int, ...]  # where the logits of digit 0 … f - 1 are read
    frames_outside: tuple[int, ...]  # frames without a vector in the window of the first answer position
    frames_partly: tuple[int, ...]  # frames with only some of their vectors in it


def load(name: str | Path) -> Tokenizer:
    """Tokenizer from a tokenizer.json, a folder that holds one, or a Hugging Face repository's name.

    Relative paths are looked up as `config.local_path` says. The tokenizer encodes the spelling of a special token as
    ordinary text. Raises PromptError if the file is missing or damaged or the hub cannot be reached within 10 s.
    """
    path = _file(name)
    try:
        # A published Phi-3 file puts a space before every part of the text; the authors' ids have none.
        tokenizer = Tokenizer.from_str(json.dumps(_without_prefix(json.loads(path.read_text(encoding="utf-8")))))
    except Exception as error:  # tokenizers raises no class of its own
        raise PromptError(f"{path}: not a tokenizer that can be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([token for token in ADDED if tokenizer.token_to_id(token) is None])
    tokenizer.encode_special_tokens = True
    return tokenizer


def fitting(profile: config.Profile, *places: str | Path) -> Tokenizer:
    """The first of `places` and `model.tokenizer` that fits (see `check`). PromptError with why each does not."""
    reasons = []
    for name in places + profile.model.tokenizers:
        try:
            tokenizer = load(name)
            check(tokenizer, profile.model, profile.frames.count)
            return tokenizer
        except PromptError as error:
            reasons.append(str(error) if str(name) in str(error) else f"{name}: {error}")
    raise PromptError(f"no tokenizer fits: {'; '.join(reasons)}")


def _file(name: str | Path) -> Path:
    if path := config.local_path(name):
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise PromptError(f"{path}: no {FILE} in this folder")
        return file
    repository = str(name)
    if repository.endswith(".json") or repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise PromptError(f"{name}: no such tokenizer file or folder, nor a repository's name (owner/name)")
    from framseg.run.released import hub_errors  # loads the model's code

    missing = f"tokenizer {repository!r} is neither a local file or folder nor available from the Hugging Face hub"
    with hub_errors(missing, f"; set model.tokenizer to the path of its {FILE}", PromptError):
        cached = try_to_load_from_cache(repository, FILE)
        if not isinstance(cached, str):
            # Ask for the file's size first: without a network the download itself would try for half a minute.
            get_hf_file_metadata(hf_hub_url(repository, FILE), timeout=5)
            cached = hf_hub_download(repository, FILE)
    return Path(cached)


def _without_prefix(spec: dict) -> dict:
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        spec["normalizer"] = {"type": "Sequence", "normalizers": [s for s in steps if s["type"] != "Prepend"]}
    if (spec.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        spec["pre_tokenizer"]["prepend_scheme"] = "never"
    return spec


def _user_parts(query: str, frames: int) -> list[str]:
    """The user's turn as the frames + 1 texts around its images."""
    lines = (line.strip() for line in query.splitlines())
    query = " ".join(line for line in lines if line)  # the prompt's own parts are separated by line breaks
    if not query:
        raise PromptError("the query is empty: say in a few words what to look for")
    if not is_text(query):
        raise PromptError(f"the query {query!r} is not valid Unicode text")
    opening, task = OPENING.format(frames=frames, last=frames - 1), TASK.format(frames=frames, query=query)
    return [f"{opening}Frame 0: ", *(f"\nFrame {i}: " for i in range(1, frames)), task]


def user_text(query: str, frames: int) -> str:
    """The user's turn as text for people to read; `prompt_ids` has ids instead of the spelled images."""
    return SPELLING["image"].join(_user_parts(query, frames))


def prompt_ids(tokenizer: Tokenizer, tokens: config.Tokens, query: str, frames: int) -> list[int]:
    """Ids from <|system|> up to and with <|assistant|>, with `frames` <image> ids.

    The line breaks that follow control tokens in the chat form have no ids: Phi-3's control tokens include them.
    Raises PromptError for an empty query or one that is not valid Unicode.
    """
    system, user = (_id(tokenizer, spelling) for spelling in ("<|system|>", "<|user|>"))
    first, *others = _user_parts(query, frames)
    ids = [system, *_encode(tokenizer, SYSTEM), tokens.end, user, *_encode(tokenizer, first)]
    for part in others:
        ids += [tokens.image, *_encode(tokenizer, part)]
    return [*ids, tokens.end, tokens.assistant]


def refuse_long(tokenizer: Tokenizer, model: config.Model, frames: int, queries: dict[int, str]) -> None:
    """Raise PromptError with every qid whose prompt and answer do not fit the model's context. queries: qid -> text."""
    room = model.language.context - frames * (model.resampler.latents - 1) - frames - 1
    lengths = {qid: len(prompt_ids(tokenizer, model.tokens, query, frames)) for qid, query in queries.items()}
    if long := [f"qid {qid}: {length - room} tokens too many" for qid, length in lengths.items() if length > room]:
        raise PromptError(
            f"queries too long for the model's context of {model.language.context} positions ({'; '.join(long)}): "
            f"shorten them or use fewer frames than {frames}"
        )


def answer_ids(tokens: config.Tokens, mask: str) -> list[int]:
    """Ids of a mask's f digits and <|end|>. Raises PromptError for characters other than 0 and 1."""
    digits = {"0": tokens.zero, "1": tokens.one}
    if not set(mask) <= digits.keys():
        raise PromptError(f"the mask {mask!r} holds other characters than 0 and 1")
    return [*(digits[character] for character in mask), tokens.end]


def pad_left(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids of any length -> ids int64 [B, L] padded on the left, attention mask int64 [B, L]."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    ids = np.full(real.shape, pad, dtype=np.int64)
    ids[real] = np.concatenate(rows)
    return ids, real.astype(np.int64)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[int, str]]:
    """Each id with its token as the vocabulary spells it (▁ is a space, <0x0A> a line break)."""
    return [(i, tokenizer.id_to_token(i) or "not in the vocabulary") for i in ids]


def check(tokenizer: Tokenizer, model: config.Model, frames: int, query: str = EXAMPLE_QUERY) -> Report:
    """Check what the method assumes of a tokenizer, and measure a sample with `query`.

    The special tokens have the profile's ids; a 0/1 string is one token per digit with no space token before it (tried:
    constant, alternating and random ones of `frames` characters, all of up to 10); no text can spell a control token;
    prompt and answer fit the context. Raises PromptError with the reason otherwise.
    """
    tokens = model.tokens
    control = {spelling: getattr(tokens, name) for name, spelling in SPELLING.items()}
    for spelling, expected in {**control, "0": tokens.zero, "1": tokens.one}.items():
        if (actual := tokenizer.token_to_id(spelling)) != expected:
            raise PromptError(f"the tokenizer gives {spelling!r} the id {actual}, the profile's is {expected}")
    control |= {spelling: _id(tokenizer, spelling) for spelling in ("<|system|>", "<|user|>")}
    for spelling in control:
        if set(_encode(tokenizer, f"a {spelling} b")) & set(control.values()):
            raise PromptError(f"the tokenizer takes {spelling!r} in a query for the control token itself")

    lengths = range(1, EXHAUSTIVE_LENGTH + 1)
    masks = ["".join(digits) for length in lengths for digits in itertools.product("01", repeat=length)]
    masks += ["0" * frames, "1" * frames, ("01" * frames)[:frames], ("10" * frames)[:frames]]
    draw = random.Random(0)
    masks += [f"{draw.getrandbits(frames):0{frames}b}" for _ in range(RANDOM_MASKS)]
    for mask, encoding in zip(masks, tokenizer.encode_batch(masks, add_special_tokens=False), strict=True):
        if encoding.ids != answer_ids(tokens, mask)[:-1]:
            raise PromptError(
                f"the mask {mask!r} of {len(mask)} frames becomes the {len(encoding.ids)} tokens {encoding.tokens} "
                f"instead of one digit token per frame"
            )

    ids = prompt_ids(tokenizer, tokens, query, frames)
    images = np.array(ids) == tokens.image
    sizes = np.where(images, model.resampler.latents, 1)
    ends = np.cumsum(sizes)  # exclusive
    first_answer = int(ends[-1]) - 1  # <|assistant|>: its logits give the first digit
    total = int(ends[-1]) + frames + 1
    if total > model.language.context:
        raise PromptError(
            f"prompt and answer take {total} positions, the model's context is {model.language.context}: "
            f"use fewer frames than {frames} or a shorter query"
        )
    earliest = first_answer - (model.language.sliding_window or total) + 1
    last, begin = ends[images] - 1, (ends - sizes)[images]  # each frame's last and first position
    return Report(
        frames=frames,
        zero=tokens.zero,
        one=tokens.one,
        masks_tried=len(masks),
        prompt_ids=len(ids),
        prompt_positions=int(ends[-1]),
        sample_positions=total,
        context=model.language.context,
        digit_positions=tuple(range(first_answer, first_answer + frames)),
        frames_outside=tuple(np.flatnonzero(last < earliest).tolist()),
        frames_partly=tuple(np.flatnonzero((begin < earliest) & (earliest <= last)).tolist()),
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _id(tokenizer: Tokenizer, spelling: str) -> int:
    if (token := tokenizer.token_to_id(spelling)) is None:
        raise PromptError(f"the tokenizer has no token {spelling!r}, which Phi-3's tokenizer has")
    return token
