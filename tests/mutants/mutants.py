"""One-line breaks of the code that decides what is trained, synced and saved, each with the tests that catch it."""

from __future__ import annotations

from mutant import Mutant, of

REDUCE, PACKING, ADVANTAGES = "tests/unit/test_reduce.py", "tests/unit/test_packing.py", "tests/unit/test_advantages.py"
SURROGATE, LOGPROBS, SOFT_CE = (
    "tests/unit/test_policy_loss.py",
    "tests/unit/test_logprobs.py",
    "tests/unit/test_soft_ce.py",
)
FP32_HEAD, ALIGN, BLOCKS = "tests/unit/test_fp32_head.py", "tests/unit/test_align.py", "tests/unit/test_blocks.py"
FLASH, SHARES = "tests/unit/test_flash.py", "tests/unit/test_shares.py"
SYNC, PAYLOAD = "tests/unit/test_weight_sync.py", "tests/rollout/test_weight_payload.py"
AGREEMENT, FOLDERS, PROMPTS = (
    "tests/unit/test_canary.py",
    "tests/unit/test_checkpoint_folders.py",
    "tests/unit/test_prompts.py",
)
SHARDED = "tests/dist/test_vocab_parallel_losses.py::test_two_ranks_equal_one_process"
SHARDS_TIE = "tests/dist/test_vocab_parallel_losses.py::test_ties_across_ranks"
CONVERSION = "tests/megatron/test_conversion.py::test_every_architecture_round_trips_and_equals_transformers"
MTP_HEAD = "tests/megatron/test_mtp_draft.py::test_every_depth_equals_the_plain_head"
DFLASH_BLOCKS = "tests/megatron/test_dflash_draft.py::test_blocks_and_gradients_are_those_of_the_definition"
PACKED = "tests/megatron/test_drafts.py::test_packed_documents_give_the_loss_and_gradients_of_documents_apart"
DRAFT_SHARE = (
    "tests/megatron/test_drafts.py::test_a_share_of_the_positions_gives_their_part_of_the_loss_and_of_the_gradients"
)
ISOLATED = (
    "tests/megatron/test_drafts.py::test_the_drafts_gradient_reaches_every_parameter_of_its_own_and_none_of_the_policy"
)
DRAFT_LOSS = "tests/megatron/test_draft_loss.py::test_loss_and_gradients_equal_the_definition"
GRADIENTS = "tests/megatron/test_policy_gradients.py::test_gradients_equal_autograds"
DIVIDED = "tests/dist/test_context_parallel.py::test_divided_packs_compute_what_whole_ones_do"
LAYOUTS = "tests/megatron/test_parallel_training.py::test_every_layout_gives_the_same_losses_gradients_and_weights"
EXPERTS = "tests/megatron/test_parallel_training.py::test_experts_on_several_ranks_give_the_same[ep2]"
MIXTURES = "tests/megatron/test_dist_checkpoint.py::test_mixtures_of_experts_resume_and_reshard"
COPIES = "tests/megatron/test_draft_copies.py::test_copies_are_scored_beside_the_training"
DRAFT_TRAINING = "tests/unit/test_draft_training.py"
LENGTHS = "tests/unit/test_lengths.py"
UPDATES = "tests/megatron/test_optimizer_step.py::test_updates_are_those_of_adamw"
REFERENCE = "tests/megatron/test_optimizer_step.py::test_the_reference_stays_where_the_policy_started"
SKIPPED = "tests/megatron/test_skipped_updates.py::test_a_bad_gradient_of_the_policy[False-1]"
BUNDLE = "tests/megatron/test_bundle.py::test_a_bundle_is_what_the_ranks_hold[mtp-2-fp32-False]"
BOXES = "tests/megatron/test_dist_checkpoint.py::test_boxes_are_the_range_in_order"
CONTINUOUS = "tests/unit/test_groups.py"
BATCHES, CHECKPOINTER = "tests/unit/test_batches.py", "tests/unit/test_checkpointer.py"
OFFLOAD = "tests/megatron/test_offload.py::test_training_is_the_same_to_the_last_bit"
HOST_COPIES = "tests/megatron/test_offload.py"
SLEEP = "tests/rollout/test_sleep.py"
RUNNING_REQUESTS = "tests/rollout/test_running_requests.py"
QUICK = "tests/mutants/quick_resume.py"
RESUME = f"{QUICK}::test_resume_is_bitwise"

