"""Training through DeepSpeed: the loop, its log, validation by decoding after each epoch, checkpoints, resume.

`launch` starts the DeepSpeed launcher, which runs this module once for every process of the profile.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from framseg import FramsegError, annotations, config, dataset, decode, evaluate, losses, prompt
from framseg.checkpoint import CARD, load_base, model_card, save_trained
from framseg.jsonl import is_number, parse_object, write_lines
from framseg.predictions import write_predictions
from framseg.run import launcher, preflight
from framseg.run.paths import Run, hold

POLL = 0.5  # seconds between two looks at the step log
KEPT = 2  # resumable states: should the last one be damaged, there is one before it
REDRAW = 3.0  # seconds between two calls of `on_progress`
LOGGED = ("step", "epoch", "learning_rate", "samples_per_second", "memory_gib")  # of a step, and its losses:
LOSSES = ("loss", *losses.NAMES)  # None if not finite
PATIENCE = 120  # seconds that an interrupted training has to write its checkpoint


class TrainError(FramsegError, RuntimeError):
    """Training that did not end well; the message says why and where its log is."""


def deepspeed_config(profile: config.Profile) -> dict:
    """The DeepSpeed configuration of a profile (method.md's "Training"; the learning rate is set at every step)."""
    section = profile.training
    zero: dict = {"stage": section.zero_stage}
    optimizer = {
        "lr": section.learning_rate,
        "betas": list(section.betas),
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    else:
        optimizer["torch_adam"] = True  # the same update, without a helper op to compile first
    return {
        "train_batch_size": section.micro_batch * section.accumulation * section.processes,
        "train_micro_batch_size_per_gpu": section.micro_batch,
        "gradient_accumulation_steps": section.accumulation,
        "gradient_clipping": section.gradient_clip,
        "bf16": {"enabled": profile.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "steps_per_print": 2**31,  # our own log has every step
    }


def total_steps(profile: config.Profile, rows: int) -> int:
    """Optimizer steps of a whole training over `rows` samples; for the paper's 7,218 and 11 epochs 618."""
    section = profile.training
    group = section.micro_batch * section.processes
    return section.epochs * dataset.samples_per_epoch(profile, rows) // group // section.accumulation


def readable(profile: config.Profile) -> tuple[list[annotations.Row], str]:
    """The training rows whose frames are there, and a sentence on those that are not ("" if there are none).

    Raises TrainError if more videos lack than `training.may_lack` allows.
    """
    store, rows = dataset.store(profile), dataset.rows(profile, "train")
    lost = sorted({row.vid for row in rows if row.vid not in store})
    if not lost:
        return rows, ""
    said = (
        f"{len(lost)} of the training videos are not in the frame store {store.folder}: {', '.join(lost[:5])}"
        f"{' …' if len(lost) > 5 else ''}; notebook 01 extracts them, failures.jsonl there says what failed"
    )
    if len(lost) > profile.training.may_lack:
        raise TrainError(f"{said}; training.may_lack={len(lost)} trains without them")
    return [row for row in rows if row.vid not in lost], said


# --- the parent: starting and watching -------------------------------------------------------------------------


def launch(
    profile: config.Profile, run: Run, on_progress: Callable[[list[dict], list[dict]], None] | None = None
) -> None:
    """Train `profile` into `run` through the DeepSpeed launcher; goes on from a checkpoint.

    One line is printed for each epoch. A progress bar is shown on a terminal, and wherever `on_progress` is given: that
    is called with the records of the step log and of the validation log, every few seconds if new ones came, and at
    the end. A finished run returns at once. Interrupting it (Ctrl-C, or the kernel's interrupt) writes a checkpoint
    first. Raises TrainError with one sentence on what to do if training cannot start or fails, BusyError if
    another one is under way there.
    """
    rows, lacking = readable(profile)
    if lacking:
        print(f"training without {lacking}")
    total = total_steps(profile, len(rows))
    if not total:
        raise TrainError(f"{profile.name}: too few rows for one optimizer step; lower micro_batch or accumulation")
    for changed in _changed(profile, run):
        print(f"going on with other settings, as training.may_change allows: {changed}")
    if len(read_log(run.step_log)) >= total and run.checkpoint.is_dir():
        print(f"trained already: {total} steps in {run.train}")
        return
    if lacking := preflight.gpus(profile):
        raise TrainError(lacking[0])
    stop, log = run.train / "stop", run.train / "output.log"
    try:
        hold(run.train).close()  # the first of the processes takes it
        config.save(profile, run.profile)
        config.save(profile, run.trained_with)
        run.trained_on.write_text(_rows_hash(profile), encoding="utf-8")
        stop.unlink(missing_ok=True)
        begin = log.stat().st_size if log.is_file() else 0
        arguments = ["--profile", str(run.profile), "--run-dir", str(run.root)]
        process = launcher.start("framseg.train", profile, log, arguments)
    except OSError as error:
        raise TrainError(f"training cannot start: {launcher.sentence(error)}") from error
    try:
        _watch(process, run, total, on_progress)
    except KeyboardInterrupt:
        stop.touch()
        print("stopping after this step, with a checkpoint …")
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"no answer within {PATIENCE} s: killed; the last checkpoint stands")
        raise
    finally:
        launcher.end(process)
        stop.unlink(missing_ok=True)
    if process.returncode or len(read_log(run.step_log)) < total:
        raise TrainError(f"training failed: {launcher.failure(process, log, begin)}")


def _changed(profile: config.Profile, run: Run) -> list[str]:
    """What differs from the training that the run folder holds, in words; how it decodes may always change.

    Raises TrainError for settings that `training.may_change` does not name, and for other rows.
    """
    if not run.trained_with.is_file():
        return []
    old, new = (
        p.model_dump(mode="json", exclude={"inference", "name"}) for p in (config.load(run.trained_with), profile)
    )
    allowed = set(profile.training.may_change) | {"training.may_change"}
    found = _differences(old, new)
    different = [words for key, words in found.items() if key not in allowed]
    if len(set(map(_samples_a_step, (old, new)))) > 1:  # the steps done would no longer say where in the data it is
        different.append("as many samples a step there must be (processes x micro_batch x accumulation)")
    if run.trained_on.is_file() and run.trained_on.read_text(encoding="utf-8") != _rows_hash(profile):
        different.append(f"other rows in {dataset.annotation_file(profile, 'train').name}")
    if different:
        raise TrainError(
            f"{run.train} was trained with other settings ({'; '.join(different)}): give another --run-dir, remove "
            f"{run.train} to train anew, or name the keys in training.may_change to go on with the new values"
        )
    return [words for key, words in found.items() if key != "training.may_change"]


def _samples_a_step(profile: dict) -> int:
    return math.prod(profile["training"][name] for name in ("processes", "micro_batch", "accumulation"))


def _rows_hash(profile: config.Profile) -> str:
    return hashlib.sha256(dataset.annotation_file(profile, "train").read_bytes()).hexdigest()


def _differences(old: dict, new: dict, at: str = "") -> dict[str, str]:
    out = {}
    for key, value in new.items():
        if isinstance(value, dict):
            out |= _differences(old[key], value, f"{at}{key}.")
        elif old[key] != value:
            out[f"{at}{key}"] = f"{at}{key}: {old[key]} there, {value} now"
    return out


def _watch(process: subprocess.Popen, run: Run, total: int, on_progress: Callable | None) -> None:
    first, validated = (len(read_log(log)) for log in (run.step_log, run.validation_log))
    told, shown = 0.0, None
    hide = on_progress is None and not sys.stderr.isatty()  # as under papermill
    with tqdm(total=total, initial=first, desc="training", unit="step", disable=hide) as bar:
        while True:
            ended = process.poll() is not None
            steps, validations = read_log(run.step_log), read_log(run.validation_log)
            if steps:
                bar.set_postfix_str(_brief(steps[-1]), refresh=False)
            bar.update(len(steps) - bar.n)
            for record in validations[validated:]:
                bar.write(_validated(record, steps))
            validated = len(validations)  # fewer than before when a resumed training drops what it does again
            news = len(steps), len(validations)
            if on_progress and steps and news != shown and (ended or time.monotonic() - told >= REDRAW):
                on_progress(steps, validations)
                told, shown = time.monotonic(), news
            if ended:
                return
            time.sleep(POLL)


def _brief(step: dict) -> str:
    loss = "not finite, skipped" if step["loss"] is None else f"{step['loss']:.3f}"
    return (
        f"epoch {step['epoch']:.2f}, loss {loss}, {step['samples_per_second']:.1f} samples/s, "
        f"{step['memory_gib']:.1f} GiB"
    )


def _validated(record: dict, steps: list[dict]) -> str:
    brief = record["metrics"]["brief"]
    before = f" (step {len(steps)}: {_brief(steps[-1])})" if steps else ""
    return (
        f"epoch {record['epoch']}: R1@0.5 {brief['MR-full-R1@0.5']}, R1@0.7 {brief['MR-full-R1@0.7']}, "
        f"mAP {brief['MR-full-mAP']}, HIT@1 {brief['HL-min-VeryGood-Hit1']}{before}"
    )


def read_log(path: Path) -> list[dict]:
    """Records of the step log, the validation log or the log of skipped steps; a missing file has none.

    Raises TrainError with the place of a line that is no such record.
    """
    records = []
    # What stands behind the last newline is being written, or was when its process was killed.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else [], 1):
        record, reasons = parse_object(line)
        if reasons := reasons or _unfit(record):
            raise TrainError(f"{path}:{number}: {'; '.join(reasons)}; remove {path.parent} to train anew")
        records.append(record)
    return records


def _unfit(record: dict) -> list[str]:
    """What is wrong with a decoded line of a log."""
    try:
        if "metrics" in record:
            values = [record["epoch"], *(record["metrics"]["brief"][key] for key in evaluate.METRICS)]
        elif "not_finite" in record:
            values = [record["step"], *record["qids"]]
        else:
            values = [*(record[key] for key in LOGGED), *(record["weights"][i] for i in range(len(losses.NAMES)))]
            values += [record[key] for key in LOSSES if record[key] is not None]
    except (LookupError, TypeError) as error:
        return [f"is no record of a training ({error!r})"]
    odd = [value for value in values if not isinstance(value, float) and not is_number(value)]
    return [f"has {str(odd[0])[:60]!r} where a number must stand"] if odd else []


# --- the child: one process of the training --------------------------------------------------------------------


class Trainer:
    """One process of the training, between `deepspeed.initialize` and the exported checkpoint."""

    def __init__(self, profile: config.Profile, run: Run):
        import deepspeed

        self.rank, self.world = launcher.join(profile)
        self.profile, self.run = profile, run
        self.held = hold(run.train) if self.rank == 0 else None
        self.tokenizer = prompt.load(profile.model.tokenizer)
        prompt.check(self.tokenizer, profile.model, profile.frames.count)  # refuses a tokenizer that cannot work
        rows, _ = readable(profile)
        self.val = dataset.rows(profile, "val")[: profile.training.validation_queries]
        self.an_epoch = dataset.samples_per_epoch(profile, len(rows))
        self.group = profile.training.micro_batch * self.world  # samples of a micro-batch on all processes
        self.total = total_steps(profile, len(rows))
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(profile.seed + self.rank)
        self.model = load_base(profile)
        self.model.to(launcher.device())
        self.samples = dataset.Samples(profile, self.tokenizer, rows, self._features(rows))
        self.step, state = 0, self._newest_state()
        if state is None:
            self._forget(-1)
            self._validate(0)
        self.start = self.model.adapt(profile.adapter, profile.seed)
        if profile.training.gradient_checkpointing:
            self.model.lang_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        if profile.training.compile:
            for layer in self.model.lang_model.model.layers:
                layer.compile()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if state is not None:
            self._load_weights(state)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, model_parameters=trained, config=deepspeed_config(profile)
        )
        self.engine.optimizer.check_grad_overflow = True  # DeepSpeed looks at 16-bit gradients alone otherwise
        if state is not None:
            self._load_state(state)

    @torch.inference_mode()
    def _features(self, rows: list[annotations.Row]) -> dataset.Features | None:
        """The encoder's output of all training videos on disk, each process having made its share; None without."""
        if not self.profile.training.cache_features:
            return None
        self.model.eval()
        features = dataset.Features.of(self.profile, self.model)
        features.make(self.profile, self.model, sorted({row.vid for row in rows})[self.rank :: self.world])
        torch.distributed.barrier()
        return features

    def train(self) -> None:
        """Train to the end of the last epoch, or until asked to stop; then export the checkpoint."""
        section = self.profile.training
        stream = dataset.MicroBatches(self.samples.lengths, self.profile, self.rank, self.step * section.accumulation)
        loader = iter(
            DataLoader(
                self.samples,
                batch_sampler=stream,
                collate_fn=self.samples.collate,
                num_workers=section.workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # or starting it would draw from the generator that dropout resumes
            )
        )
        self._learn()
        while self.step < self.total:
            self._step(loader)
            epoch = int(self._epoch(self.step))
            # The first whole step at or after an epoch's end.
            if epoch > int(self._epoch(self.step - 1)) or self.step == self.total:
                self._validate(epoch if self.step < self.total else section.epochs)
                self._learn()
                self._save_state()
            elif self._asked_to_stop():
                self._save_state()
                return
            elif self.step % section.save_steps == 0:
                self._save_state()
        if self.rank == 0:
            aside = self.run.checkpoint.with_name("checkpoint.part")
            shutil.rmtree(aside, ignore_errors=True)
            save_trained(aside, self.model, self.start, self.profile, self.tokenizer)
            last = read_log(self.run.validation_log)[-1]
            (aside / "metrics.json").write_text(json.dumps(last["metrics"], indent=2) + "\n", encoding="utf-8")
            (aside / CARD).write_text(model_card(self.profile, last["metrics"]), encoding="utf-8")
            shutil.rmtree(self.run.checkpoint, ignore_errors=True)
            aside.rename(self.run.checkpoint)

    def _learn(self) -> None:
        """Back to training mode, which decoding leaves; the frozen encoder stays in eval mode."""
        self.model.train()
        self.model.vision_encoder.eval()

    def _step(self, loader) -> None:
        section, began = self.profile.training, time.monotonic()
        rate = losses.learning_rate(self.step, section)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums, seen = torch.zeros(1 + len(losses.NAMES)), []
        for i in range(section.accumulation):
            weights = losses.weights(1 + int(self._epoch(self.step, i)), self.profile.losses)
            batch = next(loader)
            parts = self._losses(batch)
            loss = sum(weight * part for weight, part in zip(weights, parts, strict=True))
            self.engine.backward(loss)
            self.engine.step()
            found = torch.stack([loss.detach(), *(part.detach() for part in parts)]).float().cpu()
            seen.append({"qids": batch["qids"], "finite": bool(found.isfinite().all())})
            sums += found
        torch.distributed.all_reduce(sums := sums.to(self.model.device))
        self.step += 1
        applied = self.engine.was_step_applied()
        if not applied:
            self._skipped(seen)
        if self.rank == 0:
            seconds = time.monotonic() - began
            means = [x if math.isfinite(x) else None for x in (sums / (section.accumulation * self.world)).tolist()]
            memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else _resident()
            _append(
                self.run.step_log,
                {
                    "step": self.step,
                    "epoch": self._epoch(self.step),
                    "loss": means[0],
                    **dict(zip(losses.NAMES, means[1:], strict=True)),
                    "weights": weights,
                    "learning_rate": rate,
                    "gradient_norm": float(self.engine.get_global_grad_norm()) if applied else None,
                    "samples_per_second": section.micro_batch * section.accumulation * self.world / seconds,
                    "memory_gib": memory,
                    "seconds": seconds,
                },
            )

    def _skipped(self, seen: list[dict]) -> None:
        """DeepSpeed has left out a step for a gradient that is not finite: write down its queries, stop if too many."""
        every: list = [None] * self.world
        torch.distributed.all_gather_object(every, seen)
        micro_batches = [one for process in every for one in process]
        loss = [qid for one in micro_batches if not one["finite"] for qid in one["qids"]]
        what, qids = ("loss", loss) if loss else ("gradient", [qid for one in micro_batches for qid in one["qids"]])
        if self.rank == 0:
            _append(self.run.skipped_log, {"step": self.step, "not_finite": what, "qids": qids})
        torch.distributed.barrier()
        times, allowed = len(read_log(self.run.skipped_log)), self.profile.training.may_skip
        if times > allowed:
            raise TrainError(
                f"the {what} of step {self.step} is not finite, for the queries {qids}; {times} steps were, "
                f"training.may_skip allows {allowed} ({self.run.skipped_log} lists them): look at the videos, "
                f"lower training.learning_rate, or allow more"
            )

    def _losses(self, batch: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """LM, BCE, Tversky and generalized Dice of one micro-batch."""
        batch = {key: value.to(self.model.device) for key, value in batch.items() if isinstance(value, Tensor)}
        answers, soft = batch.pop("answer_ids"), batch.pop("soft_targets")
        logits = self.engine(batch.pop("pixel_values", None), **batch)
        digits, section = self.model.digit_logits(logits[:, :-1]), self.profile.losses
        return (
            losses.lm(logits, answers),
            losses.bce(digits, soft, section.pos_weight),
            losses.tversky(digits, soft, section.tversky_alpha, section.tversky_beta, section.eps),
            losses.generalized_dice(digits, soft, section.eps),
        )

    def _validate(self, epoch: int) -> None:
        """Decode val, each process its share, and log the metrics; epoch 0 is the untouched base."""
        began = time.monotonic()
        mine = decode.share(self.val, self.rank, self.world)
        records = list(decode.records(self.model, self.tokenizer, self.profile, mine, progress=False))
        shares: list = [None] * self.world
        torch.distributed.all_gather_object(shares, records)
        if self.rank == 0:
            by_qid = {record["qid"]: record for share in shares for record in share}
            predictions = [by_qid[row.qid] for row in self.val]
            write_predictions(self.run.predicted("val", epoch), predictions)
            _append(
                self.run.validation_log,
                {
                    "epoch": epoch,
                    "metrics": evaluate.evaluate(predictions, self.val),
                    "invalid": sum(not record["valid"] for record in predictions) / len(predictions),
                    "seconds": time.monotonic() - began,
                },
            )

    def _asked_to_stop(self) -> bool:
        stop = (self.run.train / "stop").exists() or not launcher.watched()
        asked = torch.tensor(float(stop), device=self.model.device)
        torch.distributed.all_reduce(asked)  # all processes leave at the same step
        return bool(asked)

    # Resumable states, a folder a step, the last two of them: the trained weights and where PiSSA began, and for each
    # process its share of the optimizer and its random generators. Safetensors and JSON only, written aside and
    # renamed; state.json comes last, with a checksum of every other file.

    def _save_state(self) -> None:
        aside, folder = self.run.resume / "part", self.run.resume / f"step_{self.step:06d}"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            trained = {
                name: p.detach().contiguous().cpu() for name, p in self.model.named_parameters() if p.requires_grad
            }
            save_file(trained, aside / "weights.safetensors")
            save_file(
                {name: value.contiguous().cpu() for name, value in self.start.items()}, aside / "start.safetensors"
            )
        torch.distributed.barrier()
        save_file(self._partition() | _generators(), aside / f"process_{self.rank}.safetensors")
        torch.distributed.barrier()
        if self.rank == 0:
            sums = {path.name: _checksum(path) for path in sorted(aside.iterdir())}
            about = {"step": self.step, "world": self.world, "sha256": sums}
            (aside / "state.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            aside.rename(folder)
            for old in _states(self.run)[:-KEPT]:
                shutil.rmtree(old)
        torch.distributed.barrier()

    def _newest_state(self) -> Path | None:
        """The newest state whose files are whole; damaged ones are removed with a warning, and trained again."""
        chosen: list = [None]
        if self.rank == 0:
            for folder in reversed(_states(self.run)):
                if reason := _damage(folder):
                    print(f"warning: {folder} is damaged ({reason}): going on from the state before it", flush=True)
                    shutil.rmtree(folder)
                else:
                    chosen[0] = folder
                    break
        torch.distributed.broadcast_object_list(chosen)
        return chosen[0]

    def _forget(self, epoch: float) -> None:
        """Take out of the logs what came after the step and epoch that training goes on from."""
        if self.rank == 0:
            for log in (self.run.step_log, self.run.validation_log, self.run.skipped_log):
                done = [r for r in read_log(log) if r.get("step", 0) <= self.step and r.get("epoch", 0) <= epoch]
                write_lines(log, done)

    def _partition(self) -> dict[str, Tensor]:
        zero = self.engine.optimizer
        out = {}
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            out[f"{i}.master"] = master.detach().cpu().clone()
            for key, value in zero.optimizer.state[master].items():
                out[f"{i}.{key}"] = torch.as_tensor(value).detach().cpu().clone()
        return out

    def _load_weights(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["world"] != self.world:
            raise TrainError(
                f"{folder} was written by {state['world']} processes and cannot go on with {self.world}: "
                f"set training.processes back, or remove {self.run.train} to start anew"
            )
        self.step = state["step"]
        start = load_file(folder / "start.safetensors")
        differing = [name for name, value in start.items() if not torch.equal(self.start[name].cpu(), value)]
        if differing:
            raise TrainError(
                f"{folder}: PiSSA now begins elsewhere ({differing[0]}): other base weights, seed or library; "
                f"remove {self.run.train} to start anew"
            )
        self.model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
        self._forget(self._epoch(self.step) if self.step < self.total else self.profile.training.epochs)

    def _epoch(self, step: int, micro_batch: int = 0) -> float:
        """Epochs passed before that micro-batch of a step, counted from 0."""
        return (step * self.profile.training.accumulation + micro_batch) * self.group / self.an_epoch

    def _load_state(self, folder: Path) -> None:
        saved = load_file(folder / f"process_{self.rank}.safetensors")
        zero = self.engine.optimizer
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            master.data.copy_(saved[f"{i}.master"])
            names = [key for key in saved if key.startswith(f"{i}.") and key != f"{i}.master"]
            zero.optimizer.state[master] = {
                key.split(".", 1)[1]: saved[key] if saved[key].dim() == 0 else saved[key].to(master.device)
                for key in names
            }
        _set_generators(saved)


def _generators() -> dict[str, Tensor]:
    """States of every random generator of this process: torch's (dropout), the GPU's, Python's, NumPy's."""
    _, words, _ = random.getstate()  # the third is a spare value of random.gauss, which nothing here draws
    numpy = np.random.get_state(legacy=False)
    out = {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor(words),
        "random.numpy": torch.from_numpy(np.append(numpy["state"]["key"].astype(np.int64), numpy["state"]["pos"])),
    }
    return out | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_generators(saved: dict[str, Tensor]) -> None:
    torch.set_rng_state(saved["random.torch"])
    random.setstate((3, tuple(saved["random.python"].tolist()), None))
    *key, position = saved["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position))
    if "random.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random.cuda"])


def _states(run: Run) -> list[Path]:
    return sorted(run.resume.glob("step_*"))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a resumable state, None if its files are as they were written."""
    try:
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        sums = about["sha256"]
        processes = len(sums) - 2
        names = {"weights.safetensors", "start.safetensors", *(f"process_{i}.safetensors" for i in range(processes))}
        numbers = int(folder.name.removeprefix("step_")), processes
        if names != sums.keys() or (about["step"], about["world"]) != numbers or type(about["step"]) is not int:
            return "state.json is another state's"
        wrong = [name for name, expected in sums.items() if _checksum(folder / name) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"state.json or a file it lists cannot be read: {error}"
    return f"the checksum of {', '.join(wrong)} is another" if wrong else None


def _append(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _resident() -> float:
    """This process's memory in GiB, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m framseg.train", description="One process of the training.")
    parser.add_argument("--profile", required=True, help="a profile's name or the path of a YAML file")
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args()
    with launcher.last_words():
        profile = config.load(options.profile)
        Trainer(profile, Run(profile, options.run_dir)).train()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
