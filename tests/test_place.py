"""Whether a process is one of several, and which: what is believed of its environment."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_job import place
from sft_job.config import load
from sft_job.errors import LaunchError, SlurmError
from sft_job.place import disregard_others, find_place, refuse_another_size
from sft_job.workers import Place
from tests.runs import ROOT, make_conversations, make_job

GIVEN = Place(1, 1, 2, 2, "127.0.0.1", 29500).environment()
OURS = GIVEN | {"SFT_JOB_LAUNCHED": "41", "SFT_JOB_ATTEMPT": "1"}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
BATCH_SHELL = {
    "SLURM_JOB_ID": "41234567",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "node[1-2]",
}
STEP = BATCH_SHELL | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
}
ALONE = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}  # fmt: skip
# As the job script leaves it for its ranks.
SCRIPT = STEP | {
    "SFT_JOB_ATTEMPT": "3", "SFT_JOB_WORLD_SIZE": "8", "MASTER_ADDR": "node1",
    "MASTER_PORT": "21000",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm has started this process, at no terminal."""
    monkeypatch.setattr(place, "_under_slurm", lambda: True)
    monkeypatch.setattr(place, "_typed_into_a_shell", lambda environ: False)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that writes down its arguments and answers with two hosts."""
    script = tmp_path / "scontrol"
    script.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/asked'\necho node1; echo node2\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "asked"


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


# --- launchers ------------------------------------------------------------------------------


def test_the_place_that_our_launcher_gives_is_found() -> None:
    """What is written into the environment is what is read from it."""
    assert find_place(OURS) == Place(1, 1, 2, 2, "127.0.0.1", 29500)


def test_the_place_that_torchrun_gives_is_found() -> None:
    """On the second node of two; also one process alone."""
    assert find_place(TORCHRUN) == Place(5, 1, 8, 4, "node1", 29400)
    alone = find_place(ALONE | {"TORCHELASTIC_RUN_ID": "none"})
    assert alone is not None
    assert alone.world_size == 1


def test_the_place_that_deepspeed_gives_is_found() -> None:
    """It calls the processes of a machine LOCAL_SIZE."""
    environ = without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
    assert find_place(environ | {"CROSS_SIZE": "2", "LOCAL_SIZE": "4"}) == Place(
        5, 1, 8, 4, "node1", 29400
    )


def test_without_local_world_size_all_ranks_are_here() -> None:
    """Other launchers do not set it."""
    found = find_place(without(TORCHRUN, "LOCAL_WORLD_SIZE"))
    assert found is not None
    assert found.local_world_size == 8


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_place_given_in_part_is_refused(name: str) -> None:
    """The missing name is said; guessing would start a second world."""
    expected = f"RANK and WORLD_SIZE are set, but not {name}\n  -> start with torchrun or srun"
    with pytest.raises(LaunchError, match=expected):
        find_place(without(TORCHRUN, name))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_without_a_world_is_a_place_in_part(name: str) -> None:
    """A worker that takes itself for the launcher would start workers of its own."""
    with pytest.raises(LaunchError, match=name):
        find_place(without(TORCHRUN, name))


def test_variables_of_launchers_win_over_those_of_slurm() -> None:
    """torchrun inside a SLURM step, or our launcher inside one."""
    found = find_place(STEP | TORCHRUN)
    assert found is not None
    assert found.master_addr == "node1"
    assert find_place(STEP | OURS) == find_place(OURS)


def test_started_by_hand() -> None:
    """As torch's documentation has it; nothing speaks against it."""
    assert find_place(GIVEN) == Place(1, 1, 2, 2, "127.0.0.1", 29500)
    assert find_place(BATCH_SHELL | GIVEN) == find_place(GIVEN)


