"""Charts of a report. Runs differ in colour, line style and marker, each of which is enough to tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skyrl_spec.metrics import names
from skyrl_spec.metrics.acceptance import comparable_lengths
from skyrl_spec.report.read import RunData
from skyrl_spec.types import FROZEN

# Colours by Okabe and Ito, distinct for people with any colour vision. Their yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
# Any, because matplotlib's type lists every possible key.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Text stays text in the SVG, so that it can be searched.
    "svg.fonttype": "none",
    "svg.hashsalt": "skyrl_spec",
    "figure.constrained_layout.use": True,
    "hatch.linewidth": 0.4,
}
# Phases of a step, stacked from the bottom.
_STACK = (*names.PHASES, "canary", "lossless")
# Inches. As wide as a phone, so that the text is legible there.
SIZE = (4.6, 3.1)


@dataclass(frozen=True)
class Chart:
    """A chart. ``name`` is that of the PNG file, ``caption`` explains it, ``text`` describes it for screen readers."""

    name: str
    title: str
    caption: str
    text: str
    figure: Figure


def draw(runs: Sequence[RunData]) -> list[Chart]:
    """Charts that the runs have values for, in the order of the page."""
    with rc_context(STYLE):
        charts = [chart for build in _OVERLAYS if (chart := build(runs)) is not None]
        # Charts with several lines per run are drawn once per run.
        charts += [chart for build in _SINGLES for run in runs if (chart := build(run, len(runs) > 1)) is not None]
    return charts


def _axes(title: str, ylabel: str) -> Axes:
    axes = Figure(figsize=SIZE).add_subplot(title=title, xlabel="step", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return axes


def _lines(axes: Axes, runs: Sequence[RunData], key: str, suffix: str = "", **look: Any) -> list[str]:
    """Draws one line per run. Returns one sentence per run that says what the line shows."""
    texts = []
    for index, run in enumerate(runs):
        steps, values = run.series(key)
        if not steps:
            continue
        style = {"color": COLOURS[index % 7], "linestyle": LINES[index % 7]} | look
        if style.pop("own_marker", False):
            style["marker"] = MARKERS[index % 7]
        axes.plot(steps, values, label=_label(run, suffix), **style)
        texts.append(f"{run.label}{suffix}: from {values[0]:.4g} (step {steps[0]}) to {values[-1]:.4g} ({steps[-1]}).")
    return texts


def _label(run: RunData, suffix: str = "") -> str:
    """The label, escaped: matplotlib reads dollars as formulas and omits labels that begin with an underscore."""
    text = f"{run.label}{suffix}".replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _log_if_positive(axes: Axes) -> None:
    """Sets a logarithmic axis, which cannot show zeros, if any value is positive."""
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
        axes.set_yscale("log", nonpositive="clip")


def _finished(axes: Axes, name: str, caption: str, texts: Sequence[str]) -> Chart | None:
    """The finished chart. None if nothing was drawn."""
    if not texts:
        return None
    # A single line needs no legend, because the page names the run.
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="best")
    figure = axes.figure
    assert isinstance(figure, Figure)
    return Chart(name, axes.get_title(loc="left"), caption, " ".join(texts), figure)


def _reward(runs: Sequence[RunData]) -> Chart | None:
    axes = _axes("Reward", "mean reward")
    texts = _lines(axes, runs, names.AVG_RAW_REWARD, ", training", linewidth=1.1, alpha=0.75)
    texts += _lines(axes, runs, names.EVAL_SCORE, ", held-out", own_marker=True)
    return _finished(
        axes, "reward", "Lines with markers: held-out prompts. Lines without markers: training prompts.", texts
    )


def _num_positions(run: RunData) -> int:
    """Number of draft positions that the run has metrics of, measured or predicted."""
    positions = (*(names.acceptance_rate_pos(mode, 0) for mode in ("train", "eval")), names.predicted_acceptance_pos(0))
    return max(len(run.numbered(position[:-1])) for position in positions)


def _acceptance(runs: Sequence[RunData]) -> Chart | None:
    axes = _axes("Draft acceptance length", "tokens per forward pass")
    texts = _lines(axes, runs, names.acceptance_length("train"), ", training")
    texts += _lines(axes, runs, names.acceptance_length("eval"), ", held-out", own_marker=True, linewidth=0.9)
    texts += _lines(axes, runs, names.PREDICTED_ACCEPTANCE_LENGTH, ", predicted", linewidth=0.9, linestyle="--")
    texts += _lines(axes, runs, names.scored_acceptance_length(FROZEN), ", never trained", linewidth=0.9, linestyle=":")
    for most in sorted({1 + k for run in runs if (k := _num_positions(run))}):
        axes.axhline(most, color="#888888", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(f"maximum: {most}", (0.02, most), xycoords=("axes fraction", "data"), va="top")
    return _finished(
        axes,
        "acceptance_length",
        "1 + accepted tokens / drafts, measured by vLLM: tokens per forward pass of the policy. Dashed: as the trainer "
        "predicts it, of all tokens that the draft is trained to draft. Dotted: the same of the draft of the start, "
        "never trained.",
        texts,
    )


def _predicted(runs: Sequence[RunData]) -> Chart | None:
    axes, texts = _axes("Draft acceptance length: predicted and measured", "measured by vLLM"), []
    axes.set_xlabel("predicted by the trainer")
    limits: list[float] = []
    for index, run in enumerate(runs):
        pairs = [lengths for record in run.records if (lengths := comparable_lengths(record)) is not None]
        if pairs:
            predicted, measured = [list(values) for values in zip(*pairs, strict=True)]
            axes.scatter(
                predicted, measured, s=14, color=COLOURS[index % 7], marker=MARKERS[index % 7], label=_label(run)
            )
            gap = sum(p - m for p, m in pairs) / len(pairs)
            texts.append(
                f"{run.label}: predicted is {abs(gap):.2f} {'above' if gap > 0 else 'below'} measured on average."
            )
            limits += [*predicted, *measured]
    if limits:
        ends = [min(limits), max(limits)]
        axes.plot(ends, ends, color="#888888", linewidth=0.8, linestyle=(0, (1, 2)), label="equal")
    return _finished(
        axes,
        "predicted_measured",
        "One point per step, over the draft positions that the engines drafted often. Points far below the line: the "
        "engines do not draft as the trainer's draft does.",
        texts,
    )


def _simple(
    name: str, title: str, ylabel: str, key: str, caption: str, *, from_zero: bool = False
) -> Callable[[Sequence[RunData]], Chart | None]:
    """Builder of a chart of one key, with one line per run."""

    def build(runs: Sequence[RunData]) -> Chart | None:
        axes = _axes(title, ylabel)
        texts = _lines(axes, runs, key)
        if from_zero:
            axes.set_ylim(bottom=0)
        return _finished(axes, name, caption, texts)

    return build


def _sync_bytes(runs: Sequence[RunData]) -> Chart | None:
    axes = _axes("Weight sync: size", "MB")
    for index, run in enumerate(runs):
        steps, values = run.series(names.SYNC_BYTES)
        if not steps:
            continue
        axes.plot(steps, [value / 1e6 for value in values], label=_label(run), color=COLOURS[index % 7],
                  linestyle=LINES[index % 7])  # fmt: skip
    axes.set_ylim(bottom=0)
    texts = [f"{run.label}: {v[-1] / 1e6:.1f} MB per sync." for run in runs if (v := run.series(names.SYNC_BYTES)[1])]
    return _finished(axes, "sync_bytes", "Size of policy and draft as sent to each engine after every step.", texts)


def _canary(runs: Sequence[RunData]) -> Chart | None:
    axes = _axes("Sync canary", "mean |log-prob difference|")
    texts = _lines(axes, runs, names.CANARY_POLICY, ", policy", own_marker=True)
    texts += _lines(axes, runs, names.CANARY_DRAFT, ", draft", own_marker=True, fillstyle="none", linestyle=":")
    _log_if_positive(axes)
    return _finished(
        axes,
        "canary",
        "Difference between engines and trainer on fixed prompts. A rise means that the engines hold other weights.",
        texts,
    )


def _lossless(runs: Sequence[RunData]) -> Chart | None:
    axes = _axes("Losslessness canary", "smallest p-value")
    texts = _lines(axes, runs, names.LOSSLESS_P_VALUE, own_marker=True)
    _log_if_positive(axes)
    return _finished(
        axes,
        "lossless",
        "Test that the draft does not change the distribution of responses. Very small values mean that it does.",
        texts,
    )


def _positions(run: RunData, several: bool) -> Chart | None:
    axes = _axes(f"Acceptance by position{f': {_label(run)}' if several else ''}", "share of drafts")
    texts, ends = [], []
    keys = run.numbered(names.acceptance_rate_pos("train", 0)[:-1])
    for index, key in enumerate(keys):
        steps, values = run.series(key)
        # Earlier positions are darker. The number of the position is at the end of its line.
        shade = str(0.75 * index / max(1, len(keys) - 1))
        axes.plot(steps, values, color=shade, linestyle=LINES[index % 7])
        ends.append((steps[-1], values[-1]))
        texts.append(f"Position {index + 1}: {values[0]:.2f} to {values[-1]:.2f}.")
    axes.set_ylim(top=1.0 + 0.03 * (1.0 - axes.get_ylim()[0]))
    gap = 0.055 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    below = axes.get_ylim()[1]
    for index, (step, value) in enumerate(ends):
        # Lines may end at the same place, but their numbers must not overlap.
        below = min(value, below - gap)
        axes.annotate(f" {index + 1}", (step, below), va="center", fontsize=8)
    return _finished(
        axes,
        f"acceptance_by_position{_slug(run, several)}",
        "Share of drafts in training that were accepted at least up to the position at the end of the line.",
        texts,
    )


def _phases(run: RunData, several: bool) -> Chart | None:
    axes = _axes(f"Time of a step by phase{f': {_label(run)}' if several else ''}", "seconds")
    phases = [phase for phase in _STACK if run.series(names.timing(phase))[0]]
    steps = run.series(names.STEP_TIME)[0]
    by_step = {record[names.STEP]: record for record in run.records}
    stacks = [[by_step[step].get(names.timing(phase)) or 0.0 for step in steps] for phase in phases]
    if not steps or not any(map(any, stacks)):
        return None
    bottom = [0.0] * len(steps)
    for phase, values in zip(phases, stacks, strict=True):
        # A phase has the same colour and pattern in every run.
        index = _STACK.index(phase)
        axes.bar(
            steps,
            values,
            width=1.0,
            bottom=bottom,
            label=phase,
            color=COLOURS[index % 7],
            hatch=HATCHES[index % 7],
            edgecolor="white",
            linewidth=0.2,
        )
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    axes.set_ylim(0, max(bottom) * 1.45)
    axes.legend(loc="upper left", ncols=3)
    total = sum(bottom)
    texts = [f"{phase} {sum(values) / total:.0%}." for phase, values in zip(phases, stacks, strict=True)]
    figure = axes.figure
    assert isinstance(figure, Figure)
    name = f"phases{_slug(run, several)}"
    return Chart(
        name, axes.get_title(loc="left"), "Phases are stacked in the order of a step.", " ".join(texts), figure
    )


def _draft_training(run: RunData, several: bool) -> Chart | None:
    axes = _axes(f"Draft training: gain and cost{f': {_label(run)}' if several else ''}", "seconds per step")
    texts = []
    for index, (key, label) in enumerate(((names.DRAFT_GAIN, "gain"), (names.DRAFT_COST, "cost"))):
        steps, values = run.series(key)
        if steps:
            axes.plot(steps, values, label=label, color=COLOURS[index], marker=MARKERS[index], linestyle="none")
            texts.append(f"{label}: from {values[0]:.2g} s (step {steps[0]}) to {values[-1]:.2g} s ({steps[-1]}).")
    if not texts:
        return None
    steps, trained = run.series(names.DRAFT_TRAINED)
    rested = [step for step, value in zip(steps, trained, strict=True) if not value]
    for step in rested:
        axes.axvspan(step - 0.5, step + 0.5, color="#dddddd", linewidth=0)
    texts.append(f"The draft was trained in {sum(trained):.0f} of {len(steps)} steps.")
    return _finished(
        axes,
        f"draft_training{_slug(run, several)}",
        "Seconds per step that rollouts would lose with a draft left alone, and that its training and sync take. Grey: "
        "steps that did not train it.",
        texts,
    )


def _asynchrony(run: RunData, several: bool) -> Chart | None:
    axes = _axes(f"Asynchrony{f': {_label(run)}' if several else ''}", "share of a step; steps")
    named = (
        (names.TRAINER_IDLE, "trainer idle"),
        (names.ENGINES_IDLE, "engines idle"),
        (names.STALENESS, "staleness"),
        (names.SPANS, "versions per response"),
    )
    texts = []
    for index, (key, label) in enumerate(named):
        steps, values = run.series(key)
        if steps:
            axes.plot(steps, values, label=label, color=COLOURS[index], linestyle=LINES[index])
            texts.append(f"{label}: mean {sum(values) / len(values):.2f}.")
    if not texts:
        return None
    axes.set_ylim(bottom=0)
    return _finished(
        axes,
        f"asynchrony{_slug(run, several)}",
        "Parts of a step in which workers and engines did not work, training steps by which the policy is ahead of the "
        "weights that sampled a batch, and weights that sampled a response.",
        texts,
    )


def _drafted_lengths(run: RunData, several: bool) -> Chart | None:
    axes, texts = _axes(f"Drafted tokens by batch size{f': {_label(run)}' if several else ''}", "drafted tokens"), []
    keys = run.numbered(names.LENGTH_AT_BATCH)
    for index, key in enumerate(keys):
        steps, values = run.series(key)
        size = int(key.removeprefix(names.LENGTH_AT_BATCH))
        # Smaller batches are darker.
        shade = str(0.75 * index / max(1, len(keys) - 1))
        label = f"{size}" if size == 1 else f"{size} to {2 * size - 1}"
        axes.plot(steps, values, label=label, color=shade, linestyle=LINES[index % 7])
        texts.append(f"{label} responses: {values[0]:.1f} to {values[-1]:.1f}.")
    return _finished(
        axes,
        f"drafted_lengths{_slug(run, several)}",
        "Mean number of tokens that an engine drafts, by the responses it generates at the same time.",
        texts,
    )


def _expected_speed(run: RunData, several: bool) -> Chart | None:
    title = f"Decoding: expected and measured speed{f': {_label(run)}' if several else ''}"
    axes, texts = _axes(title, "tokens/s"), []
    for index, (key, label) in enumerate(
        ((names.DECODE_THROUGHPUT, "measured"), (names.EXPECTED_THROUGHPUT, "expected"))
    ):
        steps, values = run.series(key)
        if steps:
            axes.plot(steps, values, label=label, color=COLOURS[index], linestyle=LINES[index])
            texts.append(f"{label}: from {values[0]:.4g} to {values[-1]:.4g} tokens/s.")
    axes.set_ylim(bottom=0)
    return _finished(
        axes,
        f"expected_speed{_slug(run, several)}",
        "Tokens per second of steps without prompts, and what step times and acceptance promised for them.",
        texts,
    )


def _slug(run: RunData, several: bool) -> str:
    return f"_{run.label.replace('/', '_')}" if several else ""


_OVERLAYS: tuple[Callable[[Sequence[RunData]], Chart | None], ...] = (
    _reward,
    _acceptance,
    _predicted,
    _simple(
        "tokens_per_second",
        "Rollout speed",
        "tokens/s",
        names.THROUGHPUT,
        "Generated tokens / seconds in which engines generated.",
        from_zero=True,
    ),
    _simple(
        "step_time",
        "Step time",
        "seconds",
        names.STEP_TIME,
        "From sampling to weight sync, with canaries and without evaluations.",
        from_zero=True,
    ),
    _sync_bytes,
    _simple(
        "sync_time",
        "Weight sync: time",
        "seconds",
        names.timing("sync_weights"),
        "Time of a weight sync. Engines wait for it.",
        from_zero=True,
    ),
    _canary,
    _lossless,
    _simple(
        "entropy",
        "Policy entropy",
        "nats",
        "policy/entropy",
        "Entropy of the policy's distribution, averaged over tokens.",
    ),
    _simple(
        "draft_loss",
        "Draft loss",
        "nats",
        names.DRAFT_LOSS,
        "Cross-entropy against the policy's distribution. It cannot fall below the policy's entropy.",
    ),
)
_SINGLES: tuple[Callable[[RunData, bool], Chart | None], ...] = (
    _positions,
    _phases,
    _asynchrony,
    _draft_training,
    _drafted_lengths,
    _expected_speed,
)
