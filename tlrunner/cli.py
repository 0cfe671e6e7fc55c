"""The border between people and the program: flags in, exit codes and one-line errors out.

`run_job` is what each file in `jobs/` calls; `main` is the `tlrunner` command.
"""

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tlrunner.config import BackboneConfig, FreezeConfig, HeadConfig
from tlrunner.configfile import load, validate
from tlrunner.errors import ConfigError, InterruptedRun, TlrunnerError
from tlrunner.jobconfig import LogConfig, PrepareJob
from tlrunner.machine import importing
from tlrunner.section import Section
from tlrunner.signals import interrupted

Job = Callable[..., int]  # (config, [model,] job name, console, dry run) -> exit code

log = logging.getLogger("tlrunner")
LOG_WIDTH = 160  # of tables in a log, which has no width of its own
UNEXPECTED = 70


def run_job(
    job_name: str,
    config_class: type[Section],
    job: str | Job,
    *,
    default_config: Path | None = None,
    needs_model: bool = False,
    prog: str | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the flags of a job, run it, and turn how it ended into an exit code.

    Args:
        job: the function or its "module:name", which is imported once the config is known to be
            good: a typo is answered in a second, not after torch, timm and Ray are loaded.
        default_config: the file used where `--config` is not given.
        needs_model: the job takes `--model RUN/best`.
        prog: what the job is called in its usage; by default the file in `jobs/`.
    """
    flags = _job_parser(prog or f"{job_name}.py", needs_model).parse_args(argv)

    def run() -> int:
        config = load(
            config_class,
            flags.config or (str(default_config) if default_config else None),
            flags.set,
            {"data.uri": flags.data, "output.uri": flags.out, "output.name": flags.name},
        )
        _log_to_terminal(getattr(config, "log", LogConfig()).level)
        model = [flags.model] if needs_model else []
        function = _imported(job) if isinstance(job, str) else job
        return function(config, *model, job_name, _console(), flags.dry_run)

    return at_the_border(run)


def main(argv: Sequence[str] | None = None) -> int:
    """The `tlrunner` command."""
    parser = _Parser(prog="tlrunner", description="Transfer learning on images: tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    freeze = commands.add_parser("freeze", help="show what a freeze strategy trains of a backbone")
    freeze.add_argument("backbone", help="as backbone.name, e.g. resnet50")
    freeze.add_argument("strategy", help="as freeze.strategy, e.g. last_stages")
    freeze.add_argument("--num-stages", type=int, help="for last_stages and first_stages")
    freeze.add_argument("--epoch", type=int, default=0, help="for lp_ft and gradual; from 0")
    backbones = commands.add_parser("backbones", help="list backbones by name")
    backbones.add_argument("pattern", nargs="?", default="", help="part of a name")
    commands.add_parser("shard", help="write images as shards; flags of jobs/prepare_images.py")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["shard"]:
        prepare = "tlrunner.run:prepare_images"
        return run_job("shard", PrepareJob, prepare, prog="tlrunner shard", argv=argv[1:])
    flags = parser.parse_args(argv)
    command = {"freeze": _freeze, "backbones": _backbones}[flags.command]
    return at_the_border(lambda: command(flags))


def at_the_border(run: Callable[[], int]) -> int:
    """Run something; an error becomes one line and its exit code, with the traceback in the log.

    A bug's traceback is shown as well: who sees it is to report it.
    """
    _log_to_terminal("info")
    previous = signal.signal(signal.SIGTERM, interrupted)
    try:
        return run()
    except TlrunnerError as err:
        log.error("%s", err, exc_info=err)
        return err.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; the same command starts again")
        return InterruptedRun.exit_code
    except BrokenPipeError:
        return 0  # whoever read the output has seen enough
    except Exception as err:
        log.critical("unexpected %s: %s", type(err).__name__, err, exc_info=err)
        return UNEXPECTED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _imported(reference: str) -> Job:
    module, _, name = reference.partition(":")
    with importing():
        function: Job = getattr(importlib.import_module(module), name)
    return function


class _Parser(argparse.ArgumentParser):
    """Wrong flags end like any other wrong config."""

    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        print(f"tlrunner: {message}", file=sys.stderr)
        raise SystemExit(ConfigError.exit_code)


def _job_parser(prog: str, needs_model: bool) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML, or JSON where it ends in .json")
    parser.add_argument("--data", metavar="URI", help="the images (data.uri)")
    parser.add_argument("--out", metavar="URI", help="directory that holds runs (output.uri)")
    parser.add_argument("--name", metavar="NAME", help="name of the run (output.name)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any other key"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done")
    if needs_model:
        parser.add_argument("--model", metavar="URI", required=True, help="RUN/best")
    return parser


def _freeze(flags: argparse.Namespace) -> int:
    """Print the audit of a strategy: what trains, stage by stage."""
    from tlrunner.model.classifier import build_classifier
    from tlrunner.model.freeze import audit, check, levels

    backbone = BackboneConfig(name=flags.backbone, weights="none")
    given = {"strategy": flags.strategy, "num_stages": flags.num_stages}
    freeze = validate(FreezeConfig, given)
    classifier, _ = build_classifier(backbone, HeadConfig(), num_classes=5)
    num_stages = len(classifier.stages.names)
    check(freeze, num_stages, backbone.name)
    classifier.set_levels(levels(freeze, num_stages, flags.epoch))
    rows = audit(classifier)
    table = Table("stage", "parameters", "trained", "norm layers", "pinned")
    for row in rows:
        table.add_row(
            row.stage,
            f"{row.num_params:,}",
            f"{row.num_trainable:,}" if row.num_trainable else "frozen",
            str(row.num_norm_layers),
            str(row.num_pinned),
        )
    total, trained = sum(r.num_params for r in rows), sum(r.num_trainable for r in rows)
    console = _console()
    console.print(table)
    console.print(
        f"{backbone.name}, {freeze}, 5 classes: {trained:,} of {total:,} parameters train "
        f"({trained / total:.1%})",
        highlight=False,
    )
    return 0


def _backbones(flags: argparse.Namespace) -> int:
    from tlrunner.model.backbones import backbone_names

    for name in backbone_names():
        if flags.pattern in name:
            print(name)
    return 0


def _console() -> Console:
    # Paths and names are printed as they are, brackets included.
    width = None if sys.stdout.isatty() else LOG_WIDTH
    return Console(width=width, markup=False, highlight=False)


class _OneLine(logging.Formatter):
    """Messages for the terminal; tracebacks only where asked for, and for bugs."""

    def __init__(self, shows_tracebacks: bool) -> None:
        super().__init__("tlrunner: %(message)s")
        self.shows_tracebacks = shows_tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if self.shows_tracebacks or record.levelno >= logging.CRITICAL:
            return super().format(record)
        return f"tlrunner: {record.getMessage()}"


def _log_to_terminal(level: str) -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(shows_tracebacks=level == "debug"))
    handler.setLevel(level.upper())
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
