"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# --- the torch-free tests ----------------------------------------------------------------

# No wall-clock limits and no luck: the same examples in every run, nothing kept between runs.
settings.register_profile(
    "repeatable",
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """The smallest job: three lines, one conversation, the bundled model."""
    (tmp_path / "conversations.json").write_text(
        '[{"id": "a", "conversations": [{"from": "human", "value": "Who are you?"},'
        ' {"from": "gpt", "value": "Quill."}]}]\n'
    )
    path = tmp_path / "job.yaml"
    path.write_text(
        'model: {path: "bundled:smollm2-135m"}\n'
        "data: {train: [conversations.json]}\n"
        "run: {dir: run}\n"
    )
    return path
