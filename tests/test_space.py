"""The Space in a real browser: what a visitor drops, sees, downloads, is told, and leaves behind."""

import importlib.util
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from vit3d.annotations.gold import align_gold
from vit3d.scoring import score_trees
from vit3d.tree import NeuronTree, read_swc
from vit3d.volume import Volume, read_volume

pytestmark = pytest.mark.slow  # importing gradio and torch takes seconds
SCRIPTS = Path(__file__).parents[1] / "scripts"
SPACING_UM = (1.0, 0.33, 0.33)
TREE = ".js-plotly-plot canvas"


def loaded(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio")
    return loaded(SCRIPTS / "space" / "app.py")


# ------------------------------------------------------------ without a browser


def v3draw(path: Path, sizes, order=b"L") -> Path:
    head = b"raw_image_stack_by_hpeng" + order + struct.pack(("<" if order == b"L" else ">") + "h4i", 1, *sizes)
    path.write_bytes(head + bytes(100))
    return path


def test_the_size_is_read_from_the_header_alone(app, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 6, 7), np.uint8), compression="zlib", imagej=True)
    assert app.declared_voxels(tmp_path / "a.tif") == 5 * 6 * 7
    for order in (b"L", b"B"):
        assert app.declared_voxels(v3draw(tmp_path / "a.v3draw", (9000, 9000, 90, 2), order)) == 9000 * 9000 * 180
    (tmp_path / "b.tif").write_bytes(b"II")
    assert app.declared_voxels(tmp_path / "b.tif") == 0


def test_a_large_stack_is_refused_before_a_voxel_is_decoded(app, tmp_path):
    """A bomb: 120 million voxels in a file of some kilobytes, whose voxels cannot even be decoded."""
    path = tmp_path / "bomb.tif"
    tifffile.imwrite(path, np.zeros((2, 8, 8), np.uint8), compression="zlib", metadata=None)
    data = path.read_bytes()
    for tag, size in ((256, 8000), (257, 7500), (278, 7500)):
        for told in (struct.pack("<HHIHxx", tag, 3, 1, 8), struct.pack("<HHII", tag, 4, 1, 8)):
            data = data.replace(told, struct.pack("<HHII", tag, 4, 1, size))
    path.write_bytes(data)
    assert app.declared_voxels(path) == 2 * 8000 * 7500
    with pytest.raises(ValueError, match=r"bomb\.tif declares 120,000,000 voxels, this page takes 100,000,000"):
        app.check_size(path)


def test_an_error_is_the_command_lines_sentence_without_our_folders(app, tmp_path):
    import gradio

    with pytest.raises(gradio.Error) as raised, app.answered(tmp_path):
        read_volume(tmp_path / "none.tif")
    assert raised.value.message == "none.tif does not exist."


