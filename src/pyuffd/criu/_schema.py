"""The messages in CRIU's image files, as far as they are needed, made from their field numbers."""

from __future__ import annotations

from typing import Any

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError as DecodeError
except ImportError as error:
    raise ImportError(
        "CRIU's images need the package protobuf: pip install 'pyuffd[criu]'"
    ) from error

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "pyuffd.criu"

# For each message: name, number and type of its fields. A type in lower case is one of protobuf's,
# others name a message; "repeated" comes before it. All else in the messages is ignored.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "PstreeEntry": {"pid": (1, "uint32"), "ppid": (2, "uint32")},
    "Vma": {
        "start": (1, "uint64"),
        "end": (2, "uint64"),
        "flags": (6, "uint32"),
        "status": (7, "uint32"),
    },
    "Mm": {"vmas": (14, "repeated Vma")},
    "PagemapHead": {"pages_id": (1, "uint32")},
    "PagemapEntry": {
        "vaddr": (1, "uint64"),
        "compat_nr_pages": (2, "uint32"),
        "in_parent": (3, "bool"),
        "flags": (4, "uint32"),
        "nr_pages": (5, "uint64"),
    },
}


def _described() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="pyuffd_criu.proto", package=_PACKAGE, syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            label, _, kind = kind.rpartition(" ")
            added = message.field.add(
                name=field,
                number=number,
                label=_Field.LABEL_REPEATED if label else _Field.LABEL_OPTIONAL,
            )
            if kind in _MESSAGES:
                added.type = _Field.TYPE_MESSAGE
                added.type_name = f".{_PACKAGE}.{kind}"
            else:
                added.type = getattr(_Field, f"TYPE_{kind.upper()}")
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_described())


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


PstreeEntry = _class("PstreeEntry")
Mm = _class("Mm")
PagemapHead = _class("PagemapHead")
PagemapEntry = _class("PagemapEntry")
