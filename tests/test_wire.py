"""openpi's msgpack-numpy, to the byte, and what is refused."""

import pickle
import struct

import msgpack
import numpy as np
import pytest

from policies import wire

# What openpi's packer makes of {"x": array([1.5, -2], float32), "s": float32(0.5)}, byte for byte.
RECORDED = (
    b"\x82\xa1x\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08\x00\x00\xc0?\x00\x00\x00\xc0"
    b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02"
    b"\xa1s\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xcb?\xe0\x00\x00\x00\x00\x00\x00\xc4\x05dtype\xa3<f4"
)


def array(data=b"\0" * 8, dtype="<f4", shape=(2,), **more):
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more}


def test_recorded_bytes():
    assert wire.pack({"x": np.array([1.5, -2], np.float32), "s": np.float32(0.5)}) == RECORDED
    read = wire.unpack(RECORDED)
    assert read["x"].dtype == np.float32 and read["x"].tolist() == [1.5, -2]
    assert type(read["s"]) is np.float32 and read["s"] == 0.5


@pytest.mark.parametrize("dtype", ["u1", "i8", "f2", "f4", "f8", ">f4", ">i2", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 3)])
def test_arrays_come_back(dtype, shape):
    sent = np.random.default_rng(0).normal(size=shape).astype(dtype)
    read = wire.unpack(wire.pack({"a": [sent]}))["a"][0]
    assert read.shape == shape and read.dtype == np.dtype(dtype).newbyteorder("=") and np.array_equal(read, sent)
    assert read.flags.writeable and read.flags.aligned and read.dtype.isnative


def test_not_contiguous_arrays_and_plain_values():
    sent = {"a": np.arange(12).reshape(3, 4)[:, ::2], "b": None, "c": [1, -2.5, True, "x", b"y"], "d": {}}
    read = wire.unpack(wire.pack(sent))
    assert np.array_equal(read.pop("a"), sent.pop("a")) and read == sent


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array([1j]),
        np.zeros(2, [("a", "f4")]),
        np.array(["x"]),
        np.datetime64(0, "s"),
        object(),
    ],
)
def test_what_cannot_be_sent(value):
    with pytest.raises(wire.WireError, match="cannot be sent"):
        wire.pack({"a": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": array(dtype="|O")}}, r"a\.b: dtype '\|O'"),
        (array(pickle.dumps([1]), "O", (1,)), "dtype 'O'"),
        ([array(dtype="<M8[s]", shape=(1,))], r"\[0\]: dtype"),
        (array(dtype="<c8", shape=(1,)), "dtype"),
        (array(dtype="V8", shape=(1,)), "dtype"),
        (array(dtype="f4,O", shape=(1,)), "dtype"),
        (array(dtype=[["a", "<f4"]]), "dtype"),
        (array(dtype={"names": ["a"]}), "dtype"),
        (array(shape=(3,)), r"shape \[3\] of float32 does not have 8 bytes"),
        (array(shape=(-2,)), "shape"),
        (array(shape=(True, 2)), "shape"),
        (array(shape=(2.0,)), "shape"),
        (array(shape=(2**62, 2**62, 0), data=b""), "shape"),
        (array(shape=(0, *[65536] * 7), data=b""), "too big"),
        (array(shape=[1] * 9, data=b"\0" * 4), "at most 8"),
        (array(shape=2), "a shape is a list"),
        (array(data="text"), "binary"),
        (array(data=[0, 0]), "binary"),
        (array(extra=1), "exactly"),
        ({b"__ndarray__": True}, "exactly"),
        (array(b"\2", "|b1", (1,)), "a bool is 0 or 1"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}, "300 is no uint8"),
        ({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}, "a number"),
        ({b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}, "dtype"),
        (msgpack.ExtType(3, b""), "extension type 3"),
        (msgpack.ExtType(3, b"x"), "max_ext_len"),
        (msgpack.Timestamp(0), "not a msgpack message"),
        ({1: 2}, "strict_map_key"),
        ([0] * 1025, "max_array_len"),
    ],
)
def test_what_is_refused(value, message):
    with pytest.raises(wire.WireError, match=message):
        wire.unpack(msgpack.packb(value))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "incomplete"),
        (pickle.dumps({"a": 1}), "not a msgpack message"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\xdf" + struct.pack(">I", 1 << 31), "max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete"),
        (b"\x91" * 9 + b"\xc0", "deeper than 8"),
        (b"\x81\xa1a" * 9 + b"\xc0", "deeper than 8"),
        (b"\x91" * 100000, "not a msgpack message"),
        (b"\xdc\x04\x00" * 100000, "not a msgpack message"),
        (b"\xa1\xff", "utf-8"),
        (b"\xc0\xc0", "extra"),
        (b"\xc1", "FormatError"),
    ],
)
def test_what_is_no_message(data, message):
    with pytest.raises(wire.WireError, match=message):
        wire.unpack(data)
