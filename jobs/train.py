"""What does one configuration reach?

python jobs/train.py --data DIR --set backbone.name=resnet50 --set freeze.strategy=head
python jobs/train.py --config RUN/best/trial.json    # the winner of a search, once more
"""

import sys

from tlrunner.cli import run_job
from tlrunner.jobconfig import TrainJob

if __name__ == "__main__":
    sys.exit(run_job("train", TrainJob, "tlrunner.run:train"))
