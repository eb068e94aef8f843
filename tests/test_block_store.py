"""A store that grows box by box never lies about what it holds; leases tell the living from the dead."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from vit3d.blockwise.block_store import LEVELS, BlockStore, Layout, create, differences, partial_path
from vit3d.blockwise.leases import Leases

LAYOUT = Layout((100, 110, 90), (64, 64, 64), (1.0, 0.3, 0.3))
MANIFEST = {"identity": {}}


def noise(layout: Layout = LAYOUT) -> np.ndarray:
    voxels = np.random.default_rng(0).random(layout.shape).astype(np.float32)
    voxels[voxels < 0.8] = 0
    voxels[:64, :64, :64] = 0  # the first box is empty
    return voxels


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A growing store, all boxes written."""
    out = tmp_path_factory.mktemp("store") / "out.zarr"
    store, voxels = create(out, LAYOUT, MANIFEST), noise()
    for index in LAYOUT.indices():
        store.write(index, voxels[LAYOUT.box_of(index)].copy())
    return store.folder


@pytest.fixture
def store(written, tmp_path) -> BlockStore:
    return BlockStore(Path(shutil.copytree(written, tmp_path / "out.zarr.partial")))


def test_what_was_written_is_read_by_zarr_to_the_nearest_2048th(store, tmp_path):
    out = tmp_path / "out.zarr"
    store.finish(out)
    array = zarr.open_array(out / "0", mode="r")
    assert_array_equal(array[...], np.rint(noise() * 2048) / 2048)
    assert array.shards == LAYOUT.box
    metadata = zarr.open_group(out, mode="r").attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in metadata["axes"]] == ["z", "y", "x"]
    assert {axis["unit"] for axis in metadata["axes"]} == {"micrometer"}
    assert metadata["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": [1.0, 0.3, 0.3]}]
    assert not partial_path(out).exists()


def test_every_box_has_a_file_and_an_empty_one_a_small_file(store):
    sizes = {index: (store.folder / store.file_of(index)).stat().st_size for index in LAYOUT.indices()}
    assert len(sizes) == 8
    assert sizes[0, 0, 0] < 200 < min(size for index, size in sizes.items() if any(index))


def test_writing_again_and_writing_zeros_or_nothing_changes_no_byte(store):
    def data(index):
        return (store.folder / store.file_of(index)).read_bytes()

    before = {index: data(index) for index in LAYOUT.indices()}
    for index in LAYOUT.indices():
        store.write(index, noise()[LAYOUT.box_of(index)])
    store.write((0, 0, 0), None)
    assert before == {index: data(index) for index in LAYOUT.indices()}
    store.write((0, 0, 0), np.full((64, 64, 64), 0.4 / LEVELS, np.float32))
    assert before == {index: data(index) for index in LAYOUT.indices()}


def test_every_chunk_carries_a_checksum(store):
    path = store.folder / store.file_of((1, 1, 1))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    array = zarr.open_array(store.folder / "0", mode="r")
    with pytest.raises(ValueError, match="checksum"):
        array[64:, 64:, 64:]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "harm, said",
    [
        (flip, "other bytes"),
        (truncate, "bytes instead of"),
        (lengthen, "bytes instead of"),
        (Path.unlink, "missing"),
        (link_to_itself, "cannot be read"),
    ],
)
@pytest.mark.parametrize("harmed", [(0, 0, 0), (1, 0, 1)])
def test_every_damage_is_named_and_nothing_else(store, harm, said, harmed):
    harm(store.folder / store.file_of(harmed))
    damage = {index: what for index, what in store.verify() if what}
    assert set(damage) == {harmed}
    assert said in damage[harmed]


def drop_the_checksum(path: Path) -> None:
    path.write_text(json.dumps({"bytes": json.loads(path.read_text())["bytes"]}))


