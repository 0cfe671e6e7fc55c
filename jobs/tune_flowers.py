"""Which backbone, how much of it to unfreeze, and with which hyperparameters, for flower photos?

    python jobs/tune_flowers.py                       # on flowers that tlrunner draws itself
    python jobs/tune_flowers.py --data DIR            # on your own images, one folder a class
    ray job submit --working-dir . -- python jobs/tune_flowers.py --data DIR --out SHARED_DIR

Measured with the search in tune_flowers.yaml, 6 trials, on 2 CPU cores without a GPU:

    3,264 photos of 5 flowers   val_acc 0.951 (652 photos), lp_ft, 11 minutes
    sample:flowers, 600 drawn   val_acc 0.967 (120 images), lp_ft, 169 seconds

One seed each. On the photos the best `last_stages` reached 0.934 and the best `head` 0.920; cut
from the full images (`data.decoded_cache=off`), training crops gave 0.949, 0.937 and 0.905.
With `search.budget.wall_seconds=300` on the photos it ended after 322 s, start and report included,
on a machine that did other work as well: 0.923 after one epoch.
"""

import sys
from pathlib import Path

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig

if __name__ == "__main__":
    shipped = Path(__file__).with_suffix(".yaml")
    sys.exit(run_job("tune_flowers", JobConfig, "tlrunner.run:tune", default_config=shipped))
