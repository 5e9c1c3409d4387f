"""Moment and highlight detection by frame segmentation with a multimodal LLM."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from framseg.predictor import predict

__version__ = "0.1.0"
__all__ = ["FramsegError", "__version__", "predict"]


class FramsegError(Exception):
    """Whatever framseg cannot do for a reason that a user can act on; the message says what to do."""


def __getattr__(name: str) -> object:
    # Loaded on first use: it needs torch, for which those who only read rows or evaluate need not wait.
    if name == "predict":
        from framseg.predictor import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
