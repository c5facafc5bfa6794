"""A Dask cluster in the place of processes here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from crossalign.errors import UserError, missing_extra
from crossalign.search.drive import Pool

CONNECT_SECONDS = 20


@contextmanager
def cluster_pool(address: str, most: int) -> Iterator[Pool]:
    """The workers connected to the scheduler at ``address``, ``most`` of them at the most (0: all); they may come and go.

    Raises:
        UserError: no Dask here, or no scheduler there.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_extra("distributed", "cluster", "a search on a cluster") from error
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--cluster {address}: no scheduler answers ({' '.join(str(error).split())[:200]}); start one with 'dask "
            "scheduler' and workers with 'dask worker ADDRESS --nthreads 1'"
        ) from error
    told = time.monotonic()

    def free() -> int:
        nonlocal told
        connected = len(client.scheduler_info(n_workers=-1)["workers"])
        if not connected and time.monotonic() - told > 30:
            print(f"waiting for workers: dask worker {address} --nthreads 1", flush=True)
            told = time.monotonic()
        return max(1, min(connected, most) if most else connected)  # the scheduler keeps one job for the first that comes

    executor = client.get_executor(pure=False)
    try:
        yield Pool(executor, free)
    finally:
        executor.shutdown(wait=False)
        client.close()
