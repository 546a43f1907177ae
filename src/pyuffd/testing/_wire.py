"""Messages between a test and its faulting child: length and JSON, on a stream socket."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

LENGTH = struct.Struct("<I")


def packed(message: dict[str, Any]) -> bytes:
    """Encode a message."""
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


def unpacked(buffer: bytearray) -> dict[str, Any] | None:
    """Remove the first whole message from a buffer and return it, or return None."""
    if len(buffer) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(buffer)
    end = LENGTH.size + length
    if len(buffer) < end:
        return None
    message: dict[str, Any] = json.loads(buffer[LENGTH.size : end])
    del buffer[:end]
    return message


def portable(value: Any) -> Any:
    """Make bytes in arguments and results representable in JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"base64": base64.b64encode(value).decode()}
    return value


def restored(value: Any) -> Any:
    """Undo `portable`."""
    if isinstance(value, dict) and value.keys() == {"base64"}:
        return base64.b64decode(value["base64"])
    return value
