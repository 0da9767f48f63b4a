"""A run from configuration to exit code: start, steps, checkpoints, restarts and shutdown."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from skyrl_spec.checkpoint.serving import serve_command
from skyrl_spec.controller.folder_lock import locked
from skyrl_spec.controller.output import Output, open_output
from skyrl_spec.controller.signals import SIGNAL_EXIT, SignalWatch
from skyrl_spec.controller.task import Task, load_task
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.envs.tool_servers import ToolServer, running_servers
from skyrl_spec.errors import (
    ActorError,
    ConfigError,
    LostActorError,
    RestartableError,
    RunError,
    SyncMismatchError,
)
from skyrl_spec.settings.derived import max_staleness, sync_backend
from skyrl_spec.settings.schema import Config
from skyrl_spec.settings.words import setting_word
from skyrl_spec.types import Component, DraftedResponse, Rollout

if TYPE_CHECKING:
    from skyrl_spec.controller.checkpoints import Checkpointer
    from skyrl_spec.controller.engines import EngineGroup
    from skyrl_spec.controller.loop import TrainingLoop
    from skyrl_spec.controller.lossless import PlainEngine
    from skyrl_spec.controller.workers import PolicyGroup

# Errors of a disk or folder that can no longer be written.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)


def run_training(config: Config, *, verbose: bool = False) -> int:
    """Trains as ``config`` says; see ``run_job``."""
    return run_job(train, config, verbose=verbose)


def run_job(job: Callable[[Config, bool, SignalWatch], None], config: Config, *, verbose: bool) -> int:
    """Runs ``job(config, verbose, watch)`` until it ends or a signal stops it; returns the process's exit code.

    The exit code is 0 if SIGTERM (a pre-empted job) left a checkpoint to resume from.

    Raises:
        ConfigError: a mistake the user can fix, before or after processes were started (all are gone by then).
    """
    watch = SignalWatch()
    try:
        with watch.installed():
            job(config, verbose, watch)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if watch.received is not None:
            name, run_dir = signal.Signals(watch.received).name, config.trainer.run_dir
            if watch.received == signal.SIGTERM and watch.saved is not None:
                print(f"skyrl-spec: {name}: saved {watch.saved}; {_how_to_go_on(config)}", file=sys.stderr)
                return 0
            if (line := _error_line(error, config)) is not None:
                print(f"skyrl-spec: error: {line}", file=sys.stderr)
            print(f"skyrl-spec: {name}: stopped; what was measured is in {run_dir}", file=sys.stderr)
            return SIGNAL_EXIT + watch.received
        if (line := _error_line(error, config)) is not None:
            print(f"skyrl-spec: error: {line}", file=sys.stderr)
            return 1
        raise


def _how_to_go_on(config: Config) -> str:
    no_path = "" if config.trainer.resume_path is None else " trainer.resume_path=null"
    return f"the same command with trainer.resume_mode=latest{no_path} goes on"


def _error_line(error: BaseException, config: Config) -> str | None:
    """The line to print for an error that can happen to a correctly configured run; None for a bug."""
    if isinstance(error, RestartableError):
        if error.checkpoint is None:
            return f"{error}; there is no checkpoint to go on from: start it again (-v shows what processes print)"
        return f"{error}; {_how_to_go_on(config)} from {error.checkpoint}"
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return f"{error.filename or 'a file of the run'}: {error.strerror}; free space, or set another trainer.run_dir"
    return None


@dataclass(frozen=True)
class Running:
    """A training loop and its actors, all started."""

    trainer: TrainingLoop
    engines: EngineGroup
    policy: PolicyGroup
    checkpointer: Checkpointer
    # The engine without a draft, if losslessness is checked.
    plain: PlainEngine | None
    # Those that this run started.
    servers: Sequence[ToolServer] = ()


def train(config: Config, verbose: bool, watch: SignalWatch) -> None:
    """The job of ``run_training``."""

    def attempt(resume_from: Path | None) -> None:
        task = load_task(config, resume_from)
        with open_output(task) as output:
            _train_on_cluster(task, output, verbose, watch)

    with_restarts(config, "policy", watch, attempt)


def with_restarts(
    config: Config, trained: Component, watch: SignalWatch, attempt: Callable[[Path | None], None]
) -> None:
    """Calls ``attempt``; after an error that a restart can cure, calls it again from the last checkpoint.

    ``trainer.max_restarts`` limits the restarts. The run's folder is locked meanwhile.
    """
    with locked(Path(config.trainer.run_dir)):
        _with_restarts(config, trained, watch, attempt)


def _with_restarts(
    config: Config, trained: Component, watch: SignalWatch, attempt: Callable[[Path | None], None]
) -> None:
    from skyrl_spec.controller.checkpoints import find

    resume_from, restarts_left = find(config, trained), config.trainer.max_restarts
    while True:
        try:
            # Ray may leave its own handlers behind.
            with watch.installed():
                attempt(resume_from)
            return
        except RestartableError as error:
            if restarts_left == 0 or watch.received is not None:
                raise
            restarts_left -= 1
            resume_from = error.checkpoint or resume_from
            where = resume_from or "the beginning"
            print(f"skyrl-spec: warning: {error}; going on from {where} (trainer.max_restarts)", file=sys.stderr)


def _train_on_cluster(task: Task, output: Output, verbose: bool, watch: SignalWatch) -> None:
    # Ray and torch are imported here, after all checks that do not need them.
    from skyrl_spec.controller.loop import TrainingLoop
    from skyrl_spec.controller.measures import measure_speedup
    from skyrl_spec.controller.placement import engine_settings, start_plain_engine

    trainer, speedup = task.config.trainer, None
    has_draft = trained_kind(trainer) is not None
    with on_cluster(task, TrainingLoop, ["policy", "draft"] if has_draft else ["policy"], watch, verbose) as running:
        run_steps(running, task, output, watch)
        if trainer.save_final_model:
            with running.trainer.shifts.scoring():
                running.policy.save_hf(output.run_dir.resolve())
        settings = engine_settings(task.config)
        # The draft need not be trained.
        if trainer.measure_speedup and settings.speculative_config is not None:
            plain = running.plain or start_plain_engine(task.config, settings, running.policy)
            speedup = measure_speedup(running.trainer, plain, (task.eval_prompts or task.stream.prompts)[:16])
            plain.shutdown()
    output.summarize(speedup=speedup, next_commands=_next_commands(task.config, output.run_dir))


@contextmanager
def on_cluster(
    task: Task, trainer_class: type[TrainingLoop], components: list[Component], watch: SignalWatch, verbose: bool
) -> Iterator[Running]:
    """Starts Ray, engines, workers and the loop, resumes from the task's checkpoint, and ends everything at the end.

    Args:
        components: components that are trained. The policy is frozen if it is not among them.
    """
    from skyrl_spec.controller.checkpoints import Checkpointer, newest, resume
    from skyrl_spec.controller.placement import engine_settings, ray_session, start_actors, start_plain_engine

    config, settings = task.config, engine_settings(task.config)
    updates = config.trainer.train_batch_size // config.trainer.policy_mini_batch_size
    total_steps = task.steps * updates * config.trainer.update_epochs_per_batch
    run_dir = Path(config.trainer.run_dir)
    with running_servers(config.environment.servers, run_dir) as servers, ray_session(verbose), plain_errors(run_dir):
        engines, policy = start_actors(config, settings, total_steps, freeze_policy="policy" not in components)
        try:
            checks_losslessness = settings.speculative_config is not None and config.trainer.canary.lossless_interval
            plain = start_plain_engine(config, settings, policy) if checks_losslessness else None
            trainer = make_trainer(trainer_class, task, engines, policy, components, plain)
            checkpointer = Checkpointer(trainer, policy)
            try:
                with plain_errors(run_dir):
                    if task.resume_from is not None:
                        resume(trainer, policy, task.resume_from)
                    trainer.shifts.begin()
                    yield Running(trainer, engines, policy, checkpointer, plain, servers)
            except RestartableError as error:
                error.checkpoint = newest(config)
                raise
            finally:
                trainer.close()
        finally:
            engines.shutdown()
            policy.shutdown()


def run_steps(running: Running, task: Task, output: Output, watch: SignalWatch) -> None:
    """Runs all steps and saves checkpoints. On SIGTERM, saves the last completed step."""
    checkpointer = running.checkpointer

    def on_step(
        step: int, values: dict[str, float], rollouts: Sequence[Rollout], drafted: Sequence[DraftedResponse]
    ) -> None:
        output.on_step(step, values, rollouts, drafted)
        if step > 0:
            checkpointer.after_step(step, values)
        for server in running.servers:
            server.require_running()

    try:
        running.trainer.run(
            task.steps,
            on_step,
            steps_done=task.steps_done or 0,
            shield=watch.shield,
            is_stopping=lambda: watch.received is not None,
        )
        with watch.shield():
            checkpointer.after_run()
    except SyncMismatchError as mismatch:
        with watch.shield():
            watch.saved = _save_after_mismatch(checkpointer, mismatch)
        raise
    except (Exception, KeyboardInterrupt) as error:
        # If a shield was broken, weights have moved without completing a step.
        if watch.received == signal.SIGTERM and not watch.is_broken:
            watch.saved = checkpointer.save_last()
        elif isinstance(error, Exception) and watch.received is None:
            checkpointer.finish_after_error()
        raise
    # A later SIGTERM reports this checkpoint.
    watch.saved = checkpointer.saved


def _save_after_mismatch(checkpointer: Checkpointer, mismatch: SyncMismatchError) -> Path | None:
    """Saves the completed step, whatever ``ckpt_interval`` is. If that fails, both errors are printed."""
    try:
        return checkpointer.save_last()
    except Exception:
        print(f"skyrl-spec: warning: {mismatch}", file=sys.stderr)
        raise


def make_trainer(
    trainer_class: type[TrainingLoop],
    task: Task,
    engines: EngineGroup,
    policy: PolicyGroup,
    components: list[Component],
    plain: PlainEngine | None = None,
) -> TrainingLoop:
    """Makes the training loop over started actors, and opens the weight transfer of ``components``.

    Args:
        plain: engine without a draft, if losslessness is checked.
    """
    from skyrl_spec.controller.lossless import LosslessCanary
    from skyrl_spec.controller.shifts import ScoringWorkers, Shifts
    from skyrl_spec.settings.derived import coarser_dtype
    from skyrl_spec.sync.canary import SyncCanary, fixed_prompts
    from skyrl_spec.sync.weights import WeightSync

    config = task.config
    keeps_updates = max_staleness(config) > 0
    sync = WeightSync(policy, engines, backend=sync_backend(config), components=components, keeps_updates=keeps_updates)
    shifts = Shifts(config, engines, policy, sync)
    settings, sampling, dtype = config.trainer.canary, config.generator.sampling_params, coarser_dtype(config)
    prompts = [prompt.token_ids for prompt in task.stream.prompts]
    canary = SyncCanary(
        settings,
        engines,
        ScoringWorkers(policy, shifts),
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
        sync=sync,
        shifts=shifts,
        canary=canary,
        lossless=lossless,
    )


def _prefill_tokens(config: Config) -> int:
    """Half of ``max_num_batched_tokens``, if it is set, because drafts take some of these tokens."""
    tokens = config.generator.inference_engine.engine_init_kwargs.get("max_num_batched_tokens")
    return sys.maxsize if tokens is None else max(1, tokens // 2)


def _next_commands(config: Config, run_dir: Path) -> list[str]:
    """Commands that the closing lines suggest."""
    commands, kind = [f"skyrl-spec report {quote(str(run_dir))}"], trained_kind(config.trainer)
    if config.trainer.ckpt_interval > 0:
        words = setting_word("checkpoint", run_dir), setting_word("out", run_dir / "bundle")
        commands.append(f"skyrl-spec export {' '.join(words)}")
        if kind is not None:
            commands.append(f"skyrl-spec eval-draft {setting_word('target', run_dir)}")
    if config.trainer.save_final_model:
        policy, draft = f"{run_dir}/model", f"{run_dir}/draft"
        go_on = f"skyrl-spec train ... {setting_word('trainer.policy.model.path', policy)}"
        if kind is not None and kind.has_own_directory:
            go_on += f" {setting_word(f'trainer.{kind.method}.path', draft)}"
        commands += [serve_command(config.trainer, policy, draft), f"{go_on}   (goes on from these weights)"]
    return commands


@contextmanager
def plain_errors(run_dir: Path) -> Iterator[None]:
    """Turns errors of actors into one line. Tracebacks of exceptions that are not ours go to a log file.

    Raises:
        ActorError: an actor raised an exception that is not ours. The line names the log file in ``run_dir``.
        LostActorError: an actor died.
    """
    import ray

    from skyrl_spec.controller.actor_errors import actor_error, cause_of_death

    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise LostActorError(f"an engine or worker died ({cause_of_death(error)}); -v shows what it printed") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ConfigError | RunError):
            raise error.cause from None
        raise _logged(actor_error("an engine or worker", error), run_dir) from None
    except ActorError as error:
        raise _logged(error, run_dir) from None


def _logged(error: ActorError, run_dir: Path) -> ActorError:
    """``error`` with the path of the log file, to which its traceback is written once."""
    if not error.traceback:
        return error
    folder = run_dir / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"actor_error_{1 + len(list(folder.glob('actor_error_*.log')))}.log"
    path.write_text(f"{error.traceback}\n")
    return ActorError(f"{error} (traceback: {path})")
