"""A run from configuration to exit code: what is checked, started, written and taken down, in this order."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_spec.checkpoint.folders import read_record
from skyrl_spec.compose import to_yaml
from skyrl_spec.config import Config, ConfigError, LostActorError, RunError
from skyrl_spec.data.dataset import load_prompts
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.draft_spec import (
    decided,
    describe_draft,
    plan_dflash,
    read_dflash_spec,
    resolve_mask_token,
    trained_draft,
)
from skyrl_spec.envs.registry import register_custom
from skyrl_spec.envs.rewards import check_environments
from skyrl_spec.metrics.console import ConsoleWriter
from skyrl_spec.metrics.writers import JsonlWriter, MetricsWriter, SamplesWriter, WandbWriter, read_metrics
from skyrl_spec.model_spec import ModelSpec, load_spec
from skyrl_spec.serve import serve_command
from skyrl_spec.types import Prompt, Rollout, Which
from skyrl_spec.validation import parallel_layout, sync_backend

if TYPE_CHECKING:
    from skyrl_spec.trainer.actors import EngineGroup, PolicyGroup
    from skyrl_spec.trainer.checkpoints import Checkpointer
    from skyrl_spec.trainer.loop import Trainer
    from skyrl_spec.trainer.lossless import PlainEngine

# What the shell reports for a process that a signal ended.
_SIGNAL_EXIT = 128
# Of a disk or folder that cannot be written any more.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
# Seconds that a run may take to end before a further signal ends it at once.
_PATIENCE_S = 10.0


class Interrupted(Exception):  # noqa: N818
    """SIGINT or SIGTERM."""


class SignalWatch:
    """SIGINT and SIGTERM raise ``Interrupted`` in the main thread, once, and are remembered.

    Remembered, because what an exception becomes inside a C extension's call (Ray's, here) is not ours to decide.
    Further signals (``make`` and ``timeout`` send two) do not disturb the way out, until it has taken too long.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # The checkpoint that SIGTERM left behind.
        self.saved: Path | None = None
        # An error left a shield: what was to be done in one piece was not.
        self.is_broken = False
        self._received_s = 0.0
        self._is_shielded = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """SIGTERM, which is to save, waits for the end of the context; SIGINT does not."""
        self._is_shielded, self.is_broken = True, False
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise
        finally:
            self._is_shielded = False
        if self.received is not None:
            raise Interrupted

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The handlers, for the time of the context. It may be entered again inside, to put them back."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            # On the way out ours stay: Ray's own would raise in the middle of its shutdown.
            if self.received is None:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _handle(self, signum: int, _frame: object) -> None:
        if self.received is None:
            self.received, self._received_s = signum, time.monotonic()
            if signum == signal.SIGINT or not self._is_shielded:
                raise Interrupted
        if time.monotonic() - self._received_s > _PATIENCE_S:
            os._exit(_SIGNAL_EXIT + signum)


def run_training(config: Config, *, verbose: bool = False) -> int:
    """Train as ``config`` says; see ``run_job``."""
    return run_job(_train, config, verbose=verbose)


def run_job(job: Callable[[Config, bool, SignalWatch], None], config: Config, *, verbose: bool) -> int:
    """``job(config, verbose, watch)`` to its end, or to a signal; returns the process's exit code.

    That is 0 where SIGTERM (a pre-empted job) left a checkpoint to go on from.

    Raises:
        ConfigError: what the user can mend, before or after processes were started (all are gone by then).
    """
    watch = SignalWatch()
    try:
        with watch.installed():
            job(config, verbose, watch)
        return 0
    except Exception as error:
        if watch.received is not None:
            name, run_dir = signal.Signals(watch.received).name, config.trainer.run_dir
            if watch.received == signal.SIGTERM and watch.saved is not None:
                print(f"skyrl-spec: {name}: saved {watch.saved}; {_how_to_go_on(config)}", file=sys.stderr)
                return 0
            if (line := _error_line(error, config)) is not None:
                print(f"skyrl-spec: error: {line}", file=sys.stderr)
            print(f"skyrl-spec: {name}: stopped; what was measured is in {run_dir}", file=sys.stderr)
            return _SIGNAL_EXIT + watch.received
        if (line := _error_line(error, config)) is not None:
            print(f"skyrl-spec: error: {line}", file=sys.stderr)
            return 1
        raise


