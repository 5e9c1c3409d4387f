"""Weights that others published: fetched from a server that answers as the hub does, read, and said what they are."""

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hub_server import contents, environment, serving
from safetensors.torch import load_file, save_file
from small import make_video, tiny
from test_decode import prepared

import framseg
from framseg import checkpoint, config, download, prompt
from framseg.backbones import CheckpointError, blip3
from framseg.run import released

BASE, PHI = config.load("paper").model.tokenizer
ASK = """
import sys
from framseg import predictor
from framseg.run import released
released.PROFILE = sys.argv[1]
predictor.main(sys.argv[2:])
"""


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def setup(tmp_path):
    """A tiny model in the published layout, a profile for it and a video."""
    setup = prepared(tmp_path)
    setup.model.save_published(tmp_path / "merged")
    setup.profile = setup.profile.model_copy(
        update={"model": setup.profile.model.model_copy(update={"weights": str(tmp_path / "merged")})}
    )
    config.save(setup.profile, tmp_path / "profile.yaml")
    setup.video = make_video(tmp_path / "own.mp4", 21)
    return setup


@pytest.fixture
def local(setup, tmp_path, monkeypatch):
    """In this process, published weights are of the tiny model."""
    monkeypatch.setattr(released, "PROFILE", tmp_path / "profile.yaml")
    return setup


@pytest.fixture
def hub(server, setup, tmp_path):
    """The server with the paper's model on it, in shards without an index, and a tokenizer in the second place."""
    section = setup.profile.model.model_copy(update={"tokenizer": (BASE, PHI)})
    config.save(setup.profile.model_copy(update={"model": section}), tmp_path / "profile.yaml")
    whole = load_file(tmp_path / "merged/model.safetensors")
    names = sorted(whole)
    (tmp_path / "shards").mkdir()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = {name: whole[name] for name in part}
        save_file(shard, tmp_path / f"shards/model-{number:05}-of-00002.safetensors")
    strange = {"config.json": b"{}", "code.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04"}
    server.files[released.MERGED] = contents(tmp_path / "shards") | strange
    server.files[PHI] = {"tokenizer.json": Path("framseg/demo/base/tokenizer.json").read_bytes()}
    return server


def ask(server, tmp_path, *arguments: str, before: str = "", **more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-c",
        before + ASK,
        str(tmp_path / "profile.yaml"),
        str(tmp_path / "own.mp4"),
        "-q",
        "dog",
    ]
    return subprocess.run(
        [*command, *arguments], env=environment(server, tmp_path) | more, capture_output=True, text=True,
        timeout=180, cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, *words: str):
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout, done.stderr
    [_, sentence] = done.stderr.split("error: ")
    assert len(sentence.splitlines()) == 1
    for word in words:
        assert word in sentence, sentence


def test_the_papers_model_is_fetched_once_and_says_what_it_is(hub, tmp_path):
    hub.licence = True
    first = ask(hub, tmp_path, "--checkpoint", "paper", "--json")
    assert first.returncode == 0, first.stderr[-3000:]
    record = json.loads(first.stdout)
    assert record["notes"] == ["the model is the paper's model, trained on QVHighlights, real videos"]
    size = sum(len(content) for name, content in hub.files[released.MERGED].items() if name.endswith(("ors", "son")))
    line = f"{released.MERGED}: fetching {download.words(size)} into {tmp_path / 'cache/hub'}, .* are free"
    assert re.search(f"{line}; licence, as its card says: cc-by-sa-4.0\n", first.stderr)
    assert "model-00002-of-00002.safetensors: 100%" in first.stderr  # the bar
    fetched = [name for name, _ in hub.fetched]
    assert len(set(fetched)) == len(fetched) and not any(name.endswith((".py", ".bin")) for name in fetched)

    hub.shutdown()  # nobody answers: what is there is used, with or without the variable that says so
    hub.server_close()
    for offline in "01":
        again = ask(hub, tmp_path, "--checkpoint", released.MERGED, HF_HUB_OFFLINE=offline)
        assert again.returncode == 0, again.stderr[-3000:]
        assert "  note: the model is the paper's model, trained on QVHighlights, real videos\n" in again.stdout
        assert "fetching" not in again.stderr


