"""A trained checkpoint for other people: its model card, and the Hugging Face hub.

`python -m framseg.hub push runs/paper/checkpoint OWNER/NAME` (after `hf auth login`), and anywhere
`framseg.predict(video, query, checkpoint="OWNER/NAME")`.
"""

import argparse
import os
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from framseg import blip3, config
from framseg.evaluate import METRICS

CARD = "README.md"
# Nothing else of a repository is fetched: no code, no pickles.
FILES = ["profile.yaml", "tokenizer.json", "metrics.json", CARD, "resampler.safetensors", "adapter/adapter_*"]


def card(profile: config.Profile, metrics: dict) -> str:
    """Model card of a checkpoint with its val metrics (as `evaluate` gives them), in the hub's format."""
    training, base = profile.training, profile.model.weights
    published = base.count("/") == 1 and config.local_weights(base) is None
    samples = training.micro_batch * training.accumulation * training.processes
    measured = " | ".join(f"{metrics['brief'][name]:.2f}" for name in METRICS)
    synthetic = (
        "the synthetic demo set of framseg" if profile.data.source == "demo" else "QVHighlights or one's own rows"
    )
    base_line = f"base_model: {base}\n" if published else ""
    return f"""---
library_name: peft
{base_line}tags: [video-moment-retrieval, highlight-detection, framseg]
---
# framseg checkpoint, profile `{profile.name}`

Finds moments (windows in seconds) and highlights (a score for every 2-second clip) of a query in a video: the model is
shown {profile.frames.count} frames and answers with a digit for each. Made by framseg, a reproduction of *Moment and
Highlight Detection via MLLM Frame Segmentation* (Jiwanta and Purwarianti).

- Base model: `{base}`; this folder holds the trained resampler and a plain LoRA adapter (PiSSA of rank
  {profile.adapter.rank}, exported), both as safetensors, with the tokenizer and the whole profile.
- Trained for {training.epochs} epochs with {samples} samples a step, peak learning rate {training.learning_rate:g}, on
  {synthetic} (`{profile.data.folder.name}`).

Validation, every answer decoded (percent):

| {" | ".join(METRICS.values())} |
|{" --- |" * len(METRICS)}
| {measured} |

```python
import framseg

answer = framseg.predict("video.mp4", "a girl cooks while talking on facetime", checkpoint="this folder or repository")
```

QVHighlights' annotations are licensed CC BY-NC-SA 4.0; mind this and the base model's licence before you use or pass on
weights trained on them.
"""


def local(checkpoint: Path | str) -> Path:
    """The folder of a checkpoint: itself, or what the hub's repository of that name holds, fetched once.

    Raises CheckpointError if it is neither.
    """
    folder = Path(os.path.expanduser(checkpoint))
    if os.path.exists(folder) or str(checkpoint).count("/") != 1 or str(checkpoint).startswith((".", "/", "~")):
        return blip3.complete(folder).resolve()
    try:
        return blip3.complete(snapshot_download(str(checkpoint), allow_patterns=FILES))
    except blip3.CheckpointError:
        raise
    except Exception as error:  # the HTTP library's errors share no base of the hub's
        raise blip3.CheckpointError(
            f"{checkpoint}: neither a checkpoint's folder nor to be had from the Hugging Face hub "
            f"({' '.join(str(error).split())})"
        ) from None


def push(folder: Path | str, name: str, private: bool = False) -> str:
    """Upload a checkpoint to the hub's repository `name`, which is made if needed; returns its address.

    Raises CheckpointError for an incomplete folder, or one whose base model others do not have.
    """
    folder = blip3.complete(folder)
    base = config.load(folder / "profile.yaml").model.weights
    if Path(base).is_absolute():
        raise blip3.CheckpointError(
            f"{folder}: its base model is a folder of this machine ({base}); write the name of a repository that holds "
            f"it as model.weights into {folder / 'profile.yaml'}"
        )
    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=FILES).commit_url)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m framseg.hub", description="Checkpoints on the Hugging Face hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="upload a checkpoint")
    pushing.add_argument("folder", type=Path, help="e.g. runs/paper/checkpoint")
    pushing.add_argument("name", help="OWNER/NAME")
    pushing.add_argument("--private", action="store_true", help="for those alone who may see your repositories")
    options = parser.parse_args()
    try:
        print(push(options.folder, options.name, options.private))
    except blip3.CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