LOSSES = [
    *of(
        "losses/vocab_parallel.py",
        [LOGPROBS],
        ("padded vocabulary in the softmax", "[: max(num_tokens, 1)]", ""),
        ("logits times the temperature", "logits_cv.div_(self.temperature)", "logits_cv.mul_(self.temperature)"),
    ),
    *of(
        "losses/vocab_parallel.py",
        [SHARDED],
        ("every shard starts at token 0", "start=rank * num_rows", "start=0"),
        ("ranks' sums added without their maxima", "(max_Rc - max_c).exp()", "torch.ones_like(max_Rc)"),
    ),
    *of(
        "losses/vocab_parallel.py",
        [SHARDS_TIE],
        (
            "the last of equal ranks wins",
            "max_Rc.max(0)",
            "(max_Rc + 1e-3 * torch.arange(len(max_Rc))[:, None]).max(0)",
        ),
    ),
    *of(
        "losses/vocab_parallel.py",
        [FP32_HEAD],
        ("fp32 logits rounded to bf16", "product = shard.fp32_logits and", "product = False and"),
    ),
    *of(
        "losses/logprobs.py",
        [LOGPROBS],
        ("sign of the log-probs' gradient", "factor_c1 = -grad_logprobs_T", "factor_c1 = grad_logprobs_T"),
        ("no temperature in the log-probs' gradient", " / ctx.temperature", ""),
        ("sign in the entropy", "normaliser.log_sum_c - mean_T", "normaliser.log_sum_c + mean_T"),
        ("log-prob of the token after", "shard.to_local(targets_c)", "shard.to_local(targets_c + 1)"),
    ),
    *of(
        "losses/logprobs.py",
        [SHARDED],
        ("log-probs' gradient not all-reduced", "dist.all_reduce(grad_hidden_TD, group=ctx.shard.group)", "pass"),
    ),
    *of(
        "losses/soft_ce.py",
        [SOFT_CE],
        ("sign of the draft's gradient", "draft_cv.sub_(targets.target_cv)", "draft_cv.add_(targets.target_cv)"),
        ("no temperature in the draft's gradient", ".to(logits.dtype) / logits.temperature", ".to(logits.dtype)"),
        ("sign of the total variation's gradient", "below_b1 - (q < p)", "below_b1 + (q < p)"),
        ("total variation of another normalisation", "(q * (q < p)).sum(-1)", "(p * (q < p)).sum(-1)"),
        ("NaN of an unsupervised token kept", ".masked_fill(~counts_KT[here][:, None], 0)", ""),
        ("NaN of a position without weight kept", ".masked_fill(~self.counts_T[positions_c, None], 0)", ""),
        (
            "acceptance under the target, not the policy",
            "accept_prob_c = targets.teacher_cv",
            "accept_prob_c = targets.target_cv",
        ),
        ("labels hit too often", "clamp(min=torch.finfo(p_c.dtype).tiny)).clamp(max=1.0)", "clamp(min=1.0))"),
        ("top-p before top-k alone", "if self.top_k > 0:", "if False:"),
        ("teacher not detached", "with torch.no_grad():", "with torch.enable_grad():"),
    ),
    *of(
        "losses/soft_ce.py",
        [SHARDED],
        ("draft's gradient not all-reduced", "dist.all_reduce(grad_KTD, group=logits.shard.group)", "pass"),
        ("overlap of one rank's tokens", "1 - overlap_Rc.sum(0)", "1 - overlap_Rc[shard.rank]"),
    ),
    *of(
        "losses/truncation.py",
        [SOFT_CE],
        ("top-k keeps the first alone", ".topk(k).values[:, -1]", ".topk(k).values[:, 0]"),
        ("a nucleus of what is left out", ">= top_p", "<= top_p"),
        ("a nucleus of half the octaves", "octaves_c + step * has_enough_c", "octaves_c + step"),
        ("a nucleus that is not renormalised", "probs_cv.div_(", "probs_cv.mul("),
    ),
    *of(
        "losses/truncation.py",
        [SHARDED],
        (
            "a nucleus of one rank",
            "_over_ranks(mass_c, shard).sum(0)",
            "_over_ranks(mass_c, shard)[shard.rank]",
        ),
    ),
    *of(
        "models/context_parallel.py",
        [f"{DIVIDED}[2]", f"{DIVIDED}[3]"],
        ("keys from the chunk's start", "keys=slice(begin, end)", "keys=slice(first, end)"),
        (
            "gradients of keys stay where they are",
            "_sum_of_own_rows(keys_grad, share), None",
            "keys_grad[: len(keys_t2Gd)], None",
        ),
        (
            "rows of the wrong chunk",
            "(share.rank + 1, 2 * share.size - share.rank)",
            "(share.rank + 1, share.rank + 1)",
        ),
        ("chunks in the order of ranks", "second_Rc.flip(0)]).flatten", "second_Rc]).flatten"),
        ("positions begin again in what is added", "torch.arange(last, last + num_added)", "torch.arange(num_added)"),
    ),
    *of(
        "training/trainer.py",
        [f"{LAYOUTS}[mtp-untied-cp2]"],
        ("ranks that share a pack all count", "if self.parallel.cp_rank == 0:", "if True:"),
    ),
    *of(
        "drafts/mtp.py",
        [f"{LAYOUTS}[mtp-untied-cp2]"],
        ("chains of a pack count twice", "accepted_K=accepted_K * counts", "accepted_K=accepted_K"),
        ("a response followed on one rank", "hit_KT = hit_KT > 0", "hit_KT = hit_KT < 0"),
    ),
    *of(
        "training/draft_states.py",
        [f"{LAYOUTS}[mtp-untied-pp2]"],
        ("the embedding of the start", "self._model.refresh_embedding(self._parallel)", "self._has_draft or None"),
    ),
    *of(
        "training/draft_states.py",
        [f"{OFFLOAD}[1-2-1-mtp]"],
        ("an embedding that is away is sent", "        self._require(self._model)\n", ""),
    ),
    *of(
        "training/draft_states.py",
        [f"{LAYOUTS}[dflash-untied-pp2]"],
        ("states of one stage only", "captured.add_parts(states)", "captured.add_parts(dict.fromkeys(states, 0))"),
    ),
    *of(
        "losses/chains.py",
        [f"{DRAFT_LOSS}[mtp-accept]"],
        ("every token of a chain by itself", "accepted_C = accepted_C * (1 - terms_C)", "accepted_C = 1 - terms_C"),
        (
            "entries that are no tokens in the first chain",
            "masked_fill(weights_E == 0, size)",
            "masked_fill(weights_E == 0, 0)",
        ),
    ),
    *of(
        "losses/reduce.py",
        [REDUCE],
        ("mean over padding too", "tokens_B.sum())", "mask_BS.size)"),
        ("sequences without a token counted", "(tokens_B > 0).sum() * tokens_B", "len(tokens_B) * tokens_B"),
        ("sum of sequences not divided by their number", "len(tokens_B) * max_response_length", "max_response_length"),
    ),
]