@pytest.mark.parametrize("harm", [flip, truncate, drop_the_checksum, Path.unlink])
def test_a_damaged_record_is_no_record(store, harm):
    record = store.folder / "0/.vit3d/done/1.1.0.json"
    harm(record)
    assert [index for index, what in store.verify() if what] == [(1, 1, 0)]


def test_a_half_written_record_is_not_counted(store):
    store.forget((1, 1, 0))
    (store.folder / "0/.vit3d/done/.1.1.0.json.left-by-the-dead").write_text('{"bytes": 1')
    assert store.num_done() == 7
    assert not store.is_done((1, 1, 0))


def test_damaged_metadata_are_put_right(store):
    path = store.folder / "0/zarr.json"
    whole = path.read_text()
    assert store.metadata_damage() is None
    for harm in (flip, Path.unlink):
        harm(path)
        assert store.metadata_damage()
        store.repair_metadata()
        assert path.read_text() == whole


def test_the_second_to_create_gets_the_firsts_store(tmp_path):
    out = tmp_path / "out.zarr"
    (tmp_path / ".out.zarr.left-by-the-dead" / "0").mkdir(parents=True)
    first = create(out, LAYOUT, MANIFEST)
    first.write((0, 0, 0), None)
    second = create(out, LAYOUT, {"identity": {"other": 1}})
    assert second.manifest == first.manifest
    assert second.num_done() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr.partial"]


def test_a_store_that_has_its_name_is_not_begun_again_by_a_late_writer(store, tmp_path):
    late = BlockStore(store.folder)
    for place in ("c/0/0/.5", ".vit3d/done/.0.0.1.json"):
        (store.folder / f"0/{place}.left-by-the-dead").write_text("half of it")
    (store.lease_folder / "0.0.1").write_text("of the dead")
    store.finish(tmp_path / "out.zarr")
    with pytest.raises(FileNotFoundError):
        late.write((0, 0, 1), noise()[LAYOUT.box_of((0, 0, 1))])
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]
    assert not [path for path in (tmp_path / "out.zarr").rglob(".*") if path.name != ".vit3d"]
    assert not list(BlockStore(tmp_path / "out.zarr").lease_folder.iterdir())


def test_what_is_no_store_is_said_to_be_none(tmp_path):
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(ValueError, match="no store that `vit3d segment` wrote"):
        BlockStore(tmp_path / "other.zarr")


@pytest.mark.parametrize("box", [(64, 100, 64), (64, 0, 64)])
def test_a_box_that_is_no_multiple_of_the_chunk_is_refused(box):
    with pytest.raises(ValueError, match="multiple of the chunk"):
        Layout((100, 100, 100), box)


def test_a_box_ends_where_the_volume_does():
    layout = Layout((100, 70, 64), (64, 64, 64))
    assert layout.grid == (2, 2, 1)
    assert layout.box_of((1, 1, 0)) == (slice(64, 100), slice(64, 70), slice(0, 64))


def test_differences_name_both_values():
    assert differences({"a": {"b": 1, "c": (1, 2)}, "d": 3}, {"a": {"b": 2, "c": [1, 2]}}) == [
        "a.b was 1 and is now 2",
        "d was 3 and is now None",
    ]


# ---------------------------------------------------------------- leases

HOLD = """
import sys, time
from pathlib import Path
from vit3d.blockwise.leases import Leases
with Leases(Path(sys.argv[1])) as leases:
    print(leases.claim("box"), flush=True)
    time.sleep(60)
"""


