"""Training through DeepSpeed: the loop, its log, validation by decoding after each epoch, the trained checkpoint.

`launch` starts the DeepSpeed launcher, which runs this module once for every process of the profile.
"""

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed

from framseg import FramsegError, annotations, command_line, config, dataset, decode, evaluate, losses, prompt
from framseg.backbones import device
from framseg.checkpoint import load_base, save_trained
from framseg.jsonl import is_number, parse_object, shortlist, write_lines
from framseg.predictions import write_predictions
from framseg.run import launcher, preflight, released, resume
from framseg.run.paths import Run, hold

REDRAW = 3.0  # seconds between two calls of `on_progress`
LOGGED = ("step", "epoch", "learning_rate", "samples_per_second", "memory_gib")  # of a step, and its losses:
LOSSES = ("loss", *losses.NAMES)  # None if not finite
PATIENCE = 120  # seconds that an interrupted training has to write its state
Watcher = Callable[[list[dict], list[dict]], None]  # gets the records of the step log and of the validation log


class TrainError(FramsegError, RuntimeError):
    """Training that did not end well; the message says why and where its log is."""


def deepspeed_config(profile: config.Profile) -> dict:
    """The DeepSpeed configuration of a profile (method.md's "Training"; the learning rate is set at every step)."""
    section = profile.training
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if section.offload_optimizer else {}
    optimizer = section.model_dump(mode="json", include={"betas", "eps", "weight_decay"})
    if not offload:
        optimizer["torch_adam"] = True  # the same update, and nothing has to be compiled first
    return {
        "train_batch_size": section.micro_batch * section.accumulation * section.processes,
        "train_micro_batch_size_per_gpu": section.micro_batch,
        "gradient_accumulation_steps": section.accumulation,
        "gradient_clipping": section.gradient_clip,
        "bf16": {"enabled": profile.model.dtype == "bfloat16"},
        "zero_optimization": {"stage": section.zero_stage} | offload,
        "optimizer": {"type": "AdamW", "params": optimizer | {"lr": section.learning_rate}},
        "steps_per_print": 2**31,  # our own log has every step
    }


def total_steps(profile: config.Profile, rows: int) -> int:
    """Optimizer steps of a whole training over `rows` samples; for the paper's 7,218 and 11 epochs 618."""
    section = profile.training
    group = section.micro_batch * section.processes
    return section.epochs * dataset.samples_per_epoch(profile, rows) // group // section.accumulation


def readable(profile: config.Profile) -> tuple[list[annotations.Row], str]:
    """The training rows whose videos are in the frame store, and a sentence on the others ("" if there are none).

    Raises TrainError if more videos are missing than `training.may_lack` allows.
    """
    store, rows = dataset.store(profile), dataset.rows(profile, "train")
    lost = sorted({row.vid for row in rows if row.vid not in store})
    if not lost:
        return rows, ""
    lacking = (
        f"{len(lost)} of the training videos are not in the frame store {store.folder}: {shortlist(lost, most=5)}; "
        f"notebook 01 extracts them, failures.jsonl there says what failed"
    )
    if len(lost) > profile.training.may_lack:
        raise TrainError(f"{lacking}; training.may_lack={len(lost)} trains without them")
    return [row for row in rows if row.vid not in lost], lacking


