"""What several benchmarks do: say what they ran on, count the memory of weights, and write their records."""

import json
from importlib.metadata import version
from pathlib import Path

import torch

from framseg import config
from framseg.backbones import blip3
from framseg.run import cost

RECORDS = Path(__file__).parent / "records"


def about(*packages: str, **more) -> dict:
    """Device and versions, the head of every record; `packages` by default those that the model runs on."""
    named = packages or ("torch", "transformers", "peft", "deepspeed")
    return {"device": cost.device_name(), "versions": {name: version(name) for name in named}, **more}


def fixed_bytes(profile: config.Profile) -> tuple[int, float]:
    """Bytes on each device that do not depend on the samples: all weights, and the state of what is trained.

    The state: gradients, and the optimizer's float32 copy and two moments, shared by all processes, unless offloaded.
    """
    size = getattr(torch, profile.model.dtype).itemsize
    with torch.device("meta"):
        model = blip3.Blip3(profile.model.model_copy(update={"attention": "sdpa"}))
        weights = size * sum(parameter.numel() for parameter in model.parameters())
        model.adapt(profile.adapter.model_copy(update={"init": True}), 0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = 0 if profile.training.offload_optimizer else 12 / profile.training.processes
    return weights, trained * (size + states)


def write(name: str, record: dict, folder: Path | None = None) -> Path:
    """Write records/`name`.json, or into `folder`."""
    path = (folder or RECORDS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path)
    return path
