"""The models behind the method: what a profile names as its `model`."""

import hashlib
from typing import TYPE_CHECKING

from framseg import FramsegError

if TYPE_CHECKING:
    from torch import nn

SAMPLED = 64  # values of each parameter that tell one set of weights from another


class CheckpointError(FramsegError, ValueError):
    """Weights that do not belong to this model; the message names the folder and every offending tensor."""


def fingerprint(module: "nn.Module") -> str:
    """16 hexadecimal digits of a few values of every parameter: tells one set of weights from another."""
    found = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLED)][:SAMPLED]
        found.update(name.encode() + values.float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
