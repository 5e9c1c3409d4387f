"""Moment and highlight detection by frame segmentation with a multimodal LLM."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from framseg.predictor import predict

for _name in ("torchao", "torch.utils._pytree"):  # when transformers loads torchao, of kernels that nothing here uses
    logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["FramsegError", "__version__", "command_line", "predict"]


class FramsegError(Exception):
    """Whatever framseg cannot do for a reason that a user can act on; the message says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it."""
        return [f"{type(self).__name__}: {self}"]


@contextmanager
def command_line(code: int = 1) -> Iterator[None]:
    """Whatever a user can cause ends the process with one sentence on standard error and exit code `code`.

    Ctrl-C ends it with the code 130. Every other error keeps its traceback. `@command_line()` stands above each `main`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            _flush()
        return
    except KeyboardInterrupt as error:
        text, code = ": ".join(["interrupted", *error.args]), 130
    except FramsegError as error:
        text = f"error: {error}"
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        text = f"error: {path}{error.strerror or error}"
    if code == 1:
        sys.exit(text)  # Python prints it, and ends with 1
    print(text, file=sys.stderr)
    sys.exit(code)


def _flush() -> None:
    """Write out what was printed; raises FramsegError if nobody takes it, as after `| head`."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        # Python itself would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise FramsegError(f"cannot write to standard output ({error.strerror})") from None


def __getattr__(name: str) -> object:
    # Loaded on first use: it needs torch, for which those who only read rows or evaluate need not wait.
    if name == "predict":
        from framseg.predictor import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
