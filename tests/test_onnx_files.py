"""ONNX models with files beside them: how the packager writes them, and the reader that finds which files they name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from edge_infer.bundle import Bundle
from edge_infer.convert import onnx_graphs
from edge_infer.errors import BundleError
from edge_infer.runtime.onnx_files import MAX_DEPTH, external_locations, locations_of


def tensor(name: str, location: str | None = None) -> Any:
    """A float tensor, kept in the file ``location`` or inline."""
    made = helper.make_tensor(name, TensorProto.FLOAT, [2], np.zeros(2, np.float32).tobytes(), raw=True)
    if location is not None:
        set_external_data(made, location, offset=0, length=8)
        made.ClearField("raw_data")
    return made


def sparse(location: str) -> Any:
    indices = tensor(f"{location}-indices", f"{location}-indices")
    return helper.make_sparse_tensor(tensor(location, location), indices, [10])


def graph(nodes: list[Any], tensors: list[Any] = [], sparse_tensors: list[Any] = [], name: str = "g") -> Any:  # noqa: B006
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    return helper.make_graph(nodes, name, [], [output], tensors, sparse_initializer=sparse_tensors)


def constant(location: str) -> Any:
    return helper.make_node("Constant", [], ["y"], value=tensor("value", location))


def model(made: Any, **fields: Any) -> Any:
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], **fields)


def plain() -> Any:
    return model(graph([helper.make_node("Add", ["a", "b"], ["y"])], [tensor("a"), tensor("b")]))


def initializers() -> Any:
    return model(graph([helper.make_node("Add", ["a", "b"], ["y"])], [tensor("a", "a.bin"), tensor("b", "b.bin")]))


def attributes() -> Any:
    several = helper.make_node("Custom", [], ["z"], domain="mine")
    several.attribute.append(helper.make_attribute("tensors", [tensor("p", "p.bin"), tensor("q", "q.bin")]))
    several.attribute.append(helper.make_attribute("sparse", sparse("s.bin")))
    several.attribute.append(helper.make_attribute("sparse_list", [sparse("t.bin"), sparse("u.bin")]))
    return model(graph([constant("c.bin"), several]))


def branches() -> Any:
    then, other = graph([constant("then.bin")], name="then"), graph([constant("else.bin")], name="else")
    inner = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    return model(graph([inner], [flag]))


def loops() -> Any:
    body = graph([branches().graph.node[0]], [tensor("w", "body.bin")], name="body")
    loop = helper.make_node("Loop", ["", "flag"], ["y"], body=body)
    several = helper.make_node("Custom", [], ["z"], domain="mine")
    several.attribute.append(helper.make_attribute("graphs", [graph([constant("graphs.bin")]), body]))
    return model(graph([loop, several]))


def functions() -> Any:
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "F", [], ["y"], [constant("function.bin")], imports)
    default = helper.make_attribute("weight", tensor("w", "default.bin"))
    function.attribute_proto.append(default)
    return model(graph([helper.make_node("F", [], ["y"], domain="mine")]), functions=[function])


def sparse_initializers() -> Any:
    return model(graph([helper.make_node("Identity", ["s.bin"], ["y"])], [], [sparse("s.bin")]))


def training() -> Any:
    made = initializers()
    info = made.training_info.add()
    info.initialization.CopyFrom(graph([constant("initialization.bin")]))
    info.algorithm.CopyFrom(graph([constant("algorithm.bin")]))
    return made


EXPECTED: dict[Callable[[], Any], set[str]] = {
    plain: set(),
    initializers: {"a.bin", "b.bin"},
    attributes: {
        "c.bin",
        "p.bin",
        "q.bin",
        *(f"{name}.bin{rest}" for name in "stu" for rest in ("", "-indices")),
    },
    branches: {"then.bin", "else.bin"},
    loops: {"then.bin", "else.bin", "body.bin", "graphs.bin"},
    functions: {"function.bin", "default.bin"},
    sparse_initializers: {"s.bin", "s.bin-indices"},
    training: {"a.bin", "b.bin", "initialization.bin", "algorithm.bin"},
}


def by_reflection(message: Any) -> Iterator[str]:
    """What protobuf itself finds: the location of every TensorProto, wherever it hangs."""
    if isinstance(message, TensorProto):
        values = [entry.value for entry in message.external_data if entry.key == "location"]
        # protobuf gives bytes where the text is no UTF-8
        yield from (text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text for text in values)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value]:
                yield from by_reflection(item)


@pytest.mark.parametrize("make", EXPECTED)
def test_every_place_that_holds_a_tensor_is_looked_at(make: Callable[[], Any]) -> None:
    made = make()
    data = made.SerializeToString()
    assert external_locations(data) == EXPECTED[make] == set(by_reflection(made))
    assert external_locations(onnx.load_from_string(data).SerializeToString()) == EXPECTED[make]


def test_a_packaged_model_refers_to_its_weights_only(packaged: Callable[..., Bundle]) -> None:
    data = packaged("torch.onnx", "onnx", "float32").file("model.onnx").read_bytes()
    assert external_locations(data) == {"weights.bin"}
    assert external_locations(data) == set(by_reflection(onnx.load_from_string(data)))


def test_what_onnx_itself_writes_is_found(tmp_path: Path) -> None:
    made = initializers()
    for item in made.graph.initializer:
        item.CopyFrom(helper.make_tensor(item.name, TensorProto.FLOAT, [2], np.ones(2, np.float32).tobytes(), raw=True))
    onnx.save_model(made, tmp_path / "m.onnx", save_as_external_data=True, location="all.bin", size_threshold=0)
    assert external_locations((tmp_path / "m.onnx").read_bytes()) == {"all.bin"}


def test_a_file_is_looked_through_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(initializers().SerializeToString())
    assert locations_of(path) == {"a.bin", "b.bin"}
    path.write_bytes(b"")
    assert locations_of(path) == set()


def compiled(**attributes: Any) -> Any:
    return helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    "node",
    [
        compiled(embed_mode=0, ep_cache_context="/etc/passwd", source="TensorrtExecutionProvider"),
        compiled(embed_mode=0, ep_cache_context="weights.bin", main_context=1),
        compiled(embed_mode=1, ep_cache_context=b"\0engine"),
        compiled(),
    ],
)
def test_what_was_compiled_already_is_refused_wherever_it_hangs(node: Any) -> None:
    inner = helper.make_node("If", ["flag"], ["y"], then_branch=graph([node]), else_branch=graph([constant("e.bin")]))
    function = helper.make_function("mine", "F", [], ["y"], [node], [helper.make_opsetid("", 17)])
    for made in (
        model(graph([node])),
        model(graph([inner])),
        model(graph([helper.make_node("F", [], ["y"], domain="mine")]), functions=[function]),
    ):
        with pytest.raises(BundleError, match=r"EPContext node\), .* refused"):
            external_locations(made.SerializeToString())


def test_a_name_alone_is_not_refused() -> None:
    node = helper.make_node("Identity", ["EPContext"], ["y"], name="EPContext", doc_string="EPContext")
    assert external_locations(model(graph([node])).SerializeToString()) == set()


@pytest.mark.parametrize("location", ["", "../x", "/etc/passwd", "ä/ö", "*/_ORT_MEM_ADDR_/*", "a\0b", "x" * 1000])
def test_a_location_is_given_as_it_stands(location: str) -> None:
    made = model(graph([constant(location)]))
    assert external_locations(made.SerializeToString()) == {location}


def length_delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def wrapped(entry: bytes) -> bytes:
    """A model with one initializer that holds one entry of external data."""
    return length_delimited(7, length_delimited(5, length_delimited(13, entry)))


LOCATION = length_delimited(1, b"location")


def test_a_location_that_is_no_utf8_is_still_found() -> None:
    assert external_locations(wrapped(LOCATION + length_delimited(2, b"\xff.bin"))) == {"\\xff.bin"}


def test_an_entry_without_a_path_is_found_as_an_empty_one() -> None:
    assert external_locations(wrapped(LOCATION)) == {""}


def test_the_last_of_several_values_counts_as_for_protobuf() -> None:
    data = wrapped(LOCATION + length_delimited(2, b"first") + length_delimited(2, b"last"))
    assert external_locations(data) == {"last"} == set(by_reflection(onnx.load_from_string(data)))


def test_graphs_given_twice_are_both_read_as_protobuf_merges_them() -> None:
    data = initializers().SerializeToString() + branches().SerializeToString()
    found = external_locations(data)
    assert found == {"a.bin", "b.bin", "then.bin", "else.bin"} == set(by_reflection(onnx.load_from_string(data)))


def overlong(tag: int) -> bytes:
    """The tag in five bytes with a bit beyond the 32nd, which C++ readers of protobuf drop."""
    groups = [tag >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21)]
    return bytes([*groups, tag >> 28 | 0x10])


def test_a_field_number_that_hides_a_tensor_is_refused() -> None:
    content = length_delimited(13, LOCATION + length_delimited(2, b"/etc/passwd"))
    hidden = overlong(5 << 3 | 2) + varint(len(content)) + content
    with pytest.raises(BundleError, match="field number"):
        external_locations(length_delimited(7, hidden))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x3a", "middle of a number"),
        (b"\x3a\x05ab", "middle of a field"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "middle of a field"),
        (b"\x3a" + b"\x80" * 11, "more than 10 bytes"),
        (b"\x3b", "wire type 3"),
        (b"\x3f", "wire type 7"),
    ],
)
def test_damage_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        external_locations(data)


def nested(depth: int) -> bytes:
    """A model of ``depth`` messages: graphs in attributes of nodes."""
    data, numbers = b"", [1, 5, 6]
    for level in range(depth):
        data = length_delimited(numbers[(depth - 2 - level) % 3] if level < depth - 1 else 7, data)
    return data


def test_nesting_is_followed_to_a_limit() -> None:
    assert external_locations(nested(MAX_DEPTH)) == set()
    for depth in (MAX_DEPTH + 1, 2000):
        with pytest.raises(BundleError, match="nests deeper"):
            external_locations(nested(depth))


def found_or_refused(data: bytes) -> set[str] | None:
    try:
        return external_locations(data)
    except BundleError:
        return None


@pytest.mark.parametrize("make", [initializers, loops, functions])
def test_a_model_cut_anywhere_is_refused_or_says_less(make: Callable[[], Any]) -> None:
    data = make().SerializeToString()
    results = [found_or_refused(data[:length]) for length in range(len(data))]
    assert all(result is None or result <= EXPECTED[make] for result in results)
    assert results.count(None) > len(data) * 0.8


def test_random_bytes_are_refused_or_read() -> None:
    chance = random.Random(7)
    results = [found_or_refused(chance.randbytes(chance.randint(0, 200))) for _ in range(5000)]
    assert all(result is None or isinstance(result, set) for result in results)
    assert 1000 < results.count(None) < 5000


def test_a_changed_byte_never_hides_a_location_that_protobuf_still_finds() -> None:
    chance, data = random.Random(11), loops().SerializeToString()
    compared = 0
    for _ in range(4000):
        spoilt = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
        found = found_or_refused(bytes(spoilt))
        try:
            made = onnx.load_from_string(bytes(spoilt))
        except Exception:  # whatever protobuf calls it
            continue
        if found is not None:
            assert found >= set(by_reflection(made))
            compared += 1
    assert compared > 200


def test_a_saved_model_has_its_weights_in_one_file_beside_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    arrays = {name: rng.standard_normal((64, width)).astype(np.float32) for name, width in (("a", 32), ("b", 8))}
    made = model(graph([], [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]))
    path = tmp_path / "m.onnx"
    onnx_graphs.save(made, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert external_locations(path.read_bytes()) == {"m.onnx.data"}
    assert path.stat().st_size < 1024
    assert not any(item.raw_data for item in made.graph.initializer)
    for item in onnx.load(path).graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(item), arrays[item.name])


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    made = model(graph([], [onnx.numpy_helper.from_array(np.arange(900.0), "a")]))
    path = tmp_path / "m.onnx"
    written = []
    for _ in range(2):
        onnx_graphs.save(made, path)
        written.append((path.read_bytes(), path.with_name("m.onnx.data").read_bytes()))
        onnx.load_external_data_for_model(made, str(tmp_path))
    assert written[0] == written[1]


def test_a_file_of_that_name_where_the_packager_runs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a model with weights beside it is packaged from its own folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "m.onnx.data").write_bytes(b"the user's")
    monkeypatch.chdir(here)
    onnx_graphs.save(model(graph([], [onnx.numpy_helper.from_array(np.arange(900.0), "a")])), there / "m.onnx")
    assert (here / "m.onnx.data").read_bytes() == b"the user's"
    assert (there / "m.onnx.data").stat().st_size == 900 * 8


def test_weights_of_branches_lie_beside_the_model_too(tmp_path: Path) -> None:
    array = np.arange(900.0)
    inner = graph([], [onnx.numpy_helper.from_array(array, "b")], name="branch")
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    onnx_graphs.save(model(graph([node])), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1024
    for attribute in onnx.load(tmp_path / "m.onnx").graph.node[0].attribute:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(attribute.g.initializer[0]), array)
