"""The models behind the method: what a profile names as its `model`."""

import hashlib
import os
from typing import TYPE_CHECKING

from framseg import FramsegError

if TYPE_CHECKING:
    import torch

SAMPLED = 64  # values of each parameter that tell one set of weights from another


class CheckpointError(FramsegError, ValueError):
    """Weights that do not belong to this model; the message names the folder and every offending tensor."""


def fingerprint(module: "torch.nn.Module") -> str:
    """16 hexadecimal digits of a few values of every parameter: tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLED)][:SAMPLED]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def device(where: str = "auto") -> "torch.device":
    """Where models run: the GPU of this process (of several, the one that the launcher gave it), or the CPU.

    where: `training.device` of a profile; "cpu" leaves a GPU alone.
    """
    import torch  # here, so that who only needs the error does not wait for it

    if where == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
