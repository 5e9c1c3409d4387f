"""What does autograd keep of a sample until the backward pass? Counted at full size, on a CPU, a layer at a time.

python tests/benchmarks/activations.py   (some 10 GB of memory, a few minutes)

One sample goes forward, as in training and in bfloat16, through the full-size resampler and one layer of the language
model, then with two. Counted are the bytes of all tensors that autograd saves, a storage once and weights not at all.
What a layer adds, times 32, says which micro-batches fit a GPU without recomputation. Writes records/activations.json.
"""

import argparse
from pathlib import Path

import common
import torch

from framseg import config
from framseg.backbones import blip3
from framseg.run import cost

POSITIONS = 3621  # of the paper's sample
GPU_GIB = 79  # of an 80 GB card, as CUDA counts them


def kept(profile: config.Profile) -> dict[str, int]:
    """Bytes that are saved for backward by the resampler, and by language model and head."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = blip3.Blip3(profile.model)
    model.adapt(profile.adapter.model_copy(update={"init": "gaussian"}), 0)
    torch.set_default_dtype(torch.float32)
    model.train()
    if profile.training.gradient_checkpointing:
        model.recompute_layers()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens, section, frames = profile.model.tokens, profile.model.vision, profile.frames.count
    text = POSITIONS - frames * profile.model.resampler.latents
    ids = torch.randint(3, 29000, (1, text + frames))
    ids[0, 5 : 5 + frames] = tokens.image
    ids[0, -frames - 1 :] = tokens.zero
    positions = torch.arange(text - 2, text + frames - 1)[None]
    features = torch.randn(1, frames, (section.image_size // section.patch_size) ** 2, section.hidden_size)
    features = features.to(torch.bfloat16)

    seen: dict[int, torch.Tensor] = {}  # held, so that no storage is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vision = model.resampled(features)
        resampler = size()
        logits = model(None, ids, torch.ones_like(ids), positions, vision)
        assert logits.requires_grad
    return {"resampler": resampler, "language": size() - resampler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()
    record, whole = common.about(positions=POSITIONS), 0
    for name in ("h100", "paper"):
        full = config.load(name)
        one, two = (
            kept(config.load(name, {"model.language.layers": layers, "model.vision.layers": 1})) for layers in (1, 2)
        )
        layer = two["language"] - one["language"]
        total = one["resampler"] + one["language"] + (full.model.language.layers - 1) * layer
        if full.training.gradient_checkpointing:
            total += whole  # the layer that is being recomputed
        else:
            whole = layer
        fixed = sum(cost.fixed_bytes(full)) / 2**30
        record[name] = {
            "recomputes layers": full.training.gradient_checkpointing,
            "MB per layer": round(layer / 1e6, 1),
            "MB resampler": round(one["resampler"] / 1e6, 1),
            "GiB per sample": round(total / 2**30, 2),
            "GiB weights and trained state": round(fixed, 2),
            "samples that fit": int((GPU_GIB - cost.SPARE / 2**30 - fixed) / (total / 2**30)),
            "micro_batch": full.training.micro_batch,
        }
        print(name, record[name])
    common.write("activations", record, options.out)


if __name__ == "__main__":
    main()
