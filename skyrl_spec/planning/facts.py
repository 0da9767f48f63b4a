"""What the start-up panel and the dry run say about a plan."""

from __future__ import annotations

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.kinds.served import build_speculative_config
from skyrl_spec.planning.memory import MemoryPlan
from skyrl_spec.settings.derived import (
    longest_sequence,
    max_staleness,
    pack_tokens,
    parallel_sizes,
    ratio_anchor,
    sync_backend,
    uses_tis,
)
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.flops import policy_training
from skyrl_spec.specs.model import load_spec


def memory_line(plan: MemoryPlan) -> str:
    """The line about memory in the start-up panel."""
    worker = plan.worker
    return (
        f"about {readable(worker.total)} per worker, {readable(plan.engine_weights)} of weights per engine, "
        f"checkpoint {readable(plan.checkpoint)}"
    )


def plan_facts(config: Config, plan: MemoryPlan, *, num_runs: int = 1) -> dict[str, str]:
    """Facts that ``trainer.dry_run`` prints after the start-up panel, one per line."""
    sizes = parallel_sizes(config)
    trainer, engine, worker = config.trainer, config.generator.inference_engine, plan.worker
    on_cpu = trainer.placement.device == "cpu"
    drafted = build_speculative_config(config) is not None
    plain_engines = int((trainer.measure_speedup or bool(trainer.canary.lossless_interval)) and drafted)
    own_gpus = 0 if trainer.placement.colocate_all else engine.num_engines * engine.tensor_parallel_size
    shares = ", ".join(f"{name} {readable(part)}" for name, part in worker.parts.items() if part)
    facts = {
        "processes": f"driver, scorer, {sizes.world_size} x worker ({sizes}), {engine.num_engines} x engine "
        f"(TP {engine.tensor_parallel_size}){', engine without a draft' if plain_engines else ''}",
        "GPUs": "none"
        if on_cpu
        else f"{sizes.world_size + own_gpus}{' (shared)' if trainer.placement.colocate_all else ''}",
        "worker": f"about {readable(worker.total)} each: {shares}",
        **_stages(plan),
        **_steps(config),
        "packs": _packs(config),
        **_training(config),
        "engine": f"weights {readable(plan.engine_weights)} per GPU; {_cache(config, plan)}"
        + (f"; distributions of drafts, at most {readable(plan.draft_probs)}" if plan.draft_probs else ""),
        "sync": f"{readable(plan.sync)} after every step, by {sync_backend(config)}",
        "checkpoint": f"{readable(plan.checkpoint)} each, {_saves(config, plan)}",
        "tokens": f"at most {plan.tokens_per_step:,} per step, prompts included",
    }
    return facts if num_runs == 1 else facts | {"runs": f"{num_runs}, one after the other"}


def _stages(plan: MemoryPlan) -> dict[str, str]:
    if len(plan.stage_totals) == 1:
        return {}
    first, *middle, last = map(readable, plan.stage_totals)
    totals = [f"{first} (with the embedding)", *middle, f"{last} (with output head and draft)"]
    return {"stages": f"{', '.join(totals)}; the line above is the fullest"}


def _saves(config: Config, plan: MemoryPlan) -> str:
    trainer, copies = config.trainer, readable(plan.checkpoint_copies)
    if not trainer.ckpt_interval:
        return "only if SIGTERM stops the run"
    beside = f"; written beside training, from copies of at most {copies} in host memory per worker"
    return f"{trainer.max_ckpts_to_keep} kept{beside if plan.checkpoint_copies else ''}"


def _steps(config: Config) -> dict[str, str]:
    """How sampling and training follow each other, if not in turns."""
    staleness, requests = max_staleness(config), config.trainer.fully_async.running_requests
    if not staleness:
        return {}
    how = "the next batch is sampled while the workers train, so it comes from weights of a step before"
    if staleness > 1:
        at_sync = {
            "recompute": "go on with keys computed again",
            "keep": "go on with the keys they have",
            "wait": "end before it",
        }
        how = (
            f"engines sample without pause, with weights of at most {staleness} steps before; responses that run at a "
            f"sync {at_sync[requests]}"
        )
    corrected = "use_tis corrects the loss" if uses_tis(config) else "nothing corrects the loss"
    if ratio_anchor(config) == "rollout":
        corrected = "the loss is anchored on the log-probs that they were sampled with"
    return {"asynchronous": f"{how}; {corrected}"}


def _packs(config: Config) -> str:
    trainer = config.trainer
    budget, longest = pack_tokens(config), longest_sequence(config)
    alone = f" (sequences of up to {longest:,} have a pack to themselves)" if longest > budget else ""
    is_one_update = trainer.update_epochs_per_batch == 1 and trainer.policy_mini_batch_size == trainer.train_batch_size
    source = "the update itself, the only one of a step" if is_one_update else "a forward pass before the updates"
    if ratio_anchor(config) == "rollout":
        source = "the engines"
    return f"{budget:,} tokens{alone}; old log-probs from {source}"


def _training(config: Config) -> dict[str, str]:
    """The draft's part of the operations of a training step whose responses have half of their largest length."""
    trainer, kind = config.trainer, trained_kind(config.trainer)
    if kind is None:
        return {}
    spec = load_spec(trainer.policy.model.path, weights=False)
    prompt, response = trainer.max_prompt_length, config.generator.sampling_params.max_generate_length // 2
    policy = policy_training(spec, prompt, response).total
    draft = kind.training_flops(config, spec, prompt, response).total
    share = kind.settings(trainer).positions_per_step
    return {
        "draft training": f"{draft / (policy + draft):.1%} of the FLOPs of training, with positions_per_step={share:g} "
        f"and responses of {response:,} tokens"
    }


def _cache(config: Config, plan: MemoryPlan) -> str:
    engine = config.generator.inference_engine
    per_token = f"KV cache {readable(plan.kv_bytes_per_token)} per token"
    if config.trainer.placement.device == "cuda":
        return f"{per_token}, in the rest of {engine.gpu_memory_utilization:.0%} of a GPU"
    cache = engine.cpu_kvcache_space * 2**30
    return f"{per_token}, {readable(cache)} for {cache / plan.kv_bytes_per_token:,.0f} tokens"


def readable(num_bytes: float) -> str:
    """``num_bytes`` with a decimal unit, such as 1.5 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes, units = num_bytes / 1000, units[1:]
    decimals = 0 if num_bytes >= 100 or units[0] == "B" else 1
    return f"{num_bytes:.{decimals}f} {units[0]}"
