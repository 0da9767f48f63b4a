"""Requests that run while others come, and while weights change."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from engine_process import EngineProcess
from exact import exact_logprobs, generate, reference_model
from safetensors.torch import load_file
from tiny_models import LONG_PROMPT, MTP, PROMPT, dflash, split_weights
from torch import Tensor
from updates import update

from skyrl_spec.rollout import engine as engine_module
from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.payload import pack_weights
from skyrl_spec.types import Generation, SampleRequest, Versions

SAMPLING = SamplingConfig(temperature=0.9, max_generate_length=40)
OLD, NEW = Versions(3, 3), Versions(4, 4)
# After an update a request's next step has no drafted tokens, and rejections draw from its random stream. So only
# greedy responses are the same with and without an update.
GREEDY = replace(SAMPLING, temperature=0.0)
FOREVER = 1e9


class SteppedEngine(RolloutEngine):
    """An engine that can be stopped after a number of steps."""

    def advance_steps(
        self, requests: list[SampleRequest], sampling: SamplingConfig, num_steps: int
    ) -> list[tuple[int, Generation]]:
        finished = self.advance(requests, sampling, seconds=0.0)
        for _ in range(num_steps):
            self._requests._step()
        return finished + self.advance([], sampling, seconds=0.0)

    def step_alone(self, num_steps: int) -> None:
        """What finishes is not asked for."""
        for _ in range(num_steps):
            self._requests._step()


@pytest.fixture(scope="module")
def stepped(kind: str, target: Path, dflash_dir: Path, start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    draft = MTP if kind == "mtp" else dflash(dflash_dir / "d0")
    engine = start_engine(SteppedEngine, model_path=str(target), speculative_config=draft)
    engine.init_weight_transfer_engine({})
    return engine


@pytest.fixture(scope="module")
def weights(kind: str, models_dir: Path, dflash_dir: Path) -> tuple[Weights, Weights]:
    """Two sets of weights, and the directories of their policies."""
    if kind == "mtp":
        first, second = (models_dir / f"w{index}" for index in range(2))
        return (first, *split_weights(first)), (second, *split_weights(second))
    first, second = (
        (
            dflash_dir / f"t{index}",
            load_file(dflash_dir / f"t{index}" / "model.safetensors"),
            load_file(dflash_dir / f"d{index}" / "model.safetensors"),
        )
        for index in range(2)
    )
    return first, second


Weights = tuple[Path, dict[str, Tensor], dict[str, Tensor]]


def load(engine: EngineProcess, weights: Weights, versions: Versions, *, keeps_keys: bool = False) -> None:
    """Policy and draft, between two steps of requests that are stopped."""
    engine.pause() if keeps_keys else engine.set_aside()
    for draft, tensors in enumerate(weights[1:]):
        update(engine, bool(draft), [pack_weights(tensors.items())])
    engine.keys_are_old() if keeps_keys else engine.reset_prefix_cache()
    engine.set_versions(versions)


def requests(count: int, prompts: Sequence[list[int]] = (PROMPT,), first_key: int = 0) -> list[SampleRequest]:
    chosen = itertools.islice(itertools.cycle(prompts), count)
    return [SampleRequest(key, prompt, seed=1000 + key) for key, prompt in enumerate(chosen, start=first_key)]


def sampled_across_an_update(
    engine: EngineProcess,
    old: Weights,
    new: Weights,
    asked: Sequence[SampleRequest],
    sampling: SamplingConfig = SAMPLING,
    *,
    keeps_keys: bool = False,
) -> list[Generation]:
    load(engine, old, OLD)
    engine.go_on()
    finished = engine.advance_steps(asked, sampling, 6)
    load(engine, new, NEW, keeps_keys=keeps_keys)
    engine.go_on()
    finished += engine.advance([], sampling, FOREVER)
    assert sorted(key for key, _ in finished) == [request.key for request in asked]
    return [generation for _, generation in sorted(finished)]


def uniforms(samples: Sequence[Generation], path: Path, indices: Sequence[range], seed: int = 0) -> np.ndarray:
    """What each of these tokens becomes under the distribution function of the model at ``path``, made continuous.

    Independent and uniform on [0, 1] exactly if the tokens were sampled from the model.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for sample, chosen in zip(samples, indices, strict=True):
        if not chosen:
            continue
        logprobs = exact_logprobs(path, [[*PROMPT, *sample.token_ids]], SAMPLING)[0, len(PROMPT) - 1 : -1]
        probs, tokens = logprobs.exp()[list(chosen)], torch.tensor(sample.token_ids)[list(chosen)]
        upper = probs.cumsum(-1).gather(1, tokens[:, None])[:, 0]
        share = torch.rand(len(upper), generator=generator, dtype=torch.float64)
        found.append((upper - share * probs.gather(1, tokens[:, None])[:, 0]).numpy())
    return np.concatenate(found)


