"""A run belongs to what its data and base model contain, wherever they are."""

import json
from pathlib import Path

import pytest

from sft_job import identity, seal
from sft_job.config import load
from sft_job.errors import RunDirError
from sft_job.prepared import DataStats, Prepared
from sft_job.rundir import RunDir
from sft_job.schema import JobConfig

STATS = DataStats("fingerprint", 1, 1, [3], 1, {}, None, "</s>")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a model, two data files and a job."""
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text('{"rope_theta": 10000.0, "_name_or_path": "a"}')
    (folder / "model/model.safetensors").write_bytes(b"weights")
    for name in ("a", "b"):
        (folder / f"{name}.json").write_text(f'["{name}"]')
    (folder / "job.yaml").write_text(
        "model: {path: ./model}\ndata: {train: [a.json, b.json]}\nrun: {dir: run}\n"
    )
    return folder


def ready(config: JobConfig, stats: DataStats = STATS) -> Prepared:
    """Prepared data over the job's own model folder."""
    folder = Path(config.model.path)
    names = [path.name for path in folder.iterdir()]
    return Prepared(str(folder), "data", stats, (), seal.make(folder, names))


def begin(project: Path, *overrides: str) -> tuple[RunDir, JobConfig]:
    """A run that has begun."""
    config = load(project / "job.yaml", overrides)
    run = RunDir(config.run.dir)
    run.path.mkdir(exist_ok=True)
    identity.refuse_changed_content(run, config, ready(config))
    return run, config


def test_the_same_sources_are_the_same_run(project: Path) -> None:
    """Before anything slow, and when everything is ready."""
    run, config = begin(project)
    identity.refuse_changed_sources(run, config)
    identity.refuse_changed_content(run, config, ready(config))


def test_a_moved_project_is_the_same_run(project: Path) -> None:
    """Paths are no identity."""
    begin(project)
    moved = project.rename(project.with_name("elsewhere"))
    run, config = RunDir(moved / "run"), load(moved / "job.yaml")
    identity.refuse_changed_sources(run, config)
    identity.refuse_changed_content(run, config, ready(config))


@pytest.mark.parametrize("change", ["content", "order", "less"])
def test_other_data_is_refused_before_anything_slow(project: Path, change: str) -> None:
    """One other byte, another order, a file less."""
    run, config = begin(project)
    if change == "content":
        (project / "b.json").write_text('["c"]')
    elif change == "order":
        config = load(project / "job.yaml", [f"data.train=[{project}/b.json, {project}/a.json]"])
    else:
        config = load(project / "job.yaml", [f"data.train=[{project}/a.json]"])
    with pytest.raises(RunDirError, match="the data has changed since this run began") as caught:
        identity.refuse_changed_sources(run, config)
    assert caught.value.exit_code == 2


def test_another_base_model_is_refused_with_what_differs(project: Path) -> None:
    """Before anything slow where config.json says so; what saving changes does not count."""
    run, config = begin(project)
    file = project / "model/config.json"
    file.write_text('{"rope_theta": 10000.0, "_name_or_path": "b", "transformers_version": "9"}')
    identity.refuse_changed_sources(run, config)
    file.write_text('{"rope_theta": 1000000.0}')
    with pytest.raises(RunDirError, match=r"\n  rope_theta: 10000\.0 before, 1000000\.0 now\n"):
        identity.refuse_changed_sources(run, config)


def test_other_weights_are_refused(project: Path) -> None:
    """Of the same shape and name."""
    run, config = begin(project)
    (project / "model/model.safetensors").write_bytes(b"weighTs")
    with pytest.raises(RunDirError, match="the weights of the base model have changed"):
        identity.refuse_changed_content(run, config, ready(config))


def test_another_encoding_is_refused(project: Path) -> None:
    """The same files through another tokenizer, say."""
    run, config = begin(project)
    other = DataStats("other", 1, 1, [3], 1, {}, None, "</s>")
    with pytest.raises(RunDirError, match="the data or its encoding has changed"):
        identity.refuse_changed_content(run, config, ready(config, other))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_record_is_put_aside_and_made_anew(project: Path, damage: bytes, capsys) -> None:
    """Settings are in job.json too, data and weights in every checkpoint."""
    run, config = begin(project)
    run.identity.write_bytes(damage)
    identity.refuse_changed_sources(run, config)
    identity.refuse_changed_content(run, config, ready(config))
    assert json.loads(run.identity.read_text())["data"] == "fingerprint"
    assert "put aside as replaced-1-identity.json" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["garbage", "gone", "folder"])
def test_a_damaged_job_json_is_made_up_for(project: Path, damage: str) -> None:
    """By the settings in identity.json: the same job goes on, another one is refused."""
    run, config = begin(project)
    run.claim(config, "text")
    run.job_file.unlink()
    if damage == "garbage":
        run.job_file.write_bytes(b"\0\0")
    elif damage == "folder":
        run.job_file.mkdir()
    with pytest.raises(RunDirError, match=r"train\.seed: 0 before, 1 now"):
        run.claim(load(project / "job.yaml", ["train.seed=1"]), "text")
    run.claim(config, "text")
    assert JobConfig.model_validate_json(run.job_file.read_text()) == config
    run.job_file.write_bytes(b"\0\0")
    run.identity.unlink()
    with pytest.raises(RunDirError, match=r"job\.json is damaged, so it cannot be told whose run"):
        run.claim(config, "text")


@pytest.mark.parametrize("change", [{}, {"data": "x"}, {"data_files": 3}, {"config": {"a": 1}}])
def test_a_record_that_is_not_as_it_was_written_refuses_nothing(
    project: Path, change: dict[str, object], capsys
) -> None:
    """It is JSON, and damaged all the same: it says nothing of what has changed."""
    run, config = begin(project)
    record = json.loads(run.identity.read_text()) | change if change else {}
    run.identity.write_text(json.dumps(record))
    identity.refuse_changed_sources(run, config)
    identity.refuse_changed_content(run, config, ready(config))
    assert "put aside as replaced-1-identity.json" in capsys.readouterr().err


def test_a_job_json_with_one_other_digit_is_made_anew(project: Path) -> None:
    """identity.json, which has a checksum, says that this is the job."""
    run, config = begin(project)
    run.claim(config, "text")
    whole = run.job_file.read_text()
    run.job_file.write_text(whole.replace('"seed": 0', '"seed": 4'))
    run.claim(config, "text")
    assert run.job_file.read_text() == whole
    assert (run.path / "replaced-1-job.json").exists()


def test_a_job_json_that_was_edited_is_no_other_job(project: Path) -> None:
    """A job script starts from job.json: what was changed in it is not trained in silence."""
    run, config = begin(project)
    run.claim(config, "text")
    run.job_file.write_text(run.job_file.read_text().replace('"seed": 0', '"seed": 4'))
    edited = load(run.job_file)
    assert edited.train.seed == 4
    with pytest.raises(RunDirError, match=r"train\.seed: 0 before, 4 now"):
        run.refuse_foreign(edited)