def _how_to_go_on(config: Config) -> str:
    no_path = "" if config.trainer.resume_path is None else " trainer.resume_path=null"
    return f"the same command with trainer.resume_mode=latest{no_path} goes on"


def _error_line(error: Exception, config: Config) -> str | None:
    """One line for what can happen to a run that was rightly configured; None for what should not."""
    if isinstance(error, LostActorError):
        if error.checkpoint is None:
            return f"{error}; there is no checkpoint to go on from: start it again (-v shows what processes print)"
        return f"{error}; {_how_to_go_on(config)} from {error.checkpoint}"
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return f"{error.filename or 'a file of the run'}: {error.strerror}; free space, or set another trainer.run_dir"
    return None


@dataclass(frozen=True)
class Task:
    """What is trained, on what, for how long."""

    config: Config
    spec: ModelSpec
    tokenizer: Any
    stream: PromptStream
    eval_prompts: list[Prompt]
    steps: int
    # The checkpoint that it goes on from.
    resume_from: Path | None = None

    @property
    def steps_done(self) -> int | None:
        """None: it begins."""
        return None if self.resume_from is None else read_record(self.resume_from)["extra"]["trainer"]["step"]


@dataclass(frozen=True)
class Output:
    """Where a run's numbers and samples go."""

    run_dir: Path
    console: ConsoleWriter
    writers: list[MetricsWriter]
    samples: SamplesWriter

    def on_step(self, step: int, values: dict[str, float], rollouts: Sequence[Rollout]) -> None:
        for writer in self.writers:
            writer.write(step, values)
        self.samples.write(step, rollouts)


@dataclass(frozen=True)
class Running:
    """A loop over actors that are up."""

    trainer: Trainer
    engines: EngineGroup
    policy: PolicyGroup
    checkpointer: Checkpointer
    # The engine without a draft, where losslessness is checked.
    plain: PlainEngine | None


def _train(config: Config, verbose: bool, watch: SignalWatch) -> None:
    def attempt(resume_from: Path | None) -> None:
        task = load_task(config, resume_from)
        with open_output(task) as output:
            _train_on_cluster(task, output, verbose, watch)

    with_restarts(config, "policy", watch, attempt)


def with_restarts(config: Config, trained: Which, watch: SignalWatch, attempt: Callable[[Path | None], None]) -> None:
    """``attempt``, and where it loses an actor again, ``trainer.max_restarts`` times, from the last checkpoint."""
    from skyrl_spec.trainer.checkpoints import find

    resume_from, restarts_left = find(config, trained), config.trainer.max_restarts
    while True:
        try:
            # Ray leaves handlers of its own behind.
            with watch.installed():
                attempt(resume_from)
            return
        except LostActorError as error:
            if restarts_left == 0 or watch.received is not None:
                raise
            restarts_left -= 1
            resume_from = error.checkpoint or resume_from
            where = resume_from or "the beginning"
            print(f"skyrl-spec: warning: {error}; going on from {where} (trainer.max_restarts)", file=sys.stderr)


def _train_on_cluster(task: Task, output: Output, verbose: bool, watch: SignalWatch) -> None:
    # Ray and torch are imported once everything that can be refused has been.
    from skyrl_spec.trainer.loop import Trainer, measure_speedup
    from skyrl_spec.trainer.placement import engine_settings, start_plain_engine

    trainer, speedup = task.config.trainer, None
    has_draft = trained_draft(trainer) is not None
    with on_cluster(task, Trainer, ["policy", "draft"] if has_draft else ["policy"], watch, verbose) as running:
        run_steps(running, task, output, watch)
        if trainer.save_final_model:
            running.policy.save_hf(output.run_dir.resolve())
        if trainer.measure_speedup and has_draft:
            plain = running.plain or start_plain_engine(task.config, engine_settings(task.config), running.policy)
            speedup = measure_speedup(running.trainer, plain, (task.eval_prompts or task.stream.prompts)[:16])
            plain.shutdown()
    records = read_metrics(output.run_dir / "metrics.jsonl")
    commands = _next_commands(task.config, output.run_dir)
    output.console.summary(records, output.run_dir, speedup=speedup, next_commands=commands)


