"""What `show_config` prints and what `warmup` compiles, with nothing compiled."""

import builtins
import io
import platform
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn import _config, _threads
from fastbn.kernels import forward

ROWS = ["fastbn", "numba", "numpy", "python", "cpu", "threads", "threading layer", "tbb", "cache folder"]


def test_show_config(capsys):
    fastbn.show_config()
    found = _config.config()
    assert list(found) == ROWS
    assert capsys.readouterr().out.splitlines() == [f"{name + ':':<17}{value}" for name, value in found.items()]
    assert {name: found[name] for name in ("fastbn", "numba", "numpy")} == {
        name: version(name) for name in ("fastbn", "numba", "numpy")
    }
    assert found["python"] == f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    assert found["cpu"] == _config.cpu_name()
    numba = sys.modules["numba"]
    most = numba.config.NUMBA_NUM_THREADS
    assert found["threads"] == f"{fastbn.get_num_threads()} of {most}; one below 65,536 elements"


@pytest.mark.parametrize("layer", [None, "omp"])
@pytest.mark.parametrize("tbb", [None, "/lib/libtbb.so.12"])
@pytest.mark.parametrize("folder", [None, "/home/somebody/cache"])
def test_config_says_what_there_is(monkeypatch, layer, tbb, folder):
    monkeypatch.setattr(_config, "threading_layer", lambda: layer)
    monkeypatch.setattr(_config, "load_tbb", lambda: tbb)
    stats = {} if folder is None else {"stats": SimpleNamespace(cache_path=folder)}
    monkeypatch.setattr(forward.forward_runs, "serial", SimpleNamespace(**stats))
    monkeypatch.setattr(_config, "version", lambda package: f"{package} 1.2")
    found = _config.config()
    assert found["threading layer"] == (layer or f"not started yet ({sys.modules['numba'].config.THREADING_LAYER})")
    safe = "not loaded: fastbn is safe without it, but serial in forked children"
    assert found["tbb"] == f"tbb 1.2, {tbb or safe}"
    without = "none is writable: kernels that no folder has are compiled anew in every process"
    assert found["cache folder"] == (folder or without)
    assert found["fastbn"] == "fastbn 1.2"


def test_a_package_that_is_not_installed():
    assert _config._version("a-package-that-nobody-has") == "not installed"


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "expected"),
    [
        ("processor : 0\nmodel name\t: Some CPU: 3 GHz \nmodel name : Another\n", "P", "Some CPU: 3 GHz"),
        ("processor : 0\n", "P", "P"),
        ("", "", "M"),
        (None, "P", "P"),
        (None, "", "M"),
    ],
)
def test_the_name_of_the_cpu(monkeypatch, cpuinfo, processor, expected):
    def read(path):
        assert path == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return io.StringIO(cpuinfo)

    monkeypatch.setattr(builtins, "open", read)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "M")
    assert _config.cpu_name() == expected


@pytest.fixture
def calls(monkeypatch):
    """What `warmup` calls, with nothing computed."""
    made = []

    def verb(name, result):
        def call(*arrays, axis=None):
            made.append((name, axis, *arrays))
            return result(*arrays)

        monkeypatch.setattr(_config, name, call)

    verb("batch_norm_train", lambda x: (x + 1, SimpleNamespace(mean="mean", var="var")))
    for name in ("batch_norm", "batch_norm_backward", "moments"):
        verb(name, lambda *arrays: None)
    return made


def test_warmup_calls_every_verb_on_every_kind_of_array(calls):
    fastbn.warmup(["float32", "int8"], [1, 3])
    seen = []
    assert len(calls) == 4 * 4 * 4
    for train, infer, backward, moments in zip(*[iter(calls)] * 4, strict=True):
        (name, axis, x), made = train, SimpleNamespace(mean="mean", var="var")
        assert (name, infer) == ("batch_norm_train", ("batch_norm", axis, x, made.mean, made.var))
        assert (backward[0], moments) == ("batch_norm_backward", ("moments", axis, x))
        np.testing.assert_array_equal(backward[2], x + 1)
        assert (backward[1], backward[3]) == (None, made)
        assert x.flags.c_contiguous
        assert (x == 1).all()
        seen.append((x.dtype.name, axis, np.moveaxis(x, axis, 1).shape))
    shapes = [(2, 8, 2, 2), (2, 8, 16, 16), (2, 64, 32, 32), (256, 64, 2, 2)]
    assert seen == [(d, a, s) for d in ("float32", "int8") for a in (1, 3) for s in shapes]
    sizes = [int(np.prod(s)) for s in shapes]
    assert [n >= _threads.SERIAL_SIZE for n in sizes] == [False, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "arrays"),
    [
        (((), ()), 0),
        (("float64", -1), 4),
        ((("float32",), range(4)), 16),
        (({"float32"}, {1}), 4),
        ((), 8),
    ],
)
def test_warmup_takes_one_or_many(calls, arguments, arrays):
    fastbn.warmup(*arguments)
    assert len(calls) == 4 * arrays
    if arguments == ("float64", -1):
        assert all(x.dtype == np.float64 and axis == 3 for name, axis, x, *_ in calls if name == "moments")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": [1, 4]}, "^warmup: axes has 4, expected -4 to 3$"),
        ({"axes": [[1]]}, r"^warmup: axes has \[1\], expected ints$"),
        ({"axes": [(1, 2)]}, r"^warmup: axes has \(1, 2\), expected ints$"),
        ({"dtypes": None}, "^warmup: dtypes has None, expected"),
        ({"dtypes": ["float32", "complex64"]}, "^warmup: dtypes has 'complex64', expected"),
    ],
)
def test_warmup_calls_nothing_if_an_argument_is_bad(calls, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastbn.warmup(**arguments)
    assert not calls


def test_warmup_says_on_stderr_how_far_it_is(calls, capsys):
    fastbn.warmup(axes=[1])
    assert capsys.readouterr() == ("", "")
    fastbn.warmup(axes=[1], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "".join(f"\rcompiling {i}/4" for i in (1, 2, 3, 4)) + "\r" + " " * 40 + "\r"
