"""Files of layers and moments: the same bits come back, and a damaged, foreign or hostile file is a ValueError."""

import contextlib
import doctest
import errno
import io
import json
import os
import re
import struct
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import pages
import pytest
from subprocesses import run_script

import fastbn
from fastbn.conventions import CONVENTIONS
from fastbn.interop import files

C = 3


def _safetensors():
    return pytest.importorskip("safetensors", reason="safetensors is not installed: no file of it to read or write")


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        _safetensors()
    return tmp_path / f"layer{request.param}"


def trained(bn, rng, steps=3, weights=False):
    shape = [4] * (max(a % 4 for a in np.atleast_1d(bn.axis)) + 1 if bn.axis != -1 else 3)
    for a, n in zip(np.atleast_1d(bn.axis), bn.channels, strict=True):
        shape[a] = n
    for _ in range(steps):
        x = rng.normal(2, 3, shape)
        bn(x, where=rng.uniform(0, 3, x.shape) if weights else None)
    for a in (bn.gamma, bn.beta):
        if a is not None:
            a[...] = rng.normal(size=a.shape)
    return bn


def state(thing):
    if isinstance(thing, fastbn.Moments):
        return {k: (np.asarray(v := getattr(thing, k)).tobytes(), type(v)) for k in ("count", "mean", "m2")}
    return repr(thing), {k: (np.asarray(v).dtype, np.asarray(v).tobytes()) for k, v in thing.state_dict().items()}


LAYERS = {
    "plain": lambda: fastbn.BatchNorm(C),
    "bare": lambda: fastbn.BatchNorm(C, center=False, scale=False, track_running_stats=False),
    "no gamma": lambda: fastbn.BatchNorm(C, scale=False, momentum=0.1, eps=1 / 3),
    "pool": lambda: fastbn.BatchNorm(C, momentum=None, correction=0),
    "axes": lambda: fastbn.BatchNorm((C, 2), axis=(1, 2), activation="relu", dtype="float64", eps=0.0),
    **{name: lambda name=name: fastbn.BatchNorm.like(name, C, eps=1e-4) for name in CONVENTIONS},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_bit_for_bit(path, rng, name):
    bn = trained(LAYERS[name](), rng)
    files.save(bn, path)
    other = files.load(path)
    assert state(other) == state(bn)
    assert other.training
    x = rng.normal(size=(6, *[2] * (len(bn.channels) - 1), C) if bn.axis == -1 else (6, *bn.channels))
    np.testing.assert_array_equal(other(x), bn(x))  # and it goes on with the same bits
    np.testing.assert_array_equal(other.eval()(x), bn.eval()(x))
    assert state(other) == state(bn)


def test_a_pool_of_weights_comes_back(path, rng):
    bn = trained(fastbn.BatchNorm(C, momentum=None), rng, weights=True)
    files.save(bn, path)
    other = files.load(path)
    assert state(other) == state(bn)
    assert other._pool.count.tobytes() == bn._pool.count.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.0, 5e-324, 1e300])
def test_any_number_comes_back(path, value):
    bn = fastbn.BatchNorm(C, dtype="float64")
    bn.gamma[1] = bn.beta[0] = bn.running_mean[2] = bn.running_var[1] = value
    files.save(bn, path)
    assert state(files.load(path)) == state(bn)


@pytest.mark.parametrize("weights", [False, True])
def test_moments_come_back_and_go_on(path, rng, weights):
    x = rng.normal(size=(9, C, 4))
    w = rng.uniform(size=x.shape) if weights else None
    m = fastbn.moments(x, where=w)
    files.save(m, path)
    other = files.load(path)
    assert state(other) == state(m)
    assert state(other + m) == state(m + m)


@pytest.mark.parametrize("channels", [(), 0, (2, 3)])
def test_moments_of_any_shape(path, channels):
    m = fastbn.Moments.empty(channels)
    files.save(m, path)
    assert state(files.load(path)) == state(m)
    assert files.load(path).mean.shape == m.mean.shape


