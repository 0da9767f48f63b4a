#!/usr/bin/env bash
# MiMo-7B-RL with its MTP head on one node of 8 GPUs; further words are settings, trainer.dry_run=true only plans.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=mimo_7b_dapo_8gpu "$@"