@contextmanager
def on_cluster(
    task: Task, trainer_class: type[Trainer], whiches: list[Which], watch: SignalWatch, verbose: bool
) -> Iterator[Running]:
    """Ray, engines, workers and the loop over them, back where its checkpoint was; all gone when the context ends.

    ``whiches`` is what is trained; a policy that is not is frozen.
    """
    from skyrl_spec.trainer.checkpoints import Checkpointer, newest, resume
    from skyrl_spec.trainer.placement import engine_settings, ray_session, start_actors, start_plain_engine

    config, settings = task.config, engine_settings(task.config)
    updates = config.trainer.train_batch_size // config.trainer.policy_mini_batch_size
    total_steps = task.steps * updates * config.trainer.update_epochs_per_batch
    # Ray puts handlers of its own in place of ours when it starts.
    with ray_session(verbose), watch.installed(), plain_errors():
        engines, policy = start_actors(config, settings, total_steps, freeze_policy="policy" not in whiches)
        try:
            checks_losslessness = settings.speculative_config is not None and config.trainer.canary.lossless_interval
            plain = start_plain_engine(config, settings, policy) if checks_losslessness else None
            trainer = make_trainer(trainer_class, task, engines, policy, whiches, plain)
            checkpointer = Checkpointer(trainer, policy)
            try:
                with plain_errors():
                    if task.resume_from is not None:
                        resume(trainer, policy, task.resume_from)
                    yield Running(trainer, engines, policy, checkpointer, plain)
            except LostActorError as error:
                error.checkpoint = newest(config)
                raise
            finally:
                trainer.close()
        finally:
            engines.shutdown()
            policy.shutdown()


def run_steps(running: Running, task: Task, output: Output, watch: SignalWatch) -> None:
    """All steps, with checkpoints; SIGTERM leaves one of the last step that was done."""
    checkpointer = running.checkpointer

    def on_step(step: int, values: dict[str, float], rollouts: Sequence[Rollout]) -> None:
        output.on_step(step, values, rollouts)
        if step > 0:
            checkpointer.after_step(step, values)

    try:
        running.trainer.run(task.steps, on_step, steps_done=task.steps_done or 0, shield=watch.shield)
        with watch.shield():
            checkpointer.after_run()
    except Exception:
        # Otherwise weights have moved that are not a step's.
        if watch.received == signal.SIGTERM and not watch.is_broken:
            watch.saved = checkpointer.save_last()
        raise
    # For a SIGTERM that comes later.
    watch.saved = checkpointer.saved


def make_trainer(
    trainer_class: type[Trainer],
    task: Task,
    engines: EngineGroup,
    policy: PolicyGroup,
    whiches: list[Which],
    plain: PlainEngine | None = None,
) -> Trainer:
    """The loop over actors that are up, with the transfer of what is trained (``whiches``) opened.

    ``plain``: the engine to check losslessness against, if that is to be.
    """
    from skyrl_spec.sync.canary import SyncCanary, fixed_prompts
    from skyrl_spec.sync.weights import WeightSync
    from skyrl_spec.trainer.fidelity import coarser_dtype
    from skyrl_spec.trainer.lossless import LosslessCanary

    config = task.config
    settings, sampling, dtype = config.trainer.canary, config.generator.sampling_params, coarser_dtype(config)
    prompts = [prompt.token_ids for prompt in task.stream.prompts]
    canary = SyncCanary(
        settings,
        engines,
        policy,
        fixed_prompts(prompts, settings.num_prompts, min(config.trainer.max_prompt_length, _prefill_tokens(config))),
        temperature=sampling.temperature,
        dtype=dtype,
    )
    lossless = None
    if plain is not None:
        few = task.stream.prompts[: settings.num_prompts]
        lossless = LosslessCanary(settings, sampling, few, plain, exact=dtype == "fp32")
    return trainer_class(
        config,
        tokenizer=task.tokenizer,
        stream=task.stream,
        eval_prompts=task.eval_prompts,
        engines=engines,
        policy=policy,
        sync=WeightSync(policy, engines, backend=sync_backend(config), whiches=whiches),
        canary=canary,
        lossless=lossless,
    )


