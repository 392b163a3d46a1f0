"""What is looked at before a run directory is claimed or a job is queued: with what will train,
and on a login node, where neither torch nor transformers nor a tracker is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sft_job import __version__, images, preflight
from sft_job.config import load
from sft_job.errors import ConfigError
from tests.runs import ROOT
from tests.test_locks import PYTHON, pins
from tests.test_plan import model_folder, prepare

# What `pip install sft_job` without an extra brings, and what that brings.
BASE = ["pydantic", "pydantic_core", "annotated_types", "typing_extensions.py", "typing_inspection",
        "yaml", "_yaml", "rich", "markdown_it", "mdurl", "pygments", 
        "submitit", "cloudpickle"]  # fmt: skip


@pytest.fixture(scope="module")
def login_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python packages as on a login node: the base package's alone."""
    folder = tmp_path_factory.mktemp("login-node")
    installed = Path(sysconfig.get_path("purelib"))
    for name in BASE:
        if (installed / name).exists():
            (folder / name).symlink_to(installed / name)
    return folder


def package(folder: Path, name: str) -> Path:
    """A folder with an importable package of that name."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    return folder


def run(login_node: Path, *words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """`sft-job WORDS` there; `-S` leaves out what is installed here."""
    paths = [str(ROOT), str(login_node), *filter(None, [environ.pop("PACKAGES", "")])]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths)} | environ
    command = [sys.executable, "-S", "-m", "sft_job", *map(str, words)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Slurm's commands and apptainer, as far as a dry run calls them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sinfo": "echo 'gpu*|up|infinite|64|gpu:8|(null)'", "squeue": ":"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def image(tools: Path, **labels: str) -> str:
    """An Apptainer image of ours (with other labels), as a value of the job file."""
    path = tools.parent / "x.sif"
    path.write_bytes(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0")
    found = {"data": {"attributes": {"labels": {images.VERSION_LABEL: __version__} | labels}}}
    (tools / "apptainer").write_text(f"#!/bin/bash\necho '{json.dumps(found)}'\n")
    (tools / "apptainer").chmod(0o755)
    return f"container={{type: apptainer, image: {path}}}"


SLURM = "slurm={gpus_per_node: 2}"


# --- both commands, without torch ----------------------------------------------------------


# What the job file says by itself, and what depends on where it trains.
REFUSED = [
    {
        "train.extra.adam_bta1=0.9": "not a Hugging Face TrainingArguments field; did you mean",
        "train.extra.adam_beta1=abc": "must be a number of at least 0 and less than 1, not 'abc'",
        "train.extra.optim=nonsense": "'nonsense' is not one of its values",
        "train.extra.neftune_noise_alpha=5": "noise on the embeddings",
    },
    {
        "train.seed=4294967296": "input should be less than 4294967296",
        "train.max_steps=1e20": "input should be less than or equal to 10000000",
        "run.dir=$NOT_SET/run": "the variable NOT_SET is not set",
    },
    {
        "train.learning_rate=1e-30": "the greatest of all steps is 1e-30",
        "logging.report_to=[wandb]": "wandb is not installed in this Python",
    },
]


@pytest.mark.parametrize("refused", REFUSED, ids=["extra", "file", "place"])
@pytest.mark.parametrize("command", ["plan", "submit"])
def test_refused_on_a_login_node_before_the_queue(
    job_file, login_node, tools, command, refused
) -> None:
    """By `plan` and by `submit --dry-run`, with exit code 2, and nothing is claimed."""
    words = [command, job_file, SLURM, *refused, *["--dry-run"] * (command == "submit")]
    result = run(login_node, *words, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 2, result.stdout + result.stderr
    for override, said in refused.items():
        assert f"{override.partition('=')[0]}: {said}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (job_file.parent / "run").exists()


MODELS = {
    "end of another vocabulary": ({"eos_token_id": 32}, "eos_token_id is 32"),
    "window": (
        {"model_type": "mistral", "sliding_window": 16},
        "the longest sample has 20 tokens, and layers of mistral look back 16 tokens only",
    ),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["plan", "submit"])
def test_an_unfit_model_is_refused_on_a_login_node(
    job_file, login_node, tools, command, case
) -> None:
    """From its config.json and the lengths of the encoded samples."""
    changes, said = MODELS[case]
    model = model_folder(job_file.parent / "model", **changes)
    job_file.write_text(job_file.read_text().replace('"bundled:smollm2-135m"', str(model)))
    prepare(job_file, model)
    words = [command, job_file, SLURM, *["--dry-run"] * (command == "submit")]
    result = run(login_node, *words, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 2, result.stdout + result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_the_login_node_has_no_torch(login_node) -> None:
    """The tests above would prove nothing."""
    for name in ("torch", "transformers", "tensorboard", "wandb", "numpy"):
        code = (
            f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{name}') is not None)"
        )
        environ = {"PYTHONPATH": f"{ROOT}:{login_node}"}
        assert subprocess.run([sys.executable, "-S", "-c", code], env=environ).returncode == 0


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_here_but_not_in_the_image(job_file, login_node, tools, tmp_path, command) -> None:
    """wandb on the login node does not help a job that runs in an image without it."""
    here = package(tmp_path / "here", "wandb")
    words = [job_file, "logging.report_to=[wandb]", image(tools), SLURM]
    words += ["--dry-run"] * (command == "submit")
    path = f"{tools}:{os.environ['PATH']}"
    result = run(login_node, command, *words, PATH=path, PACKAGES=str(here))
    assert result.returncode == 2
    assert "logging.report_to: wandb is not in the image, which has tensorboard" in result.stderr
    alone = [word for word in words if not str(word).startswith("container")]
    if command == "plan":  # and where this Python trains, it does
        assert run(login_node, command, *alone, PATH=path, PACKAGES=str(here)).returncode == 0


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_in_the_image_but_not_here(job_file, login_node, tools, command) -> None:
    """tensorboard is in our images, and need not be on the login node."""
    words = [job_file, "logging.report_to=[tensorboard]", SLURM]
    last = ["--dry-run"] * (command == "submit")
    path = f"{tools}:{os.environ['PATH']}"
    good = run(login_node, command, *words, image(tools), *last, PATH=path)
    said = "logging.report_to: tensorboard is not installed in this Python"
    assert said not in good.stderr
    if command == "plan":
        assert good.returncode == 0, good.stderr
    else:  # the model of this job is in no image; the tracker is no reason
        assert "report_to" not in good.stderr
    refused = run(login_node, command, *words, *last, PATH=path)
    assert refused.returncode == 2
    assert said in refused.stderr


# --- who carries what ----------------------------------------------------------------------


@pytest.mark.parametrize("flavour", PYTHON)
def test_the_images_carry_what_their_locks_have(flavour) -> None:
    """And nothing else of what logging.report_to can name."""
    locked = pins(flavour).keys()
    carried = {
        name
        for name, packages in preflight.PACKAGES.items()
        if any(one.lower() in locked for one in packages)
    }
    assert carried == set(images.TRACKERS)
    assert set(PYTHON) == set(images.FLAVORS)


def asked(job_file: Path, *trackers: str, **container: Any) -> Any:
    overrides = [f"logging.report_to=[{', '.join(trackers)}]"]
    if container:
        overrides.append(f"container={json.dumps(container)}")
    return load(job_file, overrides)


def test_every_tracker_of_the_job_file_is_known(job_file) -> None:
    from typing import get_args

    from sft_job.schema import Logging

    (literal,) = get_args(Logging.model_fields["report_to"].annotation)
    assert set(get_args(literal)) == set(preflight.PACKAGES)


def test_no_tracker_is_looked_for_where_none_is_asked(job_file) -> None:
    assert preflight.check(asked(job_file)) == ["no tracker"]


def test_this_python_is_looked_at_where_it_trains(job_file, tmp_path, monkeypatch) -> None:
    """Without a container; and inside of one, where the job file names it still."""
    monkeypatch.syspath_prepend(tmp_path)
    inside = asked(job_file, "wandb", type="pyxis", image="x")
    with pytest.raises(ConfigError, match="wandb is not installed in this Python; pip install"):
        preflight.check(inside, here=True)
    package(tmp_path, "wandb")
    assert preflight.check(inside, here=True) == ["wandb: installed"]
    assert preflight.check(asked(job_file, "wandb", "tensorboard")) == [
        "wandb, tensorboard: installed"
    ]


def test_a_folder_that_wandb_has_left_is_no_package(job_file, tmp_path, monkeypatch) -> None:
    """It keeps its runs in `wandb/` of the working directory, which Python looks into first."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        preflight.check(asked(job_file, "wandb"))


