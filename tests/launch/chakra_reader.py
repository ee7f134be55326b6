"""Reads Chakra's execution traces with Google's protobuf and the fields of Chakra's schema (et_def.proto), apart from what writes
them."""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields

FIELDS = {
    "Attribute": {"name": (1, "string"), "int64_val": (9, "int64"), "bool_val": (27, "bool"), "string_val": (29, "string")},
    "GlobalMetadata": {"version": (1, "string"), "attr": (2, "Attribute")},
    "Node": {"id": (1, "uint64"), "name": (2, "string"), "type": (3, "int32"), "ctrl_deps": (4, "uint64s"),
             "data_deps": (5, "uint64s"), "start_time_micros": (6, "uint64"), "duration_micros": (7, "uint64"),
             "attr": (10, "Attribute")},
}  # fmt: skip


def messages() -> dict[str, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="chakra.proto", package="chakra", syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
            if kind == "Attribute":
                added.type, added.type_name, added.label = kinds.TYPE_MESSAGE, ".chakra.Attribute", kinds.LABEL_REPEATED
            else:
                added.type = getattr(kinds, f"TYPE_{kind.rstrip('s').upper()}")
                added.label = kinds.LABEL_REPEATED if kind.endswith("s") else kinds.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"chakra.{name}")) for name in FIELDS}


def parts(content: bytes) -> list[bytes]:
    """Messages that stand one after the other, each behind its length as a varint."""
    found, at = [], 0
    while at < len(content):
        size = shift = 0
        while True:
            byte = content[at]
            at += 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        found.append(content[at : at + size])
        at += size
    return found


def chakra_nodes(source: Path | bytes) -> list[dict[str, Any]]:
    """Each node's fields and attributes, by name."""
    kinds = messages()
    head, *rest = parts(source if isinstance(source, bytes) else source.read_bytes())
    assert kinds["GlobalMetadata"].FromString(head).version == "0.0.4"
    nodes = []
    for content in rest:
        node = kinds["Node"].FromString(content)
        assert len(unknown_fields.UnknownFieldSet(node)) == 0
        told = {a.name: a.int64_val or a.string_val or a.bool_val or 0 for a in node.attr}
        fields = {name: getattr(node, name) for name in FIELDS["Node"] if name not in ("attr", "data_deps")}
        nodes.append(fields | {"data_deps": list(node.data_deps)} | told)
    return nodes
