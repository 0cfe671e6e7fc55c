"""Which backbone, how much of it to unfreeze, and with which hyperparameters, for flower photos?

    python jobs/tune_flowers.py                       # on flowers that tlrunner draws itself
    python jobs/tune_flowers.py --data DIR            # on your own images, one folder a class
    ray job submit --working-dir . -- python jobs/tune_flowers.py --data DIR --out SHARED_DIR

Measured with the search in tune_flowers.yaml, 6 trials, on 2 CPU cores without a GPU:

    3,264 photos of 5 flowers   val_acc 0.949 (652 photos), lp_ft, 11 minutes
    sample:flowers, 600 drawn   val_acc 0.967 (120 images), lp_ft, 162 seconds

One seed each; run twice, the photos gave the same leaderboard. On them the best
`last_stages 1` reached 0.937, and the best `head` 0.905 before it was stopped.
Did not help: stopping after one epoch (`grace_epochs: 1`), which ends `lp_ft` in its frozen phase.
"""

import sys
from pathlib import Path

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig

if __name__ == "__main__":
    shipped = Path(__file__).with_suffix(".yaml")
    sys.exit(run_job("tune_flowers", JobConfig, "tlrunner.run:tune", default_config=shipped))
