"""What a machine has. Driver, device nodes and torch are all made up here."""

import copy
import dataclasses
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sft_job
from sft_job import hardware
from sft_job.errors import HardwareError
from sft_job.hardware import GPUS, Gpu, Hardware, detect, find, named

A100_ROW = "NVIDIA A100-SXM4-80GB, 81920, 8.0, GPU-{}, 570.86.15, Disabled"
V100_ROW = "Tesla V100-SXM2-32GB, 32768, 7.0, GPU-{}, 570.86.15, [N/A]"
T4_ROW = "Tesla T4, 15360, 7.5, GPU-{}, 570.86.15, [N/A]"
ON_CPU = "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running."
)


class Machine:
    """A made-up machine in a directory, empty at first."""

    def __init__(self, root: Path) -> None:
        self.bin, self.dev, self.pci = root / "bin", root / "dev", root / "pci"
        self.kernel_driver, self.modules = root / "version", root / "modules"
        self.asked_torch = root / "asked_torch"
        for folder in (self.bin, self.dev, self.pci, self.modules):
            folder.mkdir()

    def has_nodes(self, *names: str) -> None:
        for name in names:
            (self.dev / name).touch()

    def has_pci_device(self, vendor: str, kind: str) -> None:
        device = self.pci / f"0000:00:{len(list(self.pci.iterdir())):02x}.0"
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def has_nvidia_smi(
        self, *rows: str, code: int = 0, error: str = "", topology: str | None = None
    ) -> None:
        """It prints rows and topology, or fails; without a topology that question fails."""
        for name, text in (("rows", "".join(f"{row}\n" for row in rows)), ("error", error)):
            (self.bin / name).write_text(text)
        asked = "exit 1"
        if topology is not None:
            (self.bin / "topology").write_text(topology)
            asked = f"/bin/cat '{self.bin}/topology'; exit 0"
        self.has_script(
            f"case $1 in topo) {asked};; esac\n"
            f"/bin/cat '{self.bin}/rows'; /bin/cat '{self.bin}/error' >&2; exit {code}\n"
        )

    def has_script(self, text: str, interpreter: str = "/bin/sh") -> None:
        script = self.bin / "nvidia-smi"
        script.write_text(f"#!{interpreter}\n{text}")
        script.chmod(0o755)

    def has_torch(self, *gpus: tuple[str, float, int, int], broken: str = "") -> str:
        """A torch that child processes import; returns its source."""
        source = TORCH.format(asked=str(self.asked_torch), gpus=gpus, broken=broken or "pass")
        (self.modules / "torch.py").write_text(source)
        return source


