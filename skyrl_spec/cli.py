"""The ``skyrl-spec`` command. Imports no torch, vLLM, Megatron or Ray before a run starts."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn, TypeVar

from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.describe import describe
from skyrl_spec.settings.options import (
    CompareOptions,
    DoctorOptions,
    EvalDraftOptions,
    ExportOptions,
    LayoutsOptions,
    ReportOptions,
)
from skyrl_spec.settings.schema import Config

Options = TypeVar("Options")

EXIT_OK = 0
EXIT_RUN = 1
EXIT_USAGE = 2
# Plus the number of the signal.
EXIT_SIGNAL = 128

# Summary and description of the commands that take a configuration, and of those that take options of their own.
RUNS = {
    "train": (
        "train a policy together with its draft",
        "Train a policy with GRPO or DAPO, together with its speculative-decoding draft.",
    ),
    "warmup-draft": (
        "train a draft for a frozen policy",
        "Train a draft on responses of the frozen policy, before reinforcement learning. Settings: trainer.warmup.*.",
    ),
    "compare": (
        "train with the draft trained, frozen and absent",
        "Train several times with the same seeds and data: with the draft trained, trained at times, frozen, and "
        "without a draft. Write a folder for each arm to trainer.run_dir, compare.json and a report.",
    ),
}
TOOLS = {
    "eval-draft": (
        "measure how much a draft speeds up generation",
        "Measure acceptance length and tokens/s with and without the draft, by number of draft tokens and batch size, "
        "and recommend a number of draft tokens.",
    ),
    "doctor": (
        "find what is wrong with a model, a draft or a configuration",
        "Check files, tokenizer, and real engines and workers in a few minutes: trainer, engines and transformers "
        "compute the same policy and draft, with and without the draft, before and after a training step and its sync. "
        "Settings may follow. The exit code is 1 if a check failed.",
    ),
    "layouts": (
        "list the layouts of a run that fit on so many GPUs",
        "List the layouts of a run that fit on so many GPUs, with estimated seconds of a step, the fastest first. "
        "Nothing is started, and no weight is read. Settings of the run may follow.",
    ),
    "report": (
        "draw charts of runs",
        "Write one self-contained HTML page of charts, and each chart as a PNG file. Several runs share the charts.",
    ),
    "export": (
        "write a checkpoint in the form that vLLM serves",
        "Write policy and draft of a checkpoint in the form that vLLM serves, with tokenizer and README.",
    ),
}
EXAMPLES = {
    "train": [
        "experiment=cpu_mtp_grpo",
        "experiment=cpu_mtp_grpo trainer.mtp.enabled=false trainer.max_training_steps=3",
        "experiment=mimo_7b_dapo_8gpu trainer.dry_run=true",
        "experiment=mimo_7b_dapo_8gpu --cfg job",
    ],
    "warmup-draft": ["experiment=cpu_dflash_grpo"],
    "compare": ["experiment=cpu_mtp_grpo", "experiment=cpu_dflash_grpo arms=[trained,auto,every:4,frozen] seeds=3"],
    "eval-draft": ["target=runs/cpu_mtp_grpo"],
    "doctor": [
        "target=examples/arithmetic_mtp/model",
        "target=examples/arithmetic_dflash/model draft=examples/arithmetic_dflash/draft",
        "experiment=cpu_mtp_grpo --thorough",
    ],
    "layouts": ["experiment=mimo_7b_dapo_8gpu gpus=8 gpu_memory_gb=80"],
    "report": ["runs/cpu_mtp_grpo"],
    "export": ["checkpoint=runs/cpu_mtp_grpo out=exported"],
}

SCHEMAS = {
    "compare": CompareOptions,
    "eval-draft": EvalDraftOptions,
    "doctor": DoctorOptions,
    "layouts": LayoutsOptions,
    "report": ReportOptions,
    "export": ExportOptions,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status. A mistake of the user is one line on stderr and status 2."""
    parser = _parser()
    # argparse alone does not accept overrides both before and after options.
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    words = [*args.words, *rest, *(["thorough=true"] if getattr(args, "thorough", False) else [])]
    received: list[int] = []
    try:
        with _interrupted_by_signals(received):
            if args.command in RUNS:
                return _run(args.command, words, show_config=args.cfg is not None, verbose=args.verbose)
            return _TOOLS[args.command](words, args.verbose)
    except RunError as error:
        print(f"skyrl-spec: error: {error}", file=sys.stderr)
        return EXIT_RUN
    except ConfigError as error:
        print(f"skyrl-spec: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        number = received[0] if received else signal.SIGINT
        print(f"skyrl-spec: {signal.Signals(number).name}: stopped", file=sys.stderr)
        return EXIT_SIGNAL + number
    except BrokenPipeError:
        # The reader of the output (head, less) has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


@contextmanager
def _interrupted_by_signals(received: list[int]) -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, until a run installs its own handlers. Notes them in ``received``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # A run that a signal has ended keeps its own handlers.
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"skyrl-spec: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="skyrl-spec",
        usage="skyrl-spec COMMAND [KEY=VALUE ...]",
        description="Reinforcement learning of language models on Megatron-core and vLLM, with a speculative-decoding\n"
        "draft that is trained together with the policy.",
        epilog=f"{_commands_help()}\n\n{_examples(*EXAMPLES)}\n\nskyrl-spec COMMAND --help describes a command.",
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"skyrl-spec {version('skyrl-spec')}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="see below", parser_class=_Parser, prog="skyrl-spec"
    )
    for name in RUNS:
        options = f"{_options_help(name)}\n\n" if name in SCHEMAS else ""
        epilog = f"{options}{_SETTINGS_HELP}\n\n{_examples(name)}"
        command = _add(commands, name, "KEY=VALUE", "settings of the run, see below", epilog)
        command.add_argument("--cfg", choices=["job"], help="print all settings with their values and stop")
    for name in TOOLS:
        metavar, words_help = (
            ("RUN | KEY=VALUE", "directories of runs") if name == "report" else ("KEY=VALUE", "see below")
        )
        command = _add(commands, name, metavar, words_help, f"{_options_help(name)}\n\n{_examples(name)}")
        if name == "doctor":
            command.add_argument("--thorough", action="store_true", help="the same as thorough=true")
    return parser


