"""What is known of a container image from outside: the labels of an Apptainer image."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sft_job import __version__
from sft_job.errors import SubmitError
from sft_job.schema import Apptainer, JobConfig

# Of an image, and what they must say.
VERSION_LABEL = "sft_job.version"
FLAVOR_LABEL = "sft_job.flavor"

# What logging.report_to can name, of that which every image of this project carries
# (docker/locks). An image derived from one, with more in it, says so by another flavor label.
FLAVORS = ("ampere", "volta", "cpu")
TRACKERS = ("tensorboard",)

TIMEOUT_S = 60.0


def labels(image: Path) -> Mapping[str, str] | str:
    """The labels of an Apptainer image, or why they are not known.

    Raises:
        SubmitError: apptainer cannot read the image.
    """
    if shutil.which("apptainer") is None:
        return "no apptainer on this machine"
    command = ["apptainer", "inspect", "--json", "--labels", str(image)]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        found = json.loads(answer.stdout)["data"]["attributes"]["labels"]
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f"exit code {error.returncode}"
        raise SubmitError([f"container.image: apptainer cannot read {image}: {said}"]) from error
    except (subprocess.TimeoutExpired, OSError, ValueError, LookupError, TypeError):
        return "its labels cannot be read"
    return found if isinstance(found, dict) else {}


def trackers(config: JobConfig) -> tuple[str, ...] | str:
    """The trackers that the job's image carries, or why that is not known."""
    container = config.container
    if not isinstance(container, Apptainer) or "://" in container.image:
        return "the image is not a file of this machine that could be asked"
    found = labels(Path(container.image))
    if isinstance(found, str):
        return found
    if found.get(VERSION_LABEL) != __version__:
        return f"the image is not one of sft_job {__version__}"
    flavor = found.get(FLAVOR_LABEL)
    return TRACKERS if flavor in (None, *FLAVORS) else f"the image is of its own flavor, {flavor}"