ALGORITHMS = [
    *of(
        "algorithms/token_loss.py",
        [SURROGATE],
        ("swapped clips", "1 - eps_clip_low, 1 + eps_clip_high", "1 - eps_clip_high, 1 + eps_clip_low"),
        ("optimistic clip", "-torch.minimum(surrogate,", "-torch.maximum(surrogate,"),
        (
            "importance ratio upside down",
            "exp_log_ratio(old_logprobs.detach(), rollout_logprobs.detach())",
            "exp_log_ratio(rollout_logprobs.detach(), old_logprobs.detach())",
        ),
        ("importance ratio without its cap", ".clamp(max=cap)", ""),
    ),
    *of(
        "algorithms/clipped_surrogate.py",
        [SURROGATE],
        ("dual clip on gains", "(advantages < 0) & (loss > bound)", "(advantages > 0) & (loss > bound)"),
        ("old log-probs not detached", "old_logprobs = old_logprobs.detach()", "old_logprobs = +old_logprobs"),
    ),
    *of(
        "algorithms/gspo.py",
        [SURROGATE],
        ("sum in place of the mean", '"mean", lengths', '"sum", lengths'),
        ("ratio of another response", "mean_R[response_N]", "mean_R[response_N.flip(0)]"),
        ("no gradient", "policy_logprobs - policy_logprobs.detach()", "policy_logprobs.detach() * 0"),
    ),
    *of(
        "algorithms/cispo.py",
        [SURROGATE],
        ("weight with a gradient", "exp_log_ratio(policy_logprobs.detach(),", "exp_log_ratio(policy_logprobs,"),
        ("weight without its clip", "ratio.clamp(1 - eps_clip_low, 1 + eps_clip_high)", "ratio"),
    ),
    *of(
        "algorithms/kl.py",
        [SURROGATE],
        ("KL the other way", "ref_logprobs.detach() - policy_logprobs", "policy_logprobs - ref_logprobs.detach()"),
    ),
    *of(
        "algorithms/advantages.py",
        [ADVANTAGES],
        ("mean over the wrong axis", "rewards_PG.mean(axis=1,", "rewards_PG.mean(axis=0,"),
        ("biased standard deviation", "ddof=1", "ddof=0"),
        (
            "overlong penalty from the limit on",
            "max_generate_length - buffer_len - lengths",
            "max_generate_length - lengths",
        ),
    ),
]

DATA = [
    *of(
        "data/packing.py",
        [PACKING],
        ("loss on tokens of tools", "_flat((rollout.loss_mask for rollout in rollouts), bool)", "True"),
        ("advantages at the prompt too", "np.where(is_response_BS,", "np.where(is_token_BS,"),
        ("mini-batch with the batch's denominator", "replace(mini_batch, loss_weights=weights)", "mini_batch"),
        ("every rank gets all rows", "shards[rank].append(row)", "[shard.append(row) for shard in shards]"),
        ("attention free of charge", "(1.0 + lengths_B / _ATTENTION_EQUALS_REST)", "1.0"),
        ("packs above their budget", "room[: len(packs)] >= sizes_B[index]", "room[: len(packs)] > 0"),
        ("log-probs put back one row off", "gathered[name][rows] =", "gathered[name][rows - 1] ="),
    ),
    *of("data/prompts.py", [PROMPTS], ("resume from the epoch's start", '"position": self._position', '"position": 0')),
]

