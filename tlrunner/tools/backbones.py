"""`tlrunner backbones`: every name that `backbone.name` takes."""

import argparse

from rich.console import Console

HELP = "list backbones by name"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="", help="part of a name")


def run(flags: argparse.Namespace, out: Console) -> int:
    from tlrunner.model.backbones import backbone_names

    for name in backbone_names():
        if flags.pattern in name:
            print(name)
    return 0
