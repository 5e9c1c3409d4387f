"""Run the notebooks in their order for one profile: ``python -m framseg.run PROFILE [options]``.

Every notebook is executed by papermill in this very Python; the executed copies lie in the run folder, beside the
resolved profile that all of them read. A stamp beside each finished copy says what it was made from: while that stays
the same, a whole run skips it. Exit code 1: a notebook failed; 2: nothing was started, for the reason said.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from framseg import FramsegError, config
from framseg.run import WAITING_THREADS, stamps
from framseg.run.paths import BusyError, Run, hold

NOTEBOOKS = config.REPOSITORY / "notebooks"
KERNEL = "python3"
TRAINING = "03"  # the notebook that trains
TAIL = 25  # lines of a failed cell's traceback that are shown


class RunError(FramsegError):
    """A run that cannot start; the message says why."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_all.sh", description="Run the notebooks 01 to 05 for one profile.")
    parser.add_argument("name", nargs="?", metavar="PROFILE", help="a profile's name or a YAML file's path; else demo")
    parser.add_argument("--profile", metavar="PROFILE", help="the same")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key, e.g. training.epochs=2"
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="write there instead of runs/<profile>")
    parser.add_argument("--force", action="store_true", help="run what is finished and unchanged again, too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="04", help="run this notebook alone, finished or not")
    which.add_argument(
        "--from", dest="first", metavar="04", help="run this notebook and those after it, finished or not"
    )
    return parser.parse_args(arguments)


def chosen(only: str | None, first: str | None) -> list[Path]:
    """Notebooks to run, in order. A notebook is named by its number or its whole name."""
    notebooks = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise RunError(f"{NOTEBOOKS}: no notebooks here; the repository is not complete")
    asked = only or first
    if asked is None:
        return notebooks
    found = [i for i, path in enumerate(notebooks) if asked in (path.stem, path.stem[:2], path.stem[:2].lstrip("0"))]
    if not found:
        raise RunError(f"no notebook {asked!r}: there are {', '.join(path.stem for path in notebooks)}")
    return notebooks[found[0] :] if first else [notebooks[found[0]]]


def resolve(options: argparse.Namespace) -> tuple[config.Profile, Run]:
    """The profile with its changes, and the run's paths.

    A part of a run (--only, --from) goes on with the profile that the run folder holds.
    """
    if options.name and options.profile and options.name != options.profile:
        raise RunError(f"two profiles were named, {options.name} and {options.profile}: name one")
    overrides = {}
    for change in options.set:
        key, equals, value = change.partition("=")
        if not equals:
            raise RunError(f"--set {change}: write KEY=VALUE, e.g. training.epochs=2")
        overrides[key.strip()] = value
    profile = config.load(options.name or options.profile or "demo", overrides)
    run = Run(profile, options.run_dir and options.run_dir.resolve())
    if (options.only or options.first) and run.profile.is_file():
        profile = config.load(run.profile, overrides)
    return profile, run


def refuse_incomplete(profile: config.Profile, run: Run, todo: list[stamps.Step]) -> None:
    """Raise RunError with everything that the profile needs for these notebooks and this machine has not."""

    from framseg.run import preflight  # here, so that a mistyped option is answered at once

    trains = any(one.notebook.stem.startswith(TRAINING) for one in todo) and not run.checkpoint.is_dir()
    missing = preflight.missing(profile, trains)
    if missing:
        what = "\n".join(f"- {line}" for line in missing)
        raise RunError(f"profile {profile.name!r} cannot run here yet, this is missing:\n{what}")


def _literal(path: Path) -> str:
    """A path for papermill, which puts parameters in where it finds braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def execute(notebook: Path, run: Run) -> None:
    """Execute one notebook with the run's parameters; the executed copy is kept, a failed one's too."""
    parameters = {"profile": str(run.profile), "run_dir": str(run.root)}
    if "live" in papermill.inspect_notebook(_literal(notebook)):
        parameters["live"] = False  # nobody looks on: plain lines
    with tempfile.TemporaryDirectory() as folder:
        # A kernel called python3 may be another interpreter's; first on Jupyter's path is a spec of this one.
        write_kernel_spec(str(Path(folder) / "kernels" / KERNEL))
        os.environ["JUPYTER_PATH"] = folder
        papermill.execute_notebook(
            _literal(notebook),
            _literal(run.notebooks / notebook.name),
            parameters=parameters,
            kernel_name=KERNEL,
            language="python",
            cwd=str(NOTEBOOKS),
        )


def step(notebook: Path, run: Run) -> str | None:
    """Execute one notebook; why it failed, with the end of its traceback on stderr, or None."""
    try:
        execute(notebook, run)
    except PapermillExecutionError as error:
        lines = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)).splitlines()
        print(*lines[-TAIL:], sep="\n", file=sys.stderr)
        return f"cell {error.exec_count} failed with {error.ename}"
    except DeadKernelError:
        return "its kernel died, most often for want of memory"
    except OSError as error:
        return str(error)
    except KeyboardInterrupt:
        return "interrupted"
    return None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    asked = {"--only": options.only, "--from": options.first, "--force": options.force}
    always = next((option for option, value in asked.items() if value), None)
    try:
        profile, run = resolve(options)
        todo = [stamps.Step(notebook, profile, run) for notebook in chosen(options.only, options.first)]
        if always or any(one.changed() for one in todo):
            refuse_incomplete(profile, run, todo)
        held = hold(run.root)
        run.notebooks.mkdir(parents=True, exist_ok=True)
        config.save(profile, run.profile)
    except (RunError, config.ProfileError, BusyError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; give another --run-dir", file=sys.stderr)
        return 2
    with held:
        return carry_out(todo, profile, run, always)


def carry_out(todo: list[stamps.Step], profile: config.Profile, run: Run, always: str | None) -> int:
    """Execute what has changed, or all for the reason `always`; the exit code."""
    os.environ.setdefault(*WAITING_THREADS)
    # Notebooks import this framseg, from whatever folder they are started.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(config.REPOSITORY), os.environ.get("PYTHONPATH")]))
    began, skipped, reason = time.monotonic(), 0, None
    for number, one in enumerate(todo, start=1):
        start, name = time.monotonic(), one.notebook.stem
        why = f"asked for by {always}" if always else one.changed()
        if why is None:
            skipped += 1
            print(f"[{number}/{len(todo)}] {name}: unchanged, skipped (--force runs it again)", flush=True)
            continue
        print(f"[{number}/{len(todo)}] {name}: {why}", flush=True)
        one.begin()
        if reason := step(one.notebook, run):
            print(f"{name}: {reason}. The executed copy is {one.copy}", file=sys.stderr)
            print(f"Finished steps are kept; go on with --from {name[:2]}", file=sys.stderr)
            break
        one.finish()
        print(f"      {time.monotonic() - start:.0f} s", flush=True)
    if skipped < len(todo) or not run.report.is_file():
        from framseg.run import report  # here, so that a mistyped option is answered at once

        report.write(profile, run)
        print(f"report: {run.report}")
    if reason:
        return 1
    kept = f", {skipped} skipped" if skipped else ""
    print(f"{len(todo) - skipped} notebooks in {time.monotonic() - began:.0f} s{kept}; everything is in {run.root}")
    return 0