def test_the_server_of_the_weights_does_not_see_the_token(hub, tmp_path):
    with serving() as other:
        other.files, hub.elsewhere = hub.files, f"http://127.0.0.1:{other.server_port}"
        done = ask(hub, tmp_path, "--checkpoint", "paper")
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [name for name, _ in other.fetched]
    assert len(weights) == 2 and not any(other.tokens)
    assert hub.tokens and set(hub.tokens) == {"Bearer hf_nobody"} and not set(weights) & {n for n, _ in hub.fetched}


def test_without_a_checkpoint_the_papers_model_is_offered(hub, tmp_path):
    refused(ask(hub, tmp_path), "no --checkpoint is given: the paper's model, jwnt4/xgenmm-mr-v1-merged (", "--yes")
    assert not hub.fetched
    for answer, code in (("no", 1), ("yes", 0)):
        ours, theirs = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        command = [sys.executable, "-c", ASK, str(tmp_path / "profile.yaml"), str(tmp_path / "own.mp4"), "-q", "dog"]
        done = subprocess.run(
            command, env=environment(hub, tmp_path), stdin=theirs, capture_output=True, text=True, timeout=180
        )
        os.close(ours), os.close(theirs)
        assert done.returncode == code and "can be fetched. Fetch it? [y/N] " in done.stderr, done.stderr
        assert bool(hub.fetched) == (code == 0) and ("nothing was fetched" in done.stderr) == (code == 1)
    assert ask(hub, tmp_path).returncode == 0  # it is there: no question


def test_yes_fetches_unasked(hub, tmp_path):
    done = ask(hub, tmp_path, "--yes")
    assert done.returncode == 0 and "[y/N]" not in done.stderr and hub.fetched


def test_a_connection_that_is_cut_and_a_process_that_is_killed_lose_nothing(hub, tmp_path):
    kill = (
        "import os, framseg.download as d\n"
        "def update(bar, n):\n    bar.n += n\n    bar.n > 300_000 and os._exit(9)\n"
        "d.tqdm = type('Bar', (d.tqdm,), {'update': update})\n"
    )
    assert ask(hub, tmp_path, "--checkpoint", "paper", before=kill).returncode == 9
    [part] = (tmp_path / "cache/hub").rglob("*.part")
    begin, sums = part.stat().st_size, {hashlib.sha256(x).hexdigest(): n for n, x in hub.files[released.MERGED].items()}
    first = f"{released.MERGED}/{sums[part.stem]}"
    assert begin > 200_000
    hub.fetched.clear()
    hub.cut = 400_000
    again = ask(hub, tmp_path, "--checkpoint", "paper", before="import framseg.download as d; d.PAUSE = 0\n")
    assert again.returncode == 0, again.stderr[-3000:]
    begins = [place for name, place in hub.fetched if name == first]
    assert begins[0] == begin and len(begins) > 2 and begins == sorted(set(begins))


@pytest.mark.parametrize(
    "status, words",
    [
        (401, ["neither", "answers 401: the repository is gated, private or not there", "`hf auth login`"]),
        (404, ["neither", "answers 404: it has no such repository or file"]),
        (503, ["neither", "503"]),
    ],
)
def test_a_hub_that_refuses(hub, tmp_path, status, words):
    hub.status = status
    refused(ask(hub, tmp_path, "--checkpoint", "paper"), released.MERGED, *words)


@pytest.mark.parametrize("offline", "01")
def test_nobody_answers_and_nothing_is_there(hub, tmp_path, offline):
    hub.shutdown()
    hub.server_close()
    done = ask(hub, tmp_path, "--checkpoint", "paper", HF_HUB_OFFLINE=offline)
    refused(done, released.MERGED, "neither a folder here nor to be had from the Hugging Face hub")