PACKS = [
    *of(
        "models/flash.py",
        [FLASH],
        ("a query sees a key too early", "middle = end - (last - first)", "middle = end - (last - first) - 1"),
        ("documents one token late", "(0, *accumulate(self.lengths))", "(1, *accumulate(self.lengths))"),
        (
            "log-sum-exp of the backward pass left out",
            "both = Attended(attended.out_THd[None], attended.lse_HT[None])",
            "both = Attended(attended.out_THd[None], 0 * attended.lse_HT[None])",
        ),
    ),
    *of(
        "drafts/chain_attention.py",
        [FLASH],
        (
            "chain's scores without scale",
            "_own_dot(query_QHd, own_key_EQGd, wide) * scale",
            "_own_dot(query_QHd, own_key_EQGd, wide)",
        ),
        (
            "softmax of the chain alone",
            "torch.logaddexp(first.lse_HT.t(), scores_EQH.logsumexp(0))",
            "scores_EQH.logsumexp(0)",
        ),
        ("first depth not scaled down", "of_first_QH[..., None] * first.out_THd", "first.out_THd"),
        ("chain's gradient without the mean", "own_value_EQGd, wide) - mean_QH)", "own_value_EQGd, wide))"),
        ("query's gradient of the chain left out", "query_grad + _own_output(", "query_grad + 0 * _own_output("),
        ("values' gradient by the scores'", "_to_own(probs_EQH, grad_QHd", "_to_own(grad_scores_EQH, grad_QHd"),
    ),
]

DRAFTS = [
    *of(
        "drafts/align.py",
        [ALIGN],
        (
            "mask of earlier depths not intersected",
            "valid_T = valid_T & shift_right(label_T, depth)",
            "valid_T = label_T & shift_right(label_T, depth)",
        ),
        ("chains run into the next document", "(base_segment_T == label_segment_T) & ", ""),
        ("chains start one position early", "shift_right(label_T, depth)", "shift_right(label_T, depth + 1)"),
        ("depths not moved to their base", "shift_right(values_T, -depth)", "shift_right(values_T, -1)"),
        (
            "acceptance without what comes before",
            "torch.cat([torch.ones_like(hit_K[:1]), hit_K[:-1]])",
            "torch.ones_like(hit_K)",
        ),
        (
            "the engine's way without the sampled token",
            "(positions_T + 1 + num_hits_T)",
            "(positions_T + num_hits_T)",
        ),
    ),
    *of(
        "drafts/mtp.py",
        [MTP_HEAD],
        ("embedding at position 0 not zeroed", "if depth == 1:", "if depth == 0:"),
        ("rotary position stays at depth 1", "[chains.base_C] + depth - 1]", "[chains.base_C]]"),
        (
            "embedding of the same token",
            "reach.row_P[token_N + depth]",
            "reach.row_P[token_N + depth - 1]",
        ),
        (
            "depth-1 keys of another place",
            "rotary[pack.position_T[token_N]]",
            "rotary[pack.position_T[token_N] + 1]",
        ),
    ),
    *of(
        "drafts/mtp.py",
        [f"{DRAFT_LOSS}[mtp-soft_ce]"],
        (
            "hidden states after the final norm",
            '"decoder.final_layernorm", "input"',
            '"decoder.final_layernorm", "output"',
        ),
        ("draft one position off", "(position_N - depth_K1).clamp(min=0)", "(position_N - depth_K1 + 1).clamp(min=0)"),
        (
            "teacher one position off",
            "[reach.row_P[position_N]]",
            "[reach.row_P[position_N - 1]]",
        ),
    ),
    *of(
        "drafts/mtp.py",
        [f"{DRAFT_LOSS}[mtp-hard_ce]"],
        ("label one position off", "token_ids_T[position_N + 1]", "token_ids_T[position_N]"),
    ),
    *of(
        "drafts/mtp.py",
        [f"{LAYOUTS}[mtp-untied-dp2]"],
        (
            "draft divided by its own micro-batch",
            "mask_KN / denominator.clamp(min=1.0)",
            "mask_KN / mask_KN.sum().clamp(min=1.0)",
        ),
    ),
    *of(
        "drafts/chain_attention.py",
        [f"{DRAFT_LOSS}[mtp-soft_ce]"],
        (
            "keys of a depth left out",
            "            self.keys.append(key_QGd)",
            "            self.keys = [self.keys[0], key_QGd]",
        ),
    ),
    *of(
        "drafts/blocks.py",
        [BLOCKS],
        (
            "anchors with nothing behind them",
            "loss_mask[..., :-1] & loss_mask[..., 1:]",
            "loss_mask[..., :-1]",
        ),
        ("slots behind an unsupervised one", "trained_KA.cummin(dim=0).values", "trained_KA"),
        ("all documents draw alike", "np.random.default_rng(seed)", "np.random.default_rng(0)"),
        (
            "a block's document begins at the one before",
            'side="right") - 1]',
            'side="left") - 1]',
        ),
    ),
    *of(
        "drafts/block_attention.py",
        [BLOCKS],
        ("a block sees its anchor's hidden state", ">= span.anchor_Q[:, None]", "> span.anchor_Q[:, None]"),
        (
            "a block that sees no token has one",
            "span.anchor_Q <= tokens.start",
            "span.anchor_Q < tokens.start",
        ),
        ("flex attention beyond the document", "(start_Q[q] <= k) & (k < anchor_Q[q])", "k < anchor_Q[q]"),
        ("a tile before the document left out", "(last_key_K >= lowest(starts_Q)", "(last_key_K > highest(starts_Q)"),
        ("tiles taken whole too early", "last_key_K < lowest(anchors_Q)", "last_key_K < highest(anchors_Q)"),
    ),
    *of(
        "drafts/blocks.py",
        [f"{DFLASH_BLOCKS}[1]"],
        (
            "slots one position off",
            "(self.anchor_A - self.start_A)[:, None] + slots",
            "(self.anchor_A - self.start_A)[:, None] + slots + 1",
        ),
    ),
    *of(
        "drafts/dflash.py",
        [f"{DFLASH_BLOCKS}[1]"],
        (
            "captured layers in another order",
            "[captured[point][token_S] for point in self.capture_points]",
            "[captured[point][token_S] for point in self.capture_points[::-1]]",
        ),
        ("mask tokens in place of the anchor's", "slots_AsD[:, 0] = rows[:-1]", "slots_AsD[:, 1] = rows[:-1]"),
    ),
    *of(
        "drafts/dflash.py",
        [f"{DFLASH_BLOCKS}[2]"],
        (
            "context's gradient not summed over ranks",
            "context_TD = copy_to_tensor_model_parallel_region(context_TD)",
            "pass",
        ),
    ),
    *of(
        "drafts/dflash.py",
        [f"{DRAFT_LOSS}[dflash-soft_ce]"],
        (
            "captured layers shifted by one",
            "map(layer_output, self.spec.target_layer_ids)",
            "map(layer_output, [layer - 1 for layer in self.spec.target_layer_ids])",
        ),
        (
            "loss on the anchor's slot",
            "* blocks.num_slots + slot_N + 1]",
            "* blocks.num_slots + slot_N]",
        ),
        (
            "slots not weighted by position",
            "weight_N = self._weights_K[slot_N]",
            "weight_N = torch.ones_like(self._weights_K)[slot_N]",
        ),
    ),
    *of(
        "drafts/dflash.py",
        [f"{DRAFT_LOSS}[dflash-hard_ce]"],
        ("block's label one position off", "token_ids_T[position_N + 1]", "token_ids_T[position_N]"),
    ),
]

