#!/usr/bin/env bash
# Everything that a GPU must prove, for a bare machine without a network (docs/gpus.md).
#
# Here, on a machine with Python 3.12 and a package registry:
#   scripts/gpu_pack.sh build       puts wheels and code into .gpu_pack/, with a manifest
#   scripts/gpu_pack.sh rehearse    runs the checks that need no CUDA, from .gpu_pack/, in a bare Python without a network
#
# On the GPU's machine, whose Python 3.12 has torch, triton, transformers, safetensors and numpy:
#   scripts/gpu_pack.sh run OUT     runs all checks; writes OUT/result.json, OUT/report.md, pictures and traces
#
# rehearse and run take --only NAME, several times: the checks whose names begin with NAME. The exit status is 0 if every
# check that could run passed.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOCK=$ROOT/requirements-cpu-py312.lock
# What the pack carries beside the code. It is installed only where it is missing.
CARRIED='megatron[-_]core|packaging|pyyaml|matplotlib|contourpy|cycler|fonttools|kiwisolver|pillow|pyparsing|python-dateutil|six'
# What a GPU machine has at least.
MACHINE=(torch==2.11.0 transformers safetensors numpy pyarrow)
MAX_MIB=50
ENVIRONMENT=$ROOT/build/gpu_pack_env

fail() {
    echo "gpu_pack: error: $*" >&2
    exit 1
}

# A shim of pyenv runs only the version that is chosen; other commands do not read the variable.
python312() {
    local python=${PYTHON312:-python3.12}
    "$python" -c '' 2>/dev/null || export PYENV_VERSION=3.12
    command -v "$python" >/dev/null || fail "$python not found: install Python 3.12, or set PYTHON312"
    "$python" "$@"
}

build() {
    local pack=$ROOT/.gpu_pack
    rm -rf "$pack"
    mkdir -p "$pack/wheels" "$pack/code"
    echo "gpu_pack: downloading wheels"
    grep -iE "^($CARRIED)==" "$LOCK" >"$pack/wheels.txt"
    python312 -m pip download --quiet --no-deps --only-binary=:all: --disable-pip-version-check --no-input \
        --dest "$pack/wheels" --requirement "$pack/wheels.txt" || fail "a package of $LOCK could not be downloaded"
    echo "gpu_pack: copying the code"
    (cd "$ROOT" && git ls-files --cached --others --exclude-standard -- \
        skyrl_spec tests benchmarks scripts 'examples/arithmetic_mtp/*.py' pyproject.toml requirements-cpu-py312.lock |
        while read -r file; do [ ! -f "$file" ] || echo "$file"; done |
        tar -cf - --files-from=-) | tar -xf - -C "$pack/code"
    (cd "$pack" && {
        echo "commit $(git -C "$ROOT" rev-parse HEAD 2>/dev/null || echo unknown)"
        find . -type f ! -name MANIFEST -printf '%P\n' | sort | xargs sha256sum
    } >MANIFEST)
    local kib
    kib=$(du -sk "$pack" | cut -f1)
    [ $((kib / 1024)) -lt $MAX_MIB ] || fail "$pack has $((kib / 1024)) MiB; at most $MAX_MIB can be brought along"
    echo "gpu_pack: $pack, $(grep -c / "$pack/MANIFEST") files, $((kib / 1024)) MiB (at most $MAX_MIB); .gpu_pack/MANIFEST lists them:"
    find "$pack/wheels" -name '*.whl' -printf '  wheels/%f %k KiB\n' | sort
    echo "  code/ $(du -sk "$pack/code" | cut -f1) KiB"
}

rehearse() {
    [ -f "$ROOT/.gpu_pack/MANIFEST" ] || fail "there is no .gpu_pack: run scripts/gpu_pack.sh build first"
    if [ ! -f "$ENVIRONMENT/.ready" ]; then
        echo "gpu_pack: making $ENVIRONMENT with ${MACHINE[*]}, as a GPU machine has them"
        python312 -m venv "$ENVIRONMENT"
        "$ENVIRONMENT/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "${MACHINE[@]}"
        touch "$ENVIRONMENT/.ready"
    fi
    local there
    there=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$there'" EXIT
    cp -r "$ROOT/.gpu_pack" "$there/.gpu_pack"
    echo "gpu_pack: rehearsing in $there on $("$ENVIRONMENT/bin/python" -V), without a network"
    # Its own network, in which only the loopback interface exists, for process groups.
    unshare --user --map-root-user --net env -i HOME="$there" PATH="$ENVIRONMENT/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
        GPU_PACK_DEVICE=cpu bash -c 'python "$0/scripts/loopback.py" && "$0/scripts/gpu_pack.sh" run "$@"' \
        "$there/.gpu_pack/code" "$ROOT/build/gpu_pack" "$@"
}

run() {
    local out=${1:-}
    [ -n "$out" ] || fail "run needs a folder for its results: scripts/gpu_pack.sh run OUT"
    shift
    # From a checkout, or from the pack itself.
    local pack=$ROOT/.gpu_pack
    [ -d "$pack" ] || pack=$(dirname "$ROOT")
    [ -f "$pack/MANIFEST" ] || fail "there is no pack: bring .gpu_pack along, which scripts/gpu_pack.sh build makes"
    local code=$pack/code site
    site=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$site'" EXIT
    mkdir -p "$out"
    python3 "$code/scripts/missing_wheels.py" "$pack/wheels" >"$site/missing.txt"
    xargs --no-run-if-empty python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --target "$site" <"$site/missing.txt"
    local folders=$code:$code/tests/gpu:$code/tests/dist:$code/tests/megatron:$code/tests/rollout:$code/benchmarks
    # NVML answers whether there is a GPU: CUDA works in no fork of a process that has asked CUDA's runtime. Megatron
    # warns of every package that it could use.
    PYTHONPATH=$folders:$code/examples/arithmetic_mtp:$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
        PYTORCH_NVML_BASED_CUDA_CHECK=1 PYTHONWARNINGS=ignore \
        python3 "$code/tests/gpu/gpu_pack.py" --device "${GPU_PACK_DEVICE:-cuda}" --budget "${GPU_PACK_BUDGET_S:-540}" "$out" "$@"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
build | rehearse | run) "$command" "$@" ;;
*) fail "${command:-nothing} is none of build, rehearse, run (see the first lines of $0)" ;;
esac
