#!/usr/bin/env bash
# Set-up if needed, then every notebook for one profile, or the tests.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
VENV=$ROOT/.venv
STAMP=$VENV/framseg-stamp
LOG=$ROOT/runs/setup.log
SPACE_GIB=4

usage() {
  cat <<'USAGE'
usage: ./run_all.sh [demo|paper|test|PROFILE] [options]

  demo      the whole method on a small synthetic video set, without a GPU (the default)
  paper     the published setting; needs GPUs, the weights and the videos, and lists what is missing
  test      the tests without the long ones, at most 15 minutes on two cores; test --all: all tests, at most 60 minutes.
            Other options go to pytest, e.g. ./run_all.sh test -k losses
  PROFILE   a profile of framseg/profiles, or the path of a YAML file

options of a profile:
  --profile PROFILE another way to name the profile
  --set KEY=VALUE   change one key of the profile, e.g. --set training.epochs=2 (repeatable)
  --only 04         run this notebook alone, on what the run folder holds already
  --from 04         run this notebook and all after it
  --force           run every notebook again
  --run-dir DIR     write there instead of runs/<profile>

A finished notebook is skipped if nothing that it was made from has changed since: its cells, the code, the profile, the
data, the model's files, the notebooks before it. --only, --from and --force run it in any case. A finished training is
not repeated: to train anew, give another --run-dir or remove runs/<profile>/train. All executed notebooks are on one
page, runs/<profile>/report.html.

The active Python is used if it has the packages of environment.yml (torch >= 2.11, transformers >= 5.17, others in any
version). Otherwise they are installed with pip into .venv, once, and the command .venv/bin/framseg with them. Without
an NVIDIA GPU, torch's CPU wheels are a much smaller download: configure pip for them (pip config, PIP_FIND_LINKS) as
PyTorch's installation page says.
USAGE
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

requirements() { # the pip part of environment.yml, one requirement per line
  awk '/^ *- pip:/ { pip = 1; next } pip && sub(/^ *- /, "") { sub(/ +#.*/, ""); print }' "$ROOT/environment.yml"
}

lacks() { # what Python $1 lacks of framseg's dependencies, in words; nothing if it can be used
  requirements | "$1" -c '
import re, sys
lines = sys.stdin.read().splitlines()
if sys.version_info < (3, 11):
    sys.exit(print("Python >= 3.11"))
from importlib.metadata import PackageNotFoundError, version
least = {"torch": (2, 11), "transformers": (5, 17)}
lacks = []
for name in (line.split("==")[0] for line in lines if "==" in line):
    try:
        found = version(name)
    except PackageNotFoundError:
        lacks.append(name)
        continue
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < least.get(name, ()):
        lacks.append(name + " >= " + ".".join(map(str, least[name])))
print(", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""))
' 2>/dev/null || echo "a Python >= 3.11 that runs"
}

compiler() { # DeepSpeed and torch.compile build their operations with it
  local name
  for name in "${CXX:-}" c++ g++ clang++; do
    if [ -n "$name" ] && command -v "${name%% *}" >/dev/null; then return; fi
  done
  fail "no C++ compiler found (c++, g++ or clang++): install one, e.g. 'sudo apt install g++', or name it in CXX"
}

new_enough_python() { # each is tried: version managers leave names on the path that start no Python
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

stamp() { # what .venv was made for; it is made anew after the folder has moved or pins have changed
  printf '%s\n' "$ROOT"
  cat "$ROOT/environment.yml"
}

install() {
  local base free start=$SECONDS
  base=$(new_enough_python) || fail "no Python >= 3.11 found: install one, e.g. 'sudo apt install python3 python3-venv'"
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base has no venv module: install it, e.g. 'sudo apt install python3-venv'"
  free=$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge "$SPACE_GIB" ] ||
    fail "$free GiB free on the disk of $ROOT: the environment takes $SPACE_GIB GiB (about 8 with CUDA's libraries)"
  mkdir -p "$(dirname "$LOG")"
  echo "Installing the dependencies into $VENV, once (log: $LOG)"
  rm -rf "$VENV"
  mkdir "$VENV"
  echo installing >"$STAMP" # an interrupted installation leaves this, and is repeated
  if ! { "$base" -m venv "$VENV" &&
    requirements >"$VENV/requirements.txt" &&
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check -r "$VENV/requirements.txt"); } \
    >"$LOG" 2>&1; then
    tail -n 20 "$LOG" >&2
    grep -q 'No space left' "$LOG" && fail "the disk is full: free some 8 GiB and start again"
    fail "the installation failed, the reason is above; the whole log is $LOG"
  fi
  stamp >"$STAMP"
  echo "Installed in $((SECONDS - start)) s"
}

choose_python() { # sets PYTHON
  local active reason
  active=$(command -v python || command -v python3 || true)
  reason=$([ -n "$active" ] && lacks "$active" || echo "Python >= 3.11")
  if [ -z "$reason" ]; then
    PYTHON=$("$active" -c 'import sys; print(sys.executable)')
    return
  fi
  PYTHON=$VENV/bin/python
  if [ -d "$VENV" ] && [ ! -e "$STAMP" ]; then # the user's own environment is not replaced
    reason=$(lacks "$PYTHON")
    [ -z "$reason" ] || fail "$VENV was not made by run_all.sh and lacks $reason: complete it or move it away"
  elif [ ! -x "$PYTHON" ] || ! stamp | cmp -s - "$STAMP"; then
    echo "The active environment lacks $reason"
    install
  fi
}

main() {
  case "${1:-}" in
  -h | --help)
    usage
    return
    ;;
  esac
  compiler
  choose_python
  PATH=$(dirname "$PYTHON"):$PATH # the DeepSpeed launcher and ninja of the same environment
  export PATH PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  if [ "${1:-}" = test ]; then
    cd "$ROOT"
    exec "$PYTHON" -m pytest "${@:2}"
  fi
  exec "$PYTHON" -P -m framseg.run "$@"
}

main "$@"
