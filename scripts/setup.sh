#!/usr/bin/env bash
# Makes or updates .venv from requirements-cpu.lock (`make setup` calls this). One line a phase; pip's own go to LOG.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=https://download.pytorch.org/whl/cpu
VENV=.venv
LOCK=requirements-cpu.lock
LOG=$VENV/setup.log

fail() {
    echo "setup: error: $*" >&2
    exit 1
}

# The lock is complete, so pip looks for no dependencies. Modules are compiled when they are first imported: most never are.
install() {
    "$VENV/bin/python" -m pip install --no-deps --no-compile --disable-pip-version-check --no-input "$@" >>"$LOG" 2>&1
}

why() {
    grep '^ERROR' "$LOG" | tail -n 1
}

command -v "$PYTHON" >/dev/null ||
    fail "$PYTHON not found: Python 3.11 is needed; install it, or say where it is: make PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    fail "$PYTHON is not Python 3.11, which $LOCK is for; say where it is: make PYTHON=/path/to/python3.11"

if [ ! -x "$VENV/bin/pip" ]; then
    echo "setup: making $VENV"
    "$PYTHON" -m venv "$VENV" || fail "$PYTHON cannot make virtual environments; install its venv module"
fi
: >"$LOG"

torch=$(grep '^torch==' "$LOCK")
echo "setup: installing the $(grep -c '^[^#]' "$LOCK") packages of $LOCK"
# torch, the largest, at the same time as the others: unpacking is what takes long.
{ install "$torch" || install --index-url "$TORCH_INDEX" "$torch"; } &
torch_pid=$!
install --requirement <(grep -v '^torch==' "$LOCK") || fail "a package of $LOCK is missing: $(why) (see $LOG)"
wait "$torch_pid" ||
    fail "no CPU build of torch: neither pip's index nor $TORCH_INDEX gave $torch; make one reachable (see $LOG)"

echo "setup: installing skyrl-spec"
install --no-build-isolation --editable . || fail "skyrl-spec itself: $(why) (see $LOG)"