def claim_in_a_process(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def test_a_lease_has_one_holder_and_is_free_after_its_release(tmp_path):
    with Leases(tmp_path) as first, Leases(tmp_path) as second:
        assert first.claim("box")
        assert not second.claim("box")
        assert not first.claim("box")
        assert second.claim("other")
        first.release("box")
        assert second.claim("box")
        first.release("box")  # not its own any more
        assert not first.claim("box")
    assert not list(tmp_path.iterdir())


def test_of_many_who_claim_at_once_one_gets_it(tmp_path):
    got, barrier = [], threading.Barrier(8)
    everybody = [Leases(tmp_path) for _ in range(8)]

    def claim(leases):
        barrier.wait()
        got.append(leases.claim("box"))

    threads = [threading.Thread(target=claim, args=(leases,)) for leases in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_a_lease_is_held_by_a_sibling_while_that_lives(tmp_path):
    process = claim_in_a_process(tmp_path)
    with Leases(tmp_path) as leases:

        def held_if_owner_says(**facts) -> bool:
            (tmp_path / "box").write_text(json.dumps({**owner, **facts}))
            return leases.is_held_by_sibling("box")

        owner = json.loads((tmp_path / "box").read_text())
        assert owner["launcher"] == os.getpid()
        together = {"launcher": os.getppid()}
        assert not leases.is_held_by_sibling("other")
        assert not leases.is_held_by_sibling("box")  # this process launched it
        assert held_if_owner_says(**together)
        assert not held_if_owner_says(**together, machine="elsewhere")
        process.kill()
        process.wait()
        assert not held_if_owner_says(**together)


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path):
    process = claim_in_a_process(tmp_path)
    with Leases(tmp_path) as leases:
        assert not leases.claim("box")
        process.kill()
        process.wait()
        assert leases.claim("box")


def test_the_lease_of_a_dead_process_whose_number_another_one_has_is_free_too(tmp_path):
    with Leases(tmp_path) as leases:
        assert leases.claim("box")
        owner = json.loads((tmp_path / "box").read_text())
        leases.release("box")
        (tmp_path / "box").write_text(json.dumps({**owner, "started": "1"}))
        assert leases.claim("box")


def test_the_lease_of_a_dead_process_that_nobody_waited_for_is_free_too(tmp_path):
    process = claim_in_a_process(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Leases(tmp_path) as leases:
        assert leases.claim("box")
    process.wait()


def test_a_holder_that_wakes_up_while_its_lease_is_taken_over_keeps_it(tmp_path, monkeypatch):
    rename = os.rename

    def after_a_heartbeat(path, aside):
        os.utime(path)
        rename(path, aside)

    with Leases(tmp_path, expiry_s=1000) as sleeper, Leases(tmp_path, expiry_s=1000) as other:
        assert sleeper.claim("box")
        os.utime(tmp_path / "box", (time.time() - 1001,) * 2)
        monkeypatch.setattr(os, "rename", after_a_heartbeat)
        assert not other.claim("box")
        assert [path.name for path in tmp_path.iterdir()] == ["box"]


def test_a_holder_that_wakes_up_does_not_begin_again_what_it_is_doing(tmp_path):
    with Leases(tmp_path, expiry_s=1000) as leases:
        assert leases.claim("box")
        os.utime(tmp_path / "box", (time.time() - 1001,) * 2)
        assert not leases.claim("box")


def test_the_process_of_another_machine_counts_as_dead_when_it_falls_silent(tmp_path):
    with Leases(tmp_path, expiry_s=1000) as leases:
        assert leases.claim("box")
        owner = json.loads((tmp_path / "box").read_text())
        leases.release("box")
        (tmp_path / "box").write_text(json.dumps({**owner, "machine": "elsewhere", "pid": 2**22 + 1}))
        assert not leases.claim("box")
        os.utime(tmp_path / "box", (time.time() - 1001,) * 2)
        assert leases.claim("box")


def test_a_lease_that_nobody_can_read_is_free_when_it_falls_silent(tmp_path):
    with Leases(tmp_path, expiry_s=1000) as leases:
        (tmp_path / "box").write_text("half a")
        assert not leases.claim("box")
        os.utime(tmp_path / "box", (time.time() - 1001,) * 2)
        assert leases.claim("box")


def test_a_held_lease_is_kept_alive(tmp_path):
    with Leases(tmp_path, expiry_s=0.6) as leases, Leases(tmp_path, expiry_s=0.6) as other:
        assert leases.claim("box")
        for _ in range(8):
            time.sleep(0.15)
            assert not other.claim("box")
