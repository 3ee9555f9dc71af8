"""Prints, as JSON, digests of all results for each number of threads: a program for `test_kernels`."""

import json

import numba
import numpy as np
import pytest
from arrays import FLOATS
from test_kernels import DIGESTS, digests, force

import fastbn


def main():
    assert numba.config.NUMBA_NUM_THREADS == 4
    found = {}
    for case in DIGESTS:
        for dtype in FLOATS:
            d = case.data(np.random.default_rng(1), dtype)
            results = found[f"{case}-{dtype}"] = {}
            for n in (1, 2, 4):
                fastbn.set_num_threads(n)
                results[str(n)] = digests(d, case.axis)
            for n in (0, 1, 2, 4):
                with pytest.MonkeyPatch.context() as patch:
                    force(patch, lambda kernel, *args, n=n: (kernel.parallel if n else kernel.serial)(*args))
                    numba.set_num_threads(n or 4)
                    results[f"parallel by {n}" if n else "serial"] = digests(d, case.axis)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