def launch(profile: config.Profile, run: Run, on_progress: Watcher | None = None) -> None:
    """Train `profile` into `run` through the DeepSpeed launcher; goes on from a state if there is one.

    One line is printed for each epoch. A progress bar is shown on a terminal, and wherever `on_progress` is given: that
    is called with the records of the step log and of the validation log, every few seconds if new ones came, and at
    the end. A finished run returns at once, one without epochs when it has written what `load_trained` needs.
    Interrupting it (Ctrl-C, or the kernel's interrupt) writes a state first. Raises TrainError with what to do if
    training cannot start or fails, ResumeError for a run folder of other settings, BusyError for one that is in use.
    """
    if not profile.training.epochs:
        resume.changes(profile, run)
        load_base(profile)  # fetched if need be, and it fits
        save_trained(run.checkpoint, None, {}, profile, prompt.fitting(profile), {})
        config.save(profile, run.profile)
        print(f"nothing is trained (training.epochs: 0): {released.origin(profile.model.weights)}")
        return
    rows, lacking = readable(profile)
    if lacking:
        print(f"training without {lacking}")
    total = total_steps(profile, len(rows))
    if not total:
        raise TrainError(f"{profile.name}: too few rows for one optimizer step; lower micro_batch or accumulation")
    for changed in resume.changes(profile, run):
        print(f"going on with other settings, as training.may_change allows: {changed}")
    if len(read_log(run.step_log)) >= total and resume.finished(profile, run):
        print(f"trained already: {total} steps in {run.train}")
        return
    for missing in preflight.gpus(profile):
        raise TrainError(missing)
    stop = run.train / "stop"
    try:
        hold(run.train).close()  # the first of the processes takes it
        config.save(profile, run.profile)
        resume.label(profile, run)
        stop.unlink(missing_ok=True)
        arguments = ["--profile", str(run.profile), "--run-dir", str(run.root)]
        job = launcher.Job("framseg.train", profile, run.train / "output.log", arguments)
    except OSError as error:
        raise TrainError(f"training cannot start: {launcher.sentence(error)}") from error
    with job:
        try:
            _watch(job, run, total, on_progress)
        except KeyboardInterrupt:
            stop.touch()
            print("stopping after this step, with a state to go on from …")
            try:
                job.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                print(f"no answer within {PATIENCE} s: killed; the last state on disk stays")
            raise
        finally:
            stop.unlink(missing_ok=True)
    if job.process.returncode or len(read_log(run.step_log)) < total:
        raise TrainError(f"training failed: {job.failure()}")


def _watch(job: launcher.Job, run: Run, total: int, on_progress: Watcher | None) -> None:
    first, validated = (len(read_log(log)) for log in (run.step_log, run.validation_log))
    drawn, shown = 0.0, (0, 0)
    hide = on_progress is None and not sys.stderr.isatty()  # as under papermill
    with tqdm(total=total, initial=first, desc="training", unit="step", disable=hide) as bar:
        for ended in job.polls():
            steps, validations = read_log(run.step_log), read_log(run.validation_log)
            if steps:
                bar.set_postfix_str(step_line(steps[-1]), refresh=False)
            bar.update(len(steps) - bar.n)
            for record in validations[validated:]:
                bar.write(epoch_line(record, steps))
            validated = len(validations)  # fewer than before when a resumed training drops what it does again
            news = len(steps), len(validations)
            if on_progress and steps and news != shown and (ended or time.monotonic() - drawn >= REDRAW):
                on_progress(steps, validations)
                drawn, shown = time.monotonic(), news


def step_line(step: dict) -> str:
    """A line for a record of the step log."""
    loss = "not finite, skipped" if step["loss"] is None else f"{step['loss']:.3f}"
    speed = f"{step['samples_per_second']:.1f} samples/s, {step['memory_gib']:.1f} GiB"
    return f"epoch {step['epoch']:.2f}, loss {loss}, {speed}"


def epoch_line(record: dict, steps: list[dict]) -> str:
    """A line for a record of the validation log, with the last of the steps before it."""
    brief = record["metrics"]["brief"]
    before = f" (step {len(steps)}: {step_line(steps[-1])})" if steps else ""
    scores = (f"{title} {brief[name]}" for name, title in evaluate.METRICS.items() if title != "HL mAP")
    return f"epoch {record['epoch']}: {', '.join(scores)}{before}"


def read_log(path: Path) -> list[dict]:
    """Records of the step log, the validation log or the log of skipped steps; a missing file has none.

    Raises TrainError with the place of a line that is no such record.
    """
    records = []
    # What comes after the last newline is being written, or was when its process was killed.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else [], 1):
        record, reasons = parse_object(line)
        if record is None or (reasons := _unfit(record)):
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
    # A loss may be no number or infinite, a place in the training may not.
    odd = [value for value in values if not isinstance(value, float) and not is_number(value)]
    odd += [record[place] for place in ("epoch", "step") if place in record and not is_number(record[place])]
    return [f"has {str(odd[0])[:60]!r} where a number must stand"] if odd else []


