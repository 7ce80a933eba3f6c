"""Google Cloud Storage by gcsfs: patient, without listings that grow stale, and the same one for Orbax.

As it comes, gcsfs answers `exists` and `ls` from listings that never expire, so that a process never sees what another
one writes; it gives up after half a minute; and TensorStore, which reads and writes arrays, only after a quarter of an
hour. It must be imported before Orbax opens a path of a bucket; making a `StorePath`'s first request does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from typing import Any

import aiohttp
import fsspec
from gcsfs.core import GCSFileSystem, quote
from gcsfs.retry import is_retriable

PATIENCE_SECONDS = 120.0  # for which failures of the network are tried again
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 16.0  # seconds between tries
_request_once = GCSFileSystem._request.__wrapped__  # without gcsfs's own tries, six of them


class PatientGcs(GCSFileSystem):
    """The file system of gs://: requests that may fail for a while are tried again for two minutes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            settings.setdefault("token", "anon")
        super().__init__(*arguments, **settings | {"use_listings_cache": False})
        self._gave_up = False
        self.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)

    async def _request(self, *arguments: Any, **settings: Any) -> Any:
        began, wait = time.monotonic(), _FIRST_WAIT
        while True:
            try:
                answer = await _request_once(self, *arguments, **settings)
                self._gave_up = False
                return answer
            except Exception as error:
                if not (is_retriable(error) or isinstance(error, TimeoutError)):
                    raise
                if self._gave_up or time.monotonic() - began > PATIENCE_SECONDS:
                    self._gave_up = True  # a run that ends now does not wait once more for everything that it closes
                    raise
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, _LONGEST_WAIT)

    def write_if(self, path: str, data: bytes, generation: int) -> None:
        """Writes an object of this generation (0: none is there). Raises FileExistsError if it has another."""
        bucket, name, _ = self.split_path(path)
        self.call(
            "POST",
            f"{self._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="media",
            name=name,
            ifGenerationMatch=str(generation),
            data=data,
        )


def connect() -> PatientGcs:
    """Makes fsspec, and so Orbax, use this file system for gs://, and returns it."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it reports every failure, with a traceback
    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, PatientGcs, clobber=True)
    os.environ.setdefault("EPATH_USE_TF", "false")  # an installed TensorFlow has ways of its own
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        address = emulator if "://" in emulator else f"http://{emulator}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
    return fsspec.filesystem("gs", finalize_on_close=True)  # as etils asks for it: one for both