SHARED = [
    *of(
        "drafts/shares.py",
        [SHARES],
        ("windows begin inside the row only", "rng.integers(1 - width_B, ", "rng.integers(0, "),
        ("windows drawn too rarely", "share * (num_B + width_B - 1) / width_B", "share * num_B / width_B"),
        ("the same draw in every step", "(self._seed, self.num_steps))", "(self._seed, 0))"),
        ("documents drawn in order", "+ rng.random()", "+ 0.5"),
    ),
    *of(
        "drafts/mtp.py",
        [f"{DRAFT_SHARE}[1-mtp]"],
        ("windows of neighbours", "of_rows[list(rows)]", "of_rows[::-1][list(rows)]"),
        ("chains outside the window", "mask_KT &= _at_targets(", "_at_targets("),
    ),
    *of(
        "drafts/mtp.py",
        [f"{LAYOUTS}[mtp-untied-tp2]"],
        ("keys' gradient not summed over ranks", "copy_to_tensor_model_parallel_region(layer", "(layer"),
    ),
    *of(
        "models/flash.py",
        [f"{FLASH}::test_the_last_queries_of_each_document_give_their_rows_of_the_whole"],
        ("keys before the queries left out", "attended = merged(attended, earlier)", "pass"),
        ("gradient of the keys before left out", "query_grad[rows] += earlier", "pass"),
    ),
    *of(
        "models/pack.py",
        [f"{DRAFT_SHARE}[1-dflash]"],
        ("tokens of the wrong document", "np.repeat(offsets_N, lengths_N)", "np.repeat(offsets_N[::-1], lengths_N)"),
    ),
    *of(
        "drafts/dflash.py",
        [f"{DRAFT_SHARE}[1-dflash]"],
        (
            "teacher of the tokens that are read",
            "position_N = token_S[blocks.anchor_A[block_N] + slot_N]",
            "position_N = blocks.anchor_A[block_N] + slot_N",
        ),
    ),
]

