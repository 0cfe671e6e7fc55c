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

from tlrunner.configfile import load
from tlrunner.errors import ConfigError, InterruptedRun, TlrunnerError
from tlrunner.jobconfig import LogConfig, PrepareJob
from tlrunner.machine import importing
from tlrunner.section import Section
from tlrunner.signals import interrupted
from tlrunner.tools import backbones, doctor, freeze, submit, weights

Job = Callable[..., int]  # (config, [model,] job name, console, dry run) -> exit code

TOOLS = {
    "freeze": freeze,
    "backbones": backbones,
    "weights": weights,
    "submit": submit,
    "doctor": doctor,
}

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
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["shard"]:
        prepare = "tlrunner.run:prepare_images"
        return run_job("shard", PrepareJob, prepare, prog="tlrunner shard", argv=argv[1:])
    parser = _Parser(prog="tlrunner", description="Transfer learning on images: tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, tool in TOOLS.items():
        tool.arguments(commands.add_parser(name, help=tool.HELP))
    commands.add_parser("shard", help="write images as shards; flags of jobs/prepare_images.py")
    end = argv.index("--") if "--" in argv else len(argv)
    flags = parser.parse_args(argv[:end], argparse.Namespace(after=argv[end + 1 :]))
    if flags.after and flags.command != "submit":
        parser.error(f"{flags.command} takes nothing after --")
    return at_the_border(lambda: TOOLS[flags.command].run(flags, _console()))


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
