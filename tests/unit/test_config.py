"""Composition of configurations, and the rules they are checked against."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings import compose
from skyrl_spec.settings.compose import available, load_config, to_yaml
from skyrl_spec.settings.derived import ParallelSizes, parallel_sizes, sync_backend
from skyrl_spec.settings.schema import Config

MIMO = "experiment=mimo_7b_dapo_8gpu"
CPU = "experiment=cpu_mtp_grpo"
ENGINE = "generator.inference_engine"
PER_NODE = "trainer.placement.policy_num_gpus_per_node"
# Overrides of cpu_mtp_grpo that put its one worker and one engine on one GPU.
COLOCATED = (
    "trainer.placement.device=cuda trainer.placement.colocate_all=true trainer.measure_speedup=false "
    f"{ENGINE}.gpu_memory_utilization=0.5"
)


def test_the_promised_experiments_exist() -> None:
    assert {"cpu_mtp_grpo", "cpu_mtp_dapo", "cpu_dflash_grpo", "mimo_7b_dapo_8gpu"} <= set(available("experiment"))


@pytest.mark.parametrize("experiment", available("experiment"))
def test_every_shipped_experiment_is_valid(experiment: str) -> None:
    config = load_config([f"experiment={experiment}"])
    validate(config)
    assert config.trainer.run_dir == f"runs/{experiment}"
    assert config.trainer.run_name == experiment


def test_without_overrides_the_schema_and_grpo_hold() -> None:
    assert load_config([]) == Config()


def test_the_eight_gpu_recipe() -> None:
    config = load_config([MIMO])
    assert config.trainer.policy.model.path == "XiaomiMiMo/MiMo-7B-RL"
    assert parallel_sizes(config) == ParallelSizes(4, 4, 1, 1, 1)
    engine = config.generator.inference_engine
    assert parallel_sizes(config).world_size + engine.num_engines * engine.tensor_parallel_size == 8
    assert config.trainer.mtp.enabled
    assert config.trainer.mtp.num_speculative_tokens == 3


def test_dapo_experiment_differs_from_grpo_in_its_objective_only() -> None:
    grpo, dapo = load_config([CPU]), load_config(["experiment=cpu_mtp_dapo"])
    assert dapo.trainer.algorithm.eps_clip_high == pytest.approx(0.28)
    assert dapo.trainer.algorithm.dynamic_sampling.type == "filter"
    assert dapo.trainer.algorithm.overlong.buffer_len > 0
    dapo.trainer.algorithm = grpo.trainer.algorithm
    dapo.trainer.run_dir, dapo.trainer.run_name = grpo.trainer.run_dir, grpo.trainer.run_name
    assert dapo == grpo


def test_the_command_line_wins_and_order_of_groups_does_not_matter() -> None:
    config = load_config(["trainer.max_prompt_length=17", "algorithm=dapo", CPU, "trainer.seed=1", "trainer.seed=2"])
    assert config.trainer.max_prompt_length == 17
    assert config.trainer.seed == 2
    assert config.trainer.algorithm.dynamic_sampling.type == "filter"


def test_free_form_settings_take_new_entries() -> None:
    config = load_config(
        [
            "environment.custom.mine='my.module:Env'",
            "+environment.skyrl_gym.mine.limit=3",
            f"{ENGINE}.speculative_config={{method: mtp, num_speculative_tokens: 2}}",
            f"{ENGINE}.engine_init_kwargs.block_size=16",
        ]
    )
    assert config.environment.custom == {"mine": "my.module:Env"}
    assert config.environment.skyrl_gym == {"mine": {"limit": 3}}
    assert config.generator.inference_engine.speculative_config == {"method": "mtp", "num_speculative_tokens": 2}
    assert config.generator.inference_engine.engine_init_kwargs == {"block_size": 16}


def test_interpolations_are_resolved() -> None:
    config = load_config(
        ["data.train_data=[a.jsonl]", "data.val_data=${data.train_data}", "trainer.run_dir=runs/${trainer.seed}"]
    )
    assert config.data.val_data == ["a.jsonl"]
    assert config.trainer.run_dir == "runs/0"


def test_yaml_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed YAML, used as an experiment, gives the same configuration."""
    config = load_config([MIMO, "trainer.seed=3", f"{ENGINE}.speculative_config.method=mtp"])
    experiment = own_configs(tmp_path, monkeypatch)
    experiment.write_text("# @package _global_\n" + to_yaml(config))
    assert load_config(["experiment=mine"]) == config


