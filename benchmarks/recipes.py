"""Estimates for the recipes on 8 GPUs: operations, time and memory of a worker, with all positions and with a share.

    python benchmarks/recipes.py
    python benchmarks/recipes.py --response 6000 --mfu 0.3

Nothing runs on a GPU. Operations are those of the dry-run plan (``specs/flops.py``), and those of recompute and of the
pass that computes old log-probs. Time is operations divided by the speed of the trainer's GPUs at a given MFU, which
the GPU pack measures. Memory is the plan's. Models and drafts are only their ``config.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from model_shapes import MIMO_7B, QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.planning.memory import plan_memory
from skyrl_spec.planning.training_flops import step_flops
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.derived import parallel_sizes
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.dflash import dflash_hf_config, fresh_dflash_spec
from skyrl_spec.specs.model import load_spec

MODELS = {
    "mimo_7b_dapo_8gpu": MIMO_7B,
    "qwen3_8b_dflash_dapo_8gpu": QWEN3_8B,
    "qwen3_32b_dflash_dapo_16gpu": QWEN3_32B,
    "qwen3_30b_a3b_dflash_dapo_16gpu": QWEN3_30B_A3B,
}


def recipe(name: str, folder: Path) -> Config:
    """The recipe's settings, with directories that hold only a ``config.json`` in place of models."""
    words = [f"experiment={name}", f"trainer.policy.model.path={_write(folder / name, MODELS[name])}"]
    config = load_config(words)
    if config.trainer.dflash.enabled:
        config.trainer.dflash.path = None
        spec = fresh_dflash_spec(config.trainer.dflash, load_spec(config.trainer.policy.model.path, weights=False), 0)
        config.trainer.dflash.path = _write(folder / f"{name}_draft", dflash_hf_config(spec, "bfloat16"))
    return config


def _write(folder: Path, content: dict[str, object]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=256, help="mean tokens of a prompt")
    parser.add_argument("--response", type=int, default=3000, help="mean tokens of a response")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak speed that training reaches")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of a GPU in bf16")
    args = parser.parse_args()
    heads = ["recipe", "positions_per_step", "sequence parallel", "policy, PFLOP a step", "draft, PFLOP a step"]
    heads += ["draft's share", "minutes a step", "GB a worker", "GB of activations"]
    print(f"| {' | '.join(heads)} |\n|---|---:|---|{'---:|' * (len(heads) - 3)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            config = recipe(name, Path(folder))
            kind = trained_kind(config.trainer)
            assert kind is not None
            default = kind.settings(config.trainer).positions_per_step
            for share, divides in ((1.0, False), (default, None)):
                kind.settings(config.trainer).positions_per_step = share
                config.trainer.policy.megatron_config.sequence_parallel = divides
                policy, draft = step_flops(config, args.prompt, args.response)
                speed = args.mfu * args.peak_tflops * 1e12 * parallel_sizes(config).world_size
                cells = [name, f"{share:g}", "no" if divides is False else "yes", f"{policy / 1e15:,.0f}"]
                cells += [f"{draft / 1e15:,.1f}", f"{draft / (policy + draft):.1%}"]
                worker = plan_memory(config).worker
                cells += [f"{(policy + draft) / speed / 60:.1f}", f"{worker.total / 1e9:.1f}"]
                cells += [f"{worker.activations / 1e9:.1f}"]
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
