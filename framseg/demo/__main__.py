"""`python -m framseg.demo make-base`: train the demo's base model anew from its seed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from framseg.demo import base_model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m framseg.demo", description="What the embedded demo is made of.")
    parser.add_argument("command", choices=["make-base"], help="train the demo's base model anew from its seed")
    parser.add_argument("--out", type=Path, default=base_model.BASE, help="folder to write (the package's own)")
    parser.add_argument("--seed", type=int, default=base_model.BASE_SEED, help="seed of all random numbers")
    options = parser.parse_args(arguments)
    base_model.make_base(options.out, options.seed)


if __name__ == "__main__":
    main()