def test_mpirun() -> None:
    """Its processes are ranks if somebody gives them the rest; else each would be a launcher. In
    Slurm it has one task for each node."""
    for mpi in (
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
    ):
        for slurm in ({}, STEP, STEP | {"SLURM_STEP_NUM_TASKS": "1"}):
            assert find_place(slurm | mpi | GIVEN) == find_place(GIVEN)
            with pytest.raises(LaunchError, match="mpirun has started several processes"):
                find_place(slurm | mpi)
            with pytest.raises(
                LaunchError, match=r"RANK is 0 and WORLD_SIZE is 1, but .*RANK is 1"
            ):
                find_place(slurm | mpi | ALONE)
    assert find_place({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None
    by_srun = {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert find_place(STEP | by_srun | {"MASTER_ADDR": "a"}) == find_place(
        STEP | {"MASTER_ADDR": "a"}
    )


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH_SHELL,
        BATCH_SHELL | {"SLURM_STEP_NUM_TASKS": "1"},
        BATCH_SHELL | {"SLURM_STEP_NUM_TASKS": "1"} | ALONE,
        {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0"},
    ],
    ids=["nothing", "batch shell", "step of one task", "and said twice", "rendezvous alone",
         "left by torchrun"],
)  # fmt: skip
def test_nobody_is_a_worker_without_a_place(environ: dict[str, str]) -> None:
    """SLURM sets most of its variables for the batch script too, which is a launcher."""
    assert find_place(environ) is None


# --- what a shell has kept ------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, BATCH_SHELL], ids=["shell", "batch shell"])
def test_a_world_of_one_that_a_shell_has_kept_is_refused(environ: dict[str, str]) -> None:
    """The process would train alone, and leave the other GPUs idle."""
    with pytest.raises(LaunchError) as caught:
        find_place(environ | ALONE)
    assert "a shell has kept them" in str(caught.value)
    assert "-> unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT; sft-job" in str(
        caught.value
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kept", [ALONE, GIVEN, GIVEN | {"WORLD_SIZE": "8"}])
def test_a_slurm_step_with_several_tasks_is_not_overruled(kept: dict[str, str]) -> None:
    """Every task would take the same rank."""
    with pytest.raises(LaunchError, match=r"RANK is \d .*but this is task 5 of the 8 of a Slurm"):
        find_place(STEP | kept)


def test_what_repeats_slurm_may_say_where_to_meet() -> None:
    """As hooks of container images do."""
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    meet = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_place(STEP | said | meet) == Place(5, 1, 8, 4, "10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "-1"), ("RANK", "8"), ("WORLD_SIZE", "1e3"), ("WORLD_SIZE", "²"),
     ("WORLD_SIZE", "0"), ("LOCAL_RANK", "4"), ("LOCAL_WORLD_SIZE", "9"), ("MASTER_PORT", "65536"),
     ("MASTER_PORT", "http"), ("WORLD_SIZE", "9" * 5000)],
)  # fmt: skip
def test_numbers_that_cannot_be(name: str, value: str) -> None:
    """One message with the name, also of a launcher that is trusted."""
    for environ in (TORCHRUN, TORCHRUN | {"SFT_JOB_LAUNCHED": "41"}):
        with pytest.raises(LaunchError, match=f"{name} is "):
            find_place(environ | {name: value})


def test_the_first_process_of_a_job_is_told_by_its_own_launcher_alone() -> None:
    """What is left of our launcher or job script is no place."""
    with pytest.raises(LaunchError, match="SFT_JOB_ATTEMPT is set, as in a job script"):
        find_place({"SFT_JOB_ATTEMPT": "1"})
    with pytest.raises(LaunchError, match=r"LAUNCHED is set, but not RANK(.|\n)*unset SFT_JOB_LAU"):
        find_place({"SFT_JOB_LAUNCHED": "41"})


# --- a Slurm step ---------------------------------------------------------------------------


def test_a_slurm_step_with_several_tasks_is_a_place(scontrol: Path) -> None:
    """One task per rank; rendezvous on the first node, at a port made from the job's number."""
    assert find_place(STEP) == Place(5, 1, 8, 4, "node1", 20000 + 41234567 % 12768)
    assert scontrol.read_text() == "show hostnames node[1-2]\n"


def test_a_rendezvous_that_is_given_wins_in_a_slurm_step() -> None:
    """A site may know better; then scontrol is not needed."""
    found = find_place(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert found is not None
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize("job", ["1", "19999", "20000", "99999999"])
def test_the_port_of_a_slurm_step_is_one_that_users_may_bind(job: str) -> None:
    """Above the system's ports and below the ephemeral ones, whatever the job's number."""
    found = find_place(STEP | {"SLURM_JOB_ID": job, "MASTER_ADDR": "a"})
    assert found is not None
    assert 20000 <= found.master_port < 40000


@pytest.mark.parametrize(("node", "rank", "local", "here"), [(0, 2, 2, 3), (1, 3, 0, 1)])
def test_nodes_with_different_numbers_of_tasks(node: int, rank: int, local: int, here: int) -> None:
    """Each is told its own."""
    environ = STEP | {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1", "MASTER_ADDR": "a",
    }  # fmt: skip
    found = find_place(environ)
    assert found is not None
    assert (found.local_rank, found.local_world_size) == (local, here)


@pytest.mark.parametrize("environ", [STEP, SCRIPT])
@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_PROCID", "8"), ("SLURM_PROCID", "x"), ("SLURM_LOCALID", None), ("SLURM_LOCALID", "4"),
     ("SLURM_STEP_NUM_TASKS", "many"), ("SLURM_STEP_TASKS_PER_NODE", "4(x"),
     ("SLURM_STEP_NODELIST", None), ("SLURM_JOB_ID", "j")],
)  # fmt: skip
def test_a_step_told_in_part_or_wrongly(
    environ: dict[str, str], name: str, value: str | None
) -> None:
    """As by a container that keeps some variables out."""
    changed = without(environ, name) | ({} if value is None else {name: value})
    with pytest.raises(LaunchError, match=name.removeprefix("SLURM_")):
        find_place(changed)


def test_a_task_of_the_job_script_listens_to_slurm_alone() -> None:
    """Whatever a container or a shell puts beside it."""
    expected = Place(5, 1, 8, 4, "node1", 21000)
    assert find_place(SCRIPT) == expected
    others = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x",
              "CROSS_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0",
              "PMI_SIZE": "1", "PMI_RANK": "0"}  # fmt: skip
    assert find_place(SCRIPT | others) == expected
    one = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
           "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
           "SFT_JOB_WORLD_SIZE": "1"}  # fmt: skip
    assert find_place(SCRIPT | one) == Place(0, 0, 1, 1, "node1", 21000)