_SETTINGS_HELP = """\
settings:
  experiment=NAME  start from configs/experiment/NAME.yaml, such as cpu_mtp_grpo
  algorithm=NAME   grpo or dapo, from configs/algorithm/
  KEY=VALUE        change a single setting, such as trainer.epochs=2
  --cfg job lists all settings; docs/reference/settings.md describes them."""


def _add(commands: Any, name: str, metavar: str, words_help: str, epilog: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        description=textwrap.fill((RUNS | TOOLS)[name][1], 100),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("words", nargs="*", metavar=metavar, help=words_help)
    command.add_argument("-v", "--verbose", action="store_true", help="also show the output of workers and engines")
    return command


def _commands_help() -> str:
    return "\n".join(["commands:", *(f"    {name:<14}{summary}" for name, (summary, _) in (RUNS | TOOLS).items())])


def _examples(*commands: str) -> str:
    """Command lines to copy."""
    return "\n".join(["examples:", *(f"  skyrl-spec {name} {words}" for name in commands for words in EXAMPLES[name])])


def _options_help(name: str) -> str:
    """The options of a tool, from the documentation in its schema."""
    lines = ["options as KEY=VALUE, with their defaults:"]
    for setting in describe(SCHEMAS[name]):
        lines.append(f"  {setting.name}={setting.default}")
        allowed = f" Allowed: {setting.allowed_text}." if setting.allowed is not None else ""
        lines += textwrap.wrap(setting.doc + allowed, 94, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _export(words: list[str], verbose: bool) -> int:
    from skyrl_spec.settings.compose import read_options

    options = read_options(ExportOptions, words, "export")
    for key in ("checkpoint", "out"):
        if not getattr(options, key):
            raise ConfigError(f"{key}='': must name a directory; write {key}=DIR")
    out = Path(options.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={options.out}: must be a new or empty directory; choose another one")
    _quiet(verbose)
    from skyrl_spec.checkpoint import bundle

    source = bundle.read_source(Path(options.checkpoint), model=options.model, draft=options.draft)
    target = bundle.export_bundle(source, out)
    print(f"exported {source.directory} to {target}\nserve it   cd {quote(str(target))} && {bundle.serve_line(source)}")
    return EXIT_OK


def _eval_draft(words: list[str], verbose: bool) -> int:
    from skyrl_spec.settings.compose import read_options

    options = read_options(EvalDraftOptions, words, "eval-draft")
    _quiet(verbose)
    from skyrl_spec.controller.signals import ended_by_signal
    from skyrl_spec.evaluation.command import run

    return ended_by_signal(lambda watch: run(options, watch, verbose=verbose))


def _doctor(words: list[str], verbose: bool) -> int:
    options, settings = _options(DoctorOptions, "doctor", words)
    if not options.target and not settings:
        raise ConfigError("target='': must name a model, run or bundle; write target=DIR, or experiment=NAME")
    _quiet(verbose)
    from skyrl_spec.controller.signals import ended_by_signal
    from skyrl_spec.doctor.command import run

    return ended_by_signal(lambda watch: run(options, settings, watch, verbose=verbose))


def _layouts(words: list[str], verbose: bool) -> int:
    from skyrl_spec.planning.layouts import acceptance_length, find_layouts, mean_lengths, table
    from skyrl_spec.settings.compose import load_config

    options, settings = _options(LayoutsOptions, "layouts", words)
    config = load_config(settings)
    _quiet(verbose)
    found, (prompt, response) = find_layouts(config, options), mean_lengths(config, options)
    print(
        f"{len(found)} layouts of {options.gpus} GPUs fit. Estimates for prompts of {prompt:,} and responses of "
        f"{response:,} tokens, {acceptance_length(config, options):.2g} tokens per decode step, and the speeds of "
        "trainer.hardware:\n"
    )
    print(*table(found, options.show), "", "the first one", sep="\n")
    print(*(f"  {word}" for word in found[0].layout.words(options.gpus_per_machine)), sep="\n")
    return EXIT_OK


def _report(words: list[str], verbose: bool) -> int:
    from skyrl_spec.settings.compose import read_options

    # The name of a run may contain an equals sign, as in sweeps.
    run_dirs = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    options = read_options(ReportOptions, [word for word in words if Path(word) not in run_dirs], "report")
    if options.out == "":
        raise ConfigError("out='': must name a directory; write out=DIR")
    if not run_dirs:
        raise ConfigError("report: at least one run is needed; write skyrl-spec report RUN [RUN ...]")
    _quiet(verbose)
    from skyrl_spec.report.command import write_report

    page = write_report(run_dirs, None if options.out is None else Path(options.out))
    print(f"wrote {page}, with its charts as PNG files beside it")
    return EXIT_OK


def _quiet(verbose: bool) -> None:
    """Silences libraries, which print a line about each optional package that is not installed."""
    if not verbose:
        logging.disable(logging.INFO)
        warnings.filterwarnings("ignore")


def _run(command: str, words: list[str], *, show_config: bool, verbose: bool) -> int:
    # hydra takes a third of a second to import; --help and --version do not need it.
    from skyrl_spec.planning.validation import validate
    from skyrl_spec.settings.compose import load_config, to_yaml

    options = CompareOptions()
    if command == "compare":
        options, words = _options(CompareOptions, "compare", words)
    config = load_config(words)
    validate(config)
    is_warmup = command == "warmup-draft"
    if is_warmup:
        from skyrl_spec.controller.warmup import warmup_config

        config = warmup_config(config)
    if show_config:
        print(to_yaml(config), end="")
        return EXIT_OK
    from skyrl_spec.planning.preflight import preflight

    preflight(config, draft_from_scratch=is_warmup and config.trainer.warmup.from_scratch)
    if config.trainer.dry_run:
        return _dry_run(command, config, options)
    if is_warmup:
        from skyrl_spec.controller.warmup import run_warmup

        return run_warmup(config, verbose=verbose)
    if command == "compare":
        from skyrl_spec.evaluation.compare import run_comparison

        return run_comparison(config, options, verbose=verbose)
    from skyrl_spec.controller.run import run_training

    return run_training(config, verbose=verbose)


def _options(schema: type[Options], command: str, words: list[str]) -> tuple[Options, list[str]]:
    """The options of a command that takes settings too, and the words that are settings."""
    from skyrl_spec.settings.compose import read_options

    keys = [setting.name for setting in describe(schema)]
    own = [word for word in words if word.partition("=")[0] in keys]
    return read_options(schema, own, command), [word for word in words if word not in own]


def _dry_run(command: str, config: Config, options: CompareOptions) -> int:
    from skyrl_spec.controller.checkpoints import find
    from skyrl_spec.controller.output import show_plan
    from skyrl_spec.controller.task import load_task
    from skyrl_spec.controller.warmup import as_warmup
    from skyrl_spec.evaluation.compare import checked_arms

    if command == "compare":
        show_plan(load_task(config, may_write=False), num_runs=len(checked_arms(config, options)))
    elif command == "warmup-draft":
        show_plan(as_warmup(load_task(config, find(config, "draft"), may_write=False)))
    else:
        show_plan(load_task(config, find(config, "policy"), may_write=False))
    return EXIT_OK


_TOOLS = {"eval-draft": _eval_draft, "doctor": _doctor, "layouts": _layouts, "report": _report, "export": _export}
