"""What several benchmarks do: say what they ran on, and write their records."""

import json
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch

from framseg.run import cost

RECORDS = Path(__file__).parent / "records"


def about(*packages: str, **more) -> dict:
    """Device and versions, the head of every record; `packages` by default those that the model runs on."""
    named = packages or ("torch", "transformers", "peft", "deepspeed")
    return {"device": cost.device_name(), "versions": {name: version(name) for name in named}, **more}


def peak_gib() -> float:
    """Most memory that torch took of the GPU since its count was reset; without a GPU, that this process ever had."""
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return round((gpu or getrusage(RUSAGE_SELF).ru_maxrss * 1024) / 2**30, 2)


def write(name: str, record: dict, folder: Path | None = None) -> Path:
    """Write records/`name`.json, or into `folder`."""
    path = (folder or RECORDS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path)
    return path