def test_a_repository_that_is_no_checkpoint_and_weights_of_another_shape(hub, tmp_path):
    hub.files["somebody/words"] = {"README.md": b"words", "config.json": b"{}"}
    refused(ask(hub, tmp_path, "--checkpoint", "somebody/words"), "somebody/words is no checkpoint")
    assert not hub.fetched
    blip3.Blip3(tiny().model).save_published(tmp_path / "other")
    hub.files["somebody/other"] = contents(tmp_path / "other")
    done = ask(hub, tmp_path, "--checkpoint", "somebody/other")
    refused(done, "not a checkpoint of this model", "the profile's is", " more")
    assert len(done.stderr.split("error: ")[1]) < 800  # of some hundred tensors the first few


def test_a_full_disk_is_told_before_and_keeps_what_has_arrived(hub, tmp_path):
    full = (
        "import shutil, collections; T = collections.namedtuple('T', 'total used free')\n"
        "shutil.disk_usage = lambda path: T(9, 9, {})\n"
    )
    refused(ask(hub, tmp_path, "--checkpoint", "paper", before=full.format(1000)), "1.00kB free", "HF_HOME")
    assert not hub.fetched
    # Room at first, and then none: the file begun is refused, and the next call goes on.
    later = full.replace("lambda path: T(9, 9, {})", "lambda path, n=iter([10**9, 10**9] + [10] * 9): T(9, 9, next(n))")
    refused(ask(hub, tmp_path, "--checkpoint", "paper", before=later), "no room", "kept", released.MERGED)
    first = [name for name, _ in hub.fetched if name.endswith("00001-of-00002.safetensors")]
    assert len(first) == 1
    assert ask(hub, tmp_path, "--checkpoint", "paper").returncode == 0
    assert [name for name, _ in hub.fetched].count(first[0]) == 1


def test_python_asks_for_the_papers_model_and_a_damaged_file_is_fetched_again(hub, tmp_path):
    code = "import sys, framseg; from framseg.run import released; released.PROFILE = sys.argv[1]\n"
    code += "print(framseg.predict(sys.argv[2], 'dog', checkpoint='paper').notes, released.NAME)"
    command = [sys.executable, "-c", code, str(tmp_path / "profile.yaml"), str(tmp_path / "own.mp4")]

    def python() -> subprocess.CompletedProcess:
        where = environment(hub, tmp_path)
        return subprocess.run(command, env=where, capture_output=True, text=True, timeout=180, cwd=tmp_path)

    hub.damaged = True
    done = python()
    assert done.returncode == 1 and "CheckpointError: " in done.stderr.splitlines()[-1]
    assert "has SHA-256" in done.stderr and "it was not kept: give the same command again" in done.stderr
    hub.damaged = False
    done = python()
    assert done.returncode == 0 and done.stdout == f"{[released.ORIGIN]} paper\n", done.stderr[-3000:]


