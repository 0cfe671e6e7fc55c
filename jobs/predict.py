"""What does a trained model say of these images, and how often is it right?

python jobs/predict.py --model RUN/best --data DIR --out PREDICTIONS --name flowers
"""

import sys

from tlrunner.cli import run_job
from tlrunner.jobconfig import PredictJob

if __name__ == "__main__":
    sys.exit(run_job("predict", PredictJob, "tlrunner.predict:predict", needs_model=True))
