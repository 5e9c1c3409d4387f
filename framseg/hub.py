"""Share a trained checkpoint on the Hugging Face hub: `framseg hub push FOLDER OWNER/NAME`.

Log in first with `hf auth login`. Anywhere else, `framseg.predict(video, query, checkpoint="OWNER/NAME")` fetches it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from framseg import command_line, config
from framseg.backbones import CheckpointError
from framseg.checkpoint import HUB_FILES, PROFILE, require_complete
from framseg.run.released import hub_errors


def push(folder: Path | str, name: str, private: bool = False) -> str:
    """Upload a checkpoint to the hub's repository `name`, which is made if needed; returns its address.

    CheckpointError for an incomplete folder, a base model others do not have, a hub that refuses or is not reached.
    """
    folder = require_complete(folder)
    profile = config.load(folder / PROFILE)
    base = profile.model.weights
    if not profile.training.epochs:
        raise CheckpointError(f"{folder}: nothing was trained, so there is nothing to share but the name {base} itself")
    if Path(base).is_absolute():
        raise CheckpointError(
            f"{folder}: its base model is a folder of this machine ({base}); write the name of a repository that holds "
            f"it as model.weights into {folder / PROFILE}"
        )
    with hub_errors(f"{name}: cannot be uploaded", "; `hf auth login` logs you in"):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=HUB_FILES).commit_url)


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command `framseg hub`: uploads a checkpoint and prints its address."""
    parser = argparse.ArgumentParser(prog="framseg hub", description="Checkpoints on the Hugging Face hub.")
    parser.add_argument("command", choices=["push"], help="upload a checkpoint")
    parser.add_argument("folder", type=Path, help="e.g. runs/paper/checkpoint")
    parser.add_argument("name", help="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="only for those who may see your repositories")
    options = parser.parse_args(arguments)
    print(push(options.folder, options.name, options.private))


if __name__ == "__main__":
    main()
