"""In which numbers a model computes, how much memory its answers take, and int8 weights for small GPUs."""

from importlib.util import find_spec

import psutil
import torch
from torch import nn

from framseg import FramsegError, config
from framseg.backbones import DTYPES
from framseg.download import words
from framseg.run import cost

INT8 = "int8"
GROUP = 128  # neighbouring weights that share a scale, a float32 number


def chosen(dtype: str | None, place: torch.device, usual: str) -> str:
    """The floating-point format to load a model in: `usual` for None, else one of backbones.DTYPES.

    "auto" and "int8", which is of weights alone, are `usual`, the profile's, except where that is bfloat16 and `place`
    a GPU without it: there they are float16. Raises FramsegError for another name, and for int8 without torchao.
    """
    if dtype not in (None, *DTYPES):
        raise FramsegError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if dtype == INT8 and not find_spec("torchao"):
        raise FramsegError("dtype int8 needs the package torchao: pip install torchao")
    if dtype in ("auto", INT8) and usual == "bfloat16" and place.type != "cpu":
        has = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return usual if has else "float16"
    return usual if dtype in (None, "auto", INT8) else str(dtype)


def memory(profile: config.Profile, place: torch.device, int8: bool = False) -> dict[str, int]:
    """Bytes that loading a model and answering a query need, about, by where: on `place`, and in main memory.

    The weights are read into main memory, merged and made int8 there, and then moved.
    """
    whole, size, language = cost.fixed_bytes(profile)[0], profile.model.dtype, profile.model.language
    matrices = language.layers * language.hidden_size * (4 * language.hidden_size + 3 * language.intermediate_size)
    saved = matrices * (getattr(torch, size).itemsize - 1 - 4 / GROUP) if int8 else 0
    answer = int(whole - saved + cost.query_bytes(profile))
    return {"cpu": max(whole, answer)} if place.type == "cpu" else {str(place): answer, "main memory": whole}


def told(name: str, profile: config.Profile, place: torch.device, int8: bool = False) -> str:
    """A line on what is loaded, where and in which format; of less than 1 GB only if there is too little memory."""
    needed = memory(profile, place, int8)
    free = dict.fromkeys(needed, psutil.virtual_memory().available)
    if place.type == "cuda":
        free[str(place)] = torch.cuda.mem_get_info(place)[0]
    short = any(needed[where] > free[where] for where in needed)
    if not short and max(needed.values()) < 1e9:
        return ""
    parts = [f"{where} needs about {words(needed[where])}, {words(free[where])} are free" for where in needed]
    parts += ["it may fail: choose another device or dtype, or close what else takes memory"] if short else []
    return f"loading {name} in {'int8 and ' if int8 else ''}{profile.model.dtype}: {'; '.join(parts)}\n"


def make_int8(layers: nn.Module) -> None:
    """Keep the weights of linear layers as int8, one layer after the other, and compute with them as before.

    Weights whose rows cannot be divided into groups of GROUP stay as they are.
    """
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_  # an option: not always installed

    way = Int8WeightOnlyConfig(granularity=PerGroup(GROUP))
    quantize_(layers, way, lambda layer, _: isinstance(layer, nn.Linear) and layer.in_features % GROUP == 0)
