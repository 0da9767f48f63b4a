#!/usr/bin/env bash
# Makes .venv from requirements-cpu.lock: `make setup`. Says one line per phase; details go to .venv/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=https://download.pytorch.org/whl/cpu
VENV=.venv
LOCK=requirements-cpu.lock
LOG=$VENV/setup.log

fail() { echo "setup: error: $*" >&2; exit 1; }

# Quiet on the console, everything in the log. The lock is complete, so pip has no dependencies to look for.
install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --log "$LOG" --no-deps "$@"; }

command -v "$PYTHON" >/dev/null ||
    fail "$PYTHON not found: Python 3.11 is needed; install it or say where it is with PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    fail "$PYTHON is not Python 3.11, which the lock file is for; set PYTHON=/path/to/python3.11"

if [ ! -x "$VENV/bin/python" ]; then
    echo "setup: making $VENV"
    "$PYTHON" -m venv "$VENV" || fail "$PYTHON cannot make a virtual environment; install its venv module"
fi

TORCH=$(grep '^torch==' "$LOCK")
echo "setup: installing $TORCH"
install "$TORCH" 2>/dev/null || install --index-url "$TORCH_INDEX" "$TORCH" 2>/dev/null ||
    fail "no CPU build of torch: neither pip's index nor $TORCH_INDEX offers $TORCH; make one of them reachable ($LOG)"

echo "setup: installing $(grep -c '==' "$LOCK") packages from $LOCK"
install --no-compile -r "$LOCK" || fail "a package of $LOCK could not be installed; see $LOG"

echo "setup: installing skyrl-spec"
install --no-build-isolation -e . || fail "skyrl-spec itself could not be installed; see $LOG"
