"""Settings for tiny programs, where compiling takes the time and not running. Imported before jax."""

import functools
import importlib.util
import mmap
from pathlib import Path


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a CPU that shows itself as so many devices."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    if xla_knows("xla_cpu_use_fusion_emitters"):  # saves a third of the time
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


@functools.cache
def xla_knows(flag: str) -> bool:
    """True if the installed XLA has the flag: a process whose XLA_FLAGS name an unknown one is aborted."""
    package = Path(importlib.util.find_spec("jaxlib").origin).parent
    for library in package.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"\0%b\0" % flag.encode()) >= 0  # a word by itself: names of former flags are kept too
    return False
