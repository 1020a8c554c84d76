"""Accelerators that a run can be planned for.

Peak is dense bf16 with fp32 accumulation, as the maker gives it (figures "with sparsity" halved); memory is counted as
10⁹ bytes per GB, a little less than there is. Links are the maker's, one direction, per GPU; between machines they
are those of the maker's own systems, or 100 Gb/s Ethernet for cards that have none.

Utilisation is an assumption, not a datum: executed FLOPs ÷ (time × peak). Published training runs with fused
kernels reach 0.38 – 0.59 on H100 and 0.53 – 0.79 on A100 between 1 and 30 billion parameters (HFU tables of
llm-foundry, scripts/train/benchmarking/README.md; 0.38 – 0.43 MFU for Llama 3, arXiv:2407.21783, table 4).
Modules of plain PyTorch, as here, spend more time in norms and activations, so some three quarters of that are
assumed. Measure your own and give it.
"""

import re
from dataclasses import dataclass

from qwen3_vlm.errors import ConfigError

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator."""

    name: str
    peak_flops: float  # per second, bf16, dense
    memory_bytes: float
    utilisation: float
    link_bytes: float  # per second to the others of its machine
    network_bytes: float  # per second to other machines
    source: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many of one accelerator, eight to a machine."""

    device: Device
    count: int

    @property
    def link_bytes(self) -> float:
        """Per second and direction, of the slowest hop."""
        return self.device.link_bytes if self.count <= GPUS_PER_MACHINE else self.device.network_bytes

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


def _device(name: str, peak: float, gb: float, utilisation: float, link: float, network: float, source: str) -> Device:
    return Device(name, peak * TERA, gb * GIGA, utilisation, link * GIGA, network * GIGA, source)


GPUS_PER_MACHINE = 8
#                name     TFLOP/s   GB  assumed  GB/s  GB/s
DEVICES = (
    _device("B200", 2250.0, 180, 0.30, 900, 50, "NVIDIA DGX B200 data sheet: 36 PFLOP/s bf16 sparse, 1,440 GB of 8"),
    _device("H200", 989.4, 141, 0.35, 450, 50, "NVIDIA H200 data sheet, SXM"),
    _device("H100", 989.4, 80, 0.35, 450, 50, "NVIDIA H100 data sheet, SXM; ConnectX-7, 400 Gb/s per GPU"),
    _device("H100-PCIE", 756.0, 80, 0.35, 64, 25, "NVIDIA H100 data sheet, PCIe"),
    _device("A100", 312.0, 80, 0.45, 300, 25, "NVIDIA A100 data sheet, SXM 80 GB; ConnectX-6, 200 Gb/s per GPU"),
    _device("A100-40", 312.0, 40, 0.45, 300, 25, "NVIDIA A100 data sheet, SXM 40 GB"),
    _device("MI300X", 1307.4, 192, 0.25, 448, 50, "AMD Instinct MI300X data sheet"),
    _device("L40S", 362.0, 48, 0.35, 32, 12.5, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
    _device("A10", 125.0, 24, 0.40, 32, 12.5, "NVIDIA A10 data sheet; PCIe 4.0 x16"),
    _device("L4", 121.0, 24, 0.35, 32, 12.5, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
    _device("4090", 165.2, 24, 0.50, 32, 12.5, "NVIDIA Ada GPU architecture white paper, appendix A; PCIe 4.0 x16"),
    _device("3090", 71.0, 24, 0.55, 32, 12.5, "NVIDIA Ampere GA102 white paper, appendix A; PCIe 4.0 x16"),
)


def parse_cluster(text: str) -> Cluster:
    """`8xH100`, `A100-40`, `256 x h100` → a cluster.

    Raises:
        ConfigError: it is not of that form, or there is no such accelerator.
    """
    found = re.fullmatch(r"\s*(?:(\d{1,6})\s*[x×*]\s*)?(?:nvidia|amd|rtx)?[ _-]?([a-z0-9-]+)\s*", text, re.IGNORECASE)
    devices = {device.name: device for device in DEVICES}
    name = found.group(2).upper().removeprefix("RTX").removesuffix("-80") if found else ""
    count = int(found.group(1) or 1) if found else 0
    if count < 1 or name not in devices:
        raise ConfigError(
            f"--gpus is {text!r}; it must be a number and an accelerator, such as 8xH100. Known: {', '.join(devices)}."
        )
    return Cluster(devices[name], count)
