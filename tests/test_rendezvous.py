"""How processes find each other: within a limit, with a cause, and stopped when asked."""

import os
import socket
import threading
from pathlib import Path

import pytest

from sft_job import rendezvous
from sft_job.cli import StopRequest
from sft_job.errors import Interrupted, WorkerError
from sft_job.rendezvous import Rendezvous
from sft_job.workers import Place


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in (rendezvous.LISTENER, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def busy():
    """A port that somebody else has."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def place(rank: int, size: int, port: int, host: str = "127.0.0.1") -> Place:
    return Place(rank, rank, size, size, host, port)


def meet(places: list[Place], **options) -> list[object]:
    """What each rank has in the end: its store, or its error."""
    results: dict[int, object] = {}

    def run(one: Place) -> None:
        settings = {"limit_s": 60.0, "stop": StopRequest(), **options}
        try:
            results[one.rank] = Rendezvous(one, **settings).store()
        except Exception as error:
            results[one.rank] = error

    threads = [threading.Thread(target=run, args=(one,)) for one in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[one.rank] for one in places]


def talk(stores: list) -> None:
    """They have the same store."""
    stores[0].set("word", "heard")
    assert [store.get("word") for store in stores] == [b"heard"] * len(stores)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def test_ranks_meet_at_the_port_of_the_first() -> None:
    """Three of them."""
    port = free_port()
    talk(meet([place(rank, 3, port) for rank in range(3)]))


def test_a_port_that_somebody_has_is_left_to_them(busy: int, tmp_path: Path) -> None:
    """Rank 0 takes another and writes down which, where all ranks look."""
    stores = meet([place(r, 2, busy) for r in range(2)], published=tmp_path / "rendezvous")
    talk(stores)
    assert int((tmp_path / "rendezvous").read_text()) != busy


def test_a_port_that_somebody_has_is_an_error_where_nothing_can_be_written_down(busy: int) -> None:
    """The number, the reason and the way out."""
    (error,) = meet([place(0, 1, busy)])
    assert isinstance(error, WorkerError)
    assert f"port {busy} of this machine cannot be used: Address already in use" in str(error)
    assert str(error).endswith("-> set MASTER_PORT to another one")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_means_nothing_is_said_at_once(rank: int) -> None:
    """Not after half an hour of tries."""
    (error,) = meet([place(rank, 2, 1234, "no-such-host.invalid")])
    assert isinstance(error, WorkerError)
    assert "the name of the first machine, 'no-such-host.invalid', means nothing here" in str(error)


def test_the_ranks_that_have_not_come_are_named() -> None:
    """By the first, when the limit is reached."""
    (error,) = meet([place(0, 4, free_port())], limit_s=0.5)
    assert isinstance(error, WorkerError)
    said = "did not find each other within 0.5 s: 3 of 4 have not come (rank 1, 2, 3)"
    assert said in str(error)
    assert "run.start_timeout_s is the limit" in str(error)


def test_a_first_rank_that_never_comes_is_an_error_within_the_limit() -> None:
    """Where the others look for it is said."""
    port = free_port()
    (error,) = meet([place(1, 2, port)], limit_s=0.5)
    assert isinstance(error, WorkerError)
    assert f"127.0.0.1:{port} does not answer" in str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_is_obeyed_while_they_look_for_each_other(rank: int) -> None:
    """torch waits in C++, where no signal's handler runs."""
    stop = StopRequest()
    stop.request("signal SIGTERM")
    (error,) = meet([place(rank, 2, free_port())], stop=stop)
    assert isinstance(error, Interrupted)
    assert str(error) == "interrupted by signal SIGTERM while the processes found each other"


def test_another_attempts_store_is_not_ours(tmp_path: Path) -> None:
    """Two attempts at one port keep apart by their names."""
    port = free_port()
    whole = meet([place(rank, 2, port) for rank in range(2)], name="job/1")
    (error,) = meet([place(1, 2, port)], name="job/2", limit_s=0.5)
    assert isinstance(error, WorkerError)
    talk(whole)


def test_rank_0_takes_the_socket_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the launcher; no port is looked for."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    monkeypatch.setenv(rendezvous.LISTENER, str(server.detach()))
    (first,) = meet([place(0, 1, port)])
    monkeypatch.delenv(rendezvous.LISTENER)
    first.set("word", "heard")
    assert os.environ.get(rendezvous.LISTENER) is None