def test_the_card_is_a_spaces_pins_what_is_installed_and_states_the_limits(app):
    from huggingface_hub import metadata_load

    header = metadata_load(SCRIPTS / "space" / "README.md")
    assert (header["sdk"], header["license"]) == ("gradio", "apache-2.0")
    assert (SCRIPTS / "space" / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60
    card = (SCRIPTS / "space" / "README.md").read_text()
    version = re.search(r"^sdk_version: ([\d.]+)$", card, re.M).group(1)
    lowest = re.search(r'"gradio>=([\d.]+)', (SCRIPTS.parent / "pyproject.toml").read_text()).group(1)
    assert version.startswith(lowest)
    for text in (card.replace(" MB", "MB"), app.ABOUT):
        assert app.LARGEST_FILE.upper() in text
        assert f"{app.LARGEST_VOXELS // 10**6} million voxels" in text.replace("\n", " ")


@pytest.mark.parametrize("size", [(5, 200, 40), (100, 100, 100), (0, 0, 300)])
def test_the_whole_tree_is_in_view_at_its_true_proportions(app, size):
    """Seen by plotly's camera, which opens at 45 degrees; what it looks at lies around the origin."""
    points = np.array(list(itertools.product(*[(0, side) for side in size])), float)
    tree = NeuronTree(points, np.ones(8), np.arange(8) - 1, unit="um")
    scene = app.turning(SimpleNamespace(tree=tree, volume=Volume(np.zeros((9, 9, 9))))).layout.scene
    sides = np.array([scene.aspectratio[axis] for axis in "zyx"])
    np.testing.assert_allclose(sides * max(size), size, atol=0.01)
    eye = np.array([scene.camera.eye[axis] for axis in "zyx"])
    away = np.array(list(itertools.product(*[(-side / 2, side / 2) for side in sides]))) - eye
    ahead = away @ -eye / np.linalg.norm(eye)
    aside = np.sqrt((away**2).sum(axis=1) - ahead**2)
    assert (aside / ahead < np.tan(np.pi / 8) * 1.45).all()  # a corner of the picture; its edges are closer
    assert ahead.min() > 0.5


@pytest.mark.parametrize(
    "measure, words",
    [
        ("max_path_um", "max path (µm)"),
        ("volume_um3", "volume (µm³)"),
        ("length_vox", "length (voxels)"),
        ("tips",) * 2,
    ],
)
def test_numbers_have_units_as_people_write_them(app, measure, words):
    assert app.named(measure) == words


# ------------------------------------------------------------ in Chromium


def kept(temporary: Path) -> set[str]:
    """Files with content that the app has left in its temporary folders."""
    return {str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file() and path.stat().st_size}


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        if os.environ.get("CI"):
            pytest.fail("no Chromium on this machine")
        pytest.skip("no Chromium on this machine")
    return loaded(SCRIPTS / "screenshot_space.py")


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    """(address, folder of all its temporary files) of the running app."""
    temporary = tmp_path_factory.mktemp("site") / "tmp"
    temporary.mkdir()
    with browser.served(temporary) as address:
        yield address, temporary


@pytest.fixture
def page(browser, site):
    with browser.opened(site[0]) as page:
        yield page


def drop(page, path: Path) -> None:
    shown = page.locator(".file-preview")
    for _ in range(10):  # a page that is not yet awake does not hear of it
        page.locator("input[type=file]").first.set_input_files(path)
        page.wait_for_timeout(2000)
        if shown.count() or not page.locator("input[type=file]").count():  # it is there, or on its way
            break
    shown.get_by_text(path.stem).first.wait_for()


def fibre() -> np.ndarray:
    voxels = np.zeros((12, 40, 96), np.uint8)
    voxels[5:8, 19:22, 8:89] = 200
    return voxels


def press(page, name: str) -> None:
    page.get_by_role("button", name=name).click()


def said(page) -> str:
    toast = page.get_by_test_id("toast-body")
    toast.first.wait_for()
    return toast.first.inner_text()


def download(page, label: str, folder: Path) -> Path:
    with page.expect_download() as started:
        press(page, label)
    started.value.save_as(folder / started.value.suggested_filename)
    return folder / started.value.suggested_filename


def test_a_real_neuron_gives_the_tree_that_the_command_line_gives(page, shared, site, tmp_path):
    stack = shared / "data/op/OP_6.tif"
    drop(page, stack)
    page.get_by_label("Voxel size").fill("1,0.33,0.33")
    press(page, "Reconstruct")
    page.locator(TREE).first.wait_for()
    assert "branch points" in page.get_by_role("table").last.inner_text()
    swc = download(page, "Tree (SWC)", tmp_path)
    probability = download(page, "Probability (TIFF)", tmp_path)
    assert (swc.name, probability.name) == ("OP_6.swc", "OP_6_probability.tif")
    assert download(page, "Places to review", tmp_path).read_text().startswith("kind,x_um")

    command = [sys.executable, "-m", "vit3d.cli", "reconstruct", str(stack), "--spacing", "1,0.33,0.33"]
    subprocess.run([*command, "--out", str(tmp_path / "cli")], check=True, capture_output=True)
    volume = read_volume(stack, spacing_um=SPACING_UM)
    gold, _ = align_gold(read_swc(shared / "data/op/OP_6.swc", unit="voxel").to("voxel", SPACING_UM), volume)
    ours, theirs = (score_trees(read_swc(path), gold)["f1"] for path in (swc, tmp_path / "cli" / "OP_6.swc"))
    assert ours >= 0.9
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert read_volume(probability).spacing_um == pytest.approx(SPACING_UM)
    assert read_volume(probability).shape == volume.shape


def test_the_tree_turns_when_it_is_dragged(page):
    press(page, "Example")
    page.locator(TREE).first.wait_for()
    page.wait_for_timeout(2000)
    camera = "JSON.stringify(document.querySelector('.js-plotly-plot')._fullLayout.scene._scene.getCamera().eye)"
    before, box = page.evaluate(camera), page.locator(TREE).first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 150, box["y"] + box["height"] / 2 + 60, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)
    assert page.evaluate(camera) != before


def test_a_file_that_cannot_be_read_is_answered_with_one_sentence(page, tmp_path, site):
    (tmp_path / "broken.tif").write_bytes(b"this is no image at all")
    drop(page, tmp_path / "broken.tif")
    press(page, "Reconstruct")
    words = said(page)
    assert "broken.tif is not a TIFF image, whatever its name says." in words
    assert "Traceback" not in words
    assert str(site[1]) not in words


