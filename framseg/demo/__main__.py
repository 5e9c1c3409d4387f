"""`framseg demo make-base`: train the demo's base model anew from its seed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from framseg import command_line
from framseg.demo import base_model


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """Make the base model in the folder, and from the seed, that the options name."""
    parser = argparse.ArgumentParser(prog="framseg demo", description="The demo's base model.")
    parser.add_argument("command", choices=["make-base"], help="train the base model anew, on two CPU cores")
    parser.add_argument("--out", type=Path, default=base_model.BASE, help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=base_model.BASE_SEED, help="of all random numbers (%(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**31:
        parser.error(f"--seed {options.seed}: write a number from 0 to {2**31 - 1}")
    base_model.make_base(options.out, options.seed)


if __name__ == "__main__":
    main()
