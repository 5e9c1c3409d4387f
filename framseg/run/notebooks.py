"""Run the notebooks in their order for one profile: ``framseg run PROFILE [options]``.

papermill executes every notebook with this Python; the executed copies lie in the run folder, next to the resolved
profile that all of them read. While nothing that a finished notebook was made from has changed (`framseg.run.stamps`),
a whole run skips it. Exit code 1: a notebook failed; 2: nothing was started; 130: it was interrupted.
"""

import argparse
import builtins
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from framseg import FramsegError, command_line, config
from framseg.run import WAITING_THREADS, stamps
from framseg.run.paths import Run, hold

PACKAGED = Path(__file__).parents[1] / "notebooks"  # where an installed package holds them
NOTEBOOKS = PACKAGED if PACKAGED.is_dir() else config.REPOSITORY / "notebooks"
KERNEL = "python3"  # the kernel's name in the notebooks
TRAINING = "03"  # the notebook that trains
MADE_FROM = {"01": ("data", "frames"), "04": ("inference",)}  # other notebooks and what they show of the profile
INTERRUPTED = "interrupted"
TAIL = 25  # lines of a failed cell's traceback that are shown


class RunError(FramsegError):
    """A run cannot start; the message says why."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="framseg run", description="Run the notebooks 01 to 05 for one profile.")
    parser.add_argument("name", nargs="?", metavar="PROFILE", help="its name or the path of a YAML file (demo)")
    parser.add_argument("--profile", metavar="PROFILE", help="another way to name the profile")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. training.epochs=2")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="write there instead of runs/<profile>")
    parser.add_argument("--force", action="store_true", help="run every notebook again, finished and unchanged or not")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="04", help="run this notebook alone, finished or not")
    which.add_argument("--from", dest="first", metavar="04", help="run this notebook and all after it, finished or not")
    return parser.parse_args(arguments)


def chosen(only: str | None, first: str | None) -> list[Path]:
    """Notebooks to run, in order; a notebook is named by its number or its whole name.

    Raises RunError if there are none, or none of that name.
    """
    notebooks = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise RunError(f"{NOTEBOOKS}: no notebooks here; the repository is not complete")
    name = only or first
    if name is None:
        return notebooks
    for i, path in enumerate(notebooks):
        if name in (path.stem, path.stem[:2], path.stem[:2].lstrip("0")):
            return notebooks[i:] if first else [path]
    raise RunError(f"no notebook {name!r}: there are {', '.join(path.stem for path in notebooks)}")


def resolve(options: argparse.Namespace) -> tuple[config.Profile, Run]:
    """The profile with its changes, and the run's paths.

    A part of a run (--only, --from) goes on with the profile in the run folder. Raises RunError or ProfileError.
    """
    if options.name and options.profile and options.name != options.profile:
        raise RunError(f"two profiles were named, {options.name} and {options.profile}: name one")
    if wrong := [change for change in options.set if "=" not in change]:
        raise RunError(f"--set {wrong[0]}: write KEY=VALUE, e.g. training.epochs=2")
    overrides = {key.strip(): value for key, value in (change.split("=", 1) for change in options.set)}
    profile = config.load(options.name or options.profile or "demo", overrides)
    run = Run(profile, options.run_dir and options.run_dir.absolute())
    if (options.only or options.first) and run.profile.is_file():
        profile = config.load(run.profile, overrides)
    return profile, run


def execute(notebook: Path, run: Run) -> None:
    """Execute one notebook with the run's parameters; its copy in the run folder is kept, if it fails, too.

    The kernel works in the current folder, so that a relative path in the profile means the same there as here.
    """
    # papermill takes braces in a path for the name of a parameter, unless they are doubled.
    source, copy = (re.sub("([{}])", r"\1\1", str(path)) for path in (notebook, run.notebooks / notebook.name))
    parameters: dict[str, str | bool] = {"profile": str(run.profile), "run_dir": str(run.root)}
    if "live" in papermill.inspect_notebook(source):
        parameters["live"] = False  # no widgets: nobody can use them while papermill executes
    with tempfile.TemporaryDirectory() as folder:
        # Jupyter may know another interpreter's kernel by this name: this folder, first on its path, has this Python's.
        # It loads no module from the current folder, where a file may have a library's name, unless that is PYTHONPATH:
        # the usual command, `ipykernel_launcher`, takes that away, too.
        # Of a kernel that an interrupt ends, a level below "critical" would show a traceback.
        command = [sys.executable, "-m", "ipykernel", "--log-level=CRITICAL", "-f", "{connection_file}"]
        write_kernel_spec(Path(folder) / "kernels" / KERNEL, {"argv": command, "env": {"PYTHONSAFEPATH": "1"}})
        os.environ["JUPYTER_PATH"] = folder
        papermill.execute_notebook(source, copy, parameters, kernel_name=KERNEL, language="python")


def failure(notebook: Path, run: Run) -> str | None:
    """Execute one notebook; returns why it failed, or None. Of a fault that is no user's, it prints the traceback."""
    try:
        execute(notebook, run)
    except PapermillExecutionError as error:
        if error.ename == KeyboardInterrupt.__name__:
            return INTERRUPTED
        failed = f"cell {error.exec_count} failed with {error.ename}"
        lines = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)).splitlines()
        kind = getattr(builtins, error.ename, object)
        if "Traceback" not in lines[0] or issubclass(kind, OSError):  # a FramsegError has none
            return f"{failed}: {error.evalue}"
        print(*lines[-TAIL:], sep="\n", file=sys.stderr)
        return failed
    except DeadKernelError:
        return "its kernel died, most often for want of memory"
    except OSError as error:
        return str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return None


