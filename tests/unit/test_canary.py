"""What the canary makes of numbers, and when the watch says something; tests/fidelity has it on real runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from skyrl_spec.controller.fidelity import Watch, acceptance_gap, logprob_agreement, require_current
from skyrl_spec.controller.lossless import LosslessCanary
from skyrl_spec.errors import RunError
from skyrl_spec.metrics import names
from skyrl_spec.rollout.engine import _anchors
from skyrl_spec.settings.schema import CanaryConfig, SamplingConfig
from skyrl_spec.sync.canary import Agreement, SyncCanary, compare, fixed_prompts
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


def make_canary(scores: ProposalScores, **settings: Any) -> SyncCanary:
    """A canary whose engine answers ``ENGINE``, and whose trainer ``scores``."""

    class Engines:
        def propose(self, *_: Any, **__: Any) -> list[list[Proposals]]:
            return [[ENGINE]]

    class Policy:
        def score_proposals(self, _: Any) -> ProposalScores:
            return scores

    return SyncCanary(CanaryConfig(**settings), Engines(), Policy(), [[1, 2]], temperature=1.0, dtype="fp32")


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


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (replace(TRAINER, policy_logprobs=TRAINER.policy_logprobs + 0.01), "the policy of engine 0 is not the trainer"),
        (replace(TRAINER, draft_logprobs=TRAINER.draft_logprobs + 0.01), "the draft of engine 0 is not the trainer"),
        (replace(TRAINER, policy_logprobs=np.array([np.nan, 0, 0])), "the policy of engine 0 is not the trainer"),
    ],
)
def test_a_mismatch_ends_the_run_in_a_line(
    capsys: pytest.CaptureFixture[str], scores: ProposalScores, words: str
) -> None:
    with pytest.raises(RunError, match=words) as error:
        make_canary(scores).check(Versions(3, 3))
    assert "\n" not in str(error.value)
    assert "they never agreed" in str(error.value)
    warned = make_canary(scores, on_mismatch="warn")
    for _ in range(2):
        assert names.CANARY_POLICY in warned.check(Versions(3, 3))
    assert capsys.readouterr().err.count(words) == 1


def test_a_synced_engine_is_held_against_the_loaded_one() -> None:
    # 5e-5 passes while the engine is as it was loaded, and is too much if it was better then.
    apart = replace(TRAINER, policy_logprobs=TRAINER.policy_logprobs.astype(np.float64) + 5e-5)
    make_canary(apart).check(Versions(3, 3))
    first = make_canary(TRAINER)
    first.check(Versions(3, 3))
    second = make_canary(apart)
    second.load_state_dict(first.state_dict())
    with pytest.raises(RunError, match="they agreed at policy version 3 and draft version 3 last"):
        second.check(Versions(3, 3))


def test_an_engine_of_another_version_is_named() -> None:
    with pytest.raises(
        RunError, match=r"engine 0 says that it holds policy version 3 .* but was given policy version 4"
    ):
        make_canary(TRAINER).check(Versions(4, 4))


def test_it_is_due_after_the_first_sync_and_every_interval() -> None:
    every_fourth = make_canary(TRAINER, interval=4)
    assert [v for v in range(1, 12) if every_fourth.is_due(Versions(v, v))] == [1, 5, 9]
    assert not make_canary(TRAINER, enabled=False).is_due(Versions(1, 1))


def test_the_last_prompt_is_as_long_as_prompts_may_be() -> None:
    prompts = fixed_prompts([[index] * 3 for index in range(8)], num_prompts=2, max_length=7)
    assert prompts == [[0, 0, 0], [4, 4, 4, 0, 0, 0, 1]]
    assert fixed_prompts([[1, 2]], num_prompts=4, max_length=5) == [[1, 2, 1, 2]]


def test_anchors_follow_what_was_accepted() -> None:
    # The response's tokens stand at 10 to 15: 5 6 7 8 9 4.
    blocks = [[6, 7, 0], [9, 0, 0], [1, 1, 1]]
    assert _anchors(10, [5, 6, 7, 8, 9, 4], blocks) == [10, 13]
    assert _anchors(10, [5], blocks) == []
    # A block accepted whole leads to the token sampled behind it.
    assert _anchors(10, [5, 6, 7, 8, 9, 4], [[6, 7, 8], [4, 1, 1]]) == [10, 14]


def make_rollout(versions: Versions) -> Rollout:
    return Rollout(Prompt("a", [1], [], "gsm8k", {}), Generation([2], [-1.0], "stop", versions), "", 0.0, [1])


def test_rollouts_of_other_weights_are_refused() -> None:
    require_current([make_rollout(Versions(2, 2))], Versions(2, 2))
    with pytest.raises(RunError, match="sampled under policy version 1 and draft version 2, but the trainer is at"):
        require_current([make_rollout(Versions(2, 2)), make_rollout(Versions(1, 2))], Versions(2, 2))


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


def test_a_prompt_that_engines_prefill_in_parts_is_not_asked() -> None:
    assert len(fixed_prompts([[1] * 5000], num_prompts=1, max_length=5000)[0]) == 1024


def test_losslessness_is_due_by_the_version_that_moves() -> None:
    canary = LosslessCanary(CanaryConfig(lossless_interval=2), SamplingConfig(), [], None, exact=True)  # type: ignore[arg-type]
    assert [canary.is_due(Versions(0, draft)) for draft in (1, 2, 3, 4)] == [False, True, False, True]
    assert [canary.is_due(Versions(policy, 0)) for policy in (1, 2)] == [False, True]