def _prefill_tokens(config: Config) -> int:
    """Half of what the user lets an engine prefill in a step, if that is set: drafts take some of the rest."""
    tokens = config.generator.inference_engine.engine_init_kwargs.get("max_num_batched_tokens")
    return sys.maxsize if tokens is None else max(1, tokens // 2)


def num_steps(config: Config, stream: PromptStream) -> int:
    """Steps of the run: ``epochs``, or fewer if ``max_training_steps`` says so."""
    steps = stream.steps_per_epoch * config.trainer.epochs
    limit = config.trainer.max_training_steps
    return steps if limit is None else min(steps, limit)


def load_task(config: Config, resume_from: Path | None = None) -> Task:
    spec = load_spec(config.trainer.policy.model.path)
    tokenizer = _load_tokenizer(spec)
    config = _decide_draft(config, spec, tokenizer)
    register_custom(config.environment.custom)
    train = _load_prompts(config, tokenizer, config.data.train_data, "data.train_data")
    validation = _load_prompts(config, tokenizer, config.data.val_data, "data.val_data") if config.data.val_data else []
    check_environments([*train, *validation], config.environment)
    stream = PromptStream(train, config.trainer.train_batch_size, seed=config.trainer.seed, shuffle=config.data.shuffle)
    return Task(config, spec, tokenizer, stream, validation, num_steps(config, stream), resume_from)


def _load_tokenizer(spec: ModelSpec) -> Any:
    """The model's own.

    Raises:
        ConfigError: there is none, or it has tokens that the model does not have, or no end token.
    """
    from transformers import AutoTokenizer

    setting = f"trainer.policy.model.path={spec.path}"
    # Without files transformers makes an empty one.
    if not any(spec.path.glob("tokenizer*")):
        raise ConfigError(f"{setting}: has no tokenizer; copy the tokenizer's files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path, trust_remote_code=False)
    # Of a file that is missing or broken it raises whatever its reader does.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{setting}: its tokenizer cannot be loaded ({reason}); copy the tokenizer's files") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= spec.vocab_size:
        raise ConfigError(
            f"{setting}: its tokenizer has token {largest}, the model's vocabulary ends at {spec.vocab_size - 1}; "
            "put the model's own tokenizer there"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{setting}: its tokenizer has no end token; add eos_token to tokenizer_config.json")
    return tokenizer


def _decide_draft(config: Config, spec: ModelSpec, tokenizer: Any) -> Config:
    """``config`` with nothing left open about its draft; a DFlash draft from scratch is written to run_dir first."""
    dflash = config.trainer.dflash
    if not dflash.enabled:
        return config
    found = None if dflash.path is None else read_dflash_spec(dflash.path)
    known = dflash.mask_token_id if found is None else found.mask_token_id
    mask_token_id = resolve_mask_token(known, tokenizer, spec.vocab_size)
    draft = plan_dflash(config, spec, found, mask_token_id)
    path = dflash.path
    if path is None:
        from skyrl_spec.checkpoint.fresh import write_fresh_dflash

        directory = (Path(config.trainer.run_dir) / "draft_start").resolve()
        write_fresh_dflash(draft, directory, config.trainer.policy.megatron_config.dtype, config.trainer.seed)
        path = str(directory)
    return decided(config, draft, path)


def _load_prompts(config: Config, tokenizer: Any, paths: list[str], setting: str) -> list[Prompt]:
    limit = config.trainer.max_prompt_length
    loaded = load_prompts(
        paths, tokenizer, max_prompt_length=limit, default_env_class=config.environment.env_class, setting=setting
    )
    if loaded.num_skipped:
        total = loaded.num_skipped + len(loaded.prompts)
        print(
            f"skyrl-spec: {setting}: {loaded.num_skipped} of {total} prompts are longer than "
            f"trainer.max_prompt_length={limit} tokens and are skipped",
            file=sys.stderr,
        )
    return loaded.prompts


@contextmanager
def open_output(task: Task) -> Iterator[Output]:
    """Everything a run writes, opened, and the start-up panel shown."""
    from skyrl_spec.trainer.checkpoints import begin

    trainer, console = task.config.trainer, ConsoleWriter(task.steps)
    begin(task.config, task.resume_from)
    run_dir = Path(trainer.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(task.config))
    samples = SamplesWriter(run_dir / "samples.jsonl", task.steps_done)
    writers: list[MetricsWriter] = [JsonlWriter(run_dir / "metrics.jsonl", task.steps_done)]
    if "console" in trainer.logger:
        writers.append(console)
    try:
        if "wandb" in trainer.logger:
            from omegaconf import OmegaConf

            settings = OmegaConf.to_container(OmegaConf.structured(task.config))
            writers.append(WandbWriter(run_dir, trainer.project_name, trainer.run_name, settings))  # type: ignore[arg-type]
        console.start(_facts(task))
        _warn_of_truncation(task.config)
        console.note("starting engines and workers (-v shows what they print)")
        yield Output(run_dir, console, writers, samples)
    finally:
        samples.close()
        for writer in {console, *writers}:
            writer.close()


def _facts(task: Task) -> dict[str, str]:
    """What the start-up panel says."""
    spec, trainer, generator = task.spec, task.config.trainer, task.config.generator
    _, tp, dp = parallel_layout(task.config)
    return {
        "model": f"{spec.path} ({spec.architecture}, {spec.num_layers} layers x {spec.hidden_size})",
        "draft": describe_draft(trainer),
        "policy": f"{trainer.placement.device}, TP {tp} x DP {dp}, {trainer.policy.megatron_config.dtype}",
        "engines": f"{generator.inference_engine.num_engines} x TP {generator.inference_engine.tensor_parallel_size}",
        "batch": f"{trainer.train_batch_size} prompts x {generator.n_samples_per_prompt} samples, "
        f"{trainer.train_batch_size // trainer.policy_mini_batch_size} mini-batches",
        "steps": f"{task.steps} ({task.stream.steps_per_epoch} an epoch)",
        "run": trainer.run_dir,
    } | _resume_fact(task)


def _resume_fact(task: Task) -> dict[str, str]:
    if task.resume_from is not None:
        return {"resume": f"after step {task.steps_done}, from {task.resume_from}"}
    if task.config.trainer.resume_mode is not None:
        return {"resume": "no checkpoint is there yet: from the beginning"}
    return {}


def _warn_of_truncation(config: Config) -> None:
    """Top-p and top-k are not applied to the trainer's distributions; what that means is said once."""
    sampling = config.generator.sampling_params
    if sampling.top_p < 1 or sampling.top_k != -1 or sampling.min_p > 0:
        print(
            f"skyrl-spec: generator.sampling_params truncates (top_p={sampling.top_p}, top_k={sampling.top_k}, "
            f"min_p={sampling.min_p}): log-probs and the draft's teacher are of the whole distribution, so "
            "policy/rollout_train_logprobs_abs_diff_mean has a floor and acceptance may be lower",
            file=sys.stderr,
        )


def _next_commands(config: Config, run_dir: Path) -> list[str]:
    """What one would type after this run."""
    if not config.trainer.save_final_model:
        return []
    policy, draft = f"{run_dir}/model", f"{run_dir}/draft"
    go_on = f"skyrl-spec train ... trainer.policy.model.path={policy}"
    if config.trainer.dflash.enabled:
        go_on += f" trainer.dflash.path={draft}"
    return [serve_command(config.trainer, policy, draft), f"{go_on}   (goes on from these weights)"]


@contextmanager
def plain_errors() -> Iterator[None]:
    """What an actor raised reaches the user as itself, without Ray's wrapping; a dead actor as one line."""
    import ray

    from skyrl_spec.trainer.actors import cause_of_death

    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise LostActorError(f"an engine or worker died ({cause_of_death(error)}); -v shows what it printed") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError | RunError):
            raise error.cause from None
        raise