# Like the real one: says something on import, applies CUDA_VISIBLE_DEVICES, raises without GPUs.
TORCH = """
import os
from pathlib import Path
from types import SimpleNamespace as Namespace

print("a greeting")
Path({asked!r}).touch()
GPUS = list({gpus!r})
if "CUDA_VISIBLE_DEVICES" in os.environ:
    GPUS = [GPUS[int(index)] for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]

def init():
    {broken}

def get_device_properties(index):
    name, gib, major, minor = GPUS[index]
    return Namespace(name=name, total_memory=int(gib * 2**30), major=major, minor=minor)

cuda = Namespace(
    init=init, device_count=lambda: len(GPUS), get_device_properties=get_device_properties
)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """No driver, no devices, no torch that is loaded already."""
    machine = Machine(tmp_path)
    monkeypatch.setattr(hardware, "DEVICES", machine.dev)
    monkeypatch.setattr(hardware, "PCI", machine.pci)
    monkeypatch.setattr(hardware, "KERNEL_DRIVER", machine.kernel_driver)
    monkeypatch.setenv("PATH", str(machine.bin))
    package = Path(sft_job.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(machine.modules), str(package)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return machine


def fault(call, *arguments) -> str:
    """The whole text of the refusal."""
    with pytest.raises(HardwareError) as caught:
        call(*arguments)
    return str(caught.value)


# --- the table -----------------------------------------------------------------------------

# What nvidia-smi says on real machines: product, MiB. The second lines of a key: other drivers,
# ECC switched, and what torch sees.
REAL = [
    ("Tesla V100-SXM2-16GB", 16384, "v100-16"),
    ("Tesla V100-SXM2-16GB", 16160, "v100-16"),
    ("Tesla V100-SXM2-32GB", 32768, "v100-32"),
    ("Tesla V100-SXM2-32GB", 32501, "v100-32"),
    ("Tesla V100-PCIE-16GB", 16384, "v100-pcie-16"),
    ("Tesla V100-PCIE-32GB", 32768, "v100-pcie-32"),
    ("Tesla V100S-PCIE-32GB", 32768, "v100s"),
    ("Tesla T4", 15360, "t4"),
    ("Tesla T4", 14913, "t4"),
    ("NVIDIA TITAN RTX", 24576, "titan-rtx"),
    ("TITAN RTX", 24220, "titan-rtx"),
    ("Quadro RTX 6000", 24576, "quadro-rtx-6000"),
    ("Quadro RTX 8000", 49152, "quadro-rtx-8000"),
    ("NVIDIA GeForce RTX 2080 Ti", 11264, "rtx-2080ti"),
    ("GeForce RTX 2080 Ti", 11019, "rtx-2080ti"),
    ("NVIDIA A100-SXM4-40GB", 40960, "a100-40"),
    ("A100-SXM4-40GB", 40536, "a100-40"),
    ("NVIDIA A100-SXM4-80GB", 81920, "a100-80"),
    ("NVIDIA A100-SXM4-80GB", 81050, "a100-80"),
    ("NVIDIA A100-PCIE-40GB", 40960, "a100-pcie-40"),
    ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80"),
    ("NVIDIA A800-SXM4-80GB", 81920, "a800-80"),
    ("NVIDIA A30", 24576, "a30"),
    ("NVIDIA A10", 23028, "a10"),
    ("NVIDIA A10G", 23028, "a10g"),
    ("NVIDIA A10G", 22731, "a10g"),
    ("NVIDIA A40", 46068, "a40"),
    ("NVIDIA A40", 49140, "a40"),
    ("NVIDIA RTX A5000", 24564, "a5000"),
    ("NVIDIA RTX A6000", 49140, "a6000"),
    ("NVIDIA RTX A6000", 46068, "a6000"),
    ("NVIDIA GeForce RTX 3090", 24576, "rtx-3090"),
    ("NVIDIA L4", 23034, "l4"),
    ("NVIDIA L40", 46068, "l40"),
    ("NVIDIA L40S", 46068, "l40s"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx6000-ada"),
    ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
    ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
    ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
    ("NVIDIA H100 NVL", 95830, "h100-nvl"),
    ("NVIDIA H800", 81559, "h800"),
    ("NVIDIA H20", 97871, "h20"),
    ("NVIDIA H200", 143771, "h200"),
    ("NVIDIA H200 NVL", 143771, "h200-nvl"),
    ("NVIDIA GH200 480GB", 97871, "gh200"),
    ("NVIDIA GH200 120GB", 97871, "gh200"),
    ("NVIDIA GH200 144G HBM3e", 146831, "gh200-144"),
    ("NVIDIA B200", 183359, "b200"),
    ("NVIDIA GB200", 189471, "gb200"),
    ("NVIDIA B300 SXM6 AC", 275040, "b300"),
    ("NVIDIA GeForce RTX 5090", 32607, "rtx-5090"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "rtx-pro-6000"),
]


@pytest.mark.parametrize(("name", "mib", "key"), REAL)
def test_a_product_is_known_by_the_drivers_name_and_memory(name, mib, key):
    """Name without maker and memory within 8 % find the row, and no other."""
    assert find(name, mib / 1024) is GPUS[key]


def test_every_row_can_be_found():
    """A row that no driver's answer leads to would be dead."""
    assert {key for _, _, key in REAL} == set(GPUS)
    names = {name.removeprefix("NVIDIA ") for name, _, _ in REAL}
    assert names == {name for gpu in GPUS.values() for name in gpu.names}


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA GeForce RTX 4090 D", 24564),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376),
        ("NVIDIA GeForce RTX 4090", 49140),  # rebuilt with twice the memory
        ("NVIDIA GeForce RTX 3080", 10240),
        ("NVIDIA A100-SXM-64GB", 65536),  # more multiprocessors than the others
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864),
        ("NVIDIA A100-SXM4-40GB", 4864),
        ("NVIDIA A100-SXM4-40GB", 36864),
        ("GRID A100X-40C", 40960),
        ("NVIDIA A10-24Q", 24576),
        ("NVIDIA H100", 81559),
        ("NVIDIA H20-3e", 143771),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887),
        ("NVIDIA GB300", 284208),
        ("Tesla P100-PCIE-16GB", 16384),
        ("", 16384),
    ],
)
def test_a_stranger_stays_unknown(name, mib):
    """Something like a known product is another product: never somebody else's numbers."""
    assert find(name, mib / 1024) is None


