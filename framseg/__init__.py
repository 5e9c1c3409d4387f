"""Moment and highlight detection by frame segmentation with a multimodal LLM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framseg.predictor import predict

__version__ = "0.1.0"
__all__ = ["FramsegError", "__version__", "predict"]


class FramsegError(Exception):
    """Whatever framseg cannot do for a reason that a user can act on; the message says what to do."""


def __getattr__(name: str) -> Any:
    # Looked up on first use: the pure modules (evaluate, moments, …) must not wait for torch.
    if name == "predict":
        from framseg.predictor import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
