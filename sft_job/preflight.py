"""What is looked at before a run directory is claimed or a job is queued, without torch.

What a job file says by itself is checked when it is read (`config`). This is what depends on
where it will train.
"""

from __future__ import annotations

import importlib.util
import os

from sft_job import images, rates
from sft_job.errors import ConfigError
from sft_job.schema import JobConfig

# The Python packages of which each tracker needs one.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def check(config: JobConfig, *, here: bool = False) -> list[str]:
    """Refuse what would end a job after its start.

    Args:
        here: this very Python will train (a launcher or a rank). Else the job's container will,
            or this Python where it has none.

    Returns:
        What was looked at, a line each.

    Raises:
        ConfigError: a tracker that is not there, or learning rates with which nothing is trained.
        SubmitError: apptainer cannot read the job's image.
    """
    faults = list(rates.faults(config, None))
    asked = config.logging.report_to
    if not asked:
        line = "no tracker"
    elif here or config.container is None:
        faults += [f"logging.report_to: {why}" for name in asked if (why := _obstacle(name))]
        line = f"{', '.join(asked)}: installed"
    elif isinstance(carried := images.trackers(config), str):
        line = f"{', '.join(asked)}: not checked here, {carried}; the job does before it trains"
    else:
        line = f"{', '.join(asked)}: in the image"
        if missing := [name for name in asked if name not in carried]:
            faults.append(
                f"logging.report_to: {', '.join(missing)} is not in the image, which has "
                f"{', '.join(carried)}; leave it out, or take an image that has it, with a label "
                f"{images.FLAVOR_LABEL} of its own"
            )
    if faults:
        raise ConfigError(faults)
    return [line]


def _obstacle(tracker: str) -> str | None:
    """Why the Trainer would refuse a tracker here, or None."""
    if tracker == "mlflow" and os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE":
        return "mlflow is switched off by DISABLE_MLFLOW_INTEGRATION; unset it"
    for package in PACKAGES[tracker]:
        spec = importlib.util.find_spec(package)
        # A folder of that name, such as the one that wandb leaves where it ran, is no package.
        if spec is not None and spec.origin is not None:
            return None
    return (
        f"{tracker} is not installed in this Python; pip install {PACKAGES[tracker][0]}, or "
        "leave it out"
    )
