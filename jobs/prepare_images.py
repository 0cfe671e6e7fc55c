"""Write any source of images as Parquet shards, to read them from there ever after.

    python jobs/prepare_images.py --data DIR --out SHARDS --name flowers
    python jobs/prepare_images.py --data photos.csv --out s3://BUCKET/images --name photos
    python jobs/prepare_images.py --data DIR --out SHARDS --name small --set shards.max_side=512

Each image is decoded once to check it; JPEG is kept as it is, unless it must be turned, converted
or scaled down. Images that cannot be used are listed in bad_images.parquet. The same command
continues a writing that broke off.
"""

import sys

from tlrunner.cli import run_job
from tlrunner.jobconfig import PrepareJob

if __name__ == "__main__":
    sys.exit(run_job("prepare_images", PrepareJob, "tlrunner.run:prepare_images"))
