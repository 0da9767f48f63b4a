"""Decisions of the canaries and the watch on given numbers. tests/fidelity has real runs."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from skyrl_spec.controller.fidelity import Watch, acceptance_gap, logprob_agreement, staleness
from skyrl_spec.controller.lossless import LosslessCanary
from skyrl_spec.controller.run import _save_after_mismatch
from skyrl_spec.errors import RestartableError, RunError, SyncMismatchError
from skyrl_spec.metrics import names
from skyrl_spec.rollout.anchors import drafted_anchors
from skyrl_spec.settings.schema import CanaryConfig, SamplingConfig
from skyrl_spec.sync.canary import Agreement, SyncCanary, compare, fixed_prompts, noise_limit
from skyrl_spec.types import Generation, Prompt, Proposals, ProposalScores, Rollout, TrainBatch, Versions

ENGINE = Proposals(
    prompt_ids=[1, 2],
    generation=Generation([5, 6, 7], [-1.0, -2.0, -3.0], "length", Versions(3, 3)),
    anchors=[2],
    drafted=[[6, 8]],
    draft_logprobs=[[-0.5, -0.25]],
)
TRAINER = ProposalScores(
    policy_logprobs=np.array([-1.0, -2.0, -3.0], np.float32),
    draft_logprobs=np.array([[-0.5, -0.25]], np.float32),
    favourites=np.array([[6, 8]]),
)


Shifts = Callable[[int], float]


class Pair:
    """An engine that answers ``ENGINE``, and a trainer whose log-probs differ by a shift that depends on the seed."""

    def __init__(self, policy: Shifts = lambda _: 0.0, draft: Shifts = lambda _: 0.0):
        self.policy, self.draft = policy, draft
        self.versions = Versions(0, 0)
        self.seeds: list[int] = []

    def propose(self, prompts: list[list[int]], sampling: SamplingConfig, seed: int) -> list[list[Proposals]]:
        self.seeds.append(seed)
        generation = replace(ENGINE.generation, versions=self.versions)
        return [[replace(ENGINE, prompt_ids=prompts[0], generation=generation)]]

    def score_all(self, answers: Sequence[list[Proposals]]) -> list[ProposalScores]:
        seed = self.seeds[-1]
        scores = replace(
            TRAINER,
            policy_logprobs=TRAINER.policy_logprobs.astype(np.float64) + self.policy(seed),
            draft_logprobs=TRAINER.draft_logprobs.astype(np.float64) + self.draft(seed),
        )
        return [scores] * len(answers)

    def checked(self, canary: SyncCanary, version: int) -> dict[str, float]:
        """The metrics of a check after a sync to ``version``, which the engine takes."""
        self.versions = Versions(version, version)
        self.seeds.clear()
        return canary.check(self.versions)


def make_canary(pair: Pair, dtype: str = "fp32", **settings: Any) -> SyncCanary:
    return SyncCanary(CanaryConfig(**settings), pair, pair, [[1, 2]], temperature=1.0, dtype=dtype)


def started_canary(pair: Pair, **settings: Any) -> SyncCanary:
    """A canary that has measured its noise, at version 0."""
    canary = make_canary(pair, **settings)
    pair.checked(canary, 0)
    canary.require_agreement()
    return canary


def test_agreement_is_the_mean_difference_of_each_side() -> None:
    scores = ProposalScores(
        policy_logprobs=np.array([-1.0, -2.0, -3.3], np.float32),
        draft_logprobs=np.array([[-0.5, -0.45]], np.float32),
        favourites=np.array([[6, 9]]),
    )
    found = compare([ENGINE], scores)
    assert found.policy == pytest.approx(0.1)
    assert found.draft == pytest.approx(0.1)
    assert found.favourites == 0.5


def test_a_draft_trained_less_deep_than_drafted_is_compared_as_far_as_it_goes() -> None:
    scores = replace(TRAINER, draft_logprobs=np.array([[-0.5]], np.float32), favourites=np.array([[6]]))
    assert compare([ENGINE], scores) == Agreement(0.0, 0.0, 1.0)
    nothing = replace(TRAINER, draft_logprobs=np.zeros((0, 0)), favourites=np.zeros((0, 0)))
    assert compare([ENGINE], nothing) == Agreement(0.0)


def test_the_limit_follows_mean_and_spread_of_the_baselines() -> None:
    # Mean 4e-3, sample standard deviation 3e-3.
    assert noise_limit([1e-3, 4e-3, 7e-3], floor=1e-5) == pytest.approx(2 * 4e-3 + 6 * 3e-3)
    # Equal values have a spread of a third of the mean, and so has a single one.
    assert noise_limit([2e-3, 2e-3], floor=1e-5) == noise_limit([2e-3], floor=1e-5) == pytest.approx(8e-3)
    assert noise_limit([1e-7, 2e-7], floor=1e-5) == 1e-5


def test_noise_as_wide_as_before_the_first_sync_is_no_mismatch(capsys: pytest.CaptureFixture[str]) -> None:
    # The first seed happens to agree best. One baseline would have given a limit of 4e-5.
    pair = Pair(lambda seed: (1e-5, 4e-5, 7e-5)[seed % 3])
    canary = started_canary(pair)
    assert pair.seeds == [0, 1, 2]
    pair.policy = lambda seed: 7e-5
    for version in range(1, 20):
        assert pair.checked(canary, version)[names.CANARY_POLICY] == pytest.approx(7e-5)
        canary.require_agreement()
        assert pair.seeds == [0]
    assert capsys.readouterr().err == ""


def test_an_outlier_is_measured_again_and_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair()
    canary = started_canary(pair)
    pair.policy = lambda seed: 0.01 if seed == 0 else 0.0
    for version in (1, 2):
        assert pair.checked(canary, version)[names.CANARY_POLICY] == pytest.approx(0.01)
        assert pair.seeds == [0, 1, 2, 3]
        canary.require_agreement()
    assert capsys.readouterr().err.count("not confirmed under other seeds, so it counts as noise") == 1
    # The outlier counts as an agreement.
    pair.policy = lambda _: 0.01
    pair.checked(canary, 3)
    with pytest.raises(SyncMismatchError, match="they agreed last at policy version 2 and draft version 2"):
        canary.require_agreement()


@pytest.mark.parametrize(("num_beyond", "is_mismatch"), [(1, False), (2, True), (3, True)])
def test_most_of_the_other_seeds_decide(num_beyond: int, is_mismatch: bool) -> None:
    pair = Pair()
    canary = started_canary(pair)
    pair.draft = lambda seed: 0.01 if seed <= num_beyond else 0.0
    pair.checked(canary, 1)
    if not is_mismatch:
        return canary.require_agreement()
    with pytest.raises(SyncMismatchError, match=f"the draft of engine 0 .* in {num_beyond} of 3 checks"):
        canary.require_agreement()
    # A mismatch is raised once.
    canary.require_agreement()


def test_a_mismatch_says_what_differs_by_how_much_and_since_when() -> None:
    pair = Pair(lambda _: 1e-6)
    canary = started_canary(pair)
    pair.policy = lambda _: 0.01
    assert pair.checked(canary, 1)[names.CANARY_POLICY] == pytest.approx(0.01)
    with pytest.raises(SyncMismatchError) as error:
        canary.require_agreement()
    assert str(error.value) == (
        "sync canary: the policy of engine 0 is not the trainer's at policy version 1 and draft version 1: mean "
        "|log-prob difference| 1.0e-02, above the limit 2.0e-05 in 3 of 3 checks (1.0e-06, 1.0e-06, 1.0e-06 before "
        "the first sync); they agreed last at policy version 0 and draft version 0; responses would come from other "
        "weights than are trained (trainer.canary.on_mismatch=warn continues)"
    )
    crossed_ray = pickle.loads(pickle.dumps(error.value))
    assert (type(crossed_ray), str(crossed_ray)) == (SyncMismatchError, str(error.value))


@pytest.mark.parametrize("component", ["policy", "draft"])
def test_nan_is_a_mismatch_at_once(component: str) -> None:
    pair = Pair()
    canary = started_canary(pair)
    setattr(pair, component, lambda seed: math.nan if seed == 0 else 0.0)
    pair.checked(canary, 1)
    assert pair.seeds == [0]
    with pytest.raises(SyncMismatchError, match=f"the {component} of engine 0 .* difference. nan"):
        canary.require_agreement()


def test_nan_under_one_other_seed_is_a_mismatch() -> None:
    pair = Pair()
    canary = started_canary(pair)
    pair.policy = lambda seed: {0: 0.01, 2: math.nan}.get(seed, 0.0)
    pair.checked(canary, 1)
    with pytest.raises(SyncMismatchError, match="the policy of engine 0"):
        canary.require_agreement()


def test_an_engine_of_another_version_is_a_mismatch_at_once() -> None:
    pair = Pair()
    canary = started_canary(pair)
    pair.seeds.clear()
    canary.check(Versions(1, 1))
    assert pair.seeds == [0]
    with pytest.raises(
        SyncMismatchError, match=r"engine 0 says that it holds policy version 0 .*, not policy version 1"
    ):
        canary.require_agreement()


def test_warn_prints_a_mismatch_once_and_continues(capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair()
    canary = started_canary(pair, on_mismatch="warn")
    pair.policy = lambda _: 0.01
    for version in (1, 2):
        assert names.CANARY_POLICY in pair.checked(canary, version)
        canary.require_agreement()
    assert capsys.readouterr().err.count("the policy of engine 0 is not the trainer's") == 1


@pytest.mark.parametrize(
    ("shift", "agrees"),
    [
        (lambda seed: 9e-5, True),
        # One outlier among the baselines only widens the spread.
        (lambda seed: 1e-3 if seed == 1 else 0.0, True),
        (lambda seed: 2e-4, False),
        (lambda seed: math.nan if seed == 1 else 0.0, False),
    ],
)
def test_a_loaded_engine_must_be_close(shift: Shifts, agrees: bool) -> None:
    pair = Pair(shift)
    canary = make_canary(pair)
    pair.checked(canary, 0)
    assert pair.seeds == [0, 1, 2]
    if agrees:
        return canary.require_agreement()
    with pytest.raises(RunError, match="they never agreed") as error:
        canary.require_agreement()
    # A restart would load the same weights.
    assert not isinstance(error.value, RestartableError)


def test_baselines_go_on_in_a_checkpoint() -> None:
    pair = Pair(lambda seed: (1e-5, 4e-5, 7e-5)[seed % 3])
    saved = json.loads(json.dumps(started_canary(pair).state_dict()))
    resumed = make_canary(pair)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    pair.policy = lambda _: 2.5e-4
    pair.checked(resumed, 1)
    resumed.require_agreement()
    pair.policy = lambda _: 2.7e-4
    pair.checked(resumed, 2)
    with pytest.raises(SyncMismatchError, match="they agreed last at policy version 1"):
        resumed.require_agreement()


@pytest.mark.parametrize("baseline", [{"policy": 1e-5, "draft": 2e-5, "favourites": 1.0}, None])
def test_an_older_checkpoint_has_one_baseline_or_none(baseline: dict[str, float] | None) -> None:
    pair = Pair(lambda _: 5e-5)
    canary = make_canary(pair)
    canary.load_state_dict({"baseline": baseline, "last_good": {"policy": 3, "draft": 3}})
    pair.checked(canary, 4)
    if baseline is None:
        # Noise is measured now.
        assert pair.seeds == [0, 1, 2]
        return canary.require_agreement()
    # Four times the one baseline, as before.
    with pytest.raises(SyncMismatchError, match=r"above the limit 4\.0e-05 in 3 of 3 checks"):
        canary.require_agreement()


def test_it_is_due_after_the_first_sync_and_every_interval() -> None:
    every_fourth = make_canary(Pair(), interval=4)
    assert [v for v in range(1, 12) if every_fourth.is_due(Versions(v, v))] == [1, 5, 9]
    assert not make_canary(Pair(), enabled=False).is_due(Versions(1, 1))


def test_the_last_prompt_is_as_long_as_prompts_may_be() -> None:
    prompts = fixed_prompts([[index] * 3 for index in range(8)], num_prompts=2, max_length=7)
    assert prompts == [[0, 0, 0], [4, 4, 4, 0, 0, 0, 1]]
    assert fixed_prompts([[1, 2]], num_prompts=4, max_length=5) == [[1, 2, 1, 2]]


def test_anchors_follow_what_was_accepted() -> None:
    # The response tokens 5 6 7 8 9 4 are at positions 10 to 15.
    blocks = [[6, 7, 0], [9, 0, 0], [1, 1, 1]]
    assert drafted_anchors(10, [5, 6, 7, 8, 9, 4], blocks) == [10, 13]
    assert drafted_anchors(10, [5], blocks) == []
    # After a block that is accepted whole, the anchor is the token sampled after it.
    assert drafted_anchors(10, [5, 6, 7, 8, 9, 4], [[6, 7, 8], [4, 1, 1]]) == [10, 14]


def make_rollout(versions: Versions) -> Rollout:
    return Rollout(Prompt("a", [1], [], "gsm8k", {}), Generation([2], [-1.0], "stop", versions), "", 0.0, [1])


def test_rollouts_of_other_weights_are_refused() -> None:
    assert staleness([make_rollout(Versions(2, 2))], Versions(2, 2), allowed=0) == 0
    with pytest.raises(RunError, match="sampled with policy version 1 and draft version 2, but the trainer is at"):
        staleness([make_rollout(Versions(2, 2)), make_rollout(Versions(1, 2))], Versions(2, 2), allowed=0)


def test_logprob_agreement_of_the_tokens_that_count() -> None:
    mask = np.array([[False, True, True, False]])
    ones = np.ones((1, 4), np.int64)
    zeros = np.zeros((1, 4), np.float32)
    rollout = np.array([[9.0, -1.0, -2.0, 9.0]], np.float32)
    policy = np.array([[0.0, -1.5, -2.0, 0.0]], np.float32)
    found = logprob_agreement(TrainBatch(ones, ones, mask, zeros, zeros, rollout, policy))
    assert found[names.LOGPROBS_DIFF] == pytest.approx(0.25)
    assert found[names.LOGPROBS_DIFF_MAX] == pytest.approx(0.5)
    assert found[names.LOGPROBS_KL] == pytest.approx((np.exp(-0.5) - 1 + 0.5) / 2)


def test_the_gap_is_of_positions_that_both_have() -> None:
    values = {names.predicted_acceptance_pos(1): 0.9, names.predicted_acceptance_pos(2): 0.8}
    values |= {names.acceptance_rate_pos("train", position): 0.5 for position in (1, 2, 3)}
    assert acceptance_gap(values) == {names.ACCEPTANCE_GAP: pytest.approx(0.7)}
    assert acceptance_gap({names.predicted_acceptance_pos(1): 0.9}) == {}


def test_the_watch_says_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(CanaryConfig(), dtype="fp32", temperature=0.7)
    fine = {names.LOGPROBS_DIFF: 1e-5, names.ACCEPTANCE_GAP: 0.1, names.acceptance_length("train"): 3.0}
    watch.look(fine)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        watch.look(fine | {names.LOGPROBS_DIFF: 0.1})
        watch.look(fine | {names.ACCEPTANCE_GAP: -2.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "policy/rollout_train_logprobs_abs_diff_mean is 0.1, above 0.001" in first
    assert "predicts an acceptance length of 1.00, the engines measure 3.00" in second
    assert "another temperature than 0.7" in second


def test_a_gap_where_drafts_lack_room_names_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(CanaryConfig(), dtype="fp32", temperature=1.0, missing_positions=6)
    watch.look({names.ACCEPTANCE_GAP: 2.0, names.acceptance_length("train"): 3.0})
    assert (
        "lower generator.sampling_params.max_generate_length by 6. Else the engines' draft" in capsys.readouterr().err
    )


def test_a_gap_that_few_drafts_explain_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {names.predicted_acceptance_pos(position): 0.5 for position in (1, 2, 3)}
    step = rates | {names.ACCEPTANCE_GAP: 1.6, names.acceptance_length("train"): 2.5}
    watch = Watch(CanaryConfig(), dtype="fp32", temperature=1.0)
    # Accepted tokens are 0 or 3, with a standard deviation of 1.5. The limit is 0.75 + 3 x 2 x 1.5 / sqrt(drafts).
    watch.look(step | {names.PREDICTED_DRAFTS: 100.0})
    assert capsys.readouterr().err == ""
    watch.look(step | {names.PREDICTED_DRAFTS: 0.0})
    assert capsys.readouterr().err == ""
    watch.look(step | {names.PREDICTED_DRAFTS: 121.0})
    assert "predicts an acceptance length of 4.10" in capsys.readouterr().err


def test_a_prompt_that_engines_prefill_in_parts_is_not_asked() -> None:
    assert len(fixed_prompts([[1] * 5000], num_prompts=1, max_length=5000)[0]) == 1024


def test_losslessness_is_due_by_the_version_that_moves() -> None:
    canary = LosslessCanary(CanaryConfig(lossless_interval=2), SamplingConfig(), [], None, exact=True)  # type: ignore[arg-type]
    assert [canary.is_due(Versions(0, draft)) for draft in (1, 2, 3, 4)] == [False, True, False, True]
    assert [canary.is_due(Versions(policy, 0)) for policy in (1, 2)] == [False, True]


def test_a_save_that_fails_after_a_mismatch_hides_neither_error(capsys: pytest.CaptureFixture[str]) -> None:
    class FullDisk:
        def save_last(self) -> None:
            raise RunError("no space left")

    with pytest.raises(RunError, match="no space left"):
        _save_after_mismatch(FullDisk(), SyncMismatchError("the draft differs"))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "skyrl-spec: warning: the draft differs\n"