def test_a_product_of_unknown_memory_is_unknown():
    """The name alone may stand for several boards, or for a part of one."""
    assert find("NVIDIA A100-SXM4-40GB", None) is None


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.key)
def test_a_row_is_plausible(gpu: Gpu):
    """Units and columns are not mixed up, and bf16 is where the hardware has it."""
    assert gpu.key == gpu.key.lower()
    assert not set(gpu.key) & set(" _,")
    assert gpu.source.startswith("NVIDIA ")
    assert (7, 0) <= gpu.capability <= (12, 0)
    assert 10 < gpu.memory_gib < 300
    assert set(gpu.tflops) == {"fp16", "fp32"} | ({"bf16"} if gpu.capability >= (8, 0) else set())
    assert gpu.tflops.get("bf16", gpu.tflops["fp16"]) == gpu.tflops["fp16"]
    # Twice the fp32 rate on GeForce, 30 times on B200; more would count sparsity.
    assert 1.9 < gpu.tflops["fp16"] / gpu.tflops["fp32"] < 35
    assert 8 <= gpu.tflops["fp32"] <= 130
    # Fewer FLOP per byte than this would be a row in TB/s, more a row in GB/s of the link.
    assert 30 < gpu.tflops["fp16"] * 1000 / gpu.bandwidth_gbs < 450
    assert gpu.link_gbs in (32, 64, 128, 300, 400, 600, 900, 1800)
    assert gpu.link == ("nvlink" if gpu.link_gbs >= 300 else "pcie")


@pytest.mark.parametrize(
    ("key", "capability", "bf16", "fp16", "fp32", "bandwidth_gbs", "link_gbs"),
    [
        ("v100-16", (7, 0), None, 125, 15.7, 900, 300),
        ("v100-32", (7, 0), None, 125, 15.7, 900, 300),
        ("v100-pcie-32", (7, 0), None, 112, 14.0, 900, 32),
        ("a100-40", (8, 0), 312, 312, 19.5, 1555, 600),
        ("a100-80", (8, 0), 312, 312, 19.5, 2039, 600),
        ("a100-pcie-80", (8, 0), 312, 312, 19.5, 1935, 64),
        ("h100-sxm", (9, 0), 989.4, 989.4, 66.9, 3350, 900),
        ("h100-pcie", (9, 0), 756, 756, 51.2, 2000, 128),
        ("h100-nvl", (9, 0), 835.5, 835.5, 60, 3938, 128),
        ("rtx-4090", (8, 9), 165.2, 165.2, 82.6, 1008, 64),  # 330.4 with fp16 accumulation
    ],
)
def test_figures_are_those_of_the_datasheets(
    key, capability, bf16, fp16, fp32, bandwidth_gbs, link_gbs
):
    """Dense, with fp32 accumulation: half of what is printed with sparsity."""
    gpu = GPUS[key]
    assert (gpu.capability, gpu.bandwidth_gbs, gpu.link_gbs) == (
        capability,
        bandwidth_gbs,
        link_gbs,
    )
    assert (gpu.tflops.get("bf16"), gpu.tflops["fp16"], gpu.tflops["fp32"]) == (bf16, fp16, fp32)


# --- hardware that need not be here --------------------------------------------------------


def test_gpus_can_be_named_without_having_them():
    """For the plan of another machine; the key in any case."""
    assert named("A100-40", 4) == Hardware(
        device="cuda",
        count=4,
        name="A100-SXM4-40GB",
        capability=(8, 0),
        bf16=True,
        memory_gib=40.0,
        driver=None,
        interconnect="nvlink",
        gpu=GPUS["a100-40"],
    )


@pytest.mark.parametrize("key", GPUS)
def test_every_key_can_be_named(key):
    """bf16 by capability alone; one GPU has nothing to be joined with."""
    one, two = named(key, 1), named(key, 2)
    assert one.gpu is GPUS[key]
    assert one.bf16 == (one.capability >= (8, 0)) == (one.peak_tflops("bf16") is not None)
    assert (one.interconnect, two.interconnect) == (None, GPUS[key].link)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("a100", "; did you mean a100-40 or a100-80 or a100-pcie-40 or a100-pcie-80?"),
        ("4090", "; did you mean rtx-4090?"),
        ("a100-41", "; did you mean a100-40?"),
        ("mi300x", ""),
        ("", ""),
    ],
)
def test_an_unknown_key_is_answered_with_the_keys(key, hint):
    """What was meant, and everything that there is."""
    known = ", ".join(GPUS)
    expected = f"no figures for a GPU called {key!r}{hint}\n  -> known are {known}"
    assert fault(named, key, 1) == expected


def test_no_gpus_at_all_cannot_be_named():
    """A number below one is a slip."""
    assert fault(named, "t4", 0) == "0 GPUs are asked for\n  -> ask for at least 1"


def test_hardware_travels():
    """It can be hashed, copied, sent to another process and shown as JSON-like values."""
    described = named("h100-sxm", 8)
    assert hash(described) == hash(copy.deepcopy(described))
    assert pickle.loads(pickle.dumps(described)) == described
    assert dataclasses.asdict(described)["gpu"]["tflops"]["bf16"] == 989.4