def test_an_index_says_which_files_belong_to_the_weights(hub, local, tmp_path):
    config.save(local.profile, tmp_path / "profile.yaml")  # with the tokenizer that is here
    names = {name: list(load_file(tmp_path / "shards" / name)) for name in sorted(os.listdir(tmp_path / "shards"))}
    files = {key: name for name, keys in names.items() for key in keys}
    index = tmp_path / "shards/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    save_file({"of.another.kind": torch.zeros(2)}, tmp_path / "shards/optimizer.safetensors")
    model, *_ = checkpoint.loaded(tmp_path / "shards")
    assert all(torch.equal(value, local.model.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "shards/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002.safetensors, named by the index; fetch"):
        checkpoint.loaded(tmp_path / "shards")
    index.write_text("[")
    with pytest.raises(CheckpointError, match="no .safetensors file here"):
        checkpoint.loaded(tmp_path / "shards")


def test_a_file_that_is_not_what_the_hub_says_is_not_kept(tmp_path, server):
    server.files["a/b"] = {"w.safetensors": b"x" * 1000}
    with pytest.raises(download.DownloadError, match="w.safetensors sends has SHA-256 .* give the same command again$"):
        address = f"http://127.0.0.1:{server.server_port}/a/b/resolve/main/w.safetensors?key=secret"
        download.fetch(address, tmp_path / "w", "0" * 64, otherwise="")
    assert not list(tmp_path.glob("w*"))


def test_a_folder_in_the_published_layout_answers_as_the_model_does(local, tmp_path):
    one = framseg.predict(local.video, "a dog runs", checkpoint=tmp_path / "merged")
    assert one.notes == [f"the model is {tmp_path / 'merged'}: what it was trained on is not known"]
    model, profile, tokenizer = checkpoint.loaded(tmp_path / "merged")
    assert profile == local.profile and tokenizer.to_str() == local.tokenizer.to_str()
    for name, value in local.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def batch(profile) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    frames, tokens = profile.frames.count, profile.model.tokens
    size = profile.model.vision.image_size
    ids = torch.randint(60, 250, (2, 3 * frames + 4), generator=draw)
    ids[:, 1 : 3 * frames : 3] = tokens.image
    pixels = torch.rand(2, frames, 3, size, size, generator=draw) * 2 - 1
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def trained_pair(local, tmp_path):
    """The authors' pair, made by peft: an adapter of the language model as it was trained, and how it began."""
    torch.manual_seed(3)
    model = checkpoint.load_base(local.profile)
    settings = peft.LoraConfig(
        r=4, lora_alpha=4, use_rslora=True, init_lora_weights="pissa",
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    )  # fmt: skip
    language = peft.get_peft_model(model.lang_model, settings)
    folder = tmp_path / "adapter"
    language.peft_config["default"].init_lora_weights = True
    language.save_pretrained(folder / "pissa_init")
    language.peft_config["default"].init_lora_weights = "pissa"
    model.vision_tokenizer.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(local.profile)).log_softmax(-1)[..., local.profile.model.tokens.one].mean().neg().backward()
        optimizer.step()
    language.save_pretrained(folder)
    (tmp_path / "resampler").mkdir()
    state = {f"vision_tokenizer.{name}": x.contiguous() for name, x in model.vision_tokenizer.state_dict().items()}
    save_file(state, tmp_path / "resampler/vision_tokenizer.safetensors")
    return model.eval()


def test_the_authors_pair_is_converted_exactly(local, trained_pair, tmp_path):
    parts = (tmp_path / "resampler", tmp_path / "adapter")
    both = tmp_path / "both"
    shutil.copytree(parts[1], both)
    shutil.copy(parts[0] / "vision_tokenizer.safetensors", both)
    below = tmp_path / "below"
    for part in parts:
        shutil.copytree(part, below / part.name)
    inputs = batch(local.profile)
    with torch.inference_mode():
        expected = trained_pair(**inputs)
        base = local.model(**inputs)
        for name in (parts, both, below):
            model, *_ = checkpoint.loaded(name)
            difference = (model(**inputs) - expected).abs().max()
            assert difference < 1e-4 < 0.01 < (base - expected).abs().max(), name
    answer = framseg.predict(local.video, "a dog runs", checkpoint=parts)
    assert answer.mask == framseg.predict(local.video, "a dog runs", checkpoint=both).mask


def test_the_pairs_names_may_begin_with_vlm(local, trained_pair, tmp_path):
    """As where the adapter was made on the whole published model."""
    parts = (tmp_path / "resampler", tmp_path / "adapter")
    for file in (parts[1] / "adapter_model.safetensors", parts[1] / "pissa_init/adapter_model.safetensors"):
        renamed = {
            name.replace("base_model.model.", "base_model.model.vlm.lang_model."): x
            for name, x in load_file(file).items()
        }
        save_file(renamed, file)
    file = parts[0] / "vision_tokenizer.safetensors"
    save_file({f"vlm.{name}": x for name, x in load_file(file).items()}, file)
    model, *_ = checkpoint.loaded(parts)
    inputs = batch(local.profile)
    with torch.inference_mode():
        assert (model(**inputs) - trained_pair(**inputs)).abs().max() < 1e-4


