"""The ``skyrl-spec`` command. Imports neither torch, vllm, megatron nor ray before a run starts."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from skyrl_spec.errors import ConfigError, RunError
from skyrl_spec.settings.describe import describe
from skyrl_spec.settings.options import EvalDraftOptions, ExportOptions, ReportOptions
from skyrl_spec.settings.schema import Config

EXIT_OK = 0
EXIT_RUN = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EXAMPLES = """\
examples:
  skyrl-spec train experiment=cpu_mtp_grpo
  skyrl-spec train experiment=cpu_mtp_grpo trainer.mtp.enabled=false trainer.max_training_steps=3
  skyrl-spec train experiment=mimo_7b_dapo_8gpu trainer.dry_run=true
  skyrl-spec train experiment=mimo_7b_dapo_8gpu --cfg job
  skyrl-spec warmup-draft experiment=cpu_dflash_grpo
  skyrl-spec compare experiment=cpu_mtp_grpo
  skyrl-spec report runs/cpu_mtp_grpo
  skyrl-spec eval-draft target=runs/cpu_mtp_grpo
  skyrl-spec export checkpoint=runs/cpu_mtp_grpo out=exported
"""

# Commands that take a configuration, and those that take options of their own: summary, description.
RUNS = {
    "train": (
        "train a policy, and its draft with it",
        "Train a policy with GRPO or DAPO, and its speculative-decoding draft with it.",
    ),
    "warmup-draft": (
        "train a draft for a policy that stays as it is",
        "Train a draft on the frozen policy's own responses, before reinforcement learning; trainer.warmup.* sets how.",
    ),
    "compare": (
        "the same run with the draft trained, frozen and absent",
        "Train three times on the same seeds and data: with the draft trained along, with the draft as it was, and "
        "without one. Writes trainer.run_dir/{trained,frozen,none}, compare.json and a report.",
    ),
}
TOOLS = {
    "eval-draft": (
        "how much a draft helps, by draft tokens and batch size",
        "Measure acceptance and tokens/s with and without the draft, by turns, and recommend a number of draft tokens.",
    ),
    "report": (
        "runs as a page of charts",
        "Write one self-contained HTML page, and its charts as PNG files; several runs are laid over one another.",
    ),
    "export": (
        "a checkpoint as a bundle that vLLM serves",
        "Write a checkpoint's policy and draft in the form vLLM serves, with tokenizer and README.",
    ),
}


SCHEMAS = {"eval-draft": EvalDraftOptions, "report": ReportOptions, "export": ExportOptions}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status. Mistakes of the user's are one line on stderr and status 2."""
    parser = _parser()
    # Overrides may stand before and after options, which argparse alone does not take.
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    words = [*args.words, *rest]
    try:
        if args.command in RUNS:
            return _run(args.command, words, show_config=args.cfg is not None, verbose=args.verbose)
        tool = {"eval-draft": _eval_draft, "report": _report, "export": _export}[args.command]
        return tool(words, args.verbose)
    except RunError as error:
        print(f"skyrl-spec: error: {error}", file=sys.stderr)
        return EXIT_RUN
    except ConfigError as error:
        print(f"skyrl-spec: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read what is printed (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"skyrl-spec: error: {message}; {self.prog} --help lists what there is\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    about = "Reinforcement learning on Megatron-core and vLLM, with a draft that is trained with the policy."
    parser = _Parser(prog="skyrl-spec", description=about, epilog=EXAMPLES, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"skyrl-spec {version('skyrl-spec')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, texts in RUNS.items():
        command = _add(commands, name, texts, "experiment=NAME picks a configuration, trainer.epochs=2 changes it")
        command.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
    for name, texts in TOOLS.items():
        _add(commands, name, texts, "a run's directory" if name == "report" else "see below")
    return parser


def _add(commands: Any, name: str, texts: tuple[str, str], words: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=texts[0],
        description=texts[1],
        epilog=_options_help(name) if name in TOOLS else EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("words", nargs="*", metavar="RUN | KEY=VALUE" if name == "report" else "KEY=VALUE", help=words)
    command.add_argument("-v", "--verbose", action="store_true", help="also show what the workers and engines print")
    return command


def _options_help(name: str) -> str:
    """The options of a tool, from the documentation in its schema."""
    lines = ["keys:"]
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
        raise ConfigError(f"out={options.out}: is there and not empty; choose another place")
    _quiet(verbose)
    from skyrl_spec.checkpoint import bundle

    source = bundle.read_source(Path(options.checkpoint), model=options.model, draft=options.draft)
    target = bundle.export_bundle(source, out)
    print(f"exported {source.directory} to {target}\nserve it   cd {target} && {bundle.serve_line(source)}")
    return EXIT_OK


def _eval_draft(words: list[str], verbose: bool) -> int:
    from skyrl_spec.settings.compose import read_options

    options = read_options(EvalDraftOptions, words, "eval-draft")
    _quiet(verbose)
    from skyrl_spec.controller.signals import ended_by_signal
    from skyrl_spec.evaluation.command import run

    return ended_by_signal(lambda watch: run(options, watch, verbose=verbose))


def _report(words: list[str], verbose: bool) -> int:
    from skyrl_spec.settings.compose import read_options

    # A run's name may have an equals sign, as sweeps' have.
    run_dirs = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    options = read_options(ReportOptions, [word for word in words if Path(word) not in run_dirs], "report")
    if options.out == "":
        raise ConfigError("out='': must name a directory; write out=DIR")
    if not run_dirs:
        raise ConfigError("report: names no run; write skyrl-spec report RUN [RUN ...]")
    _quiet(verbose)
    from skyrl_spec.report.command import write_report

    page = write_report(run_dirs, None if options.out is None else Path(options.out))
    print(f"wrote {page} and its charts beside it")
    return EXIT_OK


def _quiet(verbose: bool) -> None:
    """Megatron and others say, a line each, what is not installed."""
    if not verbose:
        logging.disable(logging.INFO)
        warnings.filterwarnings("ignore")


def _run(command: str, words: list[str], *, show_config: bool, verbose: bool) -> int:
    # hydra takes a third of a second to import, which --help and --version need not wait for.
    from skyrl_spec.planning.validation import validate
    from skyrl_spec.settings.compose import load_config, to_yaml

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
        return _dry_run(command, config)
    if is_warmup:
        from skyrl_spec.controller.warmup import run_warmup

        return run_warmup(config, verbose=verbose)
    if command == "compare":
        from skyrl_spec.evaluation.compare import run_comparison

        return run_comparison(config, verbose=verbose)
    from skyrl_spec.controller.run import run_training

    return run_training(config, verbose=verbose)


def _dry_run(command: str, config: Config) -> int:
    from skyrl_spec.controller.checkpoints import find
    from skyrl_spec.controller.output import show_plan
    from skyrl_spec.controller.task import load_task
    from skyrl_spec.controller.warmup import as_warmup
    from skyrl_spec.evaluation.compare import checked_arms

    if command == "compare":
        show_plan(load_task(config, may_write=False), num_runs=len(checked_arms(config)))
    elif command == "warmup-draft":
        show_plan(as_warmup(load_task(config, find(config, "draft"), may_write=False)))
    else:
        show_plan(load_task(config, find(config, "policy"), may_write=False))
    return EXIT_OK
