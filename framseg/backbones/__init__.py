"""The models behind the method: what a profile names as its `model`."""

import hashlib
import os
from typing import TYPE_CHECKING

from framseg import FramsegError

if TYPE_CHECKING:
    import torch

DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), ("auto", "float32", "float16", "bfloat16", "int8")
SAMPLED = 64  # values of each parameter that tell one set of weights from another


class CheckpointError(FramsegError, ValueError):
    """Weights that do not belong to this model; the message names the folder and every offending tensor."""


def fingerprint(module: "torch.nn.Module") -> str:
    """16 hexadecimal digits of a few values of every parameter: tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = getattr(parameter, "qdata", parameter).detach().flatten()  # int8 weights have their numbers there
        values = values[:: max(1, len(values) // SAMPLED)][:SAMPLED]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def device(where: str = "auto") -> "torch.device":
    """Where models run: the GPU of this process (of several, the one that the launcher gave it), or the CPU.

    where: "auto" is the GPU if there is one, else the CPU; "cpu", "cuda", or "mps" (Apple's GPU; never tried). Raises
    FramsegError for a device that this machine does not have.
    """
    import torch  # here, so that who only needs the error does not wait for it

    usable = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    kind = next(name for name, is_here in usable.items() if is_here) if where == "auto" else where
    if not usable.get(kind):
        here = ", ".join(name for name, is_here in usable.items() if is_here)
        raise FramsegError(f"device {where!r}: this machine does not have it; choose auto or one of {here}")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