MODELS = [
    *of(
        "models/conversion.py",
        [f"{CONVERSION}[1]"],
        ("key and value swapped", '_proj.{kind}" for name in "qkv")', '_proj.{kind}" for name in "qvk")'),
        (
            "gate and up swapped",
            'gate_proj.weight", f"{hf_prefix}up_proj.weight"',
            'up_proj.weight", f"{hf_prefix}gate_proj.weight"',
        ),
        ("padded rows exported", "lambda full: [full[:vocab_size]]", "lambda full: [full]"),
    ),
    *of(
        "models/experts.py",
        [f"{CONVERSION}[1]"],
        ("outputs of experts without their weights", " * weight_N[:, None]", ""),
    ),
    *of(
        "models/policy.py",
        [f"{CONVERSION}[1]"],
        ("weights of experts normed if they are not to be", "not spec.experts.is_normed", "spec.experts.is_normed"),
    ),
    *of(
        "models/experts.py",
        [EXPERTS],
        ("gradients of experts summed over all replicas", "parameter.allreduce = False", "parameter.allreduce = True"),
    ),
    *of(
        "models/router_replay.py",
        ["tests/megatron/test_experts.py::test_nor_does_the_layout_change_where_they_go"],
        ("choices of the last micro-batch in a recompute", "self._to_come.popleft()", "self._to_come.pop()"),
        ("a stage replays the layers of the first one", "start=self._first_layer", "start=0"),
    ),
    *of(
        "models/router_replay.py",
        ["tests/megatron/test_experts.py::test_tokens_go_to_the_experts_of_the_engine"],
        ("routers choose for themselves", "torch.where(chosen_Tk < 0,", "torch.where(chosen_Tk > -2,"),
    ),
    *of(
        "rollout/routed_experts.py",
        ["tests/rollout/test_mixtures.py::test_a_response_comes_with_the_experts_of_its_tokens"],
        ("experts of another layer", "partial(self._keep, attention, number)", "partial(self._keep, attention, 0)"),
        ("tokens in the order of the batch", "self._chosen[slots_T, layer]", "self._chosen[: len(slots_T), layer]"),
    ),
    *of(
        "models/expert_load.py",
        ["tests/megatron/test_experts.py::test_load_equals_a_count"],
        ("tokens counted again in a recompute", "if torch.is_grad_enabled():", "if True:"),
    ),
    *of(
        "models/conversion.py",
        [f"{CONVERSION}[2]"],
        ("wrong tensor-parallel rank", "[cut.rank]", "[cut.rank - 1]"),
        ("shards gathered along the wrong axis", "torch.cat(shards, dim=cut.axis)", "torch.cat(shards, dim=0)"),
        ("output projection cut along its rows", 'self_attn.o_proj.weight", 1)', 'self_attn.o_proj.weight", 0)'),
    ),
    *of(
        "models/conversion.py",
        [MTP_HEAD],
        ("embedding halves not swapped", "weight.chunk(2, dim=1)[::-1]", "weight.chunk(2, dim=1)"),
    ),
    *of(
        "models/conversion.py",
        [f"{LAYOUTS}[mtp-untied-tp2]"],
        ("shards taken for replicas in the norm", "is_parallel=True", "is_parallel=False"),
    ),
    *of(
        "models/capture.py",
        [f"{ISOLATED}[mtp]"],
        ("captured tensors not detached", "tensor.detach()", "tensor"),
        ("captured tensors kept", "tensors, self._tensors = self._tensors, {}", "tensors = dict(self._tensors)"),
        ("hooks left behind", "handle.remove()", "pass"),
    ),
    *of(
        "models/policy.py",
        [f"{ISOLATED}[dflash]"],
        (
            "draft's gradient reaches the embedding",
            "@torch.no_grad()\n    def embed",
            "@torch.enable_grad()\n    def embed",
        ),
    ),
    *of(
        "models/policy.py",
        [f"{CONVERSION}[1]"],
        ("every token at position 0", "[pack.own(pack.position_T)]", "[pack.own(pack.position_T * 0)]"),
    ),
    *of(
        "models/attention.py",
        [f"{PACKED}[1.0-mtp]"],
        (
            "documents of a pack see one another",
            "documents, share = packed_seq_params.documents,",
            "documents, share = Documents.of([len(query_T1Hd)]),",
        ),
    ),
    *of(
        "models/attention.py", [f"{CONVERSION}[1]"], ("attention without its scale", "config.kv_channels**-0.5", "1.0")
    ),
]

