"""Whatever surrounds fastbn: environment variables, interpreter options, missing libraries, frameworks beside it."""

import json
import os
import shutil
import sysconfig

import numpy as np
import pytest
import reference
from arrays import SMALL
from layers import LAYERS, PREAMBLE, skip_without, unavailable
from subprocesses import ROOT, run_python, run_script

import fastbn

DONE = '\nassert right()\nprint("done")\n'

# Every verb over every arrangement of axes, and one array large enough to go parallel; written to a file.
VERBS = """
import sys
import numpy as np, fastbn
from arrays import SMALL, Case
results = {}
for case in [*SMALL, Case("parallel", (8, 9_000))]:
    d = case.data(np.random.default_rng(7), "float32")
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, axis=case.axis)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    results[str(case)] = [y, dx, dgamma, dbeta, fastbn.batch_norm(d.x, d.mean, d.var, d.gamma, d.beta, axis=case.axis)]
bn = fastbn.BatchNorm(3)
d = SMALL[0].data(np.random.default_rng(7), "float32")
results["layer"] = [bn(d.x), bn.backward(d.dy), bn.running_mean, bn.running_var, *bn.fold()]
np.savez(sys.argv[1], **{f"{name} {i}": a for name, arrays in results.items() for i, a in enumerate(arrays)})
"""


def test_without_the_jit(tmp_path):
    """Every verb works as plain Python, and is as near to the compiled one as both are to the truth."""
    files = {value: str(tmp_path / f"{value}.npz") for value in ("0", "1")}
    for value, file in files.items():
        run_script(VERBS, file, NUMBA_DISABLE_JIT=value, NUMBA_NUM_THREADS="2")
    compiled, plain = (np.load(files[value]) for value in ("0", "1"))
    assert compiled.files == plain.files
    for case in SMALL:
        d = case.data(np.random.default_rng(7), "float32")
        train = reference.train(d.x, d.gamma, d.beta, axis=case.axis)
        back = reference.backward(d.dy, d.x, d.gamma, axis=case.axis)
        infer = reference.infer(d.x, d.mean, d.var, d.gamma, d.beta, axis=case.axis)
        budgets = (train.budget, back.dx_budget, back.dgamma_budget, back.dbeta_budget, infer.budget)
        for i, budget in enumerate(budgets):
            name = f"{case} {i}"
            reference.assert_within(plain[name], compiled[name], budget, name)
    for name in plain.files:
        assert plain[name].dtype == compiled[name].dtype
        np.testing.assert_allclose(plain[name], compiled[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_one_thread():
    script = PREAMBLE + DONE + "try: print(layer())\nexcept ValueError: print('not started', fastbn.get_num_threads())"
    assert run_script(script, NUMBA_NUM_THREADS="1", quiet=True) == "done\nnot started 1\n"


@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_thread_count_that_numba_refuses(value):
    script = """
import numpy as np, fastbn
for x in (np.ones((4, 2)), np.ones((40_000, 2))):
    out = np.full_like(x, 7)
    try:
        fastbn.batch_norm_train(x, out=out)
    except ValueError as error:
        print(error)
    assert (out == 7).all()
"""
    expected = f"the environment variable NUMBA_NUM_THREADS is {value!r}, expected at least 1\n"
    assert run_script(script, NUMBA_NUM_THREADS=value, quiet=True) == expected * 2


# --- the threading layer ---

# Makes Numba believe that a layer is not installed, for all that it looks at.
ABSENT = {
    "tbb": "import sys; sys.modules['numba.np.ufunc.tbbpool'] = None\n",
    "omp": "import sys; sys.modules['numba.np.ufunc.omppool'] = None\n",
}
TOGETHER = "together(*[lambda: [right() for _ in range(4)] == [True] * 4 or sys.exit('wrong')] * 3)\n"


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("default", LAYERS), ("safe", ["tbb"]), ("threadsafe", ["tbb", "omp"]), ("forksafe", ["tbb", "workqueue"]),
        ("OMP", ["omp"]),
    ],
)  # fmt: skip
def test_ways_to_ask_for_a_layer(value, layers):
    """The first of them that is installed."""
    layers = [layer for layer in layers if not unavailable(layer)]
    if not layers:
        pytest.skip(f"no threading layer that is {value} is installed")
    script = PREAMBLE + TOGETHER + DONE + "print(layer())"
    printed = run_script(script, NUMBA_THREADING_LAYER=value, NUMBA_NUM_THREADS="2", quiet=True)
    assert printed == f"done\n{layers[0].lower()}\n"