def test_hardware_is_described_by_its_first_six_fields():
    """What is not given is not known."""
    old = Hardware("cuda", 8, "NVIDIA A100-SXM4-80GB", (8, 0), True, 80.0)
    assert (old.driver, old.interconnect, old.gpu) == (None, None, None)
    assert old.peak_tflops("bf16") is None


def test_the_peak_is_of_one_device_and_by_dtype():
    """A dtype that the device does not compute in has no peak."""
    assert named("a100-80", 8).peak_tflops("bf16") == 312
    assert named("v100-32", 8).peak_tflops("fp16") == 125
    assert named("v100-32", 8).peak_tflops("fp32") == 15.7
    assert named("v100-32", 8).peak_tflops("bf16") is None
    assert named("a100-80", 8).peak_tflops("fp8") is None


# --- asked from the driver -----------------------------------------------------------------


def test_gpus_are_asked_from_the_driver(machine):
    """Name, number, capability, memory, driver and what is known of the product."""
    machine.has_nvidia_smi(*(A100_ROW.format(uuid) for uuid in "abcdefgh"))
    assert detect() == Hardware(
        device="cuda",
        count=8,
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        bf16=True,
        memory_gib=80.0,
        driver="570.86.15",
        interconnect=None,
        gpu=GPUS["a100-80"],
    )


@pytest.mark.parametrize(
    ("row", "capability", "bf16"), [(V100_ROW, (7, 0), False), (T4_ROW, (7, 5), False)]
)
def test_bf16_needs_capability_8(row, capability, bf16, machine):
    """is_bf16_supported() counts emulation, this does not."""
    machine.has_nvidia_smi(row.format("a"))
    found = detect()
    assert (found.capability, found.bf16) == (capability, bf16)


def test_an_unknown_product_is_used_without_figures(machine):
    """It can be trained on; only what nobody told us is missing."""
    machine.has_nvidia_smi("NVIDIA A100-SXM-64GB, 65536, 8.0, GPU-a, 570.86.15, Disabled")
    found = detect()
    assert (found.bf16, found.memory_gib) == (True, 64.0)
    assert (found.gpu, found.peak_tflops("bf16")) == (None, None)