def test_what_does_not_fit_is_said_too(page, tmp_path, site):
    press(page, "Reconstruct")
    assert "Drop a stack first" in said(page)
    page.get_by_test_id("toast-close").first.click()
    page.get_by_label("Threshold").fill("high")
    press(page, "Example")
    page.get_by_text("--threshold takes a number, got 'high'.").wait_for()


def test_nothing_of_the_last_stack_is_shown_beside_the_next(page, tmp_path):
    for name in ("first", "second"):
        tifffile.imwrite(tmp_path / f"{name}.tif", fibre(), imagej=True, metadata={"axes": "ZYX"})
    buttons = [page.get_by_role("button", name=name) for name in ("Tree (SWC)", "Probability (TIFF)")]
    drop(page, tmp_path / "first.tif")
    press(page, "Reconstruct")
    page.locator(TREE).first.wait_for()
    assert all(button.is_enabled() for button in buttons)
    page.get_by_label("Clear").first.click()
    page.get_by_text("The numbers come here.").wait_for()
    drop(page, tmp_path / "second.tif")
    assert page.locator(TREE).count() == 0
    assert not any(button.is_enabled() for button in buttons)
    press(page, "Reconstruct")
    page.locator(TREE).first.wait_for()
    assert download(page, "Tree (SWC)", tmp_path).name == "second.swc"


def test_a_run_is_stopped_and_another_can_be_started(page, site):
    press(page, "Example")
    until(lambda: runs(site[1]))
    press(page, "Stop")
    until(lambda: not runs(site[1]))
    for _ in range(200):  # until the first has ended, the page does not hear of another
        assert page.locator(TREE).count() == page.get_by_test_id("toast-body").count() == 0
        press(page, "Example")
        page.wait_for_timeout(500)
        if runs(site[1]):
            break
    page.locator(TREE).first.wait_for()


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_reaches_beyond_the_page_on_a_desk_and_on_a_phone(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    press(page, "Example")
    page.locator(TREE).first.wait_for()
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    canvas = page.locator(TREE).first.bounding_box()
    assert canvas["width"] > 0.7 * canvas["height"]  # or the tree, which is fitted to the height, is cut off


def runs(temporary: Path) -> set[str]:
    return {path.name for path in temporary.rglob("run-*")}


def until(condition, seconds: float = 300) -> None:
    for _ in range(int(seconds * 10)):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited in vain")


def test_nothing_is_left_of_a_visit_and_no_other_server_is_asked(browser, site, tmp_path):
    address, temporary = site
    until(lambda: not runs(temporary))  # of earlier visits
    before = kept(temporary)
    tifffile.imwrite(tmp_path / "private.tif", fibre(), imagej=True, metadata={"axes": "ZYX"})
    asked = []
    with browser.opened(address, lambda request: asked.append(request.url)) as page:
        drop(page, tmp_path / "private.tif")
        press(page, "Reconstruct")
        page.get_by_text("states no voxel size").first.wait_for()
        page.locator(TREE).first.wait_for()
        (first,) = runs(temporary)
        page.get_by_label("Threshold").fill("0.4")
        press(page, "Reconstruct")  # without uploading again
        page.locator(f"img[src*='{first}']").wait_for(state="detached")  # before, the button leads to what is removed
        page.wait_for_timeout(1000)
        assert first not in runs(temporary)
        download(page, "Tree (SWC)", tmp_path)
        held = kept(temporary) - before
        assert {Path(path).name for path in held} >= {"private.tif", "private.swc", "private.png"}
        assert len([path for path in held if path.endswith(".swc")]) == 1  # the last run's
        page.close()
        until(lambda: not kept(temporary) - before, 60)
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def test_nothing_is_left_when_the_page_is_closed_before_the_tree_is_there(browser, site):
    address, temporary = site
    before = kept(temporary)
    with browser.opened(address) as page:
        page.get_by_label("Threshold").fill("0.3")
        press(page, "Example")
        until(lambda: runs(temporary))
        page.close()
    for _ in range(2):
        until(lambda: not runs(temporary) and not kept(temporary) - before, 60)
        time.sleep(5)  # nothing comes late


def test_a_stack_taken_off_the_page_is_gone(page, site, tmp_path):
    temporary = site[1]
    tifffile.imwrite(tmp_path / "taken.tif", np.zeros((4, 8, 8), np.uint8), imagej=True)
    drop(page, tmp_path / "taken.tif")
    assert any("taken.tif" in name for name in kept(temporary))
    page.get_by_label("Clear").first.click()
    until(lambda: not any("taken.tif" in name for name in kept(temporary)), 60)
    press(page, "Reconstruct")
    assert "Drop a stack first" in said(page)
