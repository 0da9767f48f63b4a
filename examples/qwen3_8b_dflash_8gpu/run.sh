#!/usr/bin/env bash
# Qwen3-8B with a DFlash draft on one node of 8 GPUs. Arguments are settings; trainer.dry_run=true only prints the plan.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=qwen3_8b_dflash_dapo_8gpu "$@"
