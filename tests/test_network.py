"""What gloo and NCCL are told of the network, on made-up machines."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_job import hardware, network
from sft_job.errors import HardwareError
from sft_job.hardware import Hardware
from sft_job.workers import Place

A100 = hardware.named("a100-80", 4)
CPU = Hardware("cpu", 1, "Xeon", None, True, 64.0)
MANY = Place(5, 1, 8, 4, "node1", 29500)
ALONE = Place(1, 1, 4, 4, "node1", 29500)

LO = {"127.0.0.1": "lo", "::1": "lo"}
FABRIC = {
    "192.168.122.1": "virbr0",
    "172.17.0.1": "docker0",
    "10.0.0.5": "eth0",
    "10.0.7.5": "eth0",
    "10.1.0.5": "ib0",
    "fe80::5": "eth0",
    "fd00:1::5": "ib0",
}
V6_ONLY = {"::1": "lo", "fe80::9": "eno1", "2001:db8:5::9": "eno1", "fe80::a": "eno2"}


def routes(*known: tuple[str, str]) -> Callable[[str], str | None]:
    """The way to addresses that begin with a prefix, the longest first: prefix, own address."""
    ordered = sorted(known, key=lambda route: -len(route[0]))

    def source(address: str) -> str | None:
        if address in ("127.0.0.1", "127.0.1.1"):
            return "127.0.0.1"
        return next((own for prefix, own in ordered if address.startswith(prefix)), None)

    return source


HOME = routes(("10.0.0.", "10.0.0.5"), ("10.1.", "10.1.0.5"), ("", "10.0.0.5"))


@pytest.mark.parametrize(
    ("master", "own", "source", "expected"),
    [
        (["10.0.0.1"], LO | FABRIC, HOME, "eth0"),
        (["10.1.0.1"], LO | FABRIC, HOME, "ib0"),
        (["172.30.0.9"], LO | FABRIC, HOME, "eth0"),  # by the default route
        # the first machine itself, by any of its addresses
        (["10.0.0.5"], LO | FABRIC, HOME, "eth0"),
        (["10.0.7.5"], LO | FABRIC, HOME, "eth0"),
        (["10.1.0.5"], LO | FABRIC, HOME, "ib0"),
        # by its own name, which /etc/hosts has as a loopback
        (["127.0.1.1"], LO | FABRIC, HOME, "eth0"),
        (["127.0.0.1", "10.1.0.5"], LO | FABRIC, HOME, "ib0"),
        (["::1", "127.0.0.1"], LO | FABRIC, HOME, "eth0"),
        # a machine without a default route
        (["127.0.1.1"], LO | {"10.0.0.5": "eth0", "fe80::5": "eth0"}, routes(), "eth0"),
        (["127.0.1.1"], LO | FABRIC, routes(), None),
        (["10.9.9.9"], LO | FABRIC, routes(), None),
        # the first machine's address is on its loopback interface, as some fabrics route it
        (["10.255.0.5"], LO | FABRIC | {"10.255.0.5": "lo"}, HOME, "eth0"),
        # a public address that no interface has
        (["34.1.2.3"], LO | {"10.0.0.5": "eth0"}, routes(("", "10.0.0.5")), "eth0"),
        # IPv6 alone
        (["2001:db8:5::1"], V6_ONLY, routes(("2001:db8:5:", "2001:db8:5::9")), "eno1"),
        (["2001:db8:5::9"], V6_ONLY, routes(), "eno1"),
        (["::1"], V6_ONLY, routes(("2001:", "2001:db8:5::9")), "eno1"),
        (["::1"], V6_ONLY, routes(), "eno1"),  # the only one that others can reach
        # the name is not known, one machine is not connected
        ([], LO | FABRIC, HOME, "eth0"),
        ([], LO, routes(), None),
    ],
)
def test_the_interface_is_the_one_on_the_way_to_the_first_machine(
    master: list[str],
    own: dict[str, str],
    source: Callable[[str], str | None],
    expected: str | None,
) -> None:
    """Whatever else the machine has: bridges, several addresses, loopbacks."""
    assert network.interface(master, own, source) == expected


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of the fabric; returns NCCL's own file, which is not there."""
    monkeypatch.setattr(network, "_addresses_of", lambda name: ["10.0.0.1"])
    monkeypatch.setattr(network, "_own_addresses", lambda: LO | FABRIC)
    monkeypatch.setattr(network, "_source", HOME)
    monkeypatch.setattr(network, "NCCL_FILES", (str(tmp_path / "nccl.conf"),))
    return tmp_path / "nccl.conf"


