"""The wire format of openpi: msgpack, arrays as maps of data, dtype and shape.

An array is `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [3]}`, a NumPy scalar
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`. Reading believes nothing: dtypes are a closed list of
numbers, sizes are checked before memory is taken, nesting is bounded, and nothing a message says can run code.
"""

import math
from typing import Any

import msgpack
import numpy as np

DTYPES = frozenset(f"{order}{kind}" for order in "<>|=" for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
DTYPES |= {f"{order}{kind}" for order in "<>|=" for kind in ("f2", "f4", "f8", "b1")}
MAX_DEPTH = 8  # maps and lists within one another
MAX_DIMENSIONS = 8
MAX_ITEMS = 1024  # of a list or map that is no array
ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}
SCALAR = {b"__npgeneric__", b"data", b"dtype"}


class WireError(ValueError):
    """A message that is not of this format; says where."""


def pack(message: Any) -> bytes:
    """Raises WireError on an array of objects, records or complex numbers."""
    try:
        return msgpack.packb(message, default=_pack_array)
    except (TypeError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error


def _pack_array(value):
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.str not in DTYPES:
            raise WireError(f"cannot be sent: an array of dtype {value.dtype}")
        if isinstance(value, np.ndarray):
            return {
                b"__ndarray__": True,
                b"data": value.tobytes(),
                b"dtype": value.dtype.str,
                b"shape": value.shape,
            }
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__}")


def unpack(data: bytes) -> Any:
    """One message; arrays are copies of their own, in native byte order. Raises WireError, and nothing else."""
    try:
        # Lists take memory as soon as their length is read: it is bounded before, whatever the message claims.
        value = msgpack.unpackb(
            data,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
            ext_hook=_refuse_extension,
            strict_map_key=True,
        )
    except WireError:
        raise
    except (msgpack.UnpackException, ValueError, RecursionError, MemoryError) as error:
        raise WireError(f"not a msgpack message: {str(error) or type(error).__name__}") from error
    return _revive(value, "", 0)


def _refuse_extension(code: int, data: bytes):
    raise WireError(f"not a msgpack message: extension type {code}")


def _revive(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        if b"__ndarray__" in value:
            return _array(value, where or "message")
        if b"__npgeneric__" in value:
            return _scalar(value, where or "message")
        return {key: _revive(item, f"{where}.{_name(key)}".lstrip("."), depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise WireError(f"{where or 'message'}: a {type(value).__name__} is not allowed")


def _array(value: dict, where: str) -> np.ndarray:
    if value.keys() != ARRAY:
        raise WireError(f"{where}: an array has exactly data, dtype and shape")
    data, dtype, shape = value[b"data"], _dtype(value[b"dtype"], where), value[b"shape"]
    if not isinstance(data, bytes):
        raise WireError(f"{where}: the data of an array is binary")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"{where}: a shape is a list of at most {MAX_DIMENSIONS} numbers")
    if any(type(size) is not int or not 0 <= size <= max(len(data), 1 << 16) for size in shape):
        raise WireError(f"{where}: shape {shape} is not one of {len(data)} bytes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"{where}: shape {shape} of {dtype} does not have {len(data)} bytes")
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise WireError(f"{where}: a bool is 0 or 1")
    try:
        return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # an empty array of sizes whose product does not fit
        raise WireError(f"{where}: shape {shape}: {error}") from error


def _scalar(value: dict, where: str) -> np.generic:
    if value.keys() != SCALAR:
        raise WireError(f"{where}: a scalar has exactly data and dtype")
    dtype, data = _dtype(value[b"dtype"], where), value[b"data"]
    if not isinstance(data, bool | int | float):
        raise WireError(f"{where}: the data of a scalar is a number")
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise WireError(f"{where}: {data} is no {dtype}") from error


def _dtype(name: Any, where: str) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"{where}: dtype {str(name)[:40]!r} is not one of numbers")
    return np.dtype(name)


def _name(key: str | bytes) -> str:
    text = key if isinstance(key, str) else repr(key)
    return text if len(text) <= 40 else text[:40] + "..."