def p_value(uniform: np.ndarray) -> float:
    counts, _ = np.histogram(uniform, bins=40, range=(0, 1))
    return float(scipy.stats.chisquare(counts).pvalue)


def test_tokens_before_and_after_an_update_come_from_the_weights_they_claim(
    stepped: EngineProcess, weights: tuple[Weights, Weights]
) -> None:
    """Chi-square against the exact distribution of the version of each token. Keys are computed again."""
    old, new = weights
    samples = sampled_across_an_update(stepped, old, new, requests(400))
    crossing = [sample for sample in samples if sample.updates]
    assert len(crossing) > 100
    assert all(sample.versions == OLD and sample.updates[0][1] == NEW for sample in crossing)
    starts = [sample.updates[0][0] for sample in crossing]
    before = [range(start) for start in starts]
    after = [range(start, len(s.token_ids)) for start, s in zip(starts, crossing, strict=True)]
    first = [range(start, start + 1) for start in starts]
    assert p_value(uniforms(crossing, old[0], before)) > 1e-3
    assert p_value(uniforms(crossing, new[0], after)) > 1e-3
    assert p_value(uniforms(crossing, new[0], first)) > 1e-3
    # Power: versions swapped, and a boundary that is one token off.
    assert p_value(uniforms(crossing, new[0], before)) < 1e-9
    assert p_value(uniforms(crossing, old[0], after)) < 1e-9
    assert p_value(uniforms(crossing, new[0], [range(start - 1, start) for start in starts])) < 1e-3


def test_log_probs_are_those_of_the_weights_that_sampled(
    stepped: EngineProcess, weights: tuple[Weights, Weights]
) -> None:
    samples = [sample for sample in sampled_across_an_update(stepped, *weights, requests(40)) if sample.updates]
    assert samples
    for sample in samples[:10]:
        ids, start = torch.tensor(sample.token_ids), sample.updates[0][0]
        by_version = [
            exact_logprobs(path, [[*PROMPT, *sample.token_ids]], SAMPLING)[0, len(PROMPT) - 1 : -1]
            .gather(1, ids[:, None])[:, 0]
            for path, *_ in weights
        ]  # fmt: skip
        expected = torch.cat([by_version[0][:start], by_version[1][start:]])
        assert (expected - torch.tensor(sample.logprobs)).abs().max() < 1e-4


def test_an_update_to_the_same_weights_changes_no_token(
    stepped: EngineProcess, weights: tuple[Weights, Weights]
) -> None:
    """Responses are those of a run that nothing interrupts: no token is lost or sampled twice."""
    load(stepped, weights[0], OLD)
    stepped.go_on()
    asked = requests(8, [PROMPT, [9], [60, 61, 62], LONG_PROMPT[:200]])
    quiet = dict(stepped.advance(asked, GREEDY, FOREVER))
    crossed = sampled_across_an_update(stepped, weights[0], weights[0], asked, GREEDY)
    assert any(sample.updates for sample in crossed)
    for key, sample in enumerate(crossed):
        assert sample.token_ids == quiet[key].token_ids
        assert np.allclose(sample.logprobs, quiet[key].logprobs, atol=1e-4)


