"""What the commands take that run no training, as ``key=value`` words (``compose.read_options``).

``None`` means "decided from the target"; the comments say how. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SPECULATIVE_METHODS = ("mtp", "dflash", "eagle3", "ngram")


@dataclass
class ExportOptions:
    """``skyrl-spec export``: a checkpoint as a bundle that vLLM serves."""

    # A checkpoint, or a run: its newest one.
    checkpoint: str = ""
    # The directory to write.
    out: str = ""
    # Where the run's starting model is now, if it has moved.
    model: str | None = None
    # Where the run's starting draft is now, if it has moved.
    draft: str | None = None


@dataclass
class EvalDraftOptions:
    """``skyrl-spec eval-draft``: how much a draft helps, at several numbers of draft tokens and batch sizes."""

    # A run (its newest checkpoint), a checkpoint, an exported bundle, or a Hugging Face model that vLLM serves.
    target: str = ""
    # Where the model that a run or checkpoint started from is now, if it has moved.
    model: str | None = None
    # "mtp", "dflash", "eagle3" or "ngram". None: what the target was trained with; else by what `draft` is, or the
    # target's own MTP head.
    method: str | None = None
    # A draft's directory or hub name, for dflash and eagle3. None: the target's own.
    draft: str | None = None
    # Rows (.parquet, .jsonl) or texts, one a line (.txt). None: the run's held-out prompts.
    prompts: list[str] | None = None
    # Draft tokens to try. None: 1, 2, 3, 5, 7, as far as the draft's block goes.
    num_speculative_tokens: list[int] | None = None
    # Rollouts generated at a time.
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16])
    # Measurements of each combination, with and without the draft by turns; medians are shown, and the spread.
    rounds: int = 3
    # Rollouts of one measurement, where a batch is smaller than that.
    min_rollouts: int = 8
    # None: as in the run, else 1.
    temperature: float | None = None
    # Longer prompts are left out. None: as in the run, else 512, or what the model has room for.
    max_prompt_length: int | None = None
    # None: as in the run, else 128.
    max_generate_length: int | None = None
    # "cpu" or "cuda". None: as in the run, else cuda where there is a GPU.
    device: str | None = None
    # "fp32" or "bf16". None: as in the run, else fp32 on cpu and bf16 on cuda.
    dtype: str | None = None
    # GPUs of an engine; None: as in the run, else 1. Two engines run by turns: they share a GPU where this is 1.
    tensor_parallel_size: int | None = None
    # Of the engines and of sampling.
    seed: int = 0
    # None: eval_draft.json, in the target's directory where that is a run's.
    out: str | None = None


@dataclass
class ReportOptions:
    """``skyrl-spec report RUN [RUN ...]``: a page of charts, and the charts as PNG files."""

    # The directory to write. None: report, in the first run's.
    out: str | None = None