@pytest.mark.parametrize(
    ("machine", "given", "told"),
    [
        (A100, {}, {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}),
        (CPU, {}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        (A100, {"NCCL_SOCKET_IFNAME": "^docker"}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        (A100, {"NCCL_SOCKET_IFNAME": ""}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        (A100, {"GLOO_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "=ib0"}),
        (A100, {"GLOO_SOCKET_IFNAME": "ib0,ib1"}, {"NCCL_SOCKET_IFNAME": "=ib0,ib1"}),
        (A100, {"GLOO_SOCKET_IFNAME": "eth0:1"}, {"NCCL_SOCKET_IFNAME": "=eth0"}),
        (A100, {"GLOO_SOCKET_IFNAME": "a", "NCCL_SOCKET_IFNAME": "b"}, {}),
    ],
)
def test_nccl_gets_the_interface_that_gloo_gets(
    host: Path, machine: Hardware, given: dict[str, str], told: dict[str, str]
) -> None:
    """By its very name; what is set stays, and InfiniBand is left to NCCL."""
    assert network.network_environment(MANY, machine, given) == told


def test_what_a_site_has_told_nccl_in_a_file_is_kept(host: Path, tmp_path: Path) -> None:
    """The environment would win over it; a comment tells nothing."""
    host.write_text("# NCCL_SOCKET_IFNAME=eth1\nNCCL_DEBUG=WARN\n")
    assert "NCCL_SOCKET_IFNAME" in network.network_environment(MANY, A100, {})
    host.write_text("NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=bond0\n")
    assert "NCCL_SOCKET_IFNAME" not in network.network_environment(MANY, A100, {})
    host.unlink()
    own = tmp_path / "mine.conf"
    own.write_text("NCCL_SOCKET_IFNAME = bond0\n")
    told = network.network_environment(MANY, A100, {"NCCL_CONF_FILE": str(own)})
    assert told == {"GLOO_SOCKET_IFNAME": "eth0"}


def test_on_one_machine_nothing_is_told(host: Path) -> None:
    """All of its ranks reach each other without a network."""
    assert network.network_environment(ALONE, A100, {}) == {}


def test_without_a_way_nothing_is_told(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process group says what it cannot reach."""
    monkeypatch.setattr(network, "_source", routes())
    assert network.network_environment(MANY, A100, {}) == {}


def test_this_machine_is_read_as_it_is() -> None:
    """Real addresses, with the names of their interfaces; a name that nobody has has none."""
    own = network._own_addresses()
    assert own["127.0.0.1"] in {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1" in network._addresses_of("localhost")
    assert network._source("127.0.0.1") == "127.0.0.1"
    assert network._addresses_of("no-such-host.invalid") == []


# --- links between GPUs ------------------------------------------------------------------------


def cards(name: str, count: int, driver: str | None) -> Hardware:
    return dataclasses.replace(
        hardware.named("rtx-4090", count), name=f"NVIDIA {name}", driver=driver
    )


@pytest.mark.parametrize(
    ("machine", "given", "told"),
    [
        (cards("GeForce RTX 4090", 2, "535.183.01"), {}, "1"),
        (cards("GeForce RTX 4090", 2, "525.60.13"), {}, "1"),
        (cards("GeForce RTX 4070 Ti SUPER", 8, "550.40.06"), {}, "1"),
        (cards("GeForce RTX 4090 D", 2, "545.23.08"), {"NCCL_P2P_DISABLE": "1"}, "1"),
        (
            cards("GeForce RTX 4090", 2, "535.183.01"),
            dict.fromkeys(network.PEER_VARIABLES, "0"),
            None,
        ),
        (cards("GeForce RTX 4090", 2, "550.40.07"), {}, None),
        (cards("GeForce RTX 4090", 2, "550.54.14"), {}, None),
        (cards("GeForce RTX 4090", 2, "580.65"), {}, None),
        (cards("GeForce RTX 4090", 2, None), {}, None),  # no nvidia-smi: accelerate asks nobody
        # One of several that nvidia-smi shows, and a card that only sounds like one.
        (cards("GeForce RTX 4090", 1, "535.183.01"), {}, "0"),
        (cards("Quadro RTX 4000", 2, "535.183.01"), {}, "0"),
        (cards("A100-SXM4-80GB", 8, "535.183.01"), {}, "0"),
    ],
)
def test_a_link_that_an_old_driver_claims_is_not_used(
    machine: Hardware, given: dict[str, str], told: str | None
) -> None:
    """accelerate refuses the machine unless both variables are set; 0 is what NCCL does anyway."""
    missing = [name for name in network.PEER_VARIABLES if name not in given]
    expected = {} if told is None else dict.fromkeys(missing, told)
    assert network.network_environment(ALONE, machine, given) == expected


def test_several_machines_with_such_a_driver_are_refused(host: Path) -> None:
    """Exchanging over TCP without InfiniBand is the user's choice."""
    machine = cards("GeForce RTX 4090", 4, "535.183.01")
    with pytest.raises(
        HardwareError, match=r"(?s)driver 535\.183\.01 claims links.*550\.40\.07 or newer"
    ):
        network.network_environment(MANY, machine, {})
    chosen = dict.fromkeys(network.PEER_VARIABLES, "1")
    assert "GLOO_SOCKET_IFNAME" in network.network_environment(MANY, machine, chosen)


def test_accelerate_accepts_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own check, on what nvidia-smi would show: the driver and the cards that we act upon."""
    import inspect

    from accelerate import state
    from accelerate.utils import environment

    for names in (["NVIDIA GeForce RTX 4090"] * 2, ["Quadro RTX 4000"] * 2):
        monkeypatch.setattr(environment, "get_gpu_info", lambda names=names: (names, len(names)))
        for driver, good in (("550.40.06", False), (network.PEER_DRIVER, True)):
            monkeypatch.setattr(environment, "get_driver_version", lambda driver=driver: driver)
            assert environment.check_cuda_p2p_ib_support() is good
    source = inspect.getsource(state.PartialState.__init__)
    for name in network.PEER_VARIABLES:
        assert f'"{name}" not in os.environ' in source