def test_a_tracker_that_the_environment_switches_off(job_file, tmp_path, monkeypatch) -> None:
    """The Trainer takes mlflow for not installed then."""
    monkeypatch.syspath_prepend(package(tmp_path, "mlflow"))
    assert preflight.check(asked(job_file, "mlflow")) == ["mlflow: installed"]
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "true")
    with pytest.raises(ConfigError, match="switched off by DISABLE_MLFLOW_INTEGRATION; unset it"):
        preflight.check(asked(job_file, "mlflow"))


@pytest.mark.parametrize(
    ("container", "labels", "said"),
    [
        ({"type": "pyxis", "image": "r#x"}, {}, "the image is not a file of this machine"),
        ({"type": "apptainer", "image": "docker://x"}, {}, "the image is not a file of this mach"),
        (None, {images.VERSION_LABEL: "9.9"}, f"the image is not one of sft_job {__version__}"),
        (None, {images.FLAVOR_LABEL: "lab"}, "the image is of its own flavor, lab"),
        (None, None, "no apptainer on this machine"),
    ],
)
def test_a_foreign_image_is_not_judged(
    job_file, tools, monkeypatch, container, labels, said
) -> None:
    """It may have more, or less; the job looks before it trains."""
    monkeypatch.setenv("PATH", str(tools))
    if container is None:
        override = image(tools, **(labels or {}))
        if labels is None:
            (tools / "apptainer").unlink()
        config = load(job_file, ["logging.report_to=[wandb]", override])
    else:
        config = asked(job_file, "wandb", **container)
    (line,) = preflight.check(config)
    assert line.startswith("wandb: not checked here, ")
    assert said in line
    assert line.endswith("; the job does before it trains")


@pytest.mark.parametrize("flavor", [None, *images.FLAVORS])
def test_our_own_image_is_judged_by_its_list(job_file, tools, monkeypatch, flavor) -> None:
    """An older label names no flavor; what all of them carry is the same."""
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    override = image(tools, **({images.FLAVOR_LABEL: flavor} if flavor else {}))
    good = load(job_file, ["logging.report_to=[tensorboard]", override])
    assert preflight.check(good) == ["tensorboard: in the image"]
    with pytest.raises(ConfigError, match=r"wandb is not in the image, which has tensorboard; "):
        preflight.check(load(job_file, ["logging.report_to=[wandb, tensorboard]", override]))


def test_all_reasons_at_once(job_file) -> None:
    config = load(job_file, ["logging.report_to=[wandb]", "train.learning_rate=1e-30"])
    with pytest.raises(ConfigError) as caught:
        preflight.check(config)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "train.learning_rate", "logging.report_to"
    ]  # fmt: skip
