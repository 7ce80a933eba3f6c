"""Settings for tiny programs, where compiling takes the time and not running. Imported before jax."""


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a CPU that shows itself as so many devices."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    )
