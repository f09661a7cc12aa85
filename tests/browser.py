"""Drives Debian's Chromium through its WebDriver (W3C protocol over HTTP). Installs nothing."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
WHY_NOT = (
    None if CHROMIUM and CHROMEDRIVER else "no browser here: needs chromium and chromium-driver"
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
    "--disable-dev-shm-usage",
]  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how the protocol marks a reference to an element
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Tab": "\ue004", "ArrowRight": "\ue014"}


class Browser:
    """with Browser(profile_folder, width, height) as browser: …"""

    def __init__(self, profile: Path, width: int, height: int, dark: bool = False) -> None:
        self.driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in self.driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        assert found, "chromedriver did not start"
        self.base = f"http://127.0.0.1:{found[1]}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/" + session["sessionId"]
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def ask(self, method: str, path: str, body: dict | None = None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, parameters: dict) -> None:
        self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path) -> None:
        self.ask("POST", "/url", {"url": page.resolve().as_uri()})
        self.wait_for("document.body.dataset.ready === 'true'")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        body = {"script": f"return ({script});", "args": []}
        return self.ask("POST", "/execute/sync", body)

    def text(self, selector: str) -> str:
        """What the first element of a CSS selector says."""
        return self.run(f"document.querySelector({selector!r}).textContent")

    def wait_for(self, expression: str) -> None:
        """Until the expression is true, for at most 10 seconds; asserts that it became so."""
        script = (
            "const done = arguments[arguments.length - 1], end = Date.now() + 10000;"
            f"(function look() {{ const yes = Boolean({expression});"
            "if (yes || Date.now() > end) done(yes); else setTimeout(look, 20); })()"
        )
        assert self.ask("POST", "/execute/async", {"script": script, "args": []}), expression

    def click(self, selector: str) -> None:
        found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        self.ask("POST", f"/element/{found[ELEMENT]}/click", {})

    def pointer(self, *moves: tuple[float, float], click: bool = False, drag: bool = False) -> None:
        """The mouse to each (x, y) in CSS px; pressed at the last, or from the first on."""
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in moves]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        if drag:
            actions = [actions[0], down, *actions[1:], up]
        elif click:
            actions += [down, up]
        mouse = {"type": "pointer", "id": "mouse", "actions": actions}
        self.ask("POST", "/actions", {"actions": [mouse]})

    def wheel(self, x: float, y: float, delta: int) -> None:
        turn = {"type": "scroll", "x": round(x), "y": round(y), "deltaX": 0, "deltaY": delta}
        actions = [{"type": "wheel", "id": "wheel", "actions": [turn]}]
        self.ask("POST", "/actions", {"actions": actions})

    def press(self, *keys: str) -> None:
        """Keys by their character or by their name in KEYS, to whatever has the focus."""
        values = [KEYS.get(key, key) for key in keys]
        actions = [{"type": t, "value": v} for v in values for t in ("keyDown", "keyUp")]
        self.ask(
            "POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        )

    # of the page that tSNE.py writes

    def state(self) -> dict:
        """Which panel is shown, which image is pinned, how the map lies."""
        return self.run("explorer.state()")

    def place(self, i: int) -> tuple[float, float]:
        """Where image i is in the window, in CSS px."""
        point = self.run(f"explorer.screenOf({i})")
        box = "document.getElementById('map').getBoundingClientRect()"
        left, top = self.run(f"[{box}.left, {box}.top]")
        return left + point["x"], top + point["y"]

    def pixels(self, colour: str) -> int:
        """How many pixels of the map are exactly of a colour "#rrggbb"."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self.run(
            "(() => { const c = document.getElementById('map'); let n = 0;"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            f"const [r, g, b] = {list(bytes.fromhex(colour[1:]))};"
            "for (let i = 0; i < d.length; i += 4)"
            "if (d[i] === r && d[i + 1] === g && d[i + 2] === b && d[i + 3] === 255) n++;"
            "return n; })()"
        )

    def screenshot(self) -> str:
        """A PNG in base64."""
        return self.ask("GET", "/screenshot")

    def log(self) -> list[str]:
        """The errors, refused requests among them, that the page reported since the last call."""
        rows = self.ask("POST", "/se/log", {"type": "browser"})
        return [row["message"] for row in rows if row["level"] == "SEVERE"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
