"""Options of the commands that run no training, given as ``key=value`` words (``compose.read_options``)."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_spec.settings.allowed import FROM_ONE, NOT_NEGATIVE, SEEDS
from skyrl_spec.settings.schema import DEVICES, DTYPES, SPECULATIVE_METHODS, setting


@dataclass
class ExportOptions:
    """``skyrl-spec export``: writes a checkpoint as a bundle that vLLM serves."""

    checkpoint: str = setting("", "A checkpoint, or a run (its newest checkpoint).")
    out: str = setting("", "Output directory.")
    model: str | None = setting(None, "Present place of the model the run started from, if it has moved.")
    draft: str | None = setting(None, "Present place of the draft the run started from, if it has moved.")


@dataclass
class EvalDraftOptions:
    """``skyrl-spec eval-draft``: measures how much a draft helps, by number of draft tokens and batch size."""

    target: str = setting(
        "", "A run (its newest checkpoint), a checkpoint, an exported bundle, or a Hugging Face model that vLLM serves."
    )
    model: str | None = setting(
        None, "Present place of the model that the run or checkpoint started from, if it has moved."
    )
    method: str | None = setting(
        None,
        "null: the target's own draft, else by the kind of draft, else the target's MTP head.",
        SPECULATIVE_METHODS,
    )
    draft: str | None = setting(
        None, "Directory or hub name of a draft, for dflash and eagle3. null: the target's own."
    )
    prompts: list[str] | None = setting(
        None, "Files with rows (.parquet, .jsonl) or with one text a line (.txt). null: the run's held-out prompts."
    )
    num_speculative_tokens: list[int] | None = setting(
        None, "Numbers of draft tokens to try. null: 1, 2, 3, 5, 7, up to the draft's block size."
    )
    batch_sizes: list[int] = setting(lambda: [1, 4, 16], "Numbers of rollouts generated at the same time.")
    rounds: int = setting(
        3,
        "Measurements of each combination, alternating with and without the draft. Medians and ranges are shown.",
        FROM_ONE,
    )
    min_rollouts: int = setting(8, "Rollouts of one measurement at least.", FROM_ONE)
    temperature: float | None = setting(None, "Sampling temperature. null: as in the run, else 1.", NOT_NEGATIVE)
    max_prompt_length: int | None = setting(
        None,
        "Tokens of a prompt at most; longer ones are skipped. null: as in the run, else 512 or what fits.",
        FROM_ONE,
    )
    max_generate_length: int | None = setting(
        None, "Tokens of a response at most. null: as in the run, else 128.", FROM_ONE
    )
    device: str | None = setting(None, "null: as in the run, else cuda if there is a GPU.", DEVICES)
    dtype: str | None = setting(None, "null: as in the run, else fp32 on cpu and bf16 on cuda.", DTYPES)
    tensor_parallel_size: int | None = setting(
        None, "GPUs of an engine. null: as in the run, else 1. The two engines share a GPU if this is 1.", FROM_ONE
    )
    seed: int = setting(0, "Seed of the engines and of sampling.", SEEDS)
    out: str | None = setting(
        None, "Output file. null: eval_draft.json, in the run's directory if the target is a run."
    )


@dataclass
class ReportOptions:
    """``skyrl-spec report RUN [RUN ...]``: writes a page of charts, and each chart as a PNG file."""

    out: str | None = setting(None, "Output directory. null: report, in the first run's directory.")
