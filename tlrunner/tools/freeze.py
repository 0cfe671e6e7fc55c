"""`tlrunner freeze`: what a freeze strategy trains of a backbone, stage by stage."""

import argparse

from rich.console import Console
from rich.table import Table

from tlrunner.config import BackboneConfig, FreezeConfig, HeadConfig
from tlrunner.configfile import validate

HELP = "show what a freeze strategy trains of a backbone"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="as backbone.name, e.g. resnet50")
    parser.add_argument("strategy", help="as freeze.strategy, e.g. last_stages")
    parser.add_argument("--num-stages", type=int, help="for last_stages and first_stages")
    parser.add_argument("--epoch", type=int, default=0, help="for lp_ft and gradual; from 0")


def run(flags: argparse.Namespace, out: Console) -> int:
    """Print the audit of a strategy."""
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
    out.print(table)
    out.print(
        f"{backbone.name}, {freeze}, 5 classes: {trained:,} of {total:,} parameters train "
        f"({trained / total:.1%})",
        highlight=False,
    )
    return 0
