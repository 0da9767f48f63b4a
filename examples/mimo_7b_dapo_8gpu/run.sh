#!/usr/bin/env bash
# MiMo-7B-RL with its MTP head on one node of 8 GPUs. Arguments are settings; trainer.dry_run=true only prints the plan.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=mimo_7b_dapo_8gpu "$@"