def test_several_in_one_file_keep_their_names_and_order(path, rng):
    net = {
        "stem": trained(fastbn.BatchNorm(C), rng), "a": trained(fastbn.BatchNorm.like("caffe", 2), rng),
        "a.b": trained(fastbn.BatchNorm.like("keras", C), rng), "block/1/größe-2": fastbn.BatchNorm(1),
        "seen": fastbn.moments(rng.normal(size=(5, 2))),
    }  # fmt: skip
    files.save(net, path)
    found = files.load(path)
    assert [*found] == [*net]
    assert {k: state(v) for k, v in found.items()} == {k: state(v) for k, v in net.items()}
    files.save({}, path)
    assert files.load(path) == {}
    files.save({"one": fastbn.BatchNorm(1)}, path)
    assert [*files.load(path)] == ["one"]


def test_others_can_read_the_arrays(tmp_path, rng):
    bn = trained(fastbn.BatchNorm(C), rng)
    files.save(bn, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as found:
        assert json.loads(str(found["fastbn"]))["one"]["options"]["eps"] == 1e-5
        np.testing.assert_array_equal(found["running_var"], bn.running_var)
    _safetensors()
    from safetensors.numpy import load_file

    files.save({"bn1": bn}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["bn1.running_var"], bn.running_var)


def test_the_same_layer_is_the_same_npz(tmp_path):
    """The metadata of safetensors come in any order."""
    path = tmp_path / "a.npz"
    files.save(fastbn.BatchNorm(C), path)
    before = path.read_bytes()
    files.save(fastbn.BatchNorm(C), os.fspath(path))
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(call, error, *words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("files."), message
    assert all(word in message for word in words), message
    assert len(message) < 1500
    return message


@pytest.mark.parametrize(
    ("what", "name", "error", "words"),
    [
        (fastbn.BatchNorm(1), "a.npy", ValueError, ["path", "'.npy'", ".npz", ".safetensors"]),
        (fastbn.BatchNorm(1), "npz", ValueError, ["path", "''", ".npz"]),
        (fastbn.BatchNorm(1).state_dict(), "a.npz", TypeError, ["gamma", "BatchNorm"]),
        ([fastbn.BatchNorm(1)], "a.npz", TypeError, ["what", "list", "mapping"]),
        (None, "a.npz", TypeError, ["what", "None"]),
        *[
            ({name: fastbn.BatchNorm(1)}, "a.npz", ValueError, ["name", "letters"])
            for name in ("", "..", "/a", "a/", "a//b", "../a", "a b", "a\n", "a\0", "a\\b", 1, "x" * 201)
        ],
    ],
)
def test_what_cannot_be_saved(tmp_path, what, name, error, words):
    refused(lambda: files.save(what, tmp_path / name), error, "files.save", *words)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("verb", [lambda p: files.save(fastbn.BatchNorm(1), p), files.load])
@pytest.mark.parametrize("path", [None, 3, b"a.npz"])
def test_a_path_is_text(verb, path):
    refused(lambda: verb(path), TypeError, "path", "expected a str or a path")


def test_a_layer_spoiled_by_hand_is_refused_before_anything_is_written(tmp_path):
    for name, value in {"eps": -1.0, "momentum": "0.9", "correction": 2, "num_batches_tracked": 2**63}.items():
        bn = fastbn.BatchNorm(1)
        setattr(bn, name, value)
        with pytest.raises((TypeError, ValueError), match=f"files.save: {name}"):
            files.save(bn, tmp_path / "a.npz")
    assert not [*tmp_path.iterdir()]


def test_no_file_is_an_os_error(path):
    with pytest.raises(FileNotFoundError, match="layer"):
        files.load(path)
    absent = path.parent / "absent" / path.name
    with pytest.raises(FileNotFoundError) as error:
        files.save(fastbn.BatchNorm(1), absent)
    assert error.value.filename == absent
    assert ".tmp" not in str(error.value)
    path.mkdir()
    with pytest.raises(OSError, match="layer"):
        files.load(path)
    with pytest.raises(OSError, match="layer") as error:
        files.save(fastbn.BatchNorm(1), path)
    assert ".tmp" not in str(error.value)


def test_a_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    for call in (lambda p: files.save(fastbn.BatchNorm(1), p), files.load):
        with pytest.raises(ImportError, match=re.escape('pip install "fastbn[safetensors]"')):
            call(tmp_path / "a.safetensors")
    files.save(fastbn.BatchNorm(1), tmp_path / "a.npz")
    assert repr(files.load(tmp_path / "a.npz")) == "BatchNorm(1)"


# -------------------------------------------------------------------------------------------------------- damaged files


def saved(path, rng):
    net = {"a": trained(fastbn.BatchNorm.like("flax", C), rng), "b": fastbn.moments(rng.normal(size=(9, 2)))}
    files.save(net, path)
    return {k: state(v) for k, v in net.items()}, path.read_bytes()


def test_part_of_a_file_is_refused(path, rng):
    _, content = saved(path, rng)
    for n in sorted({0, 1, 8, *(len(content) * i // 4 for i in range(1, 4)), *range(len(content) - 40, len(content))}):
        path.write_bytes(content[:n])
        refused(lambda: files.load(path), ValueError, "files.load", path.name)


def test_no_flipped_bit_changes_what_is_loaded(path, rng):
    """One in every third byte of the file: an error, or, where no reader looks, the same bits."""
    expected, content = saved(path, rng)
    harmless, messages = 0, []
    for i in range(0, len(content), 3):
        spoiled = bytearray(content)
        spoiled[i] ^= 1 << (i % 8)
        path.write_bytes(spoiled)
        try:
            found = files.load(path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert {k: state(v) for k, v in found.items()} == expected, f"bit {i % 8} of byte {i}"
            harmless += 1
    assert all(m.startswith("files.load") for m in messages)
    assert harmless < len(messages) / 2


def test_bytes_that_are_no_file(path):
    noise = np.random.default_rng(0).bytes(5000)
    for content in (b"", b"x", bytes(100), b"PK\x05\x06" + bytes(18), b"\xff" * 64, b"\x80\x04N.", noise):
        path.write_bytes(content)
        refused(lambda: files.load(path), ValueError, "files.load", path.name)


def test_a_file_of_the_other_kind_is_refused(tmp_path):
    _safetensors()
    for one, other in ((".npz", ".safetensors"), (".safetensors", ".npz")):
        files.save(fastbn.BatchNorm(1), tmp_path / f"a{one}")
        (tmp_path / f"b{other}").write_bytes((tmp_path / f"a{one}").read_bytes())
        refused(lambda other=other: files.load(tmp_path / f"b{other}"), ValueError, "cannot be read")


# ------------------------------------------------------------------------------------------- foreign and hostile files


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def header(descr, shape):
    """The start of an .npy file that claims this dtype and shape."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, found, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in found.items():
            archive.writestr(name, content)
    return path


@contextlib.contextmanager
def no_more_than(nbytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


class Exploding:
    """Unpickled, it would say so."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


HOSTILE = {
    "an object array": npy(np.array([Exploding()] * C, object)),
    "a structured dtype": npy(np.zeros(C, [("a", "f4"), ("b", "O")])),
    "characters": npy(np.array(["1", "2", "3"])),
    "complex": npy(np.ones(C, complex)),
    "dates": npy(np.ones(C, "M8[s]")),
    "a huge shape": header("<f4", (1 << 40,)),
    "an impossible shape": header("<f4", (1 << 62, 1 << 62)),
    "a negative shape": header("<f4", (-C,)) + bytes(12),
    "two negative lengths": header("<f4", (-C, -1)) + bytes(12),
    "huge items": header("|V2000000000", (C,)),
    "a header of code": header("<f4", "__import__('os').abort()"),
    "a header of version 2": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f",
    "half an array": npy(np.ones(C, "float32"))[:-5],
    "more than an array": npy(np.ones(C, "float32")) + b"more",
    "half a header": npy(np.ones(C, "float32"))[:40],
    "nothing": b"",
    "another shape": npy(np.ones(C + 1, "float32")),
    "one number": npy(np.float32(1)),
    "another dtype": npy(np.ones(C, "float64")),
    "a negative variance": npy(-np.ones(C, "float32")),
}


# Why some are refused, where more than one check would.
WHY = {
    "an object array": "dtype object", "a structured dtype": "expected numbers", "dates": "expected numbers",
    "two negative lengths": "expected shape (-3, -1)", "more than an array": "16 bytes, expected shape (3,)",
    "a huge shape": "0 bytes", "a header of version 2": "version 1.0",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_array_is_refused_and_takes_no_memory(tmp_path, what):
    path = tmp_path / "a.npz"
    files.save(fastbn.BatchNorm(C), path)
    write(path, members(path) | {"running_var.npy": HOSTILE[what]})
    with no_more_than(1_000_000):
        refused(lambda: files.load(path), ValueError, "a.npz", "running_var", WHY.get(what, ""))


@pytest.mark.parametrize("what", [w for w in HOSTILE if w != "another dtype"])
def test_hostile_moments_are_refused_and_take_no_memory(tmp_path, what):
    path = tmp_path / "a.npz"
    files.save(fastbn.Moments.empty(C), path)
    write(path, members(path) | {"m2.npy": HOSTILE[what]})
    with no_more_than(1_000_000):
        refused(lambda: files.load(path), ValueError, "a.npz", WHY.get(what, "m2"))


@pytest.mark.parametrize("what", [w for w in HOSTILE if w not in ("another shape", "one number", "another dtype")])
def test_hostile_options_are_refused_and_take_no_memory(tmp_path, what):
    path = tmp_path / "a.npz"
    files.save(fastbn.BatchNorm(C), path)
    write(path, members(path) | {"fastbn.npy": HOSTILE[what]})
    with no_more_than(1_000_000):
        refused(lambda: files.load(path), ValueError, "files.load", "a.npz", "fastbn")


def test_a_bomb_is_refused(tmp_path):
    path, bomb = tmp_path / "a.npz", npy(np.zeros(1 << 22, "float32"))
    files.save(fastbn.BatchNorm(C), path)
    write(path, members(path) | {"gamma.npy": bomb}, zipfile.ZIP_DEFLATED)
    with no_more_than(1_000_000):
        refused(lambda: files.load(path), ValueError, "compressed")
    with zipfile.ZipFile(path, "w") as archive:  # a hundred members that are the same bytes
        archive.writestr("fastbn.npy", npy(np.array("{}")))
        archive.writestr("0.npy", npy(np.zeros(1 << 14)))
        for i in range(1, 100):
            archive.filelist.append(alias := zipfile.ZipInfo(f"{i}.npy"))
            for name in ("file_size", "compress_size", "CRC", "header_offset"):
                setattr(alias, name, getattr(archive.filelist[1], name))
        archive._didModify = True
    with no_more_than(1_000_000):
        refused(lambda: files.load(path), ValueError, "larger than the file")


def document(path, change):
    """The file again, with its JSON document changed."""
    found = members(path)
    text = str(np.load(io.BytesIO(found["fastbn.npy"]))[()])
    changed = change(json.loads(text))
    found["fastbn.npy"] = npy(np.array(changed if isinstance(changed, str) else json.dumps(changed)))
    return write(path, found)


def put(*keys, value):
    """Set what lies under these keys, or with None take it away."""

    def change(found):
        at = found
        for k in keys[:-1]:
            at = at[k]
        at[keys[-1]] = value
        if value is None:
            del at[keys[-1]]
        return found

    return change


OPTION = ("one", "options")
DOCUMENTS = {
    "no JSON": lambda _: "{",
    "a list": lambda _: [],
    "deep": lambda _: "[" * 100_000,
    "digits": lambda _: '{"format": ' + "9" * 5000 + "}",
    "a later format": put("format", value=2),
    "true": put("format", value=True),
    "nothing of the format": put("format", value=None),
    "more": put("more", value=1),
    "neither one nor many": put("one", value=None),
    "an entry that is none": put("one", value=[1]),
    "a kind": put("one", "kind", value="Layer"),
    "no kind": put("one", "kind", value=None),
    "the other kind": put("one", value={"kind": "Moments"}),
    "many": lambda d: {"format": 1, "many": {"a": d["one"]}},
    "a name": lambda d: {"format": 1, "many": {"../a": d["one"]}},
    "a system": put("one", "like", value="caffe2"),
    "no system": put("one", "like", value=""),
    "a system that is a list": put("one", "like", value=["torch"]),
    "channels": put("one", "channels", value=[4]),
    "huge channels": put("one", "channels", value=[1 << 40]),
    "impossible channels": put("one", "channels", value=[1 << 70]),
    "channels that are text": put("one", "channels", value="3"),
    "half channels": put("one", "channels", value=[2.5]),
    "no channels": put("one", "channels", value=[0]),
    "an axis": put(*OPTION, "axis", value=[1, 2]),
    "an axis that is text": put(*OPTION, "axis", value="1"),
    "eps": put(*OPTION, "eps", value=-1),
    "NaN": put(*OPTION, "eps", value=float("nan")),
    "momentum": put(*OPTION, "momentum", value=2),
    "correction": put(*OPTION, "correction", value=True),
    "center": put(*OPTION, "center", value=0),
    "without gamma": put(*OPTION, "scale", value=False),
    "a dtype": put(*OPTION, "dtype", value="object"),
    "another dtype": put(*OPTION, "dtype", value="float64"),
    "an activation": put(*OPTION, "activation", value="gelu"),
    "an option less": put(*OPTION, "activation", value=None),
    "an option more": put(*OPTION, "training", value=True),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_options_that_are_none_are_refused(tmp_path, what):
    path = tmp_path / "a.npz"
    files.save(fastbn.BatchNorm(C), path)
    document(path, DOCUMENTS[what])
    with no_more_than(3_000_000):
        refused(lambda: files.load(path), ValueError, "files.load", "a.npz")


def test_options_changed_by_hand_are_read(tmp_path):
    """An .npz has no checksum over all, and a user may edit it; what stands above is refused for what it says."""
    path = tmp_path / "a.npz"
    files.save(fastbn.BatchNorm(C), path)
    document(path, put(*OPTION, "eps", value=0.5))
    assert repr(files.load(path)) == f"BatchNorm({C}, eps=0.5)"


def test_arrays_in_the_order_of_fortran_are_read(tmp_path, rng):
    path, bn = tmp_path / "a.npz", trained(LAYERS["axes"](), rng)
    files.save(bn, path)
    write(path, members(path) | {"gamma.npy": npy(np.asfortranarray(bn.gamma))})
    assert state(files.load(path)) == state(bn)


def test_so_many_options_are_refused(path, monkeypatch):
    files.save(fastbn.BatchNorm(C), path)
    monkeypatch.setattr(files, "LONGEST", 100)
    refused(lambda: files.load(path), ValueError, "options", "at most 100")
    refused(lambda: files.save(fastbn.BatchNorm(C), path), ValueError, "files.save: what", "at most 100")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "the disk is gone")])
def test_what_the_machine_lacks_is_no_fault_of_the_file(path, monkeypatch, error):
    files.save(fastbn.BatchNorm(C), path)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "frombuffer" if path.suffix == ".npz" else "array", fail)
        with pytest.raises(type(error)) as caught:
            files.load(path)
    assert caught.value is error
    assert repr(files.load(path)) == f"BatchNorm({C})"


def test_channels_without_arrays_are_bounded(tmp_path):
    path = tmp_path / "a.npz"
    files.save(fastbn.BatchNorm(C, center=False, scale=False, track_running_stats=False), path)
    document(path, put("one", "channels", value=[1 << 33]))
    refused(lambda: files.load(path), ValueError, "more channels than it has bytes")


def twice(path, found):
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*found, "a.beta.npy"):
            archive.writestr(name, found[name])


def test_wrong_keys_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    files.save({"a": fastbn.BatchNorm(C)}, path)
    good = members(path)
    for change, words in {
        "b.gamma.npy": ["b.gamma", "its layers only"],
        "gamma.npy": ["gamma", "its layers only"],
        "a.weight.npy": ["weight", "running_var"],
        "a.running_count.npy": ["running_count", "running_var"],
        "a.gamma": ["'a.gamma'", "arrays only"],
    }.items():
        write(path, good | {change: good["a.gamma.npy"]})
        refused(lambda: files.load(path), ValueError, "a.npz", *words)
    write(path, {k: v for k, v in good.items() if k != "a.beta.npy"})
    refused(lambda: files.load(path), ValueError, "a.npz", "expected", "beta")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice(path, good)
    refused(lambda: files.load(path), ValueError, "twice")


def test_a_state_alone_is_no_file_of_a_layer(path):
    state = fastbn.BatchNorm(C).state_dict()
    if path.suffix == ".npz":
        np.savez(path, **state)
        refused(lambda: files.load(path), ValueError, "no array 'fastbn'", "load_state_dict(np.load(path))")
        return
    from safetensors.numpy import save_file

    for metadata in (None, {"format": "pt"}, {"fastbn": "{}"}, {"fastbn": "{}", "sha256": "0" * 64}):
        save_file({k: np.asarray(v) for k, v in state.items()}, path, metadata)
        word = "checksum" if metadata and len(metadata) == 2 else "metadata"
        refused(lambda: files.load(path), ValueError, word)


def test_hostile_tensors_are_refused(tmp_path):
    """Headers that claim what is not there; a right checksum makes nothing of them."""
    safetensors = _safetensors()
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    for spec in (
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
    ):
        text = json.dumps({"gamma": spec, "__metadata__": {"fastbn": "{}", "sha256": ""}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with no_more_than(1_000_000):
            refused(lambda: files.load(path), ValueError, "a.safetensors")
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(lambda: files.load(path), ValueError, "a.safetensors")
    files.save(fastbn.BatchNorm(C), path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for a in (arrays["gamma"].view("int32"), arrays["gamma"].reshape(C, 1), arrays["gamma"] + 1):
        save_file(arrays | {"gamma": a}, path, metadata)
        refused(lambda: files.load(path), ValueError, "checksum")
    entry = {"kind": "BatchNorm", "like": None, "channels": [1 << 40], "options": {}}
    for text in ("[]", json.dumps({"format": 1, "one": entry})):
        arrays = {"gamma": np.ones(1, "float32")}
        save_file(arrays, path, {"fastbn": text, "sha256": files._digest(text, arrays)})
        with no_more_than(1_000_000):
            refused(lambda: files.load(path), ValueError, "options", "expected")


# ------------------------------------------------------------------------------------------- what fails, and who reads


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(path, rng, monkeypatch, when, error):
    before, content = saved(path, rng)

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, when, fail)
    with pytest.raises(type(error), match="the disk is full: .*layer" if isinstance(error, OSError) else None):
        files.save(fastbn.BatchNorm(7), path)
    assert path.read_bytes() == content
    assert [*path.parent.iterdir()] == [path]
    assert {k: state(v) for k, v in files.load(path).items()} == before


def test_a_file_too_large_for_the_system_leaves_the_old_one(tmp_path):
    pytest.importorskip("resource", reason="this system has no limit of file sizes")
    script = """
import os, resource, sys
import fastbn
from fastbn.interop import files
path = sys.argv[1]
files.save(fastbn.BatchNorm(3), path)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    files.save(fastbn.BatchNorm(100_000), path)
except OSError as error:
    print(files.load(path), os.listdir(os.path.dirname(path)))
"""
    assert run_script(script, str(tmp_path / "a.npz")) == "BatchNorm(3) ['a.npz']\n"


def test_a_link_is_followed(tmp_path):
    real, link = tmp_path / "real.npz", tmp_path / "link.npz"
    files.save(fastbn.BatchNorm(1), real)
    try:
        link.symlink_to(real)
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    files.save(fastbn.BatchNorm(2), link)
    assert link.is_symlink()
    assert repr(files.load(real)) == "BatchNorm(2)"


def test_readers_beside_writers_see_one_whole_layer(path):
    layers = [fastbn.BatchNorm(500, eps=float(i)) for i in range(2)]
    for i, bn in enumerate(layers):
        bn.gamma[:] = bn.running_var[:] = i
    files.save(layers[0], path)
    known, errors = [state(bn) for bn in layers], []

    def work(step):
        try:
            for i in range(60):
                step(i)
        except BaseException as error:
            errors.append(error)

    def read(_):
        found = state(files.load(path))
        assert found in known

    works = [read, read, *[lambda i, bn=bn: files.save(bn, path) for bn in layers]]
    threads = [threading.Thread(target=work, args=(w,)) for w in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    assert [*path.parent.iterdir()] == [path]


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_code_of_the_how_to_prints_what_its_comments_say(tmp_path, monkeypatch):
    _safetensors()
    monkeypatch.chdir(tmp_path)
    pages.check("how-to/save-and-load.md")


def test_the_examples_run():
    found = doctest.testmod(files)
    assert found.attempted
    assert not found.failed
