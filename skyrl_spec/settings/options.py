"""Options of the commands that do not train, given as ``KEY=VALUE`` words (``compose.read_options``)."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_spec.settings.allowed import DEVICES, DTYPES, FROM_ONE, NOT_NEGATIVE, POSITIVE, SEEDS, SPECULATIVE_METHODS
from skyrl_spec.settings.field import setting


@dataclass
class CompareOptions:
    """``skyrl-spec compare``: which runs are compared. Settings of the runs may follow."""

    arms: list[str] = setting(
        lambda: ["trained", "frozen", "none"],
        "Drafts to compare: trained in every step, auto or every:N (trained at times), frozen as at the start, none.",
    )
    seeds: int = setting(1, "Runs of each arm, with trainer.seed, trainer.seed + 1, and so on.", FROM_ONE)


@dataclass
class LayoutsOptions:
    """``skyrl-spec layouts``: which layouts of a run fit on so many GPUs. Settings of the run may follow."""

    gpus: int = setting(0, "GPUs of all machines together. Required.", NOT_NEGATIVE)
    gpus_per_machine: int = setting(8, "GPUs of a machine. Tensor parallelism stays inside of one.", FROM_ONE)
    gpu_memory_gb: float | None = setting(
        None, "Memory of a GPU, in GB. null: trainer.hardware.gpu_memory_gb.", POSITIVE
    )
    response: int | None = setting(
        None, "Mean tokens of a response. null: half of generator.sampling_params.max_generate_length.", FROM_ONE
    )
    acceptance_length: float | None = setting(
        None, "Tokens of a decode step with the draft. null: as if half of the drafted tokens were accepted.", POSITIVE
    )
    show: int = setting(10, "Layouts to list, the best ones.", FROM_ONE)


@dataclass
class ExportOptions:
    """``skyrl-spec export``: writes a checkpoint as a bundle that vLLM serves."""

    checkpoint: str = setting("", "Checkpoint, or run (its newest checkpoint is exported). Required.")
    out: str = setting("", "Output directory. Must be empty or not exist. Required.")
    model: str | None = setting(None, "New location of the model that the run started from, if it was moved.")
    draft: str | None = setting(None, "New location of the draft that the run started from, if it was moved.")


@dataclass
class EvalDraftOptions:
    """``skyrl-spec eval-draft``: measures how much a draft helps, by number of draft tokens and batch size."""

    target: str = setting(
        "",
        "Run (its newest checkpoint is measured), checkpoint, exported bundle, or Hugging Face model that vLLM serves. "
        "Required.",
    )
    model: str | None = setting(
        None, "New location of the model that the run or checkpoint started from, if it was moved."
    )
    method: str | None = setting(
        None,
        "Kind of draft. null: that of the draft if there is one, otherwise the target's MTP head.",
        SPECULATIVE_METHODS,
    )
    draft: str | None = setting(
        None, "Directory or hub name of a draft of kind dflash or eagle3. null: the draft that belongs to the target."
    )
    prompts: list[str] | None = setting(
        None,
        "Files of prompts: dataset rows (.parquet, .jsonl), questions of MT-Bench or SPEED-Bench (their first turns), "
        "or one prompt per line (.txt). Rows with a category are reported by category, too. null: the run's "
        "held-out prompts; without a run it is required.",
    )
    num_speculative_tokens: list[int] | None = setting(
        None, "Numbers of draft tokens to try, each at least 1. null: 1, 2, 3, 5 and 7, as far as the draft allows."
    )
    batch_sizes: list[int] = setting(lambda: [1, 4, 16], "Batch sizes to try: responses generated at the same time.")
    rounds: int = setting(
        3,
        "Measurements of each combination, alternating with and without the draft. The table shows medians and ranges.",
        FROM_ONE,
    )
    min_rollouts: int = setting(8, "Smallest number of responses in one measurement.", FROM_ONE)
    temperature: float | None = setting(None, "Sampling temperature. null: as in the run, or 1.", NOT_NEGATIVE)
    max_prompt_length: int | None = setting(
        None,
        "Longest prompt, in tokens. Longer prompts are skipped. null: as in the run, or 512, but no more than fits "
        "into the model's positions.",
        FROM_ONE,
    )
    max_generate_length: int | None = setting(
        None, "Longest response, in tokens. null: as in the run, or 128.", FROM_ONE
    )
    device: str | None = setting(
        None, "Device of the engines. null: as in the run, or cuda if there is a GPU.", DEVICES
    )
    dtype: str | None = setting(
        None, "Type of weights and activations. null: as in the run, or fp32 on cpu and bf16 on cuda.", DTYPES
    )
    tensor_parallel_size: int | None = setting(
        None, "GPUs of an engine. null: as in the run, or 1. At 1 the two engines share one GPU.", FROM_ONE
    )
    seed: int = setting(0, "Seed of the engines and of sampling.", SEEDS)
    out: str | None = setting(
        None, "Output file. null: eval_draft.json, in the directory of the run or bundle, or the current one."
    )


@dataclass
class DoctorOptions:
    """``skyrl-spec doctor``: checks a pair of model and draft, or a configuration, on this machine."""

    target: str = setting(
        "",
        "Model, run (its newest checkpoint), checkpoint or exported bundle. Empty: the settings name model and draft.",
    )
    draft: str | None = setting(None, "Directory of a DFlash draft. null: the target's own, such as its MTP head.")
    thorough: bool = setting(
        False, "Also test by chi-square that sampled responses have their exact distribution (--thorough)."
    )
    out: str = setting("doctor.json", "Output file.")


@dataclass
class ReportOptions:
    """``skyrl-spec report RUN [RUN ...]``: writes a page of charts and each chart as a PNG file."""

    out: str | None = setting(None, "Output directory. null: report, in the directory of the first run.")
