"""What made the tokenizer of the demo's base model: `python tests/demo_tokenizer.py` writes it anew.

After a change of the prompt or of the demo's queries, test_demo.py asks for that; then train the base model anew, too.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from framseg import prompt
from framseg.demo.base_model import BASE
from framseg.demo.synthetic import ACTIVITIES, QUERIES


def build_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json that does what the method needs of BLIP-3's, learned from the demo's prompt and queries.

    Digits and control tokens have their published ids, and a 0/1 string is one token per digit. A piece may hold
    several words of the prompt, but never more than one word of a query.
    """
    splitting = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never", split=False), pre_tokenizers.Digits(individual_digits=True)]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitting
    queries = [activity.query(wording) for activity in ACTIVITIES for wording in QUERIES]
    words = {f" {word.strip('.?:')}" for query in queries for word in query.split()} | {"a", "A", "the", "We"}
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
    # The embedding has 32,000 rows before the control tokens; ids without a piece get a name that no text contains.
    ids |= {f"<unused {id}>": id for id in set(range(32000)) - set(ids.values())}
    control = {32000: "<|endoftext|>", 32001: "<|assistant|>", 32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>"}
    control |= enumerate(prompt.ADDED, 32011)
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    spellings = [control.get(id, f"<|placeholder {id}|>") for id in range(32000, 32015)]
    tokenizer.add_special_tokens([AddedToken(spelling, normalized=False) for spelling in spellings])
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)  # with the spaces of the file that is shipped
    (folder / prompt.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    build_tokenizer(BASE)
