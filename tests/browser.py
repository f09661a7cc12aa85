"""Opens a page that tSNE.py writes in Chromium, without a window, and acts in it."""

import json
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--enable-logging=stderr"]  # fmt: skip
WINDOW = "--window-size=1100,760"
ACT = """<script>
const problems = [], get = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
for (const kind of ["error", "securitypolicyviolation"]) {
  addEventListener(kind, (e) => problems.push(e.message || e.blockedURI));
}
const frame = () => new Promise((go) => requestAnimationFrame(go));
async function until(ready) {
  for (let i = 0; i < 500 && !ready(); i++) await frame();
}
function mouse(i, ...kinds) {  // "move", "down" or "up" at image i
  const { x, y } = explorer.screenOf(i), box = get("map").getBoundingClientRect();
  const place = { clientX: box.left + x, clientY: box.top + y, pointerId: 1 };
  for (const kind of kinds) get("map").dispatchEvent(new PointerEvent("pointer" + kind, place));
}
async function pixels(colour) {  // how many pixels of the map are exactly of [red, green, blue]
  for (let i = 0; i < 10; i++) await frame();  // the map may still get its size, and be cleared
  const { width, height } = get("map"), pen = get("map").getContext("2d");
  const bytes = pen.getImageData(0, 0, width, height).data;
  let count = 0;
  for (let i = 0; i < bytes.length; i += 4) {
    count += colour.every((value, k) => bytes[i + k] === value) && bytes[i + 3] === 255 ? 1 : 0;
  }
  return count;
}
addEventListener("load", async () => {
  const sized = () => get("map").width === get("map").clientWidth;
  await until(() => document.body.dataset.ready && sized());
  get("map").setPointerCapture = () => {};  // there is no such pointer
  const act = async () => { SCRIPT };
  const result = await act().catch((error) => problems.push(String(error)));
  console.log(`seen ${JSON.stringify({ result, problems })} end`);
});
</script>"""


def act(page: Path, script: str, *flags: str) -> Any:
    """What JavaScript returns that acts in a page by the functions above, without an error."""
    copy = page.with_name("tried.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</head>", ACT.replace("SCRIPT", script) + "</head>", 1), "utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *(flags or [WINDOW])]
        with subprocess.Popen(
            [*command, copy.as_uri()], stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as chromium:
            limit = threading.Timer(120, chromium.kill)
            limit.start()
            lines = (re.search('"seen (.*) end"', line) for line in chromium.stderr)
            seen = json.loads(next(filter(None, lines))[1])
            limit.cancel()
            chromium.kill()
    assert seen["problems"] == []
    return seen["result"]
