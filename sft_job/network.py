"""The way from this machine to the others, and between its GPUs, as gloo and NCCL must be told.

Only what nobody has told them: variables of the user's, and NCCL's own files, stay what they are.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from sft_job.errors import HardwareError
from sft_job.hardware import Hardware
from sft_job.workers import Place

# Where NCCL reads settings that the environment does not have.
NCCL_FILES = ("~/.nccl.conf", "/etc/nccl.conf")

# GeForce RTX 40 cards reach each other through the host alone; drivers before this one said
# otherwise. accelerate 1.15 ends with a bare NotImplementedError (utils/environment.py,
# check_cuda_p2p_ib_support) where nvidia-smi shows several cards with RTX 40 in their names, also
# hidden ones and an RTX 4000, with such a driver, unless both variables are set, to whatever.
PEER_DRIVER = "550.40.07"
PEER_VARIABLES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")


def network_environment(
    place: Place, hardware: Hardware, environ: Mapping[str, str]
) -> dict[str, str]:
    """What gloo and NCCL must be told of the way between the machines, and have not been told.

    gloo would take the address of the host's own name, on many machines 127.0.1.1; NCCL the first
    interface that is not a loopback or Docker's, be it a virtual bridge or a card without a route.
    Both get the one over which this machine and the first one reach each other. NCCL uses it for
    the first contact, and for data where there is nothing faster: InfiniBand stays what it is.

    Raises:
        HardwareError: as `peer_environment`.
    """
    found = peer_environment(hardware, place.world_size > place.local_world_size, environ)
    if place.world_size == place.local_world_size:
        return found
    gloo = environ.get("GLOO_SOCKET_IFNAME") or interface(
        _addresses_of(place.master_addr), _own_addresses(), _source
    )
    if gloo is None:
        return found  # the process group will say what cannot be reached
    if "GLOO_SOCKET_IFNAME" not in environ:
        found["GLOO_SOCKET_IFNAME"] = gloo
    told = "NCCL_SOCKET_IFNAME" in environ or "NCCL_SOCKET_IFNAME" in _nccl_settings(environ)
    if hardware.device == "cuda" and not told:
        # = takes the very name, else it is the beginning of one. A further address of a card
        # (eth0:1) is none of its own for NCCL, which reads a port there.
        found["NCCL_SOCKET_IFNAME"] = "=" + ",".join(
            dict.fromkeys(name.partition(":")[0] for name in gloo.split(","))
        )
    return found


def interface(
    master: Sequence[str], own: Mapping[str, str], source: Callable[[str], str | None]
) -> str | None:
    """The network interface over which this machine and the first one reach each other.

    Args:
        master: addresses of the first machine, as its name is resolved here, the best first.
        own: this machine's addresses, each with the name of its interface.
        source: the own address from which another one would be reached; None: there is no way.

    Returns:
        None where there is no way, or several and nothing to choose by.
    """
    loops = {name for address, name in own.items() if ipaddress.ip_address(address).is_loopback}
    usable = {address: name for address, name in own.items() if name not in loops}
    for address in master:
        # On the first machine itself, the way to its address is the loopback; its address is not.
        found = usable.get(address) or usable.get(source(address) or "")
        if found is not None:
            return found
    # The first machine's own name, as many distributions write it into /etc/hosts: the way to
    # everywhere else decides. These addresses are nobody's (RFC 5737, 3849).
    for nobody in ("203.0.113.1", "2001:db8::1"):
        if (found := usable.get(source(nobody) or "")) is not None:
            return found
    names = {n for a, n in usable.items() if not ipaddress.ip_address(a).is_link_local}
    return names.pop() if len(names) == 1 else None


def _addresses_of(host: str) -> list[str]:
    """IPv4 first: so do gloo and NCCL, of the addresses of an interface."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in ordered))


def _own_addresses() -> dict[str, str]:
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    }


def _source(address: str) -> str | None:
    """Connecting a datagram socket sends nothing, and asks the kernel for the way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def _nccl_settings(environ: Mapping[str, str]) -> set[str]:
    """Names in NCCL's own files, which it reads for what the environment does not have."""
    names = set()
    for file in (environ.get("NCCL_CONF_FILE"), *NCCL_FILES):
        try:
            text = Path(os.path.expanduser(file)).read_text(errors="replace") if file else ""
        except OSError:
            continue
        lines = (line.strip() for line in text.splitlines())
        names |= {line.partition("=")[0].strip() for line in lines if line[:1] not in ("", "#")}
    return names


# --- between GPUs -----------------------------------------------------------------------------


def peer_environment(
    hardware: Hardware, several_machines: bool, environ: Mapping[str, str]
) -> dict[str, str]:
    """What NCCL and accelerate must be told of links that a driver claims and cards lack.

    On one machine nothing is lost: the cards have no other way, and InfiniBand is not used.

    Raises:
        HardwareError: on several machines, where the choice is slow or broken, and the user's.
    """
    missing = [name for name in PEER_VARIABLES if name not in environ]
    if hardware.driver is None or not missing or not _older(hardware.driver, PEER_DRIVER):
        return {}
    if hardware.count == 1 or not re.search(r"GeForce RTX 40\d\d", hardware.name):
        return dict.fromkeys(missing, "0")  # NCCL's defaults
    if several_machines:
        raise HardwareError(
            f"the driver {hardware.driver} claims links between {hardware.name} cards that they "
            "do not have, and NCCL would hang in them",
            remedy=f"have the driver updated to {PEER_DRIVER} or newer, or set "
            f"{' and '.join(f'{name}=1' for name in missing)}: machines then exchange over TCP",
        )
    return dict.fromkeys(missing, "1")


def _older(version: str, than: str) -> bool:
    mine, theirs = ([int(n) for n in re.findall(r"\d+", text)] for text in (version, than))
    return mine < theirs