def test_others_run_while_requests_are_set_aside(stepped: EngineProcess, weights: tuple[Weights, Weights]) -> None:
    """Evaluations and canaries see an engine that is idle, and leave the others as they were."""
    load(stepped, weights[0], OLD)
    stepped.go_on()
    alone = generate(stepped, [PROMPT, LONG_PROMPT[:200]], SAMPLING, n=3, seed=5)
    (proposals,) = stepped.propose([PROMPT], SAMPLING, 7)
    asked = requests(12, [PROMPT, [9], [60, 61, 62], LONG_PROMPT[:200]])
    quiet = dict(stepped.advance(asked, GREEDY, FOREVER))
    assert stepped.advance_steps(asked, GREEDY, 4) == []
    stepped.set_aside()
    stepped.reset_prefix_cache()
    assert generate(stepped, [PROMPT, LONG_PROMPT[:200]], SAMPLING, n=3, seed=5) == alone
    assert stepped.propose([PROMPT], SAMPLING, 7) == [proposals]
    assert stepped.advance([], SAMPLING, FOREVER) == []
    stepped.go_on()
    later = dict(stepped.advance([], GREEDY, FOREVER))
    assert {key: g.token_ids for key, g in later.items()} == {key: g.token_ids for key, g in quiet.items()}


def test_requests_come_while_others_run_and_each_finishes_by_itself(
    stepped: EngineProcess, weights: tuple[Weights, Weights]
) -> None:
    load(stepped, weights[0], OLD)
    stepped.go_on()
    # A prompt of one token would get other random numbers beside others than alone.
    asked = requests(6, [PROMPT, [9, 11]])
    alone = {
        request.key: dict(stepped.advance([request], SAMPLING, FOREVER))[request.key].token_ids for request in asked
    }
    together: dict[int, Generation] = {}
    for request in asked:
        together |= dict(stepped.advance_steps([request], SAMPLING, 3))
    together |= dict(stepped.advance([], SAMPLING, FOREVER))
    assert {key: sample.token_ids for key, sample in together.items()} == alone
    assert stepped.advance([], SAMPLING, FOREVER) == []


def test_new_requests_do_not_use_keys_of_older_weights(
    stepped: EngineProcess, weights: tuple[Weights, Weights]
) -> None:
    """Also where nobody dropped them: they are stored under the versions of their weights."""
    sampling = replace(SAMPLING, temperature=0.0)
    old, new = weights
    load(stepped, old, OLD)
    stepped.go_on()
    generate(stepped, [LONG_PROMPT], sampling)
    for draft, tensors in enumerate(new[1:]):
        update(stepped, bool(draft), [pack_weights(tensors.items())])
    stepped.set_versions(NEW)
    unaware = generate(stepped, [LONG_PROMPT], sampling)[0][0].token_ids
    stepped.reset_prefix_cache()
    assert generate(stepped, [LONG_PROMPT], sampling)[0][0].token_ids == unaware


@torch.no_grad()
def logprobs_with_old_keys(sample: Generation, old: Path, new: Path) -> Tensor:
    """``[T]``: log-probs of a response whose keys were kept at its update, by transformers.

    The last token before the update has no keys at that time, because no step has read it.
    """
    ids, first_new = [*PROMPT, *sample.token_ids], len(PROMPT) + sample.updates[0][0] - 1
    before, after = (reference_model(path) for path in (old, new))
    output = before(torch.tensor([ids[:first_new]]), use_cache=True)
    later = after(torch.tensor([ids[first_new:]]), past_key_values=output.past_key_values).logits
    logits = torch.cat([output.logits, later], dim=1)[0, len(PROMPT) - 1 : -1] / SAMPLING.temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]


def distance_after_update(sample: Generation, path: Path) -> float:
    """Largest difference of its log-probs from those of the model at ``path``, behind the update."""
    start, ids = sample.updates[0][0], torch.tensor(sample.token_ids)
    exact = exact_logprobs(path, [[*PROMPT, *sample.token_ids]], SAMPLING)[0, len(PROMPT) - 1 : -1]
    exact = exact.gather(1, ids[:, None])[:, 0]
    return float((exact - torch.tensor(sample.logprobs)).abs()[start:].max())


