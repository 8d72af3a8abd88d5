"""Fields and lengths as protobuf's own library writes them."""

import pytest

from vpruner.core.protobuf import fields, opening, spans, varint

onnx = pytest.importorskip("onnx")


def test_fields_and_where_they_lie():
    tensor = onnx.TensorProto(dims=[3, 70_000], data_type=1, name="w" * 200, raw_data=b"abc", double_data=[1.5])
    data = memoryview(tensor.SerializeToString())
    found = {number: bytes(value) if isinstance(value, memoryview) else value for number, value in fields(data)}
    assert found[2] == 1 and found[8] == b"w" * 200 and found[9] == b"abc"
    assert [field.number for field in spans(data)] == sorted(field.number for field in spans(data))
    (raw,) = (field for field in spans(data) if field.number == 9)
    assert bytes(data[raw.start : raw.end]) == opening(9, 3) + b"abc"
    assert list(spans(data, raw.start, raw.end)) == [raw]
    assert b"".join(bytes(data[field.start : field.end]) for field in spans(data)) == data


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, (1 << 31) - 1, (1 << 63) + 5])
def test_lengths_are_read_back(number):
    written = opening(15, number)
    assert varint(memoryview(written), 1) == (number, len(written))
    assert onnx.TensorProto(raw_data=b"x" * 300).SerializeToString()[:3] == opening(9, 300)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x08", "it ends too early"),
        (b"\x12\x05ab", "it ends too early"),
        (b"\x0d\x00", "it ends too early"),
        (b"\x0b", "wire type 3"),
        (b"\x08" + b"\xff" * 11, "more than 64 bits"),
    ],
)
def test_what_is_no_message_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        list(fields(memoryview(data)))
