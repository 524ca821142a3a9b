"""A real browser without a window, for pages that are tested as they are read; skipped where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-device-scale-factor=1")


class Browser:
    """A browser with what the tests ask of it, by the ids of the page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """A page that is read to its end, in a window of a width, on a system of a colour scheme."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        # Without motion: what is scrolled to is there at once.
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        self.command("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """What a script returns, once that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: self.run(script))

    def column(self, title: str) -> list[str]:
        """The texts of a column of the table, in the order in which they are seen."""
        return self.run(
            "const heads = [...document.querySelectorAll('#layer-table thead th')].map(h => h.textContent);"
            "const at = heads.indexOf(arguments[0]);"
            "return [...document.querySelectorAll('#layer-table tbody tr')].map(r => r.cells[at].textContent)",
            title,
        )

    def head(self, title: str) -> Any:
        return self.driver.find_element("xpath", f"//table[@id='layer-table']//th[button[text()='{title}']]")

    def slide(self, index: int) -> None:
        """Put the damping at one of its stops, as a hand does."""
        self.run(
            "const e = document.getElementById('lambda'); e.value = arguments[0];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            str(index),
        )

    def see_all(self) -> None:
        """Open what can be opened and go down the page, so that every picture is drawn."""
        self.run("for (const d of document.querySelectorAll('details')) d.open = true")
        for figure in self.driver.find_elements("css selector", "figure:not([hidden])"):
            if figure.is_displayed():
                self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
                chart = figure.find_element("css selector", ".chart").get_attribute("id")
                self.wait(
                    f"const c = document.getElementById('{chart}');"
                    "return c.closest('figure').hidden || c.querySelector('.main-svg') !== null"
                )

    def complaints(self) -> list[str]:
        """What is in the console, warnings and refusals of the page's own policy among it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for, those of the page's own data left out."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        asked = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def screenshot(self, path: Path) -> None:
        """All of the page in one picture."""
        height = self.run("window.scrollTo(0, 0); return document.body.scrollHeight")
        width = self.run("return window.innerWidth")
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=min(height, 9000),
            deviceScaleFactor=1,
            mobile=False,
        )
        self.driver.save_screenshot(str(path))


@contextmanager
def browsing() -> Iterator[Browser]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None or shutil.which("chromedriver") is None:
        pytest.skip("no chromium with chromedriver here")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