def test_the_job_script_and_its_step_have_one_size() -> None:
    with pytest.raises(LaunchError, match=r"has started 16 task\(s\), but this step has 8"):
        find_place(SCRIPT | {"SFT_JOB_WORLD_SIZE": "16"})


def test_the_job_file_and_the_step_have_one_size(tmp_path: Path) -> None:
    """Elsewhere the job file says nothing of ranks."""
    data = make_conversations(tmp_path / "data.json", 1)
    config = load(make_job(tmp_path, "x/y", data, slurm={"nodes": 2, "gpus_per_node": 8}))
    found = find_place(SCRIPT)
    assert found is not None
    with pytest.raises(LaunchError, match=r"2 node\(s\) with 8 task\(s\) each, 16 in all, .* 8\n"):
        refuse_another_size(found, config, SCRIPT)
    refuse_another_size(Place(0, 0, 16, 8, "a", 1), config, SCRIPT)
    refuse_another_size(found, config, STEP)
    refuse_another_size(found, config, SCRIPT | OURS)


# --- who has started it, as the machine shows ------------------------------------------------


def test_a_slurm_task_whose_container_hides_slurm_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each of its tasks would start the whole job; outside of Slurm there is nothing to hide.
    The processes themselves are looked at in tests/images/test_slurm.py."""
    inside = {"APPTAINER_CONTAINER": "/images/sft_job.sif"}
    with pytest.raises(SlurmError, match="each task would take itself for the whole job"):
        find_place(inside)
    assert find_place(inside | {"SLURM_JOB_ID": "7"}) is None
    for seen in (False, None):
        monkeypatch.setattr(place, "_under_slurm", lambda seen=seen: seen)
        assert find_place(inside) is None


@pytest.mark.parametrize(("seen", "refused"), [(True, False), (None, False), (False, True)])
def test_variables_of_an_old_step_are_refused_where_the_machine_shows_it(
    seen: bool | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_under_slurm", lambda: seen)
    environ = STEP | {"MASTER_ADDR": "a"}
    if refused:
        with pytest.raises(LaunchError, match="no Slurm step has started this process"):
            find_place(environ)
    else:
        assert find_place(environ) is not None


def test_the_shell_of_a_task_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun -n 2 --pty bash`: nobody is at the other tasks."""
    monkeypatch.setattr(place, "_typed_into_a_shell", lambda environ: True)
    assert find_place(STEP) is None
    assert find_place(SCRIPT) is not None