def test_a_pair_that_is_not_whole(local, trained_pair, tmp_path):
    with pytest.raises(CheckpointError, match="vision_tokenizer.safetensors is missing"):
        checkpoint.loaded(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="pissa_init is missing"):
        checkpoint.loaded(tmp_path / "resampler")
    parts = (tmp_path / "resampler", tmp_path / "adapter")
    settings = tmp_path / "adapter/adapter_config.json"
    text = settings.read_text()
    settings.write_text(text.replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(CheckpointError, match="use_dora"):
        checkpoint.loaded(parts)
    settings.unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json: No such file"):
        checkpoint.loaded(parts)
    settings.write_text(text)
    start = tmp_path / "adapter/pissa_init/adapter_model.safetensors"
    pairs = load_file(start)
    save_file({name: x for name, x in pairs.items() if name != min(pairs)}, start)
    with pytest.raises(CheckpointError, match="pissa_init holds other pairs"):
        checkpoint.loaded(parts)
    for file in (start, tmp_path / "adapter/adapter_model.safetensors"):
        save_file({name.replace("layers.0", "layers.7"): x for name, x in pairs.items()}, file)
    with pytest.raises(CheckpointError, match="does not fit the profile's model.*7"):
        checkpoint.loaded(parts)


def test_the_pair_is_fetched_by_its_names(hub, local, trained_pair, tmp_path):
    for name in released.PAIR:
        part = "adapter" if "pissa" in name else "resampler"
        hub.files[name] = contents(tmp_path / part)
    arguments = [word for name in sorted(released.PAIR) for word in ("--checkpoint", name)]
    done = ask(hub, tmp_path, *arguments, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    config.save(local.profile, tmp_path / "profile.yaml")  # with the tokenizer that is here
    answer = framseg.predict(local.video, "dog", checkpoint=(tmp_path / "resampler", tmp_path / "adapter"))
    assert record["notes"] == [released.ORIGIN] and record["mask"] == answer.mask
    np.testing.assert_allclose(record["probability"], answer.probability, atol=1e-4)


def test_names_of_the_papers_weights_are_known():
    assert released.names("paper") == [released.MERGED]
    for wrong in ([], ["a", "b", "c"]):
        with pytest.raises(CheckpointError, match="one name or two"):
            released.names(wrong)
    for known in ("paper", released.MERGED, sorted(released.PAIR)):
        assert released.origin(known) == released.ORIGIN
    assert "not known" in released.origin("somebody/else")


def test_a_tokenizer_that_does_not_fit_is_passed_over(local, shared, monkeypatch, tmp_path):
    shutil.copy(shared / "tokenizer/qwen3/tokenizer.json", tmp_path / "merged")
    assert prompt.fitting(local.profile, tmp_path / "merged").to_str() == local.tokenizer.to_str()
    section = local.profile.model.model_copy(update={"tokenizer": str(tmp_path / "shards")})
    with pytest.raises(prompt.PromptError, match=f"no tokenizer fits: {tmp_path}/merged: .*id.*; .*shards"):
        prompt.fitting(local.profile.model_copy(update={"model": section}), tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "auto"])
def test_the_weights_are_loaded_as_asked(local, tmp_path, dtype):
    answer = framseg.predict(local.video, "a dog runs", tmp_path / "merged", device="cpu", dtype=dtype)
    assert np.isfinite(answer.probability).all()
    model, *_ = checkpoint.loaded(tmp_path / "merged", "cpu", dtype)
    assert model.vision_tokenizer.latents.dtype == getattr(torch, "float32" if dtype == "auto" else dtype)
    exact = framseg.predict(local.video, "a dog runs", tmp_path / "merged")
    np.testing.assert_allclose(answer.probability, exact.probability, atol=0.05)