TRAINING = [
    *of(
        "training/step.py",
        [f"{GRADIENTS}[one rank-Qwen2ForCausalLM untied-token_mean]"],
        ("log-prob predicted by the token itself", "_own(pack, index_N - 1)", "_own(pack, index_N)"),
        (
            "mean of a micro-batch in place of its sum",
            "(micro.loss_weights_N * loss_N).sum()",
            "(micro.loss_weights_N * loss_N).mean()",
        ),
        (
            "rollout log-probs taken for old ones",
            "is None else micro.policy_logprobs_N",
            "is None else micro.rollout_logprobs_N",
        ),
        ("sign of the KL term", "loss_N + algorithm.kl_loss_coef", "loss_N - algorithm.kl_loss_coef"),
        (
            "importance ratio omitted",
            "truncated_importance(old_N, micro.rollout",
            "truncated_importance(old_N, micro.policy",
        ),
    ),
    *of(
        "training/trainer.py",
        [f"{GRADIENTS}[one rank-Qwen2ForCausalLM untied-token_mean]"],
        (
            "log-probs at temperature 1",
            "temperature=self.config.generator.sampling_params.temperature",
            "temperature=1.0",
        ),
    ),
    *of(
        "training/trainer.py",
        [f"{LAYOUTS}[mtp-untied-dp2]"],
        ("draft's denominator not all-reduced", "dist.all_reduce(total, group=self.parallel.dp_cp_group)", "pass"),
        ("policy's gradients not all-reduced", "self.policy.reduce_grads()", "pass"),
    ),
    *of(
        "training/trainer.py",
        [REFERENCE],
        ("the reference is the policy", "self._load_policy(tensors).eval()", "self.model"),
    ),
    *of(
        "training/copies.py",
        [f"{COPIES}[mtp-1-1-fp32]"],
        ("a copy follows the training", "parameter.detach().cpu().clone()", "parameter.detach()"),
        ("copies scored with the draft of now", "        self._load(self._copies[name])\n        try:", "        try:"),
        ("the draft keeps the weights of a copy", "            self._load(current)", "            pass"),
    ),
    *of(
        "training/copies.py",
        [f"{COPIES}[mtp-2-1-bf16]"],
        # An fp32 module's weights are the optimizer's own.
        ("the optimizer is not told", "self._trainable.take_over_weights()", "pass"),
    ),
    *of(
        "rollout/step_times.py",
        [LENGTHS],
        ("times that are cheap by chance", "rows = [convex(self.lengths, seconds_L)", "rows = [seconds_L"),
    ),
    *of(
        "controller/draft_training.py",
        [DRAFT_TRAINING],
        ("gain without the age of the copy", "age * loss for age, loss", "loss for age, loss"),
        ("rests are never longer", "min(2 * self._rest, LONGEST_REST)", "self._rest"),
        ("a rest never ends early", "0 if lost_s * HORIZON > self._cost_s * WINDOW else ", ""),
        (
            "a rest that ends whenever fewer tokens are drafted",
            "length = _length(values)",
            'length = values.get(names.acceptance_length("train"), 1.0)',
        ),
        ("trains whatever it costs", "window.gain_s() > window.cost_s()", "True"),
        ("a worse draft is kept", "candidate < _WORSE * served", "False"),
    ),
    *of(
        "training/optimizer.py",
        [f"{UPDATES}[False-1]"],
        ("zero_grad forgotten", "self.ddp.zero_grad_buffer()", "pass"),
        ("clip skipped", "self._clip(grad_norm)", "pass"),
        ("betas swapped", "beta1, beta2 = optimizer", "beta2, beta1 = optimizer"),
        (
            "weight decay left out",
            "start_wd=config.weight_decay,\n        end_wd=config.weight_decay",
            "start_wd=0.0,\n        end_wd=0.0",
        ),
        ("schedule does not move", "self.scheduler.step(increment=1)", "self.scheduler.step(increment=0)"),
        ("first warm-up step at rate 0", "config.lr / (config.num_warmup_steps + 1)", "0.0"),
    ),
    *of(
        "training/optimizer.py",
        [SKIPPED],
        ("update with a NaN", "is_skipped = not math.isfinite(grad_norm)", "is_skipped = False"),
        (
            "skipped updates never reset",
            "self._skipped_in_a_row + 1 if is_skipped else 0",
            "self._skipped_in_a_row + is_skipped",
        ),
    ),
]

SYNCED = [
    *of(
        "sync/weights.py",
        [SYNC],
        ("version not bumped", "1 + max(self.versions.policy", "max(self.versions.policy"),
        (
            "draft sent before the policy",
            "exported = {component: self._policy.export(component) for component in components}",
            "exported = {component: self._policy.export(component) for component in components[::-1]}",
        ),
        ("draft omitted", 'if draft or component != "draft"]', 'if component != "draft"]'),
        ("draft sent in every sync", 'if draft or component != "draft"]', "]"),
        ("draft loaded into the policy", 'component == "draft")', "False)"),
        ("prefix cache not reset", "    engine.reset_prefix_cache()", "    pass"),
        (
            "prefix cache not reset after a GPU transfer",
            'self._engines.all("keys_are_old" if keeps_keys else "reset_prefix_cache")',
            "pass",
        ),
        ("engines not told their version", "engine.set_versions(versions)", "pass"),
        (
            "a replaced engine takes version 0",
            "engine.load_weights.remote(updates, self.versions)",
            "engine.load_weights.remote(updates, Versions())",
        ),
        (
            "a replaced engine gets the policy alone",
            "self._export(self.components)",
            "self._export(self.components[:1])",
        ),
    ),
    *of(
        "sync/payload.py",
        [PAYLOAD],
        ("a chunk sent twice", "chunk, size = [], 0\n        chunk", "size = 0\n        chunk"),
        ("chunks without a bound", "size += tensor.nbytes", "size = tensor.nbytes"),
    ),
    *of(
        "controller/fidelity.py",
        [AGREEMENT],
        ("stale rollouts accepted", "return sampled == versions", "return True"),
    ),
    *of(
        "controller/requests.py",
        [BATCHES],
        ("a lost batch is asked in part", "self._running[place] = dict(self._batch[place])", "pass"),
        ("answers given twice", "if key not in self._answered:", "if True:"),
        ("an engine that answered is replaced", "if not ray.wait(calls, timeout=0)[0]:", "if True:"),
    ),
    *of(
        "controller/rollouts.py",
        [BATCHES],
        ("a lost engine's batch asked in part", "sampling, is_one_batch=True", "sampling, is_one_batch=False"),
        ("later responses of a prompt share its seed", "first + index for first", "first for first"),
        (
            "engines share their seeds",
            "prompt_seeds(seed * num_engines + place, places",
            "prompt_seeds(seed * num_engines, places",
        ),
    ),
    *of(
        "controller/checkpoints.py",
        [CHECKPOINTER],
        (
            "a save begins beside another",
            "self._try(lambda: self._finish(wait=True))\n        self._policy.begin",
            "self._policy.begin",
        ),
        ("a save beside training is never looked for", "self._try(lambda: self._finish(wait=False))", "pass"),
    ),
    *of(
        "checkpoint/background.py",
        [f"{QUICK}::test_a_save_beside_training_holds_what_was_there_when_it_began"],
        ("the tensors themselves are written", "copies=True", "copies=False"),
    ),
    *of(
        "controller/groups.py",
        [CONTINUOUS],
        ("no wait for old groups", "return chosen if in_time else None", "return chosen"),
        ("young groups first", "(group.began, group.number)", "(-group.began, group.number)"),
        ("a group may be one step too old", "last >= version + 1 + index", "last >= version + index"),
    ),
    *of(
        "rollout/engine.py",
        [RUNNING_REQUESTS],
        ("new requests read old keys", "cache_salt=self._versions.label", 'cache_salt="all"'),
    ),
    *of(
        "rollout/vllm_patches.py",
        [RUNNING_REQUESTS],
        ("requests that were set aside are lost", "self.scheduler.waiting, self.requests_aside = aside, None", "pass"),
    ),
]

