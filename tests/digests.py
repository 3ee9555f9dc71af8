"""The bits of all that the verbs compute, as sha256; as a program, those under every number of threads, as JSON."""

import hashlib
import json

import numba
import numpy as np
import pytest
from arrays import BIG, FLOATS, HALVES
from builds import force

import fastbn

# Every way through the kernels (a test sees to that), large enough to run parallel.
CASES = [BIG[0], BIG[2], BIG[3], BIG[5], BIG[6], BIG[8], BIG[10], BIG[12], BIG[15]]
KEYS = {f"{case}-{dtype}": (case, dtype) for case in CASES for dtype in FLOATS}
# With residual, ReLU and weights of the kind that is named; the halves have what `test_parts` has compiled for them.
PARTS = {
    f"{case}-{dtype}-{kind or 'no weights'}": (case, dtype, relu, residual, kind)
    for case in (CASES[0], CASES[1], CASES[3], CASES[5], CASES[6])
    for dtype, relu, residual, kind in [
        ("float32", True, True, "full float32"),
        ("float32", True, True, "sample bool"),
        (HALVES[0], True, False, None),
        (HALVES[1], True, False, "sample bool"),
    ]
}


def data(key):
    if key in KEYS:
        case, dtype = KEYS[key]
        return case.data(np.random.default_rng(1), dtype)
    case, dtype, relu, residual, kind = PARTS[key]
    rng = np.random.default_rng(1)
    d = case.data(rng, dtype)
    d.options = {"activation": "relu" if relu else None, "residual": case.residual(rng, dtype) if residual else None}
    d.where = case.weights(rng, kind) if kind else None
    return d


def digests(key, d=None, new=lambda like: None):
    """Of one case, or of other memory with its data. `new` makes the array that receives y or dx."""
    d, axis = d or data(key), (KEYS | PARTS)[key][0].axis
    options, where = {"axis": axis, **getattr(d, "options", {})}, getattr(d, "where", None)
    m = fastbn.moments(d.x, axis=axis, where=where)
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, where=where, **options, out=new(d.dy))
    z = fastbn.batch_norm(d.x, d.mean, d.var, d.gamma, d.beta, **options, out=new(d.dy))
    frozen = fastbn.Saved.fixed(d.x, d.mean, d.var, d.gamma, d.beta, **options)
    results = {"mean": m.mean, "m2": m.m2, "y": y, "saved mean": saved.mean, "saved var": saved.var, "inference": z}
    for name, s in (("backward", saved), ("frozen", frozen)):
        gradients = fastbn.batch_norm_backward(d.dy, s, out=new(d.dy))
        names = ("dx", "dgamma", "dbeta", "dresidual")
        results |= {f"{name} {part}": a for part, a in zip(names, gradients, strict=False)}
    return {name: hashlib.sha256(a.tobytes("K")).hexdigest() for name, a in results.items()}


def main():
    most = numba.config.NUMBA_NUM_THREADS
    found = {}
    for key in KEYS | PARTS:
        d = data(key)
        results = found[key] = {}
        for n in range(1, most + 1):
            fastbn.set_num_threads(n)
            results[f"{n} threads"] = digests(key, d)
        for n in (0, 1, most):
            with pytest.MonkeyPatch.context() as patch:
                force(patch, lambda kernel, *args, n=n: (kernel.parallel if n else kernel.serial)(*args))
                numba.set_num_threads(n or most)
                results[f"the parallel build by {n} threads" if n else "the serial build"] = digests(key, d)
    print(json.dumps({"layer": numba.threading_layer(), "digests": found}))  # noqa: T201


if __name__ == "__main__":
    main()
