#!/usr/bin/env bash
# Makes .venv and installs kvstrata into it: `scripts/setup.sh EXTRAS`, for example `serve,test`.
#
# Needs a Python >= 3.11 with venv and ensurepip, and a package index that pip can reach (or wheels at
# hand: PIP_FIND_LINKS). Says which of them is missing, and leaves an interrupted .venv fit to go on from.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=$1

say() { printf '==> %s\n' "$*"; }
stop() { printf '\nkvstrata setup: %s\n' "$1" >&2; printf '  %s\n' "${@:2}" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if new_enough "$candidate"; then echo "$candidate"; return; fi
  done
  return 1
}

python=$(find_python) || stop "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}." \
  "Install Python 3.11 (with its venv module), or name one: make setup PYTHON=/path/to/python3.11"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || stop "$python has no venv or no ensurepip." \
    "On Debian and Ubuntu they are a package of their own: apt-get install python3-venv"
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv || stop "could not make .venv." "See the message above (disk full? folder not writable?)."
fi
new_enough .venv/bin/python || stop ".venv holds $(.venv/bin/python --version), too old." "Remove it and run again: rm -rf .venv"

say "installing kvstrata[$extras] into .venv (the first time: some hundred packages, torch among them; minutes)"
.venv/bin/python -m pip install -c constraints.txt -e ".[$extras]" || stop "pip could not install the packages." \
  "If it said that a connection failed or that no version was found: there is no network, or no package index behind it." \
  "With the wheels in a folder it goes without: PIP_NO_INDEX=1 PIP_FIND_LINKS=/folder make setup" \
  "If it said 'No space left on device': a CPU build of torch is far smaller (README, Quick start)." \
  "Run the same command again once it is cured: what was downloaded is kept."