MEGATRON = "trainer.policy.megatron_config"
COMPOSITION_ERRORS = {
    "trainer.mtp.num_spec_tokens=2": "did you mean trainer.mtp.num_speculative_tokens?",
    "trainer.num_speculative_tokens=2": "did you mean trainer.mtp.num_speculative_tokens?",
    "trainer.seed.x=1": "trainer.seed.x: unknown setting",
    "hydra.run.dir=x": "hydra.run.dir: unknown setting",
    "trainer.micro_train_batch_size_per_gpu=4": "trainer.micro_train_batch_size_per_gpu: removed; sequences are packed",
    f"{MEGATRON}.recompute_activations=true": (
        f"{MEGATRON}.recompute_activations: removed; set {MEGATRON}.recompute_granularity=full"
    ),
    "zzzzzz=1": "zzzzzz: unknown setting; --cfg job lists all settings",
    "trainer.mtp={foo: 1}": "trainer.mtp.foo: unknown setting",
    "experiment=nope": "experiment=nope: no such experiment; choose one of cpu_dflash_grpo, cpu_moe_dflash_grpo",
    "experiment=[a,b]": "no such experiment",
    "algorithm=ppo": "algorithm=ppo: no such algorithm; choose one of cispo, dapo, dr_grpo, grpo, gspo; did you mean",
    "trainer.epochs=two": "trainer.epochs: Value 'two' of type 'str'",
    "trainer.epochs=2.5": "trainer.epochs: Value '2.5'",
    "trainer.epochs=null": "give an integer",
    "trainer.mtp.enabled=maybe": "give true or false",
    "trainer.policy.optimizer_config.lr=[1]": "give a number",
    "trainer.policy.optimizer_config.adam_betas=[0.9,x]": "adam_betas[1]: Value 'x'",
    "trainer.mtp=true": "trainer.mtp is a section; set one of its settings, as in trainer.mtp.enabled=...",
    "trainer.mtp=null": "trainer.mtp is a section",
    "data.train_data=a.parquet": "must be a list; write 'data.train_data=[a.parquet]'",
    "data.train_data=null": "give a list",
    f"{ENGINE}.speculative_config=mtp": "give a dictionary, as in {a: 1}, or null",
    "trainer.seed=${nope}": "trainer.seed: Interpolation key 'nope' not found",
    "trainer.seed=${trainer.run_dir}": "trainer.seed: While dereferencing",
    "trainer.seed=1,2": "a setting takes exactly one value",
    "~trainer.seed": "a setting takes exactly one value",
    "trainer@x=1": "a setting takes exactly one value",
    "trainer.run_dir=/a=b": "as in 'trainer.run_dir=\"/a=b\"'",
    "trainer.logger=[a": "cannot read override",
    "trainer": "write KEY=VALUE",
    "": "write KEY=VALUE",
}


