"""Write any source of images as Parquet shards, to read them from there ever after.

python jobs/prepare_images.py --data DIR --out SHARDS --name flowers
"""

import sys

from tlrunner.cli import run_job
from tlrunner.jobconfig import PrepareJob

if __name__ == "__main__":
    sys.exit(run_job("prepare_images", PrepareJob, "tlrunner.run:prepare_images"))
