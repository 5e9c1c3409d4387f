"""What a whole run of a profile on QVHighlights needs of a machine, counted, for the table in framseg/README.md."""

from framseg import config, download
from framseg.run import cost, preflight
from framseg.run.cost import TERA

PROCESS = 2 * 2**30  # bytes of the host: a process with torch and CUDA, assumed
QUERIES = {"train": 7218, "val": 1550, "test": 1542}  # of QVHighlights, and its videos:
VIDEOS = {"train": 7100, "val": 1519, "test": 1529}
# What programs get of a GPU's bytes, and its operations per second by NVIDIA's data sheets (bfloat16 summed in float32,
# no sparsity). Of 24,576 MiB, driver and error correction leave 21.99 GiB (A10) to 23.6 (RTX 4090), as users report.
GPUS = {"RTX 4090": (21.9 * 2**30, 165.2 * TERA), "H100": (79 * 2**30, 989.4 * TERA)}
# Share of these operations in the authors' logs: 2.49 samples trained and 0.98 queries answered per second on an H100.
TRAINING_SHARE, DECODING_SHARE = 0.275, 0.046


def host_bytes(profile: config.Profile) -> float:
    """Bytes of the host's memory, about: each process reads the weights there and hands them to its GPU.

    Training then keeps the offloaded optimizer's state and gradients there, and two micro-batches of frames per worker.
    """
    section, frames = profile.training, profile.frames.count * 3 * profile.model.vision.image_size**2
    ahead = section.workers * 2 * section.micro_batch * frames
    offloaded = 16 * cost.parameters(profile)[1] if section.offload_optimizer else 0
    return section.processes * (PROCESS + max(cost.fixed_bytes(profile)[0], ahead + offloaded / section.processes))


def hours(profile: config.Profile) -> tuple[str, float, float]:
    """The smallest of GPUS that does, and the hours there of training and of decoding (val after each epoch, too)."""
    gpu = next((name for name, (room, _) in GPUS.items() if cost.gpu_bytes(profile) < room), [*GPUS][-1])
    work = cost.operations(profile, profile.frames.count * profile.model.resampler.latents + cost.TEXT)
    epochs, rate = profile.training.epochs, profile.training.processes * GPUS[gpu][1] * 3600
    decoded = QUERIES["val"] * (epochs + 2 if epochs else 1) + QUERIES["test"]
    trains = QUERIES["train"] * epochs * work.training
    return gpu, trains / (TRAINING_SHARE * rate), decoded * work.inference / (DECODING_SHARE * rate)


def disk_bytes(profile: config.Profile) -> dict[str, float]:
    """Bytes on disk, about, by what they are; without an archive of published frames."""
    frames = preflight.video_bytes(profile) * sum(VIDEOS[split] for split in profile.data.splits)
    fetched = dict.fromkeys(("archive", "videos"), download.ARCHIVE_BYTES * (profile.data.source == "folder"))
    states = preflight.state_bytes(profile)
    return fetched | {"frames": frames, "weights": cost.fixed_bytes(profile)[0], "states": states}


def memory_of(gpu: str, total: int) -> str:
    """The setting of torch's allocator with which a GPU of `total` bytes has no more than one of GPUS."""
    return f"per_process_memory_fraction:{min(1.0, GPUS[gpu][0] / total):.4f}"
