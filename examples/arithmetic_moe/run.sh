#!/usr/bin/env bash
# GRPO on a mixture of experts, with a co-trained DFlash draft. Arguments are settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
exec skyrl-spec train experiment=cpu_moe_dflash_grpo "$@"
