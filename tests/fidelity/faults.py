"""Faults injected into a real run one at a time, and the checks that see them.

Workers, engines and loop are real, with the shipped models. Each fault is put into one of these objects and taken out
afterwards. Before each fault the engines are synced. ``python tests/fidelity/faults.py`` prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from skyrl_spec.controller import placement
from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.loop import TrainingLoop
from skyrl_spec.controller.run import make_trainer
from skyrl_spec.controller.task import Task, load_task
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.errors import RunError
from skyrl_spec.rollout.actor import EngineActor
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.training.worker import PolicyWorker
from skyrl_spec.types import Generation, SampleRequest, Versions

MAX_STEPS = 3
# Small, but large enough for every check.
OVERRIDES = (
    "trainer.train_batch_size=8",
    "trainer.policy_mini_batch_size=4",
    "generator.n_samples_per_prompt=4",
    "generator.inference_engine.cpu_kvcache_space=0.25",
    "generator.inference_engine.max_num_seqs=64",
    "generator.speculation.schedule=fixed",
    "trainer.draft.train=every_step",
    # The prefix cache keeps a prompt of more than two blocks of 128 tokens.
    "trainer.max_prompt_length=300",
    "trainer.canary.interval=1",
    "trainer.canary.on_mismatch=warn",
)


Tensors = list[tuple[str, Any]]


class _FaultyEngine(EngineActor):
    """A real engine with a fault that ``inject`` sets."""

    fault: str | None = None
    # A method that does nothing.
    skipped: str | None = None
    # A function that changes the received tensors. Each is then loaded separately.
    change: Callable[[Tensors], Tensors] | None = None

    def inject(self, fault: str | None, skipped: str | None = None, change: Any = None) -> None:
        self.fault, self.skipped, self.change = fault, skipped, change
        self._salt = self._versions.label
        if not (fault or skipped or change):
            # Ends an update that the last fault may have left open.
            with suppress(Exception):
                super().update_weights({"names": ["none"], "dtype_names": [], "shapes": [], "arrays": []})

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, n: int, seed: int | None
    ) -> list[list[Generation]]:
        return super().generate(prompts, self._faulty(sampling), n, seed)

    def advance(
        self, requests: list[SampleRequest], sampling: SamplingConfig, seconds: float
    ) -> list[tuple[int, Generation]]:
        return super().advance(requests, self._faulty(sampling), seconds)

    def _faulty(self, sampling: SamplingConfig) -> SamplingConfig:
        is_cold = self.fault == "temperature"
        return replace(sampling, temperature=0.8 * sampling.temperature) if is_cold else sampling

    def start_weight_update(self, draft: bool) -> None:
        self._old = {name: tensor.clone() for name, tensor in self._fused().items()} if draft else {}
        super().start_weight_update(draft)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.change is None:
            return super().update_weights(update_info)
        keys = ("dtype_names", "shapes", "arrays")
        rest = zip(*(update_info[key] for key in keys), strict=True)
        for name, values in self.change(list(zip(update_info["names"], rest, strict=True))):
            super().update_weights({"names": [name]} | {key: [value] for key, value in zip(keys, values, strict=True)})
        return None

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        if self.fault == "stale buffers":
            for name, tensor in self._fused().items():
                tensor.copy_(self._old.get(name, tensor))

    def _request(self, *args: Any) -> tuple[Any, Any]:
        prompt, params = super()._request(*args)
        if self.fault == "old keys":
            prompt["cache_salt"] = self._salt
        return prompt, params

    def reset_prefix_cache(self) -> None:
        if self.fault != "old keys":
            super().reset_prefix_cache()

    def set_versions(self, versions: Versions) -> None:
        if self.skipped != "set_versions":
            super().set_versions(versions)

    def _fused(self) -> dict[str, Any]:
        """Tensors that a DFlash drafter derives from its parameters."""
        import torch

        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        return {
            name: value for name, value in vars(runner.drafter.model.model).items() if isinstance(value, torch.Tensor)
        }


FaultyEngine = ray.remote(_FaultyEngine)


class _FaultyWorker(PolicyWorker.__ray_metadata__.modified_class):  # type: ignore[name-defined]
    """A real worker whose draft can be given other trunk states than the engines give it."""

    def inject(self, fault: str | None) -> None:
        from skyrl_spec.drafts import mtp
        from skyrl_spec.models.capture import CapturePoint

        draft = self._trainer.draft.draft
        if not hasattr(self, "_right"):
            self._right = draft.capture_points
        draft.capture_points = self._right
        mtp.TRUNK_HIDDEN = CapturePoint("decoder.final_layernorm", "input")
        if fault == "post-norm":
            mtp.TRUNK_HIDDEN = CapturePoint("decoder.final_layernorm", "output")
            draft.capture_points = (mtp.TRUNK_HIDDEN, mtp.EMBEDDING)
        elif fault == "shifted layers":
            layers = [int(point.module.rsplit(".", 1)[1]) for point in self._right]
            draft.capture_points = tuple(CapturePoint(f"decoder.layers.{layer - 1}", "output") for layer in layers)
        self._trainer._draft_states._points = draft.capture_points


FaultyWorker = ray.remote(_FaultyWorker)


@dataclass(frozen=True)
class Fault:
    """A fault that ``inject`` sets: before the first check if ``from_start``, otherwise after it.

    ``seen_by``: every check that sees it, in step 1, or in step 0 if it is there from the start.
    """

    name: str
    draft: str
    seen_by: tuple[str, ...]
    inject: Callable[[TrainingLoop], None]
    from_start: bool = False

    def expected(self) -> Sighting:
        return Sighting(self, dict.fromkeys(self.seen_by, 0 if self.from_start else 1), [])


def in_engine(fault: str | None = None, **more: Any) -> Callable[[TrainingLoop], None]:
    return lambda trainer: ray.get([engine.inject.remote(fault, **more) for engine in trainer.engines.handles])


def with_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[TrainingLoop], None]:
    return in_engine(change=change)


def in_worker(fault: str) -> Callable[[TrainingLoop], None]:
    return lambda trainer: ray.get([worker.inject.remote(fault) for worker in trainer.policy.handles])


def skip_draft_once(trainer: TrainingLoop) -> None:
    export, skipped = trainer.sync._export, []

    def faulty(components: list[Any]) -> Any:
        updates, num_bytes = export(components)
        if skipped:
            return updates, num_bytes
        skipped.append("draft")
        return [update for update in updates if update[0] != "draft"], num_bytes

    trainer.sync._export = faulty  # type: ignore[method-assign]


def swap_layers(tensors: Tensors) -> Tensors:
    layers = {"model.layers.3.": "model.layers.4.", "model.layers.4.": "model.layers.3."}

    def swapped(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in layers.items() if name.startswith(old)), name)

    return [(swapped(name), rest) for name, rest in tensors]


def lose(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [item for item in tensors if part not in item[0]]


def repeat(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [copy for item in tensors for copy in [item] * (1 + (part in item[0]))]


def corrupt(part: str) -> Callable[[Tensors], Tensors]:
    """A change that sets a row of one tensor to zeros."""

    def change(tensors: Tensors) -> Tensors:
        changed = []
        for name, (dtype, shape, array) in tensors:
            if part in name:
                array = array.copy()
                array[0] = 0
            changed.append((name, (dtype, shape, array)))
        return changed

    return change


POLICY, DRAFT, VERSION = (f"sync canary ({side})" for side in ("policy", "draft", "version"))
TRANSFER, LOGPROBS = "weight transfer", "log-prob agreement"

FAULTS = (
    Fault("none", "mtp", (), lambda _: None),
    Fault("the draft's sync is skipped once", "mtp", (DRAFT,), skip_draft_once),
    Fault("two layers of the policy are swapped", "mtp", (POLICY, DRAFT), with_tensors(swap_layers)),
    Fault("a chunk of the policy is lost", "mtp", (TRANSFER,), with_tensors(lose("layers.5.mlp.down_proj"))),
    Fault(
        "a chunk of the policy is sent twice", "mtp", (TRANSFER,), with_tensors(repeat("model.layers.5.mlp.down_proj"))
    ),
    Fault("a chunk of the draft is lost", "mtp", (TRANSFER,), with_tensors(lose("mtp_layers.0.input_proj"))),
    Fault(
        "a row of the policy is corrupted", "mtp", (POLICY, DRAFT), with_tensors(corrupt("model.layers.5.mlp.up_proj"))
    ),
    Fault("a row of the draft is corrupted", "mtp", (DRAFT,), with_tensors(corrupt("mtp_layers.0.mlp.up_proj"))),
    # Kept keys alone do no harm: new requests look for keys of the weights of now.
    Fault("keys of older weights are used", "mtp", (POLICY, DRAFT), in_engine("old keys")),
    Fault("an engine is not told its version", "mtp", (VERSION,), in_engine(skipped="set_versions")),
    Fault("engines sample at another temperature", "mtp", (POLICY, LOGPROBS), in_engine("temperature")),
    Fault("the draft is trained on normed hidden states", "mtp", (DRAFT,), in_worker("post-norm"), from_start=True),
    Fault("none", "dflash", (), lambda _: None),
    Fault("the draft's sync is skipped once", "dflash", (DRAFT,), skip_draft_once),
    Fault("the drafter's fused buffers stay stale", "dflash", (DRAFT,), in_engine("stale buffers")),
    Fault("captured layers are shifted by one", "dflash", (DRAFT,), in_worker("shifted layers"), from_start=True),
)
EXPERIMENTS = {"mtp": "cpu_mtp_grpo", "dflash": "cpu_dflash_grpo"}


@dataclass(frozen=True)
class Sighting:
    """``seen`` maps each check that saw the fault to the first step in which it did. Step 0 is before training."""

    fault: Fault
    seen: dict[str, int]
    lines: list[str]


@dataclass(frozen=True)
class Rig:
    """Running actors and their task."""

    task: Task
    engines: EngineGroup
    policy: PolicyGroup

    def run(self, fault: Fault) -> Sighting:
        """Checks a run without the fault, injects it, and trains until a check sees it."""
        for handle in (*self.engines.handles, *self.policy.handles):
            ray.get(handle.inject.remote(None))
        trainer = make_trainer(TrainingLoop, self.task, self.engines, self.policy, ["policy", "draft"])
        trainer.sync.sync()
        if fault.from_start:
            fault.inject(trainer)
        found: dict[str, int] = {}
        lines: list[str] = []
        for step in range(MAX_STEPS + 1):
            text = _watched(lambda: _step(trainer, step))  # noqa: B023
            if step == 0 and not fault.from_start:
                fault.inject(trainer)
            for line in text.splitlines():
                lines.append(line)
                for check in _checks(line):
                    found.setdefault(check, step)
            if found:
                break
        return Sighting(fault, found, lines)


def _step(trainer: TrainingLoop, step: int) -> None:
    if step == 0:
        trainer.canary.check(trainer.sync.versions)
    else:
        trainer.train(trainer.sample())


def _watched(act: Callable[[], Any]) -> str:
    """Lines that ``act`` prints to stderr, and the error it raises."""
    stderr = StringIO()
    with redirect_stderr(stderr):
        try:
            act()
        except RunError as error:
            print(f"error: {error}", file=stderr)
        except ray.exceptions.RayTaskError as error:
            print(f"weight transfer: {str(error.cause).splitlines()[0]}", file=stderr)
    return stderr.getvalue()


def _checks(line: str) -> Iterator[str]:
    if "sync canary" in line:
        sides = {POLICY: "the policy of engine", DRAFT: "the draft of engine", VERSION: "says that it holds"}
        yield from (check for check, words in sides.items() if words in line)
    elif "weight transfer:" in line:
        yield TRANSFER
    elif "rollout_train_logprobs_abs_diff" in line:
        yield LOGPROBS
    elif "acceptance length" in line:
        yield "predicted acceptance"
    elif "were sampled with" in line:
        yield "versions"


@contextmanager
def rig(draft: str, run_dir: Path, *overrides: str) -> Iterator[Rig]:
    """Actors of a run with ``draft``. Ray must be running."""
    words = [f"experiment={EXPERIMENTS[draft]}", *OVERRIDES, *overrides, f"trainer.run_dir={run_dir}"]
    task = load_task(load_config(words))
    assert trained_kind(task.config.trainer) is not None
    classes = (placement.RolloutActor, placement.PolicyWorker)
    placement.RolloutActor, placement.PolicyWorker = FaultyEngine, FaultyWorker  # type: ignore[misc,assignment]
    try:
        engines, policy = placement.start_actors(task.config, placement.engine_settings(task.config), 1000)
    finally:
        placement.RolloutActor, placement.PolicyWorker = classes  # type: ignore[misc]
    try:
        yield Rig(task, engines, policy)
    finally:
        engines.shutdown()
        policy.shutdown()


def table(sightings: list[Sighting]) -> str:
    """Table of the sightings in Markdown."""
    rows = ["| fault | draft | seen by | steps until seen |", "|---|---|---|---|"]
    for sighting in sightings:
        checks = ", ".join(sighting.seen) or "nothing"
        steps = str(min(sighting.seen.values())) if sighting.seen else "-"
        rows.append(f"| {sighting.fault.name} | {sighting.fault.draft} | {checks} | {steps} |")
    return "\n".join(rows)


def main() -> None:
    sightings = []
    with placement.ray_session(verbose=False), TemporaryDirectory() as folder:
        for draft in EXPERIMENTS:
            with rig(draft, Path(folder) / draft) as running:
                for fault in FAULTS:
                    if fault.draft == draft:
                        sightings.append(running.run(fault))
                        print("\n".join(sightings[-1].lines), file=sys.stderr)
    print(table(sightings))


if __name__ == "__main__":
    main()
