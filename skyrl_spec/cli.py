"""The ``skyrl-spec`` command. Imports neither torch, vllm, megatron nor ray before a run starts."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from importlib.metadata import version
from typing import Any, NoReturn

from skyrl_spec.config import ConfigError, RunError

EXIT_OK = 0
EXIT_RUN = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EXAMPLES = """\
examples:
  skyrl-spec train experiment=cpu_mtp_grpo
  skyrl-spec train experiment=cpu_mtp_grpo trainer.mtp.enabled=false trainer.max_training_steps=3
  skyrl-spec train experiment=cpu_mtp_dapo generator.sampling_params.temperature=0.8
  skyrl-spec train experiment=mimo_7b_dapo_8gpu --cfg job
  skyrl-spec warmup-draft experiment=cpu_dflash_grpo
  skyrl-spec export checkpoint=runs/cpu_mtp_grpo out=exported
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status. Mistakes of the user's are one line on stderr and status 2."""
    parser = _parser()
    # Overrides may stand before and after options, which argparse alone does not take.
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    try:
        overrides = [*args.overrides, *rest]
        if args.command == "export":
            return _export(overrides)
        return _run(args.command, overrides, show_config=args.cfg is not None, verbose=args.verbose)
    except RunError as error:
        print(f"skyrl-spec: error: {error}", file=sys.stderr)
        return EXIT_RUN
    except ConfigError as error:
        print(f"skyrl-spec: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


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
    _add_run(
        commands,
        "train",
        "train a policy, and its draft with it",
        "Train a policy with GRPO or DAPO, and its speculative-decoding draft with it.",
    )
    _add_run(
        commands,
        "warmup-draft",
        "train a draft for a policy that stays as it is",
        "Train a draft on the frozen policy's own responses, before reinforcement learning; trainer.warmup.* sets how.",
    )
    _add_export(commands)
    return parser


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a checkpoint as a bundle that vLLM serves",
        description="Write a checkpoint's policy and draft in the form vLLM serves, with tokenizer and README.",
        epilog="examples:\n  skyrl-spec export checkpoint=runs/cpu_mtp_grpo/checkpoints/step_24 out=exported\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="checkpoint=DIR (a checkpoint, or a run: its newest one) and out=DIR; model=DIR and draft=DIR where the "
        "run's starting model or draft has moved",
    )


def _add_run(commands: Any, name: str, summary: str, description: str) -> None:
    """A command that takes a configuration."""
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="experiment=NAME picks a configuration, trainer.epochs=2 and the like change it",
    )
    command.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
    command.add_argument("-v", "--verbose", action="store_true", help="also show what the workers and engines print")


def _export(words: list[str]) -> int:
    from pathlib import Path

    given = dict.fromkeys(("checkpoint", "out", "model", "draft"), "")
    for word in words:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            raise ConfigError(f"export: cannot use {word!r}; write one of {', '.join(f'{name}=DIR' for name in given)}")
        given[key] = value
    for key in ("checkpoint", "out"):
        if not given[key]:
            raise ConfigError(f"{key}='': must name a directory; write {key}=DIR")
    out = Path(given["out"]).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={given['out']}: is there and not empty; choose another place")
    # Megatron, which is imported once the words are right, says then, a line each, what is not installed.
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    from skyrl_spec.checkpoint import bundle

    source = bundle.read_source(Path(given["checkpoint"]), model=given["model"] or None, draft=given["draft"] or None)
    target = bundle.export_bundle(source, out)
    print(f"exported {source.directory} to {target}\nserve it   cd {target} && {bundle.serve_line(source)}")
    return EXIT_OK


def _run(command: str, overrides: list[str], *, show_config: bool, verbose: bool) -> int:
    # hydra takes a third of a second to import, which --help and --version need not wait for.
    from skyrl_spec.compose import load_config, to_yaml
    from skyrl_spec.validation import validate

    config = load_config(overrides)
    validate(config)
    is_warmup = command == "warmup-draft"
    if is_warmup:
        from skyrl_spec.trainer.warmup import warmup_config

        config = warmup_config(config)
    if show_config:
        print(to_yaml(config), end="")
        return EXIT_OK
    from skyrl_spec.preflight import preflight

    preflight(config, may_lack_mtp_head=is_warmup and config.trainer.warmup.from_scratch)
    if is_warmup:
        from skyrl_spec.trainer.warmup import run_warmup

        return run_warmup(config, verbose=verbose)
    from skyrl_spec.trainer.run import run_training

    return run_training(config, verbose=verbose)
