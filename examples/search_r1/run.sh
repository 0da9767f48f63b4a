#!/usr/bin/env bash
# MiMo-7B learns to search, on one node of 8 GPUs. INDEX is a folder that corpus.py built (default: data/search_index).
# Arguments are settings; trainer.dry_run=true only prints the plan, and starts no server.
# With --cpu as the first argument a tiny model does, with the same server over invented facts: minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

if [[ "${1:-}" == --cpu ]]; then
    shift
    exec skyrl-spec train experiment=cpu_search_grpo "$@"
fi
if [[ " $* " != *" trainer.dry_run=true "* ]]; then
    python examples/search_r1/server.py "${INDEX:-data/search_index}" --port 8000 &
    trap 'kill %1' EXIT
fi
skyrl-spec train experiment=mimo_7b_search_r1_8gpu "$@"
