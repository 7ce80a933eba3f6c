"""The packages that JAX runs on: jaxlib, plugins for GPUs, libtpu. Their versions are compared; none is imported."""

from __future__ import annotations

import os
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lm2_jax.common.errors import UserError, warn_once

_PLUGINS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}  # and JAX's extra that brings it


def check_jax_stack(platforms: str | None = None) -> None:
    """Compares the installed packages of JAX with each other, before JAX is imported.

    platforms: those that will be used, as in JAX_PLATFORMS, which is the default; if both are empty, any.

    Warns of a libtpu that is another JAX's. Raises UserError if JAX cannot start, or if it would leave GPUs aside
    because their plugin is of another version.
    """
    jax, jaxlib = _installed("jax"), _installed("jaxlib")
    if jaxlib is None or jaxlib not in _needed("jaxlib"):
        raise UserError(f"jax {jax} needs jaxlib{_needed('jaxlib')}, found {jaxlib}; pip install --upgrade jax jaxlib")
    wanted = set((os.environ.get("JAX_PLATFORMS", "") if platforms is None else platforms).split(",")) - {""}
    for plugin, extra in _PLUGINS.items():
        found = _installed(plugin)
        if found is not None and found.release != jaxlib.release and (not wanted or wanted & {"cuda", "gpu"}):
            raise UserError(
                f"{plugin} {found} does not fit jaxlib {jaxlib}, and JAX would not use the GPU; "
                f"pip install 'jax[{extra}]=={jax}', or set JAX_PLATFORMS=cpu to do without it"
            )
    found = _installed("libtpu")
    if found is not None and found not in libtpu_of_jax() and (not wanted or "tpu" in wanted):
        warn_once(f"libtpu {found} is another JAX's; the one of jax {jax} is libtpu{libtpu_of_jax()}")


def libtpu_of_jax() -> SpecifierSet:
    """The versions of libtpu that belong to the installed JAX, as its metadata says."""
    return _needed("libtpu", extra="tpu")


def _installed(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def _needed(package: str, extra: str = "") -> SpecifierSet:
    """The versions of a package that the installed JAX asks for, with one of its extras."""
    requirements = map(Requirement, metadata.requires("jax") or ())
    asked = [r for r in requirements if r.name == package and (not r.marker or r.marker.evaluate({"extra": extra}))]
    return asked[0].specifier if asked else SpecifierSet()
