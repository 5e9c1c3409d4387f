"""The command line: ``framseg COMMAND …``; ``python -m framseg COMMAND …`` where the package is not installed."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import framseg
from framseg import command_line

COMMANDS = {  # name: the module whose `main` does it, what it does
    "predict": ("framseg.predictor", "find moments and highlights in your own video"),
    "evaluate": ("framseg.evaluate", "print the metrics of a file of predictions"),
    "codalab": ("framseg.codalab", "pack predictions as a competition's submission, or check one"),
    "download": ("framseg.download", "fetch the annotations and videos of QVHighlights"),
    "hub": ("framseg.hub", "upload a checkpoint to the Hugging Face hub"),
    "run": ("framseg.run.notebooks", "run the notebooks 01 to 05 for one profile"),
    "demo": ("framseg.demo.__main__", "make the demo's base model anew"),
}


@command_line()
def main(arguments: Sequence[str] | None = None) -> int:
    """Hand what follows the command's name to its module, the only one that is loaded; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    more = "framseg COMMAND --help lists its options."
    parser = argparse.ArgumentParser("framseg", description=framseg.__doc__, epilog=more)
    parser.add_argument("--version", action="version", version=f"framseg {framseg.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    return import_module(COMMANDS[command][0]).main(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