@pytest.mark.parametrize(
    ("absent", "layer"), [(["tbb"], "omp"), (["omp"], "tbb"), (["tbb", "omp"], "workqueue")], ids=str
)
def test_layers_that_are_not_installed(absent, layer):
    """The next one serves: threads at once and forks do no harm, and the bits are the same."""
    skip_without(layer)
    script = "".join(ABSENT[a] for a in absent) + PREAMBLE + TOGETHER
    script += "assert in_child(right)\n" if hasattr(os, "fork") else ""
    script += DONE + "print(layer())"
    printed = run_script(script, NUMBA_THREADING_LAYER=None, NUMBA_NUM_THREADS="2", quiet=layer != "tbb")
    assert printed.endswith(f"done\n{layer}\n")


@pytest.mark.parametrize(
    ("variable", "value", "before", "told"),
    [
        ("NUMBA_THREADING_LAYER", "nonsense", "", "is 'nonsense', which is unknown or not installed"),
        ("NUMBA_THREADING_LAYER", "tbb", ABSENT["tbb"], "is 'tbb', which is unknown or not installed"),
        ("NUMBA_THREADING_LAYER", "omp", ABSENT["omp"], "is 'omp', which is unknown or not installed"),
        ("NUMBA_THREADING_LAYER", "safe", ABSENT["tbb"], "is 'safe', which is unknown or not installed"),
        ("NUMBA_THREADING_LAYER_PRIORITY", "omp cuda", "", "is 'omp cuda', expected 'tbb omp workqueue'"),
    ],
)
def test_no_layer_can_be_started(variable, value, before, told):
    """One warning that names the variable, then one thread and the same bits; no text of Numba's."""
    script = before + "import warnings\nwarnings.simplefilter('error')\n" + PREAMBLE
    script += (
        """
x = arrays[0][0]
out = np.full_like(x, 7)
assert fastbn.get_num_threads() == 2
try:
    fastbn.batch_norm_train(x, out=out)
except RuntimeWarning as warning:
    print(warning)
assert (out == 7).all()
assert fastbn.get_num_threads() == 1
"""
        + ("assert in_child(right)\n" if hasattr(os, "fork") else "")
        + TOGETHER
        + DONE
    )
    printed = run_script(script, **{variable: value}, NUMBA_NUM_THREADS="2", quiet=True)
    assert printed == f"{variable} {told}: fastbn uses one thread\ndone\n"


def test_no_layer_and_no_filter():
    """The warning is shown once."""
    script = PREAMBLE + "import warnings\nwith warnings.catch_warnings(record=True) as found:\n"
    script += "    warnings.simplefilter('always')\n    right(), right()\nprint([w.category.__name__ for w in found])"
    printed = run_script(script, NUMBA_THREADING_LAYER="nonsense", NUMBA_NUM_THREADS="2", quiet=True)
    assert printed == "['RuntimeWarning']\n"


# --- the interpreter ---