def keep_labels(profile: config.Profile, run: Run, numbers: set[str]) -> None:
    """ResumeError or RunError for a profile with which chapters were not made that are finished and do not run now."""
    from framseg.run import resume  # loads torch; wrong options are answered without it

    resume.changes(profile, run, trains=TRAINING in numbers)
    for number in MADE_FROM.keys() - numbers:
        if run.profile.is_file() and any(run.notebooks.glob(f"{number}_*.json")):
            if changed := resume.differences(config.load(run.profile), profile, MADE_FROM[number]):
                raise RunError(
                    f"chapter {number} in {run.root} was made with other settings ({'; '.join(changed.values())}): run "
                    f"it again, too, with --from {number}, or give another --run-dir"
                )


@command_line()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the options name; returns the exit code (see above)."""
    options = parse(arguments)
    reasons = {"--only": options.only, "--from": options.first, "--force": options.force}
    option = next((name for name, value in reasons.items() if value), None)
    with command_line(2):
        profile, run = resolve(options)
        chapters = [stamps.Chapter(notebook, profile, run) for notebook in chosen(options.only, options.first)]
        if option or any(chapter.changed() for chapter in chapters):
            from framseg.run import preflight, resume

            numbers = {chapter.notebook.stem[:2] for chapter in chapters}
            keep_labels(profile, run, numbers)
            trains = TRAINING in numbers and not resume.finished(profile, run)
            if missing := preflight.missing(profile, trains, run.root):
                listed = "\n".join(f"- {sentence}" for sentence in missing)
                raise RunError(f"profile {profile.name!r} cannot run here yet, this is missing:\n{listed}")
        lock = hold(run.root)
        run.notebooks.mkdir(parents=True, exist_ok=True)
        config.save(profile, run.profile)
    with lock:
        return run_chapters(chapters, profile, run, option)


def run_chapters(chapters: list[stamps.Chapter], profile: config.Profile, run: Run, option: str | None) -> int:
    """Execute the chapters that have changed, or all of them if an `option` asks for it; returns the exit code."""
    os.environ.setdefault(*WAITING_THREADS)
    os.environ["PYTHONPATH"] = config.import_path()  # kernels import this framseg, wherever they are started
    began, skipped, reason = time.monotonic(), 0, None
    for number, chapter in enumerate(chapters, start=1):
        start, name = time.monotonic(), chapter.notebook.stem
        cause = f"asked for by {option}" if option else chapter.changed()
        if cause is None:
            skipped += 1
            print(f"[{number}/{len(chapters)}] {name}: unchanged, skipped (--force runs it again)", flush=True)
            continue
        print(f"[{number}/{len(chapters)}] {name}: {cause}", flush=True)
        chapter.begin()
        if reason := failure(chapter.notebook, run):
            print(f"error: {name}: {reason}. The executed copy is {chapter.copy}", file=sys.stderr)
            print(f"Finished chapters are kept; go on with --from {name[:2]}", file=sys.stderr)
            break
        chapter.finish()
        print(f"      {time.monotonic() - start:.0f} s", flush=True)
    if skipped < len(chapters) or not run.report.is_file():
        from framseg.run import report  # loads matplotlib and nbconvert; wrong options are answered without them

        report.write(profile, run)
        print(f"report: {run.report}")
    if reason:
        return 130 if reason == INTERRUPTED else 1
    kept = f", {skipped} skipped" if skipped else ""
    print(f"{len(chapters) - skipped} notebooks in {time.monotonic() - began:.0f} s{kept}; everything is in {run.root}")
    return 0
