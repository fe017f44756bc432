"""Inventories: what a device takes from its groups, each mistake in one sentence, which devices a pattern means."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_infer.deploy.inventory import Device, Inventory, read_inventory
from edge_infer.deploy.selector import select
from edge_infer.errors import UsageError

HOUSE = """
[groups.all]
address = "pi@{name}.local"
python = "/opt/models/bin/python"
variables = { port = 80, room = "none" }

[groups.house]
jump = "gateway.local"
variables = { room = "house" }

[groups.kitchen]
groups = ["house"]
variables = { room = "kitchen", port = "8080" }

[groups.pi4]
target = "raspberry-pi-4"

[devices.kitchen-1]
groups = ["kitchen", "pi4"]
store = "/srv/{room}/{target}"

[devices.kitchen-2]
groups = ["house", "kitchen"]
target = "raspberry-pi-5"
jump = "none"
python = "python3.12"
variables = { port = 9 }

[devices.alone]
address = "local:/tmp/{name}"
identity = "keys/{name}"
"""


@pytest.fixture
def house(tmp_path: Path) -> Inventory:
    return written(tmp_path, HOUSE)


def written(folder: Path, text: str) -> Inventory:
    (folder / "fleet.toml").write_text(text)
    return read_inventory(folder / "fleet.toml")


def device(inventory: Inventory, name: str) -> Device:
    return next(device for device in inventory.devices if device.name == name)


# -- what counts -------------------------------------------------------------------------------------------------------


def test_what_a_device_leaves_out_comes_from_its_groups(house):
    found = device(house, "kitchen-1")
    assert found.address == "pi@kitchen-1.local" and found.jump == "gateway.local"
    assert found.target == "raspberry-pi-4" and found.python == "/opt/models/bin/python"
    assert found.groups == ("kitchen", "pi4", "house", "all")
    assert found.variables == {"room": "kitchen", "port": "8080"}
    assert found.store == "/srv/kitchen/raspberry-pi-4"


def test_a_device_counts_before_its_groups_and_a_group_before_those_it_belongs_to(house):
    found = device(house, "kitchen-2")
    assert (found.target, found.jump, found.python) == ("raspberry-pi-5", "none", "python3.12")
    # It names house first, and kitchen is still the nearer.
    assert found.variables == {"room": "kitchen", "port": "9"}


def test_a_device_without_groups_has_what_all_have(house, tmp_path):
    found = device(house, "alone")
    assert found.groups == ("all",) and found.address == "local:/tmp/alone"
    assert found.identity == tmp_path / "keys" / "alone"
    assert found.variables == {"room": "none", "port": "80"}


def test_an_address_that_is_left_out_is_the_name(tmp_path):
    assert written(tmp_path, "[devices.kitchen-pi]").devices[0].address == "kitchen-pi"


def test_devices_keep_the_order_of_the_file(house):
    assert [device.name for device in house.devices] == ["kitchen-1", "kitchen-2", "alone"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("curl -f localhost:{port}/ok", "curl -f localhost:8080/ok"),
        ("echo {name} {target} {address}", "echo kitchen-1 raspberry-pi-4 pi@kitchen-1.local"),
        ("awk '{print $1}' ${HOME}/{room} $((1)) {}", "awk '{print $1}' ${HOME}/kitchen $((1)) {}"),
        ("${room}", "${room}"),
    ],
)
def test_variables_in_a_command(house, text, expected):
    assert device(house, "kitchen-1").expand(text) == expected


def test_a_variable_that_a_device_lacks_is_named(house):
    with pytest.raises(UsageError, match=r"device alone: \{target\} in .* is not known"):
        device(house, "alone").expand("{target}")


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[devices", "cannot be read as an inventory"),
        ("", "has no devices"),
        ("[device.a]", "nothing reads the key 'device'; did you mean 'devices'?"),
        ("devices = 3", "devices is 3"),
        ("[devices]\na = 3", "device a is 3"),
        ("[devices.'a b']", "device a b: a name may hold"),
        ("[devices.'../a']", "device ../a: a name may hold"),
        ("[devices.all]", "device all: that name means every device"),
        ("[devices.a]\nadress = 'x'", "device a: nothing reads the key 'adress'; did you mean 'address'?"),
        ("[devices.a]\nport = 22", "device a: nothing reads the key 'port'"),
        ("[devices.a]\naddress = 22", "device a: address is 22, expected text"),
        ("[devices.a]\naddress = ''", "device a: address is '', expected text"),
        ("[devices.a]\naddress = 'pi@'", "device a: address: 'pi@' is no SSH address"),
        ("[devices.a]\naddress = 'a:99999'", "device a: address: 'a:99999' is no SSH address"),
        ("[devices.a]\njump = 'g, -x'", "device a: jump: '-x' is no SSH address"),
        ("[devices.a]\naddress = 'local:/x'\njump = 'g'", "device a: jump is 'g', but local:/x is this machine"),
        ("[devices.a]\naddress = '{room}.local'", "device a: address: {room} in '{room}.local' is not known"),
        ("[devices.a]\ngroups = 'kitchen'", "device a: groups is 'kitchen', expected a list"),
        ("[devices.a]\ngroups = ['kitchn']\n[groups.kitchen]", "device a: groups names 'kitchn', which is not there"),
        ("[devices.a]\ngroups = ['x']", "expected a table [groups.x]"),
        ("[devices.a]\nvariables = 3", "device a: variables is 3"),
        ("[devices.a]\nvariables = {Port = 1}", "device a: variable 'Port' is no name"),
        ("[devices.a]\nvariables = {target = 'x'}", "device a: variable 'target' is no name"),
        ("[devices.a]\nvariables = {port = 1.5}", "device a: variable port is 1.5"),
        ("[devices.a]\nvariables = {on = true}", "device a: variable on is True"),
        ("[devices.a]\n[groups.a]", "a is a device and a group"),
        ("[devices.a]\n[groups.g]\ngroups = ['h']", "group g: groups names 'h'"),
        ("[devices.a]\n[groups.g]\ngroups = ['h']\n[groups.h]\ngroups = ['g']", "circle (g -> h -> g)"),
        ("[devices.a]\n[groups.g]\ngroups = ['g']", "circle (g -> g)"),
        ("[devices.a]\n[groups.all]\ngroups = ['g']\n[groups.g]", "group all: groups is given"),
        (
            "[devices.a]\ngroups = ['g', 'h']\n[groups.g]\njump = 'x'\n[groups.h]\njump = 'y'",
            "device a: jump is 'x' by group g and 'y' by group h; give the device its own",
        ),
        (
            "[devices.a]\ngroups = ['g', 'h']\n[groups.g]\nvariables = {p = 1}\n[groups.h]\nvariables = {p = 2}",
            "device a: p is 1 by group g and 2 by group h",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_device_and_key(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        written(tmp_path, text)
    sentence = str(caught.value)
    assert words in sentence and str(tmp_path / "fleet.toml") in sentence and "\n" not in sentence.strip("\n")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be read as an inventory"):
        read_inventory(tmp_path / "fleet.toml")


def test_groups_that_agree_or_where_the_device_decides_are_no_mistake(tmp_path):
    text = "[groups.g]\njump = 'x'\npython = 'p'\n[groups.h]\njump = 'x'\npython = 'q'\n"
    found = written(tmp_path, text + "[devices.a]\ngroups = ['g', 'h']\npython = 'r'").devices[0]
    assert (found.jump, found.python) == ("x", "r")


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", ["kitchen-1", "kitchen-2", "alone"]),
        ("*", ["kitchen-1", "kitchen-2", "alone"]),
        ("alone", ["alone"]),
        ("kitchen", ["kitchen-1", "kitchen-2"]),
        ("house", ["kitchen-1", "kitchen-2"]),
        ("alone,kitchen-1", ["kitchen-1", "alone"]),
        ("alone:kitchen-1", ["kitchen-1", "alone"]),
        ("kit*", ["kitchen-1", "kitchen-2"]),
        ("kitchen-[1]", ["kitchen-1"]),
        ("kitchen-?", ["kitchen-1", "kitchen-2"]),
        ("kitchen,!kitchen-1", ["kitchen-2"]),
        ("!kitchen-1,kitchen", ["kitchen-2"]),
        ("!kitchen", ["alone"]),
        ("all:&pi4", ["kitchen-1"]),
        ("&pi4", ["kitchen-1"]),
        ("target=raspberry-pi-*", ["kitchen-1", "kitchen-2"]),
        ("house, &target=*-5", ["kitchen-2"]),
        ("room=kitchen,!port=9", ["kitchen-1"]),
        ("alone,kitchen,&house,!pi4", ["kitchen-2"]),
    ],
)
def test_a_pattern_means_these_devices(house, pattern, expected):
    assert [device.name for device in select(house, pattern)] == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("kitchn", "'kitchn' fits no device or group of .*; did you mean 'kitchen'"),
        ("kitchen,!kitchen-7", "'kitchen-7' fits no device"),
        ("target=jetson", "'target=jetson' fits no device"),
        ("taget=raspberry-pi-4", "did you mean 'target'"),
        ("kitchen,&alone", "no device of .* is 'kitchen,&alone'"),
        ("kitchen,!house", "no device"),
        ("jet*", "'jet\\*' fits no device"),
    ],
)
def test_a_pattern_of_which_a_part_means_nothing_is_refused(house, pattern, words):
    with pytest.raises(UsageError, match=words):
        select(house, pattern)


def test_an_empty_group_is_no_mistake_in_itself(tmp_path):
    inventory = written(tmp_path, "[groups.new]\n[devices.a]\n")
    assert [device.name for device in select(inventory, "a,new")] == ["a"]
    with pytest.raises(UsageError, match="no device of"):
        select(inventory, "new")