def test_kept_keys_are_those_of_the_weights_before(stepped: EngineProcess, weights: tuple[Weights, Weights]) -> None:
    (old, *_), (new, *_) = weights
    samples = sampled_across_an_update(stepped, *weights, requests(60), keeps_keys=True)
    crossing = [sample for sample in samples if sample.updates]
    assert len(crossing) > 10
    for sample in crossing[:10]:
        assert (logprobs_with_old_keys(sample, old, new) - torch.tensor(sample.logprobs)).abs().max() < 1e-4
    # Power: these are not the log-probs of the new weights with keys of their own.
    assert max(distance_after_update(sample, new) for sample in crossing[:10]) > 1e-2


def test_steps_are_counted_by_version(stepped: EngineProcess, weights: tuple[Weights, Weights]) -> None:
    """The first step, and the first one after an update, sample one token: there are no drafts to verify."""
    before = stepped.spec_counters()
    samples = sampled_across_an_update(stepped, *weights, requests(8))
    counters = stepped.spec_counters() - before
    assert all(len(sample.num_steps) == 1 + len(sample.updates) for sample in samples)
    assert all(sample.num_steps[0] == 6 for sample in samples if sample.updates)
    spans = sum(len(sample.num_steps) for sample in samples)
    # A draft beyond the end of a response is not counted by everyone.
    assert abs(sum(sum(sample.num_steps) for sample in samples) - spans - counters.num_drafts) <= len(samples)


class CoreInAProcess(RolloutEngine):
    """An engine whose core steps in a process of its own, as on GPUs."""

    def __init__(self, settings: EngineSettings):
        # Test processes are daemons, which may have no children.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        ours = engine_module.engine_environment
        engine_module.engine_environment = lambda one: ours(one) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        super().__init__(settings)
        assert self._has_own_process


def test_a_core_in_its_own_process_stops_and_goes_on(
    models_dir: Path, start_engine: Callable[..., EngineProcess]
) -> None:
    """It steps by itself, so that it must be told. On a CPU; a GPU's scheduler is another. The weights stay."""
    path = models_dir / "w0"
    engine = start_engine(CoreInAProcess, model_path=str(path), speculative_config=MTP)
    asked = requests(200)
    for stop in ("set_aside", "pause"):
        engine.set_versions(OLD)
        finished = engine.advance(asked, SAMPLING, 0.1)
        getattr(engine, stop)()
        engine.set_versions(NEW)
        # Nothing runs.
        before = engine.spec_counters()
        assert engine.advance([], SAMPLING, 0.5) == []
        assert engine.spec_counters() == before
        if stop == "set_aside":
            assert len(generate(engine, [PROMPT], SAMPLING, n=3)[0]) == 3
        engine.go_on()
        finished += engine.advance([], SAMPLING, FOREVER)
        assert sorted(key for key, _ in finished) == [request.key for request in asked]
        crossing = [sample for _, sample in finished if sample.updates]
        assert crossing
        assert all(distance_after_update(sample, path) < 1e-4 for sample in crossing[:5])


def test_what_finished_before_it_was_set_aside_is_no_answer_to_others(stepped: EngineProcess) -> None:
    short, long = (replace(GREEDY, max_generate_length=length) for length in (3, 12))
    aside, other = SampleRequest(0, PROMPT, seed=1), SampleRequest(0, LONG_PROMPT, seed=1)
    (alone,) = stepped.advance([aside], short, FOREVER)
    assert stepped.advance([aside], short, 0.0) == []
    stepped.step_alone(6)
    stepped.set_aside()
    # Both have the same key.
    (answer,) = stepped.advance([other], long, FOREVER)
    stepped.go_on()
    (late,) = stepped.advance([], short, FOREVER)
    assert late[1].token_ids == alone[1].token_ids
    assert answer[1].token_ids == stepped.advance([other], long, FOREVER)[0][1].token_ids
    assert len(answer[1].token_ids) > len(late[1].token_ids)
