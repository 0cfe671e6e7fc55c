"""The device of a trial's worker: Accelerate on the GPU or the threads that the config grants."""

import ctypes

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tlrunner.config import TrialConfig
from tlrunner.errors import ConfigError, ResourceError


def build_accelerator(config: TrialConfig) -> Accelerator:
    """Accelerate for this process, one of the trial's workers.

    With a share of a GPU, the process can allocate no more than that share of its memory, so that
    trials beside it keep theirs.

    Raises:
        ResourceError: a GPU is asked for and there is none; or there are more or fewer processes
            than workers.
        ConfigError: a precision that the device cannot compute in.
    """
    resources = config.resources
    gpus = resources.gpus_per_worker
    if gpus and not torch.cuda.is_available():
        raise ResourceError(
            f"resources.gpus_per_worker is {gpus}, this machine has no usable GPU",
            "0, or leave it out",
        )
    on_cpu = gpus == 0 or not torch.cuda.is_available()
    if on_cpu and config.train.mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision is fp16, which needs a GPU", "no, bf16 (on CPUs)")
    torch.set_num_threads(resources.cpus_per_worker)
    if on_cpu:
        keep_freed_memory()
    # A reused worker may have run a trial in another precision; Accelerate remembers the first.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision, cpu=on_cpu)
    if accelerator.num_processes != resources.workers_per_trial:
        raise ResourceError(
            f"a trial was started in {accelerator.num_processes} processes, "
            f"resources.workers_per_trial is {resources.workers_per_trial}",
            "",
            "start jobs with python, not with a launcher: they start their workers themselves",
        )
    if not on_cpu:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpus or 1.0), accelerator.device)
    return accelerator


def keep_freed_memory() -> None:
    """Have glibc, where that is the C library, keep large freed blocks for the next step.

    By default it returns activations to the system after every step and gets them again as pages
    to be zeroed one by one: a fourth of the CPU time of an EfficientNet at 160 px. Kept, a step is
    1.35 to 1.5 times faster, and peak memory is the same. Outside the main thread, as in Ray Tune,
    blocks come from heaps of 64 MiB that are given back whole, unless the padding is as large.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # their numbers in malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)
