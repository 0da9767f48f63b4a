#!/usr/bin/env bash
# scripts/setup.sh PYTHON VERSION VENV LOCK: makes or updates VENV from LOCK (`make setup` calls this).
# One line a phase; pip's own go to LOG.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=$1
VERSION=$2
VENV=$3
LOCK=$4
# The Makefile's variable for PYTHON: PYTHON of .venv, PYTHON312 of .venv312.
SETTING=PYTHON${VENV#.venv}
TORCH_INDEX=https://download.pytorch.org/whl/cpu
LOG=$VENV/setup.log

fail() {
    echo "setup: error: $*" >&2
    exit 1
}

# The lock is complete, so pip looks for no dependencies. Most modules are never imported, so pip compiles none.
install() {
    "$VENV/bin/python" -m pip install --no-deps --no-compile --disable-pip-version-check --no-input "$@" >>"$LOG" 2>&1
}

why() {
    grep '^ERROR' "$LOG" | tail -n 1
}

# A shim of pyenv runs only the version that is chosen; other commands do not read the variable.
"$PYTHON" -c '' 2>/dev/null || export PYENV_VERSION=$VERSION
command -v "$PYTHON" >/dev/null ||
    fail "$PYTHON not found: Python $VERSION is needed; install it, or say where it is: make $SETTING=/path/to/python$VERSION"
[ "$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$VERSION" ] ||
    fail "$PYTHON is not Python $VERSION, which $LOCK is for; say where it is: make $SETTING=/path/to/python$VERSION"

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

# Where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process of a run would compile them.
echo "setup: compiling what engines and workers import"
env --unset=PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c "
import skyrl_spec.controller.loop, skyrl_spec.envs.env_process, skyrl_spec.rollout.actor, skyrl_spec.training.worker
import skyrl_gym, transformers.models.auto.modeling_auto, vllm.v1.worker.cpu_model_runner, wandb
from vllm import LLM
" >>"$LOG" 2>&1 || fail "a package cannot be imported: $(tail -n 1 "$LOG") (see $LOG)"