ASK = """
import os, sys
from sft_job import place
environ = dict(os.environ)
if "itself" in sys.argv:
    environ["SLURM_TASK_PID"] = str(os.getpid())
print("answer", place._typed_into_a_shell(environ), flush=True)
"""


def at_a_terminal(*command: str, typed: str = "") -> str:
    """What stands on a terminal whose session a command leads, into which this is typed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    os.write(terminal, typed.encode())
    said = b""
    while True:
        try:
            part = os.read(terminal, 1000)
        except OSError:  # Linux's way to say that nobody holds the other end
            break
        if not part:
            break
        said += part
    os.waitpid(pid, 0)
    os.close(terminal)
    return said.decode()


@pytest.fixture
def as_slurmstepd() -> Iterator[None]:
    """This process has the name of what starts Slurm's tasks."""
    name = Path("/proc/self/comm")
    before = name.read_text()
    name.write_text("slurmstepd")
    yield
    name.write_text(before.strip())


def test_who_types_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_slurmstepd: None
) -> None:
    """By the terminal and the process group, which a shell for people makes for each command."""
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    ask = [sys.executable, str(script)]
    words = shlex.join(ask)
    task = "export SLURM_TASK_PID=$$; "
    shell = ("/bin/bash", "--norc", "-i")
    for said, expected in (
        (at_a_terminal(*ask, "itself"), False),
        (at_a_terminal("/bin/bash", "-c", f"{task}{words}; true"), False),
        (at_a_terminal(*shell, "-c", f"{task}{words}; true"), False),
        (at_a_terminal(*shell, typed=f"{task}{words}; setsid -w {words}; exit\n"), True),
    ):
        assert f"answer {expected}" in said, said
        assert f"answer {not expected}" not in said, said
    detached = subprocess.run(ask, capture_output=True, text=True, start_new_session=True)
    assert detached.stdout.strip() == "answer False", detached.stderr


# --- what others have left for accelerate and torch -------------------------------------------


LEFT = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true",
    "FSDP_OFFLOAD_PARAMS": "true", "PARALLELISM_CONFIG_TP_SIZE": "2", "PMI_SIZE": "1",
    "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1",
}  # fmt: skip
STORE = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
KEPT = {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PMIRROR": "x"}


@pytest.mark.parametrize("signs", [OURS, SCRIPT], ids=["launcher", "job script"])
def test_what_others_have_left_is_forgotten_by_ranks(signs: dict[str, str]) -> None:
    """Another precision, another engine, a store of torchrun that nobody serves."""
    environ = signs | LEFT | STORE | KEPT
    disregard_others(environ)
    assert environ == signs | KEPT


def test_torchrun_keeps_what_is_its_own() -> None:
    environ = TORCHRUN | LEFT | STORE | KEPT
    disregard_others(environ)
    assert environ == TORCHRUN | STORE | KEPT