@pytest.mark.parametrize("override", COMPOSITION_ERRORS)
def test_composition_errors(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([override])
    assert COMPOSITION_ERRORS[override] in str(error.value)
    assert "\n" not in str(error.value)


def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of an experiment "mine" for the test to write, in a copy of configs/ that replaces the original."""
    copy = tmp_path / "configs"
    shutil.copytree(compose.config_dir(), copy)
    monkeypatch.setattr(compose, "config_dir", lambda: copy)
    return copy / "experiment" / "mine.yaml"


FILE_ERRORS = {
    "trainer: {sede: 1}": "mine.yaml: trainer.sede: unknown setting; did you mean trainer.seed?",
    "trainer: {seed: x}": "mine.yaml: trainer.seed: Value 'x'",
    "trainer: {seed: '${'}": "trainer.seed: ",
    "trainer: null": "trainer: ",
    "trainer: {mtp: '${trainer.dflash}'}": "mine.yaml: ",
    "data: {train_data: x}": "mine.yaml: data.train_data: ",
    "trainer: [": "mine.yaml",
    "trainer:\n\tseed: 1": "mine.yaml",
    "trainer: {seed: 1, seed: 2}": "duplicate key",
    "- a": "mine.yaml: ",
    "5": "",
    "defaults: 5": "defaults must be a list",
    "defaults: [nope]": "Could not load 'experiment/nope'",
    "defaults: [mine]": "includes or refers to itself",
    "trainer: {run_dir: !!python/object:os.system x}": "python/object",
}


@pytest.mark.parametrize("text", FILE_ERRORS)
def test_mistakes_in_files(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_configs(tmp_path, monkeypatch).write_text(f"# @package _global_\n{text}")
    with pytest.raises(ConfigError) as error:
        load_config(["experiment=mine"])
    assert FILE_ERRORS[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_package_line_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_configs(tmp_path, monkeypatch).write_text("# @package [\n")
    with pytest.raises(ConfigError, match="package line of a file cannot be read; begin it with '# @package _global_'"):
        load_config(["experiment=mine"])


def test_a_file_without_its_package_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_configs(tmp_path, monkeypatch).write_text("trainer: {seed: 1}")
    with pytest.raises(ConfigError, match="begin the file with '# @package _global_'"):
        load_config(["experiment=mine"])


# Overrides on top of cpu_mtp_grpo, and the beginning of the error line.
RULES = {
    "trainer.dflash.enabled=true": "trainer.dflash.enabled=true: one draft at a time",
    "trainer.dflash.block_size=1": "trainer.dflash.block_size=1: must be at least 2",
    "trainer.dflash.loss_type=mse": "trainer.dflash.loss_type=mse: must be soft_ce or topk_soft_ce or hard_ce",
    "trainer.dflash.optimizer_config.lr=-1": "trainer.dflash.optimizer_config.lr=-1",
    "trainer.resume_mode=newest": "trainer.resume_mode=newest: must be latest or from_path",
    "trainer.mtp.num_speculative_tokens=0": "trainer.mtp.num_speculative_tokens=0: must be at least 1",
    "trainer.mtp.unroll_steps=0": "trainer.mtp.unroll_steps=0",
    **{
        f"trainer.mtp.loss_type={text}": f"trainer.mtp.loss_type={text}: must be soft_ce or topk_soft_ce or hard_ce or "
        "tv or accept, or a sum of them with weights above 0, as in 0.7*soft_ce+0.3*accept; change it"
        for text in ("mse", "soft_ce+mse", "0*soft_ce", "-1*tv+soft_ce", "x*tv", "tv+tv", "soft_ce+", "inf*tv", "2*")
    },
    "trainer.mtp.optimizer_config.scheduler=step": "trainer.mtp.optimizer_config.scheduler=step",
    "trainer.policy.optimizer_config.lr=-1": "trainer.policy.optimizer_config.lr=-1",
    "trainer.policy.optimizer_config.lr=nan": "trainer.policy.optimizer_config.lr=nan",
    "trainer.policy.optimizer_config.lr=inf": "trainer.policy.optimizer_config.lr=inf",
    "trainer.policy.optimizer_config.adam_betas=[0.9]": "trainer.policy.optimizer_config.adam_betas=[0.9]",
    "trainer.policy.optimizer_config.adam_betas=[0.9,1]": "trainer.policy.optimizer_config.adam_betas=[0.9, 1.0]",
    "trainer.policy.optimizer_config.scheduler=cosine trainer.policy.optimizer_config.min_lr=1": (
        "trainer.policy.optimizer_config.min_lr=1.0"
    ),
    "trainer.policy.optimizer_config.min_lr=1": "trainer.policy.optimizer_config.min_lr=1.0: must be at most",
    "trainer.placement.device=cuda": "trainer.measure_speedup=true: needs an additional engine",
    "trainer.algorithm.ratio_anchor=rollout generator.sampling_params.top_p=0.9": (
        "trainer.algorithm.ratio_anchor=rollout: needs log-probs of the full distribution"
    ),
    "trainer.algorithm.ratio_anchor=rollout trainer.algorithm.use_tis=true": (
        "trainer.algorithm.ratio_anchor=rollout: corrects what trainer.algorithm.use_tis=true corrects"
    ),
    "trainer.algorithm.use_tis=true generator.sampling_params.top_p=0.9": (
        "trainer.algorithm.use_tis=true: needs log-probs of the full distribution"
    ),
    "generator.inference_engine.speculative_config={method:ngram,num_speculative_tokens:2}": (
        "generator.inference_engine.speculative_config={'method': 'ngram', 'num_speculative_tokens': 2}: must be of"
    ),
    "trainer.policy.megatron_config.dtype=fp16": "trainer.policy.megatron_config.dtype=fp16: must be fp32 or bf16",
    "trainer.policy.megatron_config.tensor_model_parallel_size=2 trainer.placement.policy_num_gpus_per_node=3": (
        "trainer.policy.megatron_config.tensor_model_parallel_size=2: must divide the 3 policy workers"
    ),
    f"{MEGATRON}.context_parallel_size=2 trainer.placement.policy_num_gpus_per_node=3": (
        f"{MEGATRON}.context_parallel_size=2: must divide the 3 policy workers"
    ),
    f"{MEGATRON}.pipeline_model_parallel_size=2 {MEGATRON}.tensor_model_parallel_size=2 "
    "trainer.placement.policy_num_gpus_per_node=6": (
        f"{MEGATRON}.tensor_model_parallel_size=2: times pipeline_model_parallel_size=2 must divide the 6 policy "
    ),
    f"{MEGATRON}.expert_model_parallel_size=2 trainer.placement.policy_num_gpus_per_node=3": (
        f"{MEGATRON}.expert_model_parallel_size=2: must divide the 3 policy workers of a pipeline stage"
    ),
    f"{MEGATRON}.num_layers_in_last_pipeline_stage=2": (
        f"{MEGATRON}.num_layers_in_last_pipeline_stage=2: must be null with {MEGATRON}.pipeline_model_parallel_size=1"
    ),
    "trainer.policy.model.path=''": "trainer.policy.model.path='': must name a model",
    "trainer.placement.device=tpu": "trainer.placement.device=tpu: must be cpu or cuda",
    "trainer.placement.policy_num_gpus_per_node=3": "trainer.policy_mini_batch_size=8: times generator.n_samples",
    "trainer.algorithm.advantage_estimator=gae": "trainer.algorithm.advantage_estimator=gae",
    "trainer.algorithm.loss_reduction=mean": "trainer.algorithm.loss_reduction=mean",
    "trainer.algorithm.dynamic_sampling.type=replace": "trainer.algorithm.dynamic_sampling.type=replace",
    "trainer.algorithm.eps_clip_low=1.5": "trainer.algorithm.eps_clip_low=1.5: must be above 0 and at most 1",
    "trainer.algorithm.policy_loss_type=ppo": "trainer.algorithm.policy_loss_type=ppo",
    "algorithm=gspo trainer.algorithm.clip_ratio_c=3": "trainer.algorithm.clip_ratio_c=3.0: is the dual clip of",
    "trainer.algorithm.clip_ratio_c=1": "trainer.algorithm.clip_ratio_c=1.0: must be above 1",
    "trainer.algorithm.overlong.buffer_len=200": "trainer.algorithm.overlong.buffer_len=200: must be below generator",
    "trainer.train_batch_size=63": "trainer.train_batch_size=63: must be a multiple of",
    "trainer.max_training_steps=0": "trainer.max_training_steps=0",
    "trainer.logger=[console,mlflow]": "trainer.logger=['console', 'mlflow']: mlflow is not one of",
    f"{MEGATRON}.recompute_modules=[mlp,norm]": (
        f"{MEGATRON}.recompute_modules=['mlp', 'norm']: norm is not one of layernorm, mlp, core_attn; remove it"
    ),
    f"{MEGATRON}.recompute_granularity=some": (
        f"{MEGATRON}.recompute_granularity=some: must be selective or full; set one of these"
    ),
    f"{MEGATRON}.sequence_parallel=true": (
        f"{MEGATRON}.sequence_parallel=true: must be null or false with {MEGATRON}.tensor_model_parallel_size=1"
    ),
    "generator.sampling_params.temperature=2.5": (
        "generator.sampling_params.temperature=2.5: must be at least 0 and at most 2"
    ),
    "trainer.mtp.positions_per_step=0": "trainer.mtp.positions_per_step=0.0: must be above 0 and at most 1; change it",
    "trainer.dflash.positions_per_step=1.5": "trainer.dflash.positions_per_step=1.5: must be above 0 and at most 1",
    "trainer.max_tokens_per_microbatch=0": "trainer.max_tokens_per_microbatch=0: must be at least 1; change it",
    "trainer.max_tokens_per_microbatch=-4": "trainer.max_tokens_per_microbatch=-4: must be at least 1; change it",
    "trainer.run_dir=''": "trainer.run_dir=''",
    "data.train_data=[]": "data.train_data=[]: must name at least one .parquet or .jsonl file",
    "data.val_data=[]": "data.val_data=[]: must name a file for evaluation",
    "generator.n_samples_per_prompt=1": "generator.n_samples_per_prompt=1: must be at least 2",
    "generator.max_turns=0": "generator.max_turns=0: must be at least 1",
    "generator.max_turns=2": "generator.max_input_length=null: is needed with generator.max_turns=2; set it",
    "generator.max_input_length=8": "generator.max_input_length=8: must be at least trainer.max_prompt_length=",
    "generator.max_turns=2 generator.max_input_length=300 trainer.algorithm.overlong.buffer_len=9": (
        "trainer.algorithm.overlong.buffer_len=9: is a penalty on responses of one turn"
    ),
    "trainer.algorithm.advantage_estimator=rloo generator.n_samples_per_prompt=1": (
        "generator.n_samples_per_prompt=1: must be at least 2, because rloo compares the responses"
    ),
    "generator.sampling_params.temperature=0": "generator.sampling_params.temperature=0.0: must be above 0",
    "generator.sampling_params.top_p=0": "generator.sampling_params.top_p=0.0",
    "generator.eval_sampling_params.top_p=1.1": "generator.eval_sampling_params.top_p=1.1: must be above 0 and at most",
    "generator.sampling_params.top_k=0": "generator.sampling_params.top_k=0: must be at least 1, or -1",
    "generator.sampling_params.min_p=0.1": "generator.sampling_params.min_p=0.1",
    f"{ENGINE}.gpu_memory_utilization=1.5": f"{ENGINE}.gpu_memory_utilization=1.5",
    f"{ENGINE}.weight_sync_backend=nccl": (
        f"{ENGINE}.weight_sync_backend=nccl: must be ray with trainer.placement.device=cpu"
    ),
    f"{ENGINE}.weight_sync_backend=ray trainer.placement.device=cuda": f"{ENGINE}.weight_sync_backend=ray",
    f"{ENGINE}.weight_sync_backend=ipc": (
        f"{ENGINE}.weight_sync_backend=ipc: must be ray with trainer.placement.device=cpu"
    ),
    f"{ENGINE}.weight_sync_backend=ipc trainer.placement.device=cuda": (
        f"{ENGINE}.weight_sync_backend=ipc: must be nccl with trainer.placement.device=cuda, or ipc if "
        "trainer.placement.colocate_all=true"
    ),
    f"{COLOCATED} {ENGINE}.weight_sync_backend=nccl": (
        f"{ENGINE}.weight_sync_backend=nccl: must be ipc with trainer.placement.colocate_all=true"
    ),
    "trainer.placement.colocate_all=true": "trainer.placement.colocate_all=true: needs trainer.placement.device=cuda",
    f"{COLOCATED} {ENGINE}.tensor_parallel_size=2": f"{ENGINE}.tensor_parallel_size=2: must divide the 1 policy",
    f"{COLOCATED} {ENGINE}.num_engines=2": f"{ENGINE}.num_engines=2: must be at most 1 with trainer.placement.colocate",
    f"{COLOCATED} {PER_NODE}=2 {ENGINE}.tensor_parallel_size=2 {ENGINE}.num_engines=2": (
        f"{ENGINE}.num_engines=2: must be at most 1 with"
    ),
    f"{COLOCATED} {ENGINE}.sleep_level=0 {ENGINE}.gpu_memory_utilization=0.7": (
        f"{ENGINE}.gpu_memory_utilization=0.7: must be at most 0.6"
    ),
    f"{COLOCATED} {ENGINE}.sleep_level=3": f"{ENGINE}.sleep_level=3: must be at least 0 and at most 2",
    f"{ENGINE}.engine_init_kwargs.speculative_config=1": f"{ENGINE}.engine_init_kwargs.speculative_config=1",
    f"{ENGINE}.speculative_config={{method: mtp, num_speculative_tokens: 0}}": (
        f"{ENGINE}.speculative_config.num_speculative_tokens=0"
    ),
    f"{ENGINE}.speculative_config={{method: mtp, rejection_sample_method: synthetic}}": (
        f"{ENGINE}.speculative_config.rejection_sample_method='synthetic'"
    ),
    f"{ENGINE}.speculative_config={{method: mtp, rejection-sample-method: synthetic}}": (
        f"{ENGINE}.speculative_config.rejection-sample-method='synthetic'"
    ),
    f"{ENGINE}.speculative_config={{method: mtp, use_local_argmax_reduction: true}}": (
        f"{ENGINE}.speculative_config.use_local_argmax_reduction=True: the sync canary must see what the engines draft"
    ),
    f"{ENGINE}.speculative_config={{method: mtp, draft_sample_method: probabilistic}}": (
        f"{ENGINE}.speculative_config.draft_sample_method=probabilistic: set "
        "generator.speculation.draft_sample_method instead; remove the key"
    ),
    "generator.speculation.draft_sample_method=sampled": (
        "generator.speculation.draft_sample_method=sampled: must be greedy or probabilistic; set one of these"
    ),
    "trainer.mtp.enabled=false generator.speculation.draft_sample_method=probabilistic": (
        "generator.speculation.draft_sample_method=probabilistic: needs a draft that is a model; set it to greedy"
    ),
    f"{ENGINE}.speculative_config={{method: mtp, use_heterogeneous_vocab: true}}": (
        f"{ENGINE}.speculative_config.use_heterogeneous_vocab=True: the sync canary must see"
    ),
    f"{ENGINE}.speculative_config={{method: mtp, num_speculative_tokens_per_batch_size: [[1, 8, 3], [9, 99, 1]]}}": (
        f"{ENGINE}.speculative_config.num_speculative_tokens_per_batch_size=[[1, 8, 3], [9, 99, 1]]: set "
        "generator.speculation.schedule instead"
    ),
    **{
        f"trainer.draft.train={value}": f"trainer.draft.train={value}: must be every_step, every:N with N of at least 1"
        for value in ("every", "every:0", "every:-1", "every:x", "automatic", "3", "3.5", "sometimes")
    },
    **{
        f"generator.speculation.schedule={value}": f"generator.speculation.schedule={shown}: {reason}"
        for value, shown, reason in (
            ("fast", "fast", "must be fixed, auto, or a table of rows [first, last, tokens]; set one of these"),
            ("null", "null", "must be fixed, auto, or a table"),
            ("[]", "[]", "must be fixed, auto, or a table"),
            ("4", "4", "must be fixed, auto, or a table"),
            ("[4]", "[4]", "must be fixed, auto, or a table of rows [first, last, tokens], and 4 is no such row"),
            ("[[1,8]]", "[[1, 8]]", "must be fixed, auto, or a table of rows [first, last, tokens], and [1, 8] is no"),
            ("[[1,8,2.5]]", "[[1, 8, 2.5]]", "must be fixed, auto, or a table of rows [first, last, tokens], and"),
            ("[[1,8,3],[8,9,2]]", "[[1, 8, 3], [8, 9, 2]]", "row [8, 9, 2] must begin above 8, where the one before"),
            ("[[9,16,3],[1,8,2]]", "[[9, 16, 3], [1, 8, 2]]", "row [1, 8, 2] must begin above 16"),
            ("[[0,8,3]]", "[[0, 8, 3]]", "row [0, 8, 3] must begin above 0"),
            ("[[8,1,3]]", "[[8, 1, 3]]", "row [8, 1, 3] must begin above 0, where the one before ends, and end at or"),
            ("[[1,8,8]]", "[[1, 8, 8]]", "row [1, 8, 8] must draft from 0 to num_speculative_tokens=7 tokens"),
            ("[[1,8,-1]]", "[[1, 8, -1]]", "row [1, 8, -1] must draft from 0 to num_speculative_tokens=7 tokens"),
        )
    },
    **{
        f"{ENGINE}.engine_init_kwargs.{key}=2": f"{ENGINE}.engine_init_kwargs.{key}=2: the weight sync reaches tensor-"
        for key in ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "nnodes")
    },
    f"{ENGINE}.engine_init_kwargs.data_parallel_rank=0": (
        f"{ENGINE}.engine_init_kwargs.data_parallel_rank=0: an engine is one data-parallel rank; use {ENGINE}.num_"
    ),
    f"{ENGINE}.engine_init_kwargs.spec_tokens=5": (
        f"{ENGINE}.engine_init_kwargs.spec_tokens=5: skyrl_spec sets this argument itself"
    ),
    f"{ENGINE}.engine_init_kwargs.logits_processors=[a.B]": (
        f"{ENGINE}.engine_init_kwargs.logits_processors=['a.B']: rollouts must come from the policy's own distribution"
    ),
    f"{ENGINE}.engine_init_kwargs.kv_offloading_size=4": (
        f"{ENGINE}.engine_init_kwargs.kv_offloading_size=4: its cache keeps keys of old weights after a weight sync"
    ),
}


@pytest.mark.parametrize("overrides", RULES)
def test_rules(overrides: str) -> None:
    words = [overrides] if "{" in overrides else overrides.split()
    config = load_config([CPU, *words])
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert str(error.value).startswith(RULES[overrides])
    assert "\n" not in str(error.value)


def test_drafts_without_a_model_cannot_be_sampled() -> None:
    config = load_config([CPU, "trainer.mtp.enabled=false", f"{ENGINE}.speculative_config={{method: ngram}}"])
    validate(config)
    config.generator.speculation.draft_sample_method = "probabilistic"
    with pytest.raises(ConfigError, match=r"^generator\.speculation\.draft_sample_method=probabilistic: needs a draft"):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "backend"),
    [
        ([CPU], "ray"),
        ([CPU, f"{ENGINE}.weight_sync_backend=ray"], "ray"),
        ([MIMO, f"{ENGINE}.weight_sync_backend=null"], "nccl"),
        ([MIMO], "nccl"),
        ([CPU, *COLOCATED.split()], "ipc"),
        ([CPU, *COLOCATED.split(), f"{ENGINE}.weight_sync_backend=ipc"], "ipc"),
    ],
)
def test_sync_backend_follows_the_placement(overrides: list[str], backend: str) -> None:
    config = load_config(overrides)
    validate(config)
    assert sync_backend(config) == backend


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ([], (1, 1, 1, 1, 1)),
        (["trainer.policy.megatron_config.tensor_model_parallel_size=2"], (2, 2, 1, 1, 1)),
        (["trainer.policy.megatron_config.context_parallel_size=2"], (2, 1, 2, 1, 1)),
        (["trainer.policy.megatron_config.pipeline_model_parallel_size=2"], (2, 1, 1, 2, 1)),
        (["trainer.placement.policy_num_gpus_per_node=2"], (2, 1, 1, 1, 2)),
        (["trainer.placement.policy_num_nodes=2", "trainer.placement.policy_num_gpus_per_node=4"], (8, 1, 1, 1, 8)),
        (
            [
                "trainer.placement.policy_num_gpus_per_node=8",
                "trainer.policy.megatron_config.tensor_model_parallel_size=2",
                "trainer.policy.megatron_config.context_parallel_size=2",
            ],
            (8, 2, 2, 1, 2),
        ),
        (["trainer.policy.megatron_config.expert_model_parallel_size=2"], (2, 1, 1, 1, 2, 2)),
        (
            [
                "trainer.policy.megatron_config.expert_model_parallel_size=2",
                "trainer.policy.megatron_config.tensor_model_parallel_size=2",
                "trainer.policy.megatron_config.pipeline_model_parallel_size=2",
            ],
            (4, 2, 1, 2, 1, 2),
        ),
    ],
)
def test_parallel_layout(overrides: list[str], layout: tuple[int, ...]) -> None:
    assert parallel_sizes(load_config([CPU, *overrides])) == ParallelSizes(*layout)
