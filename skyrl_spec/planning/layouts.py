"""Which layouts of a run fit on so many GPUs, and what a step of each would take: ``skyrl-spec layouts``.

    candidates     who trains and who samples, in which parallelism, what is recomputed
      -> fit       every phase of ``planning.phases`` and a sequence of the greatest length, within a GPU's memory
      -> estimate  seconds of a step, at the speeds of ``trainer.hardware``
      -> best first

Seconds are estimates from counts. Training: operations at an assumed share of the peak, and bytes of collectives.
Sampling: every decode step reads the weights and the keys of its sequences. Nothing is started, no weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.memory import MemoryPlan, plan_memory
from skyrl_spec.planning.phases import key_bytes, move_seconds, phases
from skyrl_spec.planning.training_flops import step_flops
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.derived import (
    ParallelSizes,
    engine_dtype,
    longest_sequence,
    max_staleness,
    pack_tokens,
    parallel_sizes,
)
from skyrl_spec.settings.describe import describe
from skyrl_spec.settings.options import LayoutsOptions
from skyrl_spec.settings.rules import check_allowed
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.dtypes import DTYPES
from skyrl_spec.specs.model import ModelSpec, load_spec

# Passes over a layer that end in a collective of tensor parallelism: two in each direction.
_COLLECTIVES_PER_LAYER = 4
# Of keys and values under context parallelism: gathered in each direction, and their gradients scattered.
_GATHERS_PER_LAYER = 3
_RECOMPUTES = (None, "selective", "full")


@dataclass(frozen=True)
class Layout:
    """Who has which GPUs."""

    trainers: int
    tp: int
    cp: int
    pp: int
    ep: int
    engines: int
    engine_tp: int
    is_shared: bool
    recompute: str | None

    @property
    def num_divided(self) -> int:
        """Parts into which replicas and experts are divided."""
        return self.tp * self.cp * self.pp * self.ep

    @property
    def gpus(self) -> int:
        return self.trainers if self.is_shared else self.trainers + self.engines * self.engine_tp

    def words(self, per_machine: int) -> list[str]:
        """Settings of the layout, to paste behind ``skyrl-spec train experiment=NAME``."""
        machines = max(1, self.trainers // per_machine)
        return [
            f"trainer.placement.colocate_all={str(self.is_shared).lower()}",
            f"trainer.placement.policy_num_nodes={machines}",
            f"trainer.placement.policy_num_gpus_per_node={self.trainers // machines}",
            f"trainer.policy.megatron_config.tensor_model_parallel_size={self.tp}",
            f"trainer.policy.megatron_config.context_parallel_size={self.cp}",
            f"trainer.policy.megatron_config.pipeline_model_parallel_size={self.pp}",
            f"trainer.policy.megatron_config.expert_model_parallel_size={self.ep}",
            f"trainer.policy.megatron_config.recompute_granularity={self.recompute or 'null'}",
            f"generator.inference_engine.num_engines={self.engines}",
            f"generator.inference_engine.tensor_parallel_size={self.engine_tp}",
        ]

    def applied(self, config: Config, per_machine: int) -> Config:
        """``config`` in this layout."""
        config = copy.deepcopy(config)
        placement, engine = config.trainer.placement, config.generator.inference_engine
        placement.colocate_all, machines = self.is_shared, max(1, self.trainers // per_machine)
        placement.policy_num_nodes, placement.policy_num_gpus_per_node = machines, self.trainers // machines
        megatron = config.trainer.policy.megatron_config
        megatron.tensor_model_parallel_size, megatron.context_parallel_size = self.tp, self.cp
        megatron.pipeline_model_parallel_size = self.pp
        megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size = self.ep, 1
        megatron.num_layers_in_first_pipeline_stage = megatron.num_layers_in_last_pipeline_stage = None
        megatron.recompute_granularity = self.recompute
        engine.num_engines, engine.tensor_parallel_size = self.engines, self.engine_tp
        return config


@dataclass(frozen=True)
class Estimate:
    """A layout with the seconds of its step, and the bytes of the GPU that is fullest."""

    layout: Layout
    sampling_s: float
    training_s: float
    # Moves between GPUs and their hosts, and the sync.
    moves_s: float
    fullest: float
    is_beside: bool

    @property
    def step_s(self) -> float:
        work = (self.sampling_s, self.training_s)
        return self.moves_s + (max(work) if self.is_beside else sum(work))


def find_layouts(config: Config, options: LayoutsOptions) -> list[Estimate]:
    """Estimates of all layouts that fit, the fastest first. Of several ways to recompute, the fastest that fits.

    Raises:
        ConfigError: an option or setting is wrong, or nothing fits.
    """
    if config.trainer.placement.device != "cuda":
        raise ConfigError(
            f"trainer.placement.device={config.trainer.placement.device}: layouts are those of GPUs; name an "
            "experiment on GPUs, or set it to cuda"
        )
    for setting in describe(LayoutsOptions):
        check_allowed(setting.name, getattr(options, setting.name), setting.allowed)
    if options.gpus < 1:
        raise ConfigError(f"gpus={options.gpus}: must be at least 1; write gpus=N")
    config = copy.deepcopy(config)
    if options.gpu_memory_gb is not None:
        config.trainer.hardware.gpu_memory_gb = options.gpu_memory_gb
    spec = load_spec(config.trainer.policy.model.path, weights=False)
    best: dict[Layout, Estimate] = {}
    smallest = float("inf")
    for layout in candidates(config, spec, options):
        plan, applied = _plan(config, layout, options)
        fullest = max(phase.total for phase in phases(applied, plan))
        smallest = min(smallest, fullest)
        if not fits(applied, plan, fullest):
            continue
        found = estimate(applied, plan, spec, layout, options, fullest)
        key = Layout(**{**layout.__dict__, "recompute": None})
        if key not in best or found.step_s < best[key].step_s:
            best[key] = found
    if not best:
        limit = config.trainer.hardware
        raise ConfigError(
            f"gpus={options.gpus}: no layout fits into GPUs of {limit.gpu_memory_gb:g} GB, {limit.reserved_gb:g} GB of "
            f"which are reserved: the least that one takes is {smallest / 1e9:.0f} GB; take more or larger GPUs, or "
            "lower trainer.max_tokens_per_microbatch or the lengths"
        )
    # Of equal times, the one with less communication.
    return sorted(
        best.values(),
        key=lambda one: (round(one.step_s, 3), one.layout.num_divided, one.layout.engine_tp),
    )


def candidates(config: Config, spec: ModelSpec, options: LayoutsOptions) -> Iterator[Layout]:
    """All layouts of these GPUs that no rule forbids.

    Raises:
        ConfigError: a rule that forbids them all.
    """
    broken: list[ConfigError] = []
    found = False
    for is_shared, trainers in ((True, options.gpus), *((False, count) for count in range(1, options.gpus))):
        sampling = options.gpus if is_shared else options.gpus - trainers
        replicas = _replicas(trainers, spec, options.gpus_per_machine)
        engines = _tensor_sizes(sampling, spec, options.gpus_per_machine)
        for (tp, cp, pp, ep), engine_tp, recompute in product(replicas, engines, _RECOMPUTES):
            layout = Layout(trainers, tp, cp, pp, ep, sampling // engine_tp, engine_tp, is_shared, recompute)
            if _is_allowed(config, layout, options.gpus_per_machine, broken):
                found = True
                yield layout
    if broken and not found:
        raise broken[0]


def _replicas(gpus: int, spec: ModelSpec, per_machine: int) -> list[tuple[int, int, int, int]]:
    """Tensor-, context-, pipeline- and expert-parallel sizes. Each stage of a replica stays within a machine."""
    powers = [2**power for power in range(gpus.bit_length())]
    return [
        (tp, cp, pp, ep)
        for tp, cp, pp, ep in product(_tensor_sizes(gpus, spec, per_machine), powers, powers, powers)
        if tp * cp <= per_machine
        and gpus % (tp * cp * pp) == 0
        and spec.num_layers % pp == 0
        and gpus // pp % ep == 0
        and (1 if spec.experts is None else spec.experts.num) % ep == 0
    ]


def _tensor_sizes(gpus: int, spec: ModelSpec, per_machine: int) -> list[int]:
    """Tensor-parallel sizes of the model on so many GPUs, within a machine."""
    columns = spec.ffn_hidden_size if spec.experts is None else spec.experts.ffn_hidden_size
    shapes = (gpus, spec.num_heads, spec.num_kv_heads, columns)
    powers = (2**power for power in range(per_machine.bit_length()))
    return [size for size in powers if size <= per_machine and all(count % size == 0 for count in shapes)]


def _is_allowed(config: Config, layout: Layout, per_machine: int, broken: list[ConfigError]) -> bool:
    if layout.trainers > per_machine and layout.trainers % per_machine:
        return False
    rows = config.trainer.policy_mini_batch_size * config.generator.n_samples_per_prompt
    if layout.trainers // (layout.tp * layout.cp * layout.pp) > rows:
        return False
    try:
        validate(layout.applied(config, per_machine))
    except ConfigError as error:
        # What is wrong with every layout is no matter of the layout.
        broken.append(error)
        return False
    return True


def _plan(config: Config, layout: Layout, options: LayoutsOptions) -> tuple[MemoryPlan, Config]:
    applied = layout.applied(config, options.gpus_per_machine)
    return plan_memory(applied), applied


def fits(config: Config, plan: MemoryPlan, fullest: float) -> bool:
    """Whether every phase, and a sequence of the greatest length, fit into the memory of the settings."""
    hardware = config.trainer.hardware
    one_sequence = plan.kv_bytes_per_token * longest_sequence(config)
    return fullest <= (hardware.gpu_memory_gb - hardware.reserved_gb) * 1e9 and key_bytes(config, plan) >= one_sequence


def estimate(
    config: Config, plan: MemoryPlan, spec: ModelSpec, layout: Layout, options: LayoutsOptions, fullest: float
) -> Estimate:
    """Seconds of a step of ``config``, which is in this layout."""
    prompt, response = mean_lengths(config, options)
    hardware = config.trainer.hardware
    sync_s = plan.sync / (hardware.gpu_to_gpu_gb_per_s * 1e9)
    return Estimate(
        layout,
        sampling_s=_sampling_seconds(config, plan, spec, options, prompt, response),
        training_s=_training_seconds(config, plan, spec, options, prompt, response),
        moves_s=sync_s + sum(move_seconds(config, plan).values()),
        fullest=fullest,
        is_beside=max_staleness(config) > 0,
    )


def mean_lengths(config: Config, options: LayoutsOptions) -> tuple[int, int]:
    """Tokens of a prompt and of a response, on average: half of the longest, unless the option says otherwise."""
    response = options.response or config.generator.sampling_params.max_generate_length // 2
    return max(1, config.trainer.max_prompt_length // 2), max(1, response)


def acceptance_length(config: Config, options: LayoutsOptions) -> float:
    """Tokens of a decode step. An assumption, unless the option says it: half of the drafted tokens are accepted."""
    if options.acceptance_length is not None:
        return options.acceptance_length
    return 1 + _num_drafted(config) / 2


def _num_drafted(config: Config) -> int:
    kind = trained_kind(config.trainer)
    if kind is None:
        return 0
    spec = load_spec(config.trainer.policy.model.path, weights=False)
    return kind.speculative_config(config.trainer)["num_speculative_tokens"] or kind.num_positions(config, spec)


def _training_seconds(
    config: Config, plan: MemoryPlan, spec: ModelSpec, options: LayoutsOptions, prompt: int, response: int
) -> float:
    hardware, trainer = config.trainer.hardware, config.trainer
    world_size, tp, cp, pp, dp, ep, _ = parallel_sizes(config)
    computed_s = sum(step_flops(config, prompt, response)) / (world_size * hardware.gpu_tflops * 1e12 * hardware.mfu)
    rows = trainer.train_batch_size * config.generator.n_samples_per_prompt * trainer.update_epochs_per_batch
    tokens = rows * (prompt + response) / dp
    size = DTYPES[trainer.policy.megatron_config.dtype].num_bytes
    passes = _COLLECTIVES_PER_LAYER * (1.5 if trainer.policy.megatron_config.recompute_granularity == "full" else 1)
    layers = spec.num_layers / pp
    tp_bytes = passes * layers * tokens / cp * spec.hidden_size * size * _sent(tp)
    # An all-gather or a reduce-scatter is half of an all-reduce.
    gathers = _GATHERS_PER_LAYER + (trainer.policy.megatron_config.recompute_granularity == "full")
    key_values = 2 * spec.num_kv_heads * spec.head_dim / tp
    cp_bytes = gathers * layers * tokens * key_values * size * _sent(cp) / 2
    updates = trainer.train_batch_size // trainer.policy_mini_batch_size * trainer.update_epochs_per_batch
    # Stages wait for the first micro-batch and after the last one.
    num_micros = max(1.0, tokens / updates / pack_tokens(config))
    computed_s *= 1 + (pp - 1) / num_micros
    # States to the next stage, and gradients back.
    pp_bytes = (pp > 1) * 2 * tokens / cp * spec.hidden_size * size
    is_within = world_size <= options.gpus_per_machine
    speed = hardware.gpu_to_gpu_gb_per_s if is_within else hardware.network_gb_per_s
    dp_bytes = updates * plan.worker.gradients * _sent(dp * cp)
    inside_s = (tp_bytes + cp_bytes) / (hardware.gpu_to_gpu_gb_per_s * 1e9)
    expert_speed = hardware.gpu_to_gpu_gb_per_s if ep <= options.gpus_per_machine else hardware.network_gb_per_s
    inside_s += passes / 2 * layers * tokens * _sent_to_experts(spec, tp * cp, ep) * size / (expert_speed * 1e9)
    return computed_s + inside_s + (dp_bytes + pp_bytes) / (speed * 1e9)


def _sent_to_experts(spec: ModelSpec, parts: int, ep: int) -> float:
    """Values that a rank sends for each token of its replica, to experts and back, in one direction of a pass.

    Args:
        parts: ranks that divide the tokens.
    """
    if spec.experts is None:
        return 0.0
    return 2 * spec.experts.per_token * spec.hidden_size / parts * (ep - 1) / ep


def _sent(ranks: int) -> float:
    """Bytes that a rank sends in an all-reduce, for each byte of the tensor."""
    return 2 * (ranks - 1) / ranks


def _sampling_seconds(
    config: Config, plan: MemoryPlan, spec: ModelSpec, options: LayoutsOptions, prompt: int, response: int
) -> float:
    """Decode steps of an engine times their seconds, and the prompts, each read once.

    A step takes as long as its memory or its arithmetic, whichever is slower, and its collectives.
    """
    hardware, engine = config.trainer.hardware, config.generator.inference_engine
    prompts = config.trainer.train_batch_size / engine.num_engines
    rows = prompts * config.generator.n_samples_per_prompt
    context = prompt + response / 2
    room = key_bytes(config, plan) / (plan.kv_bytes_per_token * context)
    running = max(1.0, min(rows, engine.max_num_seqs, room))
    read = plan.engine_weights + running * context * plan.kv_bytes_per_token
    tp, verified = engine.tensor_parallel_size, running * (1 + _num_drafted(config))
    token_s = 2 * plan.num_active_parameters / (tp * hardware.gpu_tflops * 1e12 * hardware.mfu)
    sent = verified * spec.hidden_size * DTYPES[engine_dtype(config)].num_bytes * _sent(tp)
    collective_s = (tp > 1) * (hardware.all_reduce_us / 1e6 + sent / (hardware.gpu_to_gpu_gb_per_s * 1e9))
    step_s = max(read / (hardware.gpu_bandwidth_gb_per_s * 1e9), token_s * verified)
    step_s += _COLLECTIVES_PER_LAYER / 2 * spec.num_layers * collective_s
    num_steps = rows * response / (running * acceptance_length(config, options))
    return num_steps * step_s + prompts * prompt * token_s


def table(found: Sequence[Estimate], limit: int) -> list[str]:
    """Lines of the best ``limit`` layouts."""
    heads = ("", "train", "sample", "recompute", "step", "sampling", "training", "moves", "fullest GPU")
    rows: list[Sequence[str]] = [heads]
    for rank, one in enumerate(found[:limit], start=1):
        layout = one.layout
        replica = layout.tp * layout.cp * layout.pp
        dp = layout.trainers // replica
        sizes = ParallelSizes(layout.trainers, layout.tp, layout.cp, layout.pp, dp, layout.ep)
        train = f"{layout.trainers}: {sizes}"
        sample = f"{layout.engines} x TP {layout.engine_tp}{' (shared)' if layout.is_shared else ''}"
        seconds = (one.step_s, one.sampling_s, one.training_s, one.moves_s)
        cells = (f"{value:.0f} s" for value in seconds)
        rows.append((str(rank), train, sample, layout.recompute or "nothing", *cells, f"{one.fullest / 1e9:.0f} GB"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
