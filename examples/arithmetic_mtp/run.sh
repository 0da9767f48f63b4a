#!/usr/bin/env bash
# GRPO with a co-trained MTP draft. Arguments are settings: examples/arithmetic_mtp/run.sh trainer.epochs=2
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=cpu_mtp_grpo "$@"
