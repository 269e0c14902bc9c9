"""How fast this machine reads memory: the limit of a decode step, which reads every weight once a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def read_bandwidth(threads: int, *, megabytes: int = 1024, runs: int = 7) -> float:
    """Bytes a second, the best of `runs`: the maximum of a float32 array, each thread reading its part.

    `numpy.max` keeps several vectors in flight and numpy asks for huge pages, so that it reads faster than a plain C
    loop of sums (35 against 50 GB/s on two Zen 4 cores): the higher limit is the one to be held against.
    """
    numbers = np.ones(megabytes << 18, dtype=np.float32)
    parts = np.array_split(numbers, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(runs):
            begun = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - begun)
    return numbers.nbytes / min(seconds)


if __name__ == "__main__":
    for count in (1, 2):
        print(f"{count} threads: {read_bandwidth(count) / 1e9:.1f} GB/s")
