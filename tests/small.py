"""Small models for tests, of the same class as the published one."""

from framseg import config

# The architecture of the golden files' tiny model.
TINY = {
    "dtype": "float32",
    "attention": "sdpa",
    "vision": {
        "hidden_size": 72,
        "intermediate_size": 144,
        "layers": 3,
        "heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    "resampler": {"latents": 8, "layers": 6, "heads": 16, "head_dim": 96},
    "language": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "layers": 3,
        "heads": 4,
        "vocab_size": 320,
        "used_vocab": 300,
        "extra_rows": 3,
    },
    "tokens": {"zero": 50, "one": 49, "assistant": 291, "end": 292, "pad": 299, "image": 300},
}


def tiny(**changes) -> config.Profile:
    """Profile `paper` with the tiny model and five frames; `changes` are dotted keys with __ for the dots."""
    overrides = {"frames.count": 5, "model": TINY} | {key.replace("__", "."): value for key, value in changes.items()}
    return config.load("paper", overrides)
