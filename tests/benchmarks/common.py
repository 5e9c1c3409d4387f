"""What every benchmark does alike: say what it ran on, and write its record."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

RECORDS = Path(__file__).parent / "records"


def about(*packages: str, **more) -> dict:
    """Device and versions, the head of every record; `packages` by default those that the model runs on."""
    named = packages or ("torch", "transformers", "peft", "deepspeed")
    return {"device": device(), "versions": {name: version(name) for name in named}, **more}


def device() -> str:
    """The GPU's name; without one the processor's and how many of its cores there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def write(name: str, record: dict, folder: Path | None = None) -> Path:
    """Write records/`name`.json, or into `folder`."""
    path = (folder or RECORDS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path)
    return path