def test_memory_that_the_driver_does_not_tell_is_unknown(machine):
    """GPUs that share the machine's memory answer [N/A]."""
    machine.has_nvidia_smi("NVIDIA GB10, [N/A], 12.1, GPU-a, 580.95.05, [N/A]")
    found = detect()
    assert (found.capability, found.memory_gib, found.gpu) == ((12, 1), None, None)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0", 1),
        ("2,0", 2),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0,9,1", 1),
        ("9", 0),
        ("GPU-b,GPU-c", 2),
        (" 0 , 1 ", 2),
    ],
)
def test_hidden_gpus_do_not_count(visible, count, machine, monkeypatch):
    """CUDA_VISIBLE_DEVICES by index or uuid; the list ends at the first unknown entry."""
    machine.has_nvidia_smi(*(A100_ROW.format(uuid) for uuid in "abc"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect()
    assert (found.device, found.count) == (("cuda", count) if count else ("cpu", 1))


@pytest.mark.parametrize("entry", ["MIG-a", "GPU-x"])
def test_a_part_of_a_gpu_cannot_be_chosen(entry, machine, monkeypatch):
    """A uuid that no whole GPU has."""
    machine.has_nvidia_smi(A100_ROW.format("a"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", entry)
    assert fault(detect) == (
        f"CUDA_VISIBLE_DEVICES names {entry}, which is not a whole GPU of this machine\n"
        "  -> name GPUs by index; parts of a GPU (MIG) are not supported"
    )


def test_a_divided_gpu_is_refused_where_it_would_be_used(machine, monkeypatch):
    """CUDA would give one part of it, and the memory of the whole would be a wrong number."""
    divided = A100_ROW.format("b").replace("Disabled", "Enabled")
    machine.has_nvidia_smi(A100_ROW.format("a"), divided)
    assert fault(detect) == (
        "NVIDIA A100-SXM4-80GB is divided into parts (MIG), which are not supported\n"
        "  -> use whole GPUs: switch MIG off (nvidia-smi -mig 0) or choose others"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert detect().count == 1


def test_different_gpus_are_refused(machine, monkeypatch):
    """The slowest would decide, and precision could not; hiding one kind is the way out."""
    machine.has_nvidia_smi(A100_ROW.format("a"), V100_ROW.format("b"))
    assert fault(detect) == (
        "the GPUs differ: NVIDIA A100-SXM4-80GB (sm_8.0), Tesla V100-SXM2-32GB (sm_7.0)\n"
        "  -> choose GPUs of one kind with CUDA_VISIBLE_DEVICES "
        "(and CUDA_DEVICE_ORDER=PCI_BUS_ID, to count them as nvidia-smi does)"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = detect()
    assert (found.name, found.gpu) == ("Tesla V100-SXM2-32GB", GPUS["v100-32"])


def test_two_products_of_one_capability_have_no_figures_in_common(machine):
    """They work together; both are named, the smaller memory counts, no peak is claimed."""
    smaller = "NVIDIA A100-SXM4-40GB, 40960, 8.0, GPU-b, 570.86.15, Disabled"
    machine.has_nvidia_smi(A100_ROW.format("a"), smaller)
    found = detect()
    assert found.name == "NVIDIA A100-SXM4-80GB + NVIDIA A100-SXM4-40GB"
    assert (found.count, found.memory_gib, found.gpu) == (2, 40.0, None)


# --- what joins the GPUs -------------------------------------------------------------------


def matrix(*rows: str) -> str:
    """`nvidia-smi topo -m`: GPUs, then a network card and affinities, then the legend."""
    names = [f"GPU{index}" for index in range(len(rows))]
    head = "\t\x1b[4m" + "\t".join([*names, "NIC0", "CPU Affinity", "NUMA Affinity"]) + "\x1b[0m"
    body = [
        "\t".join([name, *(f" {cell} " if cell == "X" else cell for cell in row.split()), "PIX"])
        + "\t0-31\t0\t\tN/A"
        for name, row in zip(names, rows, strict=True)
    ]
    card = "\t".join(["NIC0", *["PIX"] * len(rows), " X "])
    return "\n".join(
        [head, *body, card, "", "Legend:", "", "  X    = Self", "  NV#  = NVLinks", ""]
    )


SWITCHED = matrix("X NV12 NV12", "NV12 X NV12", "NV12 NV12 X")
# The cube of DGX-1: not every pair has a link, but all can be reached.
CUBE = matrix("X NV1 NV2 SYS", "NV1 X SYS NV2", "NV2 SYS X NV1", "SYS NV2 NV1 X")
BRIDGED = matrix("X NV4 SYS SYS", "NV4 X SYS SYS", "SYS SYS X NV4", "SYS SYS NV4 X")
BUS = matrix("X NODE NODE", "NODE X PHB", "NODE PHB X")


@pytest.mark.parametrize(
    ("topology", "count", "visible", "expected"),
    [
        (SWITCHED, 3, None, "nvlink"),
        (CUBE, 4, None, "nvlink"),
        (BRIDGED, 4, None, "pcie"),
        (BRIDGED, 4, "2,3", "nvlink"),
        (BRIDGED, 4, "1,2", "pcie"),
        (BUS, 3, None, "pcie"),
        (SWITCHED, 3, "1", None),
        (SWITCHED, 4, None, None),
        ("", 2, None, None),
        ("GPU0\n\nGPU1 what is this", 2, None, None),
        ("GPU0 X NV12\nGPU1 NV12\n", 2, None, None),
        (None, 2, None, None),
    ],
)
def test_nvlink_counts_where_it_joins_all_chosen_gpus(
    topology, count, visible, expected, machine, monkeypatch
):
    """Directly or through each other; what cannot be read is unknown, never an error."""
    rows = (A100_ROW.format(uuid) for uuid in "abcdefgh"[:count])
    machine.has_nvidia_smi(*rows, topology=topology)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect().interconnect == expected


# --- no GPU, or one that cannot be used ----------------------------------------------------


def assert_cpu(found: Hardware) -> None:
    """A CPU and nothing of a GPU."""
    assert (found.device, found.count, found.capability) == ("cpu", 1, None)
    assert (found.driver, found.interconnect, found.gpu) == (None, None, None)
    assert found.memory_gib > 0
    assert found.peak_tflops("fp32") is None


def test_a_machine_without_nvidia_devices_is_a_cpu_and_asks_nobody(machine):
    """No driver, no device nodes: torch is not started to find that out."""
    machine.has_nodes("null", "dri", "nvidia-uvm", "nvidia-caps")
    machine.has_pci_device("0x10de", "0x030200")  # a card without a driver cannot be used
    machine.has_torch(("NVIDIA L4", 22, 8, 9))
    assert_cpu(detect())
    assert not machine.asked_torch.exists()


def test_a_machine_without_dev_and_sys_is_a_cpu(machine, monkeypatch):
    """Some sandboxes have neither."""
    machine.has_nvidia_smi(code=9, error=NO_DRIVER)
    monkeypatch.setattr(hardware, "DEVICES", machine.dev / "gone")
    monkeypatch.setattr(hardware, "PCI", machine.pci / "gone")
    assert_cpu(detect())


@pytest.mark.parametrize(
    ("vendor", "kind"),
    [
        ("0x1002", "0x030000"),  # another maker's display
        ("0x10de", "0x040300"),  # the sound of a display card
        ("0x10de", "0x068000"),  # an NVSwitch
    ],
)
def test_tools_without_a_gpu_are_a_login_node(vendor, kind, machine):
    """nvidia-smi is installed there and fails; that is no reason to refuse."""
    machine.has_nvidia_smi(code=9, error=NO_DRIVER)
    machine.has_pci_device(vendor, kind)
    (machine.pci / "0000:ff:00.0").mkdir()  # unplugged while being read
    assert_cpu(detect())


@pytest.mark.parametrize("kind", ["0x030000", "0x030200"])
def test_a_broken_driver_is_no_reason_to_train_on_the_cpu(kind, machine):
    """The card is on the bus, so what the driver says is an error, with what to do."""
    machine.has_nvidia_smi(code=9, error=f"{NO_DRIVER}\n")
    machine.has_pci_device("0x8086", "0x060000")
    machine.has_pci_device("0x10de", kind)
    expected = f"nvidia-smi failed: {NO_DRIVER}\n  -> mend the driver (525 or newer), {ON_CPU}"
    assert fault(detect) == expected


@pytest.mark.parametrize("node", ["nvidia0", "nvidia15", "nvidiactl", "dxg"])
@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        (["Driver/library version mismatch"], 18, "Driver/library version mismatch"),
        (["No devices were found"], 6, "No devices were found"),
        (["No devices were found"], 0, "No devices were found"),
        ([], 0, "it shows no GPU"),
        (
            ["NVIDIA L4, 23034, [Unknown Error], GPU-a, 570.86.15, [N/A]"],
            0,
            "NVIDIA L4, 23034, [Unknown Error], GPU-a, 570.86.15, [N/A]",
        ),
        (
            ['Field "compute_cap" is not a valid field to query.'],
            2,
            'Field "compute_cap" is not a valid field to query.',
        ),
    ],
)
def test_device_nodes_tell_of_a_gpu_too(node, rows, code, said, machine):
    """In a container the bus may be hidden; an answer without GPUs is no answer either."""
    machine.has_nvidia_smi(*rows, code=code)
    machine.has_nodes(node)
    expected = f"nvidia-smi failed: {said}\n  -> mend the driver (525 or newer), {ON_CPU}"
    assert fault(detect) == expected


def test_a_driver_that_hangs_is_an_error(machine, monkeypatch):
    """A GPU that has fallen off the bus does that."""
    monkeypatch.setattr(hardware, "PATIENCE", 0.2)
    machine.has_script("exec /bin/sleep 60")
    machine.has_nodes("nvidia0")
    assert fault(detect).startswith("nvidia-smi failed: no answer within 0.2 s\n")


def test_an_nvidia_smi_that_cannot_be_started_is_an_error(machine):
    """Built for another machine, say."""
    machine.has_script("", interpreter="/no/such/interpreter")
    machine.has_nodes("nvidia0")
    assert fault(detect).startswith("nvidia-smi failed: [Errno 2] No such file or directory")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hiding_all_gpus_is_the_way_to_the_cpu(visible, machine, monkeypatch):
    """As the error texts say: nobody is asked then, so nothing can fail."""
    machine.has_nvidia_smi(code=9, error=NO_DRIVER)
    machine.has_nodes("nvidia0", "nvidiactl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert_cpu(detect())


# --- asked from torch ----------------------------------------------------------------------

A100_OF_TORCH = ("NVIDIA A100-SXM4-40GB", 39.39, 8, 0)
V100_OF_TORCH = ("Tesla V100-SXM2-16GB", 15.77, 7, 0)


@pytest.mark.parametrize("node", ["nvidia0", "nvidia7", "nvidiactl", "dxg"])
def test_a_container_without_nvidia_smi_finds_its_gpus(node, machine):
    """torch is asked in a process of its own, and stays out of this one."""
    machine.has_nodes(node)
    machine.has_torch(A100_OF_TORCH, A100_OF_TORCH)
    machine.kernel_driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    assert detect() == Hardware(
        device="cuda",
        count=2,
        name="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        bf16=True,
        memory_gib=pytest.approx(39.39),
        driver="570.86.15",
        interconnect=None,
        gpu=GPUS["a100-40"],
    )
    assert "torch" not in sys.modules


def test_a_torch_that_is_loaded_is_asked_here(machine, monkeypatch):
    """Nothing is started; without the kernel's file the driver's version is unknown."""
    machine.has_nodes("nvidia0")
    torch = ModuleType("torch")
    exec(machine.has_torch(V100_OF_TORCH), torch.__dict__)
    machine.asked_torch.unlink()
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = detect()
    assert (found.count, found.bf16, found.driver) == (1, False, None)
    assert found.gpu is GPUS["v100-16"]
    assert not machine.asked_torch.exists()


def test_torch_hides_gpus_itself(machine, monkeypatch):
    """CUDA_VISIBLE_DEVICES reaches it and is not applied again."""
    machine.has_nodes("nvidia0")
    machine.has_torch(A100_OF_TORCH, V100_OF_TORCH)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect().name == "Tesla V100-SXM2-16GB"


def test_different_gpus_are_refused_when_torch_shows_them(machine):
    """The same rule whoever is asked."""
    machine.has_nodes("nvidia0")
    machine.has_torch(A100_OF_TORCH, V100_OF_TORCH)
    assert fault(detect).startswith(
        "the GPUs differ: NVIDIA A100-SXM4-40GB (sm_8.0), Tesla V100-SXM2-16GB (sm_7.0)\n  -> "
    )


def test_a_part_of_a_gpu_is_refused_when_torch_shows_it(machine):
    """CUDA names the parts after the whole."""
    machine.has_nodes("nvidia0")
    machine.has_torch(("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, 8, 0))
    assert fault(detect) == (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb is divided into parts (MIG), which are not supported\n"
        "  -> use whole GPUs: switch MIG off (nvidia-smi -mig 0) or choose others"
    )


NOT_COMPILED = "raise AssertionError('Torch not compiled with CUDA enabled')"
NO_GPUS = "raise RuntimeError('No CUDA GPUs are available')"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (NOT_COMPILED, "AssertionError: Torch not compiled with CUDA enabled"),
        (NO_GPUS, "RuntimeError: No CUDA GPUs are available"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_gpu_that_torch_cannot_use_is_an_error(broken, said, loaded, machine, monkeypatch):
    """Device nodes tell of a GPU, so the CPU is not taken in silence."""
    machine.has_nodes("nvidia0", "nvidiactl", "dxg")
    source = machine.has_torch(A100_OF_TORCH, broken=broken)
    if loaded:
        torch = ModuleType("torch")
        exec(source, torch.__dict__)
        monkeypatch.setitem(sys.modules, "torch", torch)
        said = said.partition(": ")[2]
    node = machine.dev / "nvidiactl"
    assert fault(detect) == (
        f"{node} is there, nvidia-smi is not on PATH, and torch cannot use the GPU: {said}\n"
        "  -> put nvidia-smi on PATH, install a CUDA build of torch that fits the driver, " + ON_CPU
    )


def test_without_nvidia_smi_and_torch_a_gpu_is_an_error(machine):
    """The base package on a GPU node."""
    machine.has_nodes("nvidia0")
    blocked = "raise ModuleNotFoundError(\"No module named 'torch'\")\n"
    (machine.modules / "torch.py").write_text(blocked)
    assert "torch cannot use the GPU: ModuleNotFoundError: No module named 'torch'\n" in fault(
        detect
    )


@pytest.mark.parametrize("broken", [NOT_COMPILED, NO_GPUS])
def test_wsl_without_an_nvidia_gpu_is_a_cpu(broken, machine):
    """Its device node is there with GPUs of any maker."""
    machine.has_nodes("dxg")
    machine.has_torch(broken=broken)
    assert_cpu(detect())
    assert machine.asked_torch.exists()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # device code of the same major number
        ((7, 0), ["sm_75", "sm_80"], False),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90a"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # PTX, compiled for it when it is loaded
        ((7, 0), ["sm_80", "compute_90"], False),
    ],
)
def test_a_gpu_that_torch_has_no_code_for(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    """torch warns and fails at the first kernel; here it is said before."""
    from sft_job import world

    if runs:
        world._refuse_missing_code(capability, architectures)
        return
    said = fault(lambda: world._refuse_missing_code(capability, architectures))
    number = 10 * capability[0] + capability[1]
    assert f"the GPU is sm_{number}, and torch " in said
    assert f"has no code for it (it has {', '.join(architectures)})" in said
    assert "-> install a release of torch that has: V100 needs" in said


# --- the images ----------------------------------------------------------------------------


def wrong_image(key: str, flavour: str | None) -> str | None:
    """The refusal of one GPU of the table in an image, or None."""
    try:
        hardware.refuse_wrong_image(named(key, 1), flavour)
    except HardwareError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("key", "flavour"),
    [
        *((key, "ampere") for key in ("a100-40", "a10", "l40s", "h100-sxm", "b200", "rtx-5090")),
        *((key, "volta") for key in ("v100-16", "v100s", "t4", "quadro-rtx-8000")),
        *((key, None) for key in ("v100-16", "a100-80")),
    ],
)
def test_an_image_takes_the_gpus_that_it_is_for(key, flavour):
    """And outside of the images nothing is asked."""
    assert wrong_image(key, flavour) is None


@pytest.mark.parametrize(
    ("key", "flavour", "expected"),
    [
        (
            "v100-32",
            "ampere",
            "this image is for A100, H100 and newer GPUs; the GPU is Tesla V100-SXM2-32GB (sm_70)\n"
            f"  -> use the image for V100 and T4 (from docker/Dockerfile.v100), {ON_CPU}",
        ),
        (
            "h100-sxm",
            "volta",
            "this image is for V100 and T4; the GPU is H100 80GB HBM3 (sm_90)\n"
            f"  -> use the image for A100, H100 and newer GPUs (from Dockerfile), {ON_CPU}",
        ),
        (
            "t4",
            "cpu",
            "this image is for machines without an NVIDIA GPU; the GPU is Tesla T4 (sm_75)\n"
            f"  -> use the image for V100 and T4 (from docker/Dockerfile.v100), {ON_CPU}",
        ),
        (
            "t4",
            "turing",
            "SFT_JOB_FLAVOUR is 'turing', and the images are ampere, volta, cpu\n"
            "  -> unset it: an image says by it which GPUs it is for",
        ),
    ],
)
def test_an_image_refuses_other_gpus(key, flavour, expected):
    """In one sentence, with the image to use instead."""
    assert wrong_image(key, flavour) == expected


def test_no_image_is_for_the_oldest_gpus():
    """torch's wheels have no code below 7.0."""
    pascal = Hardware("cuda", 1, "Tesla P100-PCIE-16GB", (6, 0), False, 16.0)
    assert fault(hardware.refuse_wrong_image, pascal, "volta") == (
        "this image is for V100 and T4; the GPU is Tesla P100-PCIE-16GB (sm_60)\n"
        "  -> no image is for it: compute capability 7.0 or newer is needed; "
        "set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
    )


def test_the_gpu_is_compared_with_the_image_when_it_is_found(machine, monkeypatch):
    """Whatever looks for the hardware: plan, train, chat."""
    machine.has_nvidia_smi(V100_ROW.format("a"))
    monkeypatch.setenv("SFT_JOB_FLAVOUR", "ampere")
    assert fault(detect).startswith("this image is for A100, H100 and newer GPUs; the GPU is Tesla")
    monkeypatch.setenv("SFT_JOB_FLAVOUR", "volta")
    assert detect().gpu is GPUS["v100-32"]
    monkeypatch.setenv("SFT_JOB_FLAVOUR", "ampere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_cpu(detect())


def test_an_image_for_gpus_that_sees_none_does_not_train_on_the_cpu(machine, monkeypatch):
    """`docker run` without --gpus; planning and encoding need none."""
    monkeypatch.setenv("SFT_JOB_FLAVOUR", "ampere")
    assert_cpu(detect())
    assert fault(hardware.detect_for_training) == (
        "this image is for A100, H100 and newer GPUs, and it sees no GPU\n"
        "  -> start it with its GPUs (docker run --gpus all, podman run --device "
        f"nvidia.com/gpu=all, apptainer run --nv) on a machine that has some, {ON_CPU}"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_cpu(hardware.detect_for_training())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for flavour in ("cpu", None):
        monkeypatch.delenv("SFT_JOB_FLAVOUR", raising=False)
        if flavour:
            monkeypatch.setenv("SFT_JOB_FLAVOUR", flavour)
        assert_cpu(hardware.detect_for_training())


@pytest.mark.parametrize(
    ("driver", "torch", "cuda", "said", "remedy"),
    [
        (
            "470.82.01",
            "2.10.0",
            "12.8",
            ": the driver is 470.82.01, and CUDA 12.8 needs 525 or newer",
            "have the driver updated, ",
        ),
        (
            "570.86.15",
            "2.15.0",
            "13.2",
            ": the driver is 570.86.15, and CUDA 13.2 needs 580 or newer",
            "have the driver updated, use torch 2.10, which runs on 525 and newer, ",
        ),
        (
            "570.86.15",
            "2.13.0+cpu",
            None,
            ": it is built without CUDA",
            "install a CUDA build of torch, ",
        ),
        (
            "525.60.13",
            "2.10.0",
            "12.8",
            "",
            "install a CUDA build of torch that fits the driver 525.60.13, ",
        ),
        (None, "2.10.0", "12.8", "", "install a CUDA build of torch that fits the driver, "),
        (
            "450.1",
            "3.0.0",
            "14.0",
            "",
            "install a CUDA build of torch that fits the driver 450.1, ",
        ),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_explained(driver, torch, cuda, said, remedy):
    """With the driver that is found and the one that is needed, where that is the reason."""
    gpu = dataclasses.replace(named("a100-80", 1), driver=driver)
    expected = f"this machine has A100-SXM4-80GB, but torch {torch} cannot use it{said}"
    assert str(hardware.unusable(gpu, torch, cuda)) == f"{expected}\n  -> {remedy}{ON_CPU}"