WAYS = {
    "-O": (["-O"], {}),
    "optimized twice": ([], {"PYTHONOPTIMIZE": "2"}),
    "development mode, with faulthandler": ([], {"PYTHONDEVMODE": "1"}),
    "a checked allocator": ([], {"PYTHONMALLOC": "debug"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_start_the_interpreter(way):
    """Nothing on stderr, no resource left open, the usual bits."""
    options, env = WAYS[way]
    script = PREAMBLE + "import gc\ndigest() == expected or sys.exit('wrong bits')\ngc.collect()\nprint('done')"
    assert run_python(*options, "-c", script, NUMBA_NUM_THREADS="2", quiet=True, **env) == "done\n"


def test_warnings_are_errors():
    """Those that fastbn causes; Numba and NumPy are imported before."""
    script = "import numba, llvmlite, numpy, numpy.ma, warnings\nwarnings.simplefilter('error')\n" + PREAMBLE + DONE
    assert run_script(script, NUMBA_NUM_THREADS="2", quiet=True) == "done\n"
    assert run_python("-W", "error", "-c", PREAMBLE + DONE, NUMBA_NUM_THREADS="2", quiet=True) == "done\n"


def test_an_isolated_interpreter(tmp_path):
    """No environment, no user folder, no current folder; packages are given as the program would."""
    paths = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    script = f"import sys; sys.path += {paths}\n" + PREAMBLE + DONE
    assert run_python("-I", "-c", script, NUMBA_NUM_THREADS="2", quiet=True, cwd=tmp_path) == "done\n"


def test_from_a_zip_file(tmp_path):
    """Without a cache: there are no files whose hash would name it."""
    archive = shutil.make_archive(str(tmp_path / "fastbn"), "zip", ROOT, "fastbn")
    script = """
import numpy as np, fastbn
assert ".zip" in fastbn.__file__
print(fastbn.batch_norm_train(np.array([[1.0], [3.0]]), eps=0)[0].tolist())
fastbn.show_config()
"""
    printed = run_script(script, cwd=tmp_path, PYTHONPATH=archive, NUMBA_CACHE_DIR=str(tmp_path / "cache"), quiet=True)
    assert printed.startswith("[[-1.0], [1.0]]\n")
    assert not (tmp_path / "cache").exists()


def test_names_beyond_ascii_in_the_c_locale(tmp_path):
    folder = tmp_path / "häßlich ☃"
    folder.mkdir()
    script = """
import json, sys, numpy as np, fastbn
from fastbn.kernels import forward
y = fastbn.batch_norm_train(np.array([[1.0], [3.0]]), eps=0)[0].tolist()
stats = forward.forward_rows.serial.stats
print(json.dumps([y, sum(stats.cache_hits.values()), ascii(fastbn._config.config()["cache folder"])]))
"""
    for hits in (0, 1):
        env = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        found = json.loads(run_script(script, NUMBA_CACHE_DIR=str(folder), quiet=True, **env))
        assert found[:2] == [[[-1.0], [1.0]], hits]
    assert list(folder.rglob("*.nbc"))


def test_under_a_tracer():
    """A debugger or a coverage tool sees every line of the Python side, in every thread."""
    script = (
        PREAMBLE
        + """
seen = set()
def trace(frame, event, argument):
    seen.add(frame.f_code.co_name)
    return trace
sys.settrace(trace)
threading.settrace(trace)
assert right()
together(*[lambda: right() or sys.exit("wrong")] * 2)
sys.settrace(None)
assert {"batch_norm_train", "run"} <= seen
"""
        + DONE
    )
    assert run_script(script, NUMBA_NUM_THREADS="2", quiet=True) == "done\n"


def test_in_the_executor_of_asyncio():
    script = (
        PREAMBLE
        + """
import asyncio
async def main():
    loop = asyncio.get_running_loop()
    tasks = [loop.run_in_executor(None, right) for _ in range(6)]
    tasks += [asyncio.to_thread(right) for _ in range(6)]
    return await asyncio.gather(*tasks)
assert asyncio.run(main(), debug=True) == [True] * 12
"""
        + DONE
    )
    assert run_script(script, NUMBA_NUM_THREADS="2") == "done\n"


def awkward():
    """Data that raise every floating-point flag: overflow, underflow, division by zero, invalid."""
    x = np.random.default_rng(5).normal(size=(6, 8, 5)).astype("float32")
    x[:, 1] = np.inf
    x[0, 2] = np.nan
    x[:, 3] = np.finfo("float32").max
    x[:3, 4] = -np.finfo("float32").max
    x[:, 5] = np.finfo("float32").smallest_subnormal
    x[:, 6] = 0
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_under_strict_floating_point_errors(dtype):
    """NumPy's switch is for NumPy's operations: results and their bits stay, whatever the user set."""

    def everything():
        x = awkward().astype(dtype) * np.asarray(1 if dtype == "float32" else 1e269, dtype)
        bn = fastbn.BatchNorm(8, eps=0)
        pooled = fastbn.BatchNorm(8, momentum=None, eps=0)
        y, saved = fastbn.batch_norm_train(x, np.full(8, 1e30), np.ones(8), eps=0)
        m = fastbn.moments(x) + fastbn.moments(x[:2])
        found = [y, saved.mean, saved.var, *fastbn.batch_norm_backward(y, saved), m.mean, m.m2, m.var(1), m.std()]
        found += [bn(x), bn.backward(x), bn.dgamma, bn.running_mean, bn.running_var, pooled(x), pooled.running_var]
        found += [bn.eval()(x, save=True), bn.backward(x), *bn.fold()]
        found += [bn.fit_population([x, x[:3]]).running_var, fastbn.batch_norm(x, np.zeros(8), np.full(8, 1e-300))]
        running = np.zeros(8, "float32"), np.ones(8, "float32")
        fastbn.update_running(*running, m)
        return [*found, *running]

    with np.errstate(all="ignore"):
        expected = everything()
    with np.errstate(all="raise"):
        found = everything()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


# --- beside others ---

# The same tensor goes to PyTorch and back while both have started their threads.
TORCH = """
torch.set_num_threads(2)
x = torch.from_numpy(arrays[0][0])
for _ in range(3):
    theirs = torch.nn.functional.batch_norm(x, None, None, training=True)
    ours, saved = fastbn.batch_norm_train(x.numpy())
    assert abs(theirs.numpy() - ours).max() < 1e-5
    into = torch.empty_like(x)
    fastbn.batch_norm_train(x.numpy(), out=into.numpy())
    assert into.numpy().tobytes() == ours.tobytes()
    assert right()
together(lambda: [right() for _ in range(4)], lambda: [torch.relu(x).sum() for _ in range(40)])
"""


@pytest.mark.parametrize(
    ("order", "layer"),
    [("before", "tbb"), ("before", "omp"), ("before", "workqueue"), ("after", "tbb"), ("after", "omp")],
)
def test_pytorch_in_the_same_process(order, layer):
    pytest.importorskip("torch")
    skip_without(layer)
    script = "import torch\n" + PREAMBLE if order == "before" else PREAMBLE + "assert right()\nimport torch\n"
    script += TORCH + ("assert in_child(right)\n" if hasattr(os, "fork") else "") + DONE
    assert run_script(script, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2").endswith("done\n")


def test_in_threads_of_dask():
    pytest.importorskip("dask")
    script = (
        PREAMBLE
        + """
import dask, dask.array as da
assert all(dask.compute(*[dask.delayed(right)() for _ in range(8)], scheduler="threads", num_workers=4))
x = arrays[0][0]
mean, var = np.zeros(16), np.ones(16)
y = da.from_array(x, chunks=(1, -1, -1, -1)).map_blocks(fastbn.batch_norm, mean, var, dtype=x.dtype)
assert y.compute(scheduler="threads", num_workers=4).tobytes() == fastbn.batch_norm(x, mean, var).tobytes()
"""
        + DONE
    )
    assert run_script(script, NUMBA_NUM_THREADS="2") == "done\n"


def test_in_a_worker_of_distributed(tmp_path):
    pytest.importorskip("distributed")
    script = (
        PREAMBLE
        + """
from distributed import Client, LocalCluster
with LocalCluster(1, threads_per_worker=3, processes=False, dashboard_address=None) as cluster, Client(cluster) as c:
    assert all(c.gather([c.submit(lambda _: right(), i) for i in range(9)]))
"""
        + DONE
    )
    assert run_script(script, NUMBA_NUM_THREADS="2", cwd=tmp_path) == "done\n"
