"""States from strangers: an .npz file, or any mapping, that is hostile or damaged is refused and changes nothing."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Mapping

import numpy as np
import pytest

import fastbn

C = 3
FN = "BatchNorm.load_state_dict"


@pytest.fixture
def bn(rng):
    layer = fastbn.BatchNorm(C)
    layer(rng.normal(size=(8, C)))
    return layer


def bits(bn):
    return {k: np.asarray(v).tobytes() for k, v in bn.state_dict().items()}, vars(bn)["_saved"], bn._pool


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def header(descr, shape):
    """The start of an .npy file that claims this dtype and shape."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members(bn):
    """A good file: the state of the layer, every number one larger."""
    return {f"{name}.npy": npy(np.asarray(value) + 1) for name, value in bn.state_dict().items()}


def refused(bn, state, error, *words):
    before = bits(bn)
    with pytest.raises(error) as caught:
        bn.load_state_dict(state)
    assert str(caught.value).startswith(FN), caught.value
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 1000
    assert bits(bn) == before


@contextlib.contextmanager
def no_more_than(nbytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("momentum", [0.9, None])
def test_an_open_file_is_a_state(tmp_path, rng, momentum):
    bn = fastbn.BatchNorm(C, momentum=momentum)
    bn(rng.normal(size=(8, C)))
    np.savez(tmp_path / "state.npz", **bn.state_dict())
    with np.load(tmp_path / "state.npz") as state:
        other = fastbn.BatchNorm(C, momentum=momentum).load_state_dict(state)
    assert bits(other)[0] == bits(bn)[0]


class Exploding:
    """Unpickled, it would say so."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


HOSTILE = {
    "an object array": (npy(np.array([Exploding()] * C, object)), TypeError, "dtype object"),
    "a pickle in place of an array": (pickle.dumps(Exploding()), ValueError, "cannot be read"),
    "a structured dtype": (npy(np.zeros(C, [("a", "f4"), ("b", "O")])), TypeError, "dtype"),
    "characters": (npy(np.array(["1", "2", "3"])), TypeError, "dtype <U1"),
    "complex": (npy(np.ones(C, complex)), TypeError, "dtype complex128"),
    "dates": (npy(np.ones(C, "M8[s]")), TypeError, "dtype datetime64"),
    "a huge shape": (header("<f4", (1 << 40,)), ValueError, f"shape ({1 << 40},)"),
    "an impossible shape": (header("<f4", (1 << 62, 1 << 62)), ValueError, "shape"),
    "a negative shape": (header("<f4", (-C,)) + bytes(12), ValueError, "shape (-3,)"),
    "huge items": (header("|V2000000000", (C,)), TypeError, "dtype"),
    "a bomb": (header("<f4", (1 << 24,)) + bytes(1 << 26), ValueError, "shape"),
    "a header of code": (header("<f4", "__import__('os').abort()"), ValueError, "cannot be read"),
    "a header of version 2": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", ValueError, "version 1.0"),
    "half an array": (npy(np.ones(C, "float32"))[:-5], ValueError, "cannot be read"),
    "half a header": (npy(np.ones(C, "float32"))[:40], ValueError, "cannot be read"),
    "nothing": (b"", ValueError, "cannot be read"),
}


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_array_is_refused_before_it_is_read(tmp_path, bn, what, allow_pickle):
    content, error, words = HOSTILE[what]
    path = npz(tmp_path / "hostile.npz", members(bn) | {"running_mean.npy": content})
    with np.load(path, allow_pickle=allow_pickle) as state, no_more_than(1_000_000):
        refused(bn, state, error, "running_mean", words)


@pytest.mark.parametrize("name", ["num_batches_tracked", "running_count"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_count_is_refused_before_it_is_read(tmp_path, rng, name, what):
    bn = fastbn.BatchNorm(C, momentum=None)
    bn(rng.normal(size=(8, C)))
    path = npz(tmp_path / "hostile.npz", members(bn) | {f"{name}.npy": HOSTILE[what][0]})
    with np.load(path, allow_pickle=True) as state, no_more_than(1_000_000):
        refused(bn, state, (TypeError, ValueError), name)


def test_a_file_whose_bits_flipped_is_refused(tmp_path, bn):
    path = tmp_path / "state.npz"
    np.savez(path, **bn.state_dict())
    content = bytearray(path.read_bytes())
    content[content.index(bn.running_mean.tobytes())] ^= 1
    path.write_bytes(content)
    with np.load(path) as state:
        refused(bn, state, ValueError, "running_mean", "CRC")


def test_a_member_that_is_no_array_is_refused(tmp_path, bn):
    found = members(bn)
    found["gamma"] = found.pop("gamma.npy")
    with np.load(npz(tmp_path / "state.npz", found)) as state:
        refused(bn, state, ValueError, "gamma", "cannot be read")


def test_a_long_list_of_keys_is_refused_in_few_words(tmp_path, bn):
    refused(bn, bn.state_dict() | {f"layer.{i}.weight": 0 for i in range(100_000)}, ValueError, "layer.0.weight")
    refused(bn, bn.state_dict() | {"k" * 1_000_000: 0}, ValueError, "kkk")
    refused(bn, dict.fromkeys(range(100_000)), ValueError, "gamma")
    many = {f"{i}.npy": b"" for i in range(1000)}
    with np.load(npz(tmp_path / "many.npz", members(bn) | many)) as state:
        refused(bn, state, ValueError, "unknown")


class Fickle(Mapping):
    """Another value at every read, and what was read, how often."""

    def __init__(self, state):
        self.state, self.reads = state, []

    def __getitem__(self, key):
        self.reads.append(key)
        value = self.state[key]
        return value if self.reads.count(key) == 1 else -np.ones(9)

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_each_value_is_read_once(rng, momentum):
    bn, other = (fastbn.BatchNorm(C, momentum=momentum) for _ in range(2))
    bn(rng.normal(size=(8, C)))
    state = Fickle(bn.state_dict())
    other.load_state_dict(state)
    assert bits(other)[0] == bits(bn)[0]
    assert sorted(state.reads) == sorted(state.state)


def test_keys_that_vanish(bn):
    class Vanishing(dict):
        def __getitem__(self, key):
            raise KeyError(key)

    refused(bn, Vanishing(bn.state_dict()), ValueError, "gamma")


def test_an_error_of_the_mapping_changes_nothing(bn):
    class Failing(dict):
        def __getitem__(self, key):
            if key == "num_batches_tracked":
                raise OSError("the disk is gone")
            return super().__getitem__(key) + 1

    before = bits(bn)
    with pytest.raises(OSError, match="the disk is gone"):
        bn.load_state_dict(Failing(bn.state_dict()))
    assert bits(bn) == before


class Claiming:
    """Something of a shape, which nobody may turn into an array."""

    shape = (1 << 50,)

    def __array__(self, dtype=None, copy=None):
        pytest.fail("it was read")


class Meddling:
    """As an array it is good; becoming one it spoils the layer."""

    def __init__(self, bn, spoil):
        self.bn, self.spoil = bn, spoil

    def __array__(self, dtype=None, copy=None):
        self.spoil(self.bn)
        return np.ones(C)


def test_a_claimed_shape_is_checked_before_it_is_read(bn):
    refused(bn, bn.state_dict() | {"beta": Claiming()}, ValueError, "beta", "shape")


SPOILS = {
    "read-only": (lambda bn: bn.running_var.setflags(write=False), "running_var is read-only"),
    "resized": (lambda bn: bn.running_var.resize((C + 2,), refcheck=False), "running_var has shape (5,)"),
}


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("key", ["gamma", "running_var"])
def test_a_target_spoiled_while_values_are_read(bn, key, how):
    """Targets are checked last, so that no store fails after another was done."""
    spoil, words = SPOILS[how]
    state = {k: v + 1 for k, v in bn.state_dict().items()}
    before = bits(bn)[0]
    with pytest.raises(ValueError, match=FN) as caught:
        bn.load_state_dict(state | {key: Meddling(bn, spoil)})
    assert words in str(caught.value)
    after = bits(bn)[0]
    assert all(after[k] == before[k] for k in ("gamma", "beta", "running_mean", "num_batches_tracked"))


@pytest.mark.parametrize("spoil", [*SPOILS, "shared"])
@pytest.mark.parametrize("verb", ["load_state_dict", "fit_population", "__call__"])
def test_a_spoiled_target_changes_nothing(bn, rng, verb, spoil):
    argument = {"load_state_dict": bn.state_dict(), "fit_population": [rng.normal(size=(9, C))]}
    if spoil == "shared":
        bn.running_var = bn.running_mean[::-1]
    else:
        SPOILS[spoil][0](bn)
    before = bits(bn)
    with pytest.raises(ValueError, match="running_"):
        getattr(bn, verb)(argument.get(verb, rng.normal(size=(9, C))))
    assert bits(bn) == before


def test_arrays_of_the_layer_itself(bn):
    bn.gamma[:], bn.beta[:] = [1, 2, 3], [4, 5, 6]
    bn.load_state_dict(bn.state_dict() | {"gamma": bn.beta, "beta": bn.gamma})
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([4, 5, 6], [1, 2, 3])
    bn.load_state_dict(bn.state_dict() | {"gamma": bn.gamma[::-1], "beta": bn.gamma[:1].reshape(())})
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([6, 5, 4], [4, 4, 4])


def test_one_array_for_all(bn):
    one = np.ones(C)
    bn.load_state_dict(dict.fromkeys(bn._arrays(), one) | {"num_batches_tracked": 1})
    one[:] = 9
    assert all(a.tolist() == [1] * C for a in bn._arrays().values())
    assert len({a.__array_interface__["data"][0] for a in bn._arrays().values()}) == 4


VALUES = [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, -0.0, 2**63]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_extreme_values_stay_in_their_channel(bn, rng, name, value):
    """Warnings are errors here: none comes, and no other channel changes."""
    x = rng.normal(size=(8, C)).astype("float32")
    expected = bn.eval()(x)
    state = bn.state_dict()
    state[name] = np.array([state[name][0], value, state[name][2]], np.float64)
    if name == "running_var" and value < 0:
        refused(bn, state, ValueError, name)
        return
    y = bn.load_state_dict(state)(x)
    np.testing.assert_array_equal(y[:, ::2], expected[:, ::2])
    bn.fold()
    bn.train()(x)


COUNTS = [10**400, -(10**400), 2**63, -1, 1.0, "1", None, [1], np.array([1, 2]), np.array(1.0), b"1", True]


@pytest.mark.parametrize("value", COUNTS, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("name", ["num_batches_tracked", "running_count"])
def test_counts_that_are_none(rng, name, value):
    bn = fastbn.BatchNorm(C, momentum=None)
    bn(rng.normal(size=(8, C)))
    refused(bn, bn.state_dict() | {name: value}, (TypeError, ValueError), name)


def test_the_largest_count_still_works(rng):
    bn = fastbn.BatchNorm(C, momentum=None)
    bn(rng.normal(size=(8, C)))
    largest = 2**63 - 1
    bn.load_state_dict(bn.state_dict() | {"num_batches_tracked": largest, "running_count": largest})
    bn(rng.normal(size=(8, C)))
    assert bn.num_batches_tracked == largest + 1
    assert np.isfinite(bn.running_var).all()