CHECKPOINTS = [
    *of(
        "checkpoint/pieces.py",
        [BOXES],
        ("a row begun counts as whole", "-(-start // row_numel)", "start // row_numel"),
    ),
    *of(
        "checkpoint/pieces.py",
        [BUNDLE],
        ("every rank's shard at offset 0", "cut.rank * local[cut.axis]", "0 * local[cut.axis]"),
    ),
    *of(
        "checkpoint/pieces.py",
        [MIXTURES],
        ("experts of a rank taken for a copy of others", 'not getattr(parameter, "allreduce", True)', "False"),
    ),
    *of(
        "checkpoint/pieces.py",
        [f"{RESUME}[dp2-distributed-2]"],
        ("pieces of a range not moved on", "position += numel", "position += 0"),
        ("every rank's range starts at 0", '["param"].start, 0', '["param"].start * 0, 0'),
    ),
    *of(
        "checkpoint/pieces.py",
        [f"{RESUME}[tp1-1]"],
        ("second moment saved from the first", 'current(state["exp_avg_sq"])', 'current(state["exp_avg"])'),
    ),
    *of(
        "checkpoint/dist.py",
        [f"{RESUME}[tp1-1]"],
        ("random state not restored", "torch.set_rng_state(per_rank.pop(_TORCH_RNG))", "per_rank.pop(_TORCH_RNG)"),
        ("optimizer steps start again", 'saved["optimizer_steps"], saved', "0, saved"),
        ("schedule starts again", 'saved["scheduler"]["num_steps"]', "0"),
    ),
    *of(
        "checkpoint/folders.py",
        [FOLDERS],
        ("latest names the checkpoint before", "    _sync(root)\n    name_latest(directory)", "    _sync(root)"),
        (
            "rotation removes the newest first",
            "key=_saved_at)\n    outdated",
            "key=_saved_at, reverse=True)\n    outdated",
        ),
        ("cut files taken for whole", "!= size:", "< 0:"),
    ),
]

OFFLOADS = [
    *of(
        "training/host_copies.py",
        [HOST_COPIES],
        ("copies are made once", "if not (self._are_constant and copy.is_current)", "if not copy.is_current"),
        ("what comes back is not copied", "copy.on_device().copy_(copy.host, non_blocking=True)", "pass"),
        ("the device keeps its memory", "copy.storage.resize_(0)", "pass"),
    ),
    *of(
        "training/optimizer.py",
        [f"{OFFLOAD}[1-1-1-mtp]"],
        ("main parameters stay", "yield from (main for main in", "yield from (main for main in () and"),
    ),
    *of(
        "training/trainer.py",
        [f"{OFFLOAD}[1-1-1-mtp]"],
        (
            "weights that are away are exported",
            "        self.offload.require(self.model)\n        if component",
            "        if component",
        ),
        ("a checkpoint of what is away", "self.policy, rules, self.offload.current)", "self.policy, rules)"),
    ),
    *of(
        "rollout/sleep.py",
        [SLEEP],
        ("level 2 loses nothing", "self._lacking = set(self._synced)", "self._lacking = set()"),
        (
            "keys may wake first",
            "if not self._has_weights:\n            raise RuntimeError(\"the engine's keys",
            "if False:\n            raise RuntimeError(\"the engine's keys",
        ),
    ),
    *of(
        "sync/weights.py",
        [SYNC],
        ("what was dropped is not sent", "self.components if self._are_gone else changed", "changed"),
    ),
]

MUTANTS: list[Mutant] = [
    *LOSSES,
    *ALGORITHMS,
    *DATA,
    *PACKS,
    *DRAFTS,
    *SHARED,
    *MODELS,
    *TRAINING,
    *SYNCED,
    *CHECKPOINTS,
    *OFFLOADS,
]
