"""`tlrunner weights`: stage pretrained weights once, for trials with `backbone.weights_uri`."""

import argparse

from rich.console import Console
from rich.table import Table

from tlrunner.config import BackboneConfig
from tlrunner.configfile import validate
from tlrunner.errors import StorageError

HELP = "stage pretrained weights in a directory or in S3, so that no trial asks a hub"
EPILOG = "Trials read them with --set backbone.weights_uri=URI."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    verbs = parser.add_subparsers(dest="verb", required=True)
    pull = verbs.add_parser("pull", help="fetch from their hub what is not staged yet")
    pull.add_argument("names", nargs="+", metavar="BACKBONE[:WEIGHTS]", help="e.g. resnet50")
    push = verbs.add_parser("push", help="copy what is staged to another place")
    push.add_argument("source", type=_uri, metavar="URI", help="where it is staged")
    for verb in (pull, push):
        where = "a directory or s3:// prefix"
        verb.add_argument("--to", type=_uri, metavar="URI", required=True, help=where)
    for name, what in (("list", "show what is staged"), ("verify", "read it and compare hashes")):
        verbs.add_parser(name, help=what).add_argument("uri", type=_uri, metavar="URI")


def _uri(text: str) -> str:
    return text.rstrip("/") or text


def run(flags: argparse.Namespace, out: Console) -> int:
    return {"pull": _pull, "push": _push, "list": _list, "verify": _verify}[flags.verb](flags, out)


def _pull(flags: argparse.Namespace, out: Console) -> int:
    from tlrunner.train.staged import pull

    for spelled in flags.names:
        name, _, weights = spelled.partition(":")
        backbone = validate(BackboneConfig, {"name": name, "weights": weights or "default"})
        staged = pull(backbone, flags.to)
        out.print(f"{flags.to}/{staged.name}: SHA-256 {staged.sha256}", soft_wrap=True)
    return 0


def _push(flags: argparse.Namespace, out: Console) -> int:
    from tlrunner.train.staged import push

    for staged, was_there in push(flags.source, flags.to):
        done = "is there already" if was_there else f"{_mib(staged.num_bytes)} MiB copied"
        out.print(f"{flags.to}/{staged.name}: {done}", soft_wrap=True)
    return 0


def _list(flags: argparse.Namespace, out: Console) -> int:
    from tlrunner.train.staged import staged_weights

    table = Table("weights", "MiB", "SHA-256", "from")
    for staged in staged_weights(flags.uri):
        table.add_row(staged.name, _mib(staged.num_bytes), staged.sha256[:16], staged.source)
    out.print(table if table.row_count else f"nothing is staged at {flags.uri}")
    return 0


def _verify(flags: argparse.Namespace, out: Console) -> int:
    from tlrunner.train.staged import verify

    num_read = num_wrong = 0
    for staged, fault in verify(flags.uri):
        num_read += 1
        num_wrong += bool(fault)
        out.print(f"{staged.name}: {fault or 'ok'}", soft_wrap=True)
    if num_wrong:
        raise StorageError(f"{num_wrong} of {num_read} weights at {flags.uri} are not as staged")
    out.print(f"{num_read} weights at {flags.uri}, all as they were staged", soft_wrap=True)
    return 0


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"
