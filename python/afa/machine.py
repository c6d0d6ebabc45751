"""Description of the machine, for results."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """The CPU model, or the best available description."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or f"{platform.machine()}, {os.cpu_count()} cores"
