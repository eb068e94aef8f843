"""Serve the Space on this machine, press its example in a headless Chromium, and keep a picture of the page.

    pip install '.[test]' && apt-get install chromium && python scripts/screenshot_space.py

Writes scripts/space/screenshot.png; half a minute on two CPU cores. Nothing is downloaded: the browser is the
system's. `tests/test_space.py` drives the same page.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Page, sync_playwright

APP = Path(__file__).parent / "space" / "app.py"
PATIENCE_MS = 300_000  # a machine may have other things to do
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU


@contextmanager
def served(temporary: Path) -> Iterator[str]:
    """The app in a process of its own, offline, all its files in the folder `temporary`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"GRADIO_SERVER_PORT": port, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    variables |= {"TMPDIR": str(temporary), "GRADIO_TEMP_DIR": str(temporary / "gradio")}
    with (temporary.parent / f"{temporary.name}.log").open("wb") as log:
        app = subprocess.Popen([sys.executable, str(APP)], env=os.environ | variables, stdout=log, stderr=log)
        try:
            yield _answering(f"http://127.0.0.1:{port}", app, Path(log.name))
        finally:
            app.terminate()
            app.wait(30)


def _answering(address: str, app: subprocess.Popen, log: Path) -> str:
    for _ in range(1500):
        try:
            urlopen(address, timeout=5).close()
            return address
        except OSError:
            if app.poll() is not None:
                break
            time.sleep(0.2)
    raise RuntimeError(f"The app does not answer:\n{log.read_text()}")


@contextmanager
def opened(address: str, on_request=lambda request: None) -> Iterator[Page]:
    """The page in a headless Chromium; `on_request` hears of everything that the page asks for."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise FileNotFoundError("No Chromium on this machine: apt-get install chromium.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", on_request)
        page.goto(address)
        page.get_by_role("button", name="Reconstruct").wait_for()
        yield page
        browser.close()


def main() -> None:
    with TemporaryDirectory() as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        with served(temporary) as address, opened(address) as page:
            page.get_by_role("button", name="Example").click()
            page.locator(".js-plotly-plot canvas").first.wait_for()
            page.wait_for_timeout(3000)  # the scene is drawn after it is there
            page.screenshot(path=temporary / "page.png", full_page=True)
            picture = (
                Image.open(temporary / "page.png").convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
            )  # a third of the bytes
            picture.save(APP.with_name("screenshot.png"), optimize=True)


if __name__ == "__main__":
    main()
