"""Which backbone, how much of it to unfreeze, and with which hyperparameters, for flower photos?

python jobs/tune_flowers.py                       # on flowers that tlrunner draws itself
python jobs/tune_flowers.py --data DIR            # on your own images, one folder a class
ray job submit --working-dir . -- python jobs/tune_flowers.py --data DIR
"""

import sys
from pathlib import Path

from tlrunner.cli import run_job
from tlrunner.jobconfig import JobConfig

if __name__ == "__main__":
    shipped = Path(__file__).with_suffix(".yaml")
    sys.exit(run_job("tune_flowers", JobConfig, "tlrunner.run:tune", default_config=shipped))
