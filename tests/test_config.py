"""What `show_config` prints and what `warmup` compiles, with nothing compiled."""

import builtins
import io
import itertools
import platform
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn import _config, _threads
from fastbn._layout import layout_of
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
    """What `warmup` calls, with nothing computed: name, axis, arrays and what else is given."""
    made = []

    def verb(name, result):
        def call(*arrays, axis=None, **given):
            made.append((name, axis, arrays, given))
            return result(*arrays)

        return call

    monkeypatch.setattr(
        _config,
        "batch_norm_train",
        verb("batch_norm_train", lambda x: (x + 1, SimpleNamespace(mean="mean", var="var"))),
    )
    for name in ("batch_norm", "batch_norm_backward", "moments"):
        monkeypatch.setattr(_config, name, verb(name, lambda *arrays: None))
    monkeypatch.setattr(_config, "Saved", SimpleNamespace(fixed=verb("Saved.fixed", lambda *arrays: "fixed")))
    return made


VERBS = ["batch_norm_train", "batch_norm", "batch_norm_backward", "Saved.fixed", "batch_norm_backward", "moments"]
SHAPES = [
    (2, 8, 2, 2), (1024, 3, 2, 2), (2, 8, 16, 16), (4, 2, 32, 32),
    (16, 512, 4, 4), (8192, 3, 2, 2), (2, 64, 32, 32), (64, 2, 32, 32),
]  # fmt: skip


def rounds(calls):
    """The calls in groups, one of each verb, the names checked."""
    groups = list(zip(*[iter(calls)] * len(VERBS), strict=True))
    assert all([name for name, *_ in group] == VERBS for group in groups)
    return groups


def test_warmup_calls_every_verb_on_every_kind_of_array(calls):
    fastbn.warmup(["float32", "int8"], [1, 3])
    seen = []
    for train, infer, backward, fixed, frozen, moments in rounds(calls):
        _, axis, (x,), given = train
        made = SimpleNamespace(mean="mean", var="var")
        assert given == {}
        assert infer[1:] == fixed[1:] == (axis, (x, made.mean, made.var), {})
        np.testing.assert_array_equal(backward[2][0], x + 1)
        assert (backward[1], backward[2][1], backward[3]) == (None, made, {})
        np.testing.assert_array_equal(frozen[2][0], x + 1)
        assert (frozen[1], frozen[2][1], frozen[3]) == (None, "fixed", {})
        assert moments[1:] == (axis, (x,), {})
        assert x.flags.c_contiguous
        assert (x == 1).all()
        seen.append((x.dtype.name, axis, np.moveaxis(x, axis, 1).shape))
    assert seen == [(d, a, s) for d in ("float32", "int8") for a in (1, 3) for s in SHAPES]
    sizes = [int(np.prod(s)) for s in SHAPES]
    assert [n >= _threads.SERIAL_SIZE for n in sizes] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_arrays_of_warmup_are_cut_into_every_kind_of_tile(axis, dtype):
    kinds = set()
    for shape in SHAPES:
        x = np.moveaxis(np.ones(shape, dtype), 1, axis).copy()
        grid = layout_of(x, (axis,)).measured
        kinds.add((grid.runs, grid.fused, x.size >= _threads.SERIAL_SIZE))
    assert kinds == set(itertools.product((True, False) if axis == 1 else (False,), (True, False), (True, False)))


def test_warmup_gives_each_verb_the_parts_that_it_takes(calls):
    fastbn.warmup("int8", 1, parts=["activation", "residual+activation", "where", "activation+residual"])
    kinds = []
    for train, infer, backward, fixed, frozen, moments in rounds(calls)[:: len(SHAPES)]:
        _, _, (x,), given = train
        if "residual" in given:
            assert (given["residual"].dtype, given["residual"].shape) == (np.float32, x.shape)
        without = {name: part for name, part in given.items() if name != "where"}
        assert infer[3] == fixed[3] == without
        assert backward[3] == frozen[3] == {}
        assert moments[3] == {name: part for name, part in given.items() if name == "where"}
        kinds.append({name: part for name, part in given.items() if name != "residual"} | {"n": len(given)})
    relu = {"activation": "relu"}
    assert kinds == [{"n": 0}, {**relu, "n": 1}, {**relu, "n": 2}, {"where": True, "n": 1}]


@pytest.mark.parametrize(
    ("arguments", "arrays"),
    [
        (((), ()), 0),
        (("float64", -1), 1),
        ((("float32",), range(4)), 4),
        (({"float32"}, {1}), 1),
        ((), 2),
    ],
)
@pytest.mark.parametrize(("parts", "times"), [((), 1), ("where", 2), ({"where", "activation"}, 3)])
def test_warmup_takes_one_or_many(calls, arguments, arrays, parts, times):
    fastbn.warmup(*arguments, parts=parts)
    assert len(rounds(calls)) == len(SHAPES) * arrays * times
    if arguments == ("float64", -1):
        assert all(x.dtype == np.float64 and axis == 3 for name, axis, (x, *_), _ in calls if name == "moments")


ONE_OF = "expected 'activation', 'residual', 'where', or several with [+] between$"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": [1, 4]}, "^warmup: axes has 4, expected -4 to 3$"),
        ({"axes": [[1]]}, r"^warmup: axes has \[1\], expected ints$"),
        ({"axes": [(1, 2)]}, r"^warmup: axes has \(1, 2\), expected ints$"),
        ({"dtypes": None}, "^warmup: dtypes has None, expected"),
        ({"dtypes": ["float32", "complex64"]}, "^warmup: dtypes has 'complex64', expected"),
        ({"parts": "relu"}, f"^warmup: parts has 'relu', {ONE_OF}"),
        ({"parts": ["where", "residual+"]}, f"^warmup: parts has 'residual[+]', {ONE_OF}"),
        ({"parts": ""}, f"^warmup: parts has '', {ONE_OF}"),
        ({"parts": None}, f"^warmup: parts has None, {ONE_OF}"),
        ({"parts": [("residual", "activation")]}, f"^warmup: parts has .*, {ONE_OF}"),
    ],
)
def test_warmup_calls_nothing_if_an_argument_is_bad(calls, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastbn.warmup(**arguments)
    assert not calls


def test_warmup_says_on_stderr_how_far_it_is(calls, capsys):
    fastbn.warmup(axes=[1])
    assert capsys.readouterr() == ("", "")
    fastbn.warmup(axes=[1], parts="where", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "".join(f"\rcompiling {i}/16" for i in range(1, 17)) + "\r" + " " * 40 + "\r"