class Trainer:
    """One process of the training: `train` goes through all its steps, in the order in which they stand here."""

    def __init__(self, profile: config.Profile, run: Run, rank: int, world: int):
        self.profile, self.run, self.rank, self.world = profile, run, rank, world
        self.group = profile.training.micro_batch * world  # samples of a micro-batch on all processes
        self.step = 0  # optimizer steps done

    def train(self) -> None:
        """Train the profile to its end, from the newest state or from the start, or until asked to stop."""
        self.load()
        state = resume.newest(self.run.resume)
        if state is None:
            self.forget(-1)
            self.validate(0)
        self.adapt()
        if state is not None:
            self.step = resume.load_weights(state, self.model, self.start, self.world)
            self.forget(self.epoch(self.step) if self.step < self.total else self.profile.training.epochs)
        self.begin()
        if state is not None:
            resume.load_process(state, self.rank, self.engine.optimizer)
        if self.loop() and self.rank == 0:
            metrics = read_log(self.run.validation_log)[-1]["metrics"]
            save_trained(self.run.checkpoint, self.model, self.start, self.profile, self.tokenizer, metrics)

    def load(self) -> None:
        """Read tokenizer, rows and base model, seed the random generators, and cache the encoder's output if asked."""
        profile = self.profile
        self.tokenizer = prompt.fitting(profile)
        rows, _ = readable(profile)
        self.val = dataset.rows(profile, "val")[: profile.training.validation_queries]
        self.epoch_size = dataset.samples_per_epoch(profile, len(rows))
        self.total = total_steps(profile, len(rows))
        set_seed(profile.seed + self.rank)
        self.model = load_base(profile).to(device())
        features = None
        if profile.training.cache_features:  # each process makes its share of the files
            features = dataset.Features.of(profile, self.model)
            with torch.inference_mode():
                features.make(profile, self.model, sorted({row.vid for row in rows})[self.rank :: self.world])
            torch.distributed.barrier()
        self.samples = dataset.Samples(profile, self.tokenizer, rows, features)

    def forget(self, epoch: float) -> None:
        """Take out of the logs what came after the step and epoch that training goes on from."""
        if self.rank == 0:
            for log in (self.run.step_log, self.run.validation_log, self.run.skipped_log):
                done = [r for r in read_log(log) if r.get("step", 0) <= self.step and r.get("epoch", 0) <= epoch]
                write_lines(log, done)

    def validate(self, epoch: int) -> None:
        """Decode val, each process its share, and log the metrics; epoch 0 is the untouched base."""
        began = time.monotonic()
        mine = decode.share(self.val, self.rank, self.world)
        records = list(decode.records(self.model, self.tokenizer, self.profile, mine))
        by_qid = {record["qid"]: record for share in launcher.gathered(records) for record in share}
        if self.rank == 0:
            predictions = [by_qid[row.qid] for row in self.val]
            write_predictions(self.run.predicted("val", epoch), predictions)
            record = {"epoch": epoch, "metrics": evaluate.evaluate(predictions, self.val)}
            record["invalid"] = sum(not answer["valid"] for answer in predictions) / len(predictions)
            _append(self.run.validation_log, record | {"seconds": time.monotonic() - began})

    def adapt(self) -> None:
        """Make resampler and adapter trainable; recompute layers and compile them if the profile says so."""
        self.start = self.model.adapt(self.profile.adapter, self.profile.seed)
        if self.profile.training.gradient_checkpointing:
            self.model.recompute_layers()
        if self.profile.training.compile:
            for layer in self.model.lang_model.model.layers:
                layer.compile()

    def begin(self) -> None:
        """Hand the trainable parameters to DeepSpeed, which copies them into its optimizer."""
        import deepspeed

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        settings = deepspeed_config(self.profile)
        self.engine, *_ = deepspeed.initialize(model=self.model, model_parameters=trained, config=settings)
        self.engine.optimizer.check_grad_overflow = True  # DeepSpeed looks at 16-bit gradients alone otherwise

    def loop(self) -> bool:
        """Step, validate and write states to the end of the last epoch; False if asked to stop before."""
        section = self.profile.training
        stream = dataset.MicroBatches(self.samples.lengths, self.profile, self.rank, self.step * section.accumulation)
        loader = DataLoader(
            self.samples,
            batch_sampler=stream,
            collate_fn=self.samples.collate,
            num_workers=section.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or starting it would draw from the generator that dropout resumes
        )
        batches = iter(loader)
        while self.step < self.total:
            self._step(batches)
            epoch = int(self.epoch(self.step))
            # The first whole step at or after an epoch's end.
            epoch_ended = epoch > int(self.epoch(self.step - 1)) or self.step == self.total
            if epoch_ended:
                self.validate(epoch if self.step < self.total else section.epochs)
            stop = not epoch_ended and self._asked_to_stop()
            if epoch_ended or stop or self.step % section.save_steps == 0:
                resume.save(self.run.resume, self.step, self.model, self.start, self.engine.optimizer)
            if stop:
                return False
        return True

    def epoch(self, step: int, micro_batch: int = 0) -> float:
        """Epochs passed before that micro-batch of a step, counted from 0."""
        return (step * self.profile.training.accumulation + micro_batch) * self.group / self.epoch_size

    def _step(self, batches: Iterator[dict]) -> None:
        section, began = self.profile.training, time.monotonic()
        self.model.train()  # decoding leaves this mode
        self.model.vision_encoder.eval()  # frozen
        rate = losses.learning_rate(self.step, section)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums, seen = torch.zeros(1 + len(losses.NAMES)), []
        for i in range(section.accumulation):
            weights = losses.weights(1 + int(self.epoch(self.step, i)), self.profile.losses)
            batch = next(batches)
            parts = self._losses(batch)
            loss = functools.reduce(torch.add, [weight * part for weight, part in zip(weights, parts, strict=True)])
            self.engine.backward(loss)
            self.engine.step()
            values = torch.stack([loss.detach(), *(part.detach() for part in parts)]).float().cpu()
            seen.append({"qids": batch["qids"], "finite": bool(values.isfinite().all())})
            sums += values
        torch.distributed.all_reduce(sums := sums.to(self.model.device))
        self.step += 1
        applied = self.engine.was_step_applied()
        if not applied:
            self._skipped(seen)
        if self.rank == 0:
            seconds = time.monotonic() - began
            means = [x if math.isfinite(x) else None for x in (sums / (section.accumulation * self.world)).tolist()]
            # The GPU's peak; without a GPU that is 0, and this process's peak counts.
            memory = torch.cuda.max_memory_allocated() or 1024 * getrusage(RUSAGE_SELF).ru_maxrss
            record = {"step": self.step, "epoch": self.epoch(self.step), **dict(zip(LOSSES, means, strict=True))}
            record |= {"weights": weights, "learning_rate": rate}
            record["gradient_norm"] = float(self.engine.get_global_grad_norm()) if applied else None
            record["samples_per_second"] = section.micro_batch * section.accumulation * self.world / seconds
            _append(self.run.step_log, record | {"memory_gib": memory / 2**30, "seconds": seconds})

    def _skipped(self, seen: list[dict]) -> None:
        """DeepSpeed has left out a step for a gradient that is not finite: write down its queries, stop if too many."""
        micro_batches = [micro_batch for process in launcher.gathered(seen) for micro_batch in process]
        causes = [micro_batch for micro_batch in micro_batches if not micro_batch["finite"]]
        what = "loss" if causes else "gradient"
        qids = [qid for micro_batch in causes or micro_batches for qid in micro_batch["qids"]]
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
        tversky = losses.tversky(digits, soft, section.tversky_alpha, section.tversky_beta, section.eps)
        dice = losses.generalized_dice(digits, soft, section.eps)
        return losses.lm(logits, answers), losses.bce(digits, soft, section.pos_weight), tversky, dice

    def _asked_to_stop(self) -> bool:
        # If the process that started this one is gone (a notebook's kernel was killed), nobody reads on.
        watcher = Path("/proc", os.environ.get(launcher.WATCHER, "self"))
        stop = (self.run.train / "stop").exists() or not watcher.exists()
        return any(launcher.gathered(stop))  # all processes leave at the same step


def _append(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@command_line()
def main(arguments: Sequence[str] | None = None) -> None:
    """One process of the training, as `launch` and the DeepSpeed launcher start it."""
    with launcher.started("framseg.train", "One process of the training.", arguments) as (profile, run, _):
        if not profile.training.epochs:
            raise TrainError("training.epochs is 0: nothing is trained; framseg run takes the weights as they are")
        rank, world = launcher.place()
        with hold(run.train) if rank == 0 else contextlib.nullcontext():
            if rank == 0:  # the processes may have been started without `launch`, as on several machines
                resume.changes(profile, run)
                resume.label(profile, run)
            Trainer(profile, run, rank, world).train()


if __name__ == "__main__":
    main()
