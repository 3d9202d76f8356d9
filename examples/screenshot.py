"""Makes the README's picture of the asset graph: serves a root, opens it in Debian's chromium.

    python examples/screenshot.py ROOT RECIPE OUT.png ['+key:"demo/verify"']

The last argument is Dagster's asset selection, as one types it above the graph.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
STARTUP_SECONDS = 120


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Address of `siftline ui` on a root; stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "siftline.cli", "ui", "--root", str(root), "--port", str(port)]
    # In a session of its own: a script's child would ignore SIGTERM.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + STARTUP_SECONDS
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start: see its lines above")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/server_info", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def picture(address: str, recipe: str, selection: str, out: Path) -> None:
    """Saves a PNG of the recipe's asset graph."""
    from PIL import Image
    from playwright.sync_api import expect, sync_playwright

    group = f"{address}/locations/siftline.definitions/asset-groups/{recipe}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=[*FLAGS]
        )
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(f"{group}/lineage~{urllib.parse.quote(selection, safe='')}/")
        button = page.get_by_role("button", name="Materialize all")
        expect(button).to_be_enabled(timeout=60_000)
        page.wait_for_timeout(4000)  # states arrive and the graph glides into place
        page.screenshot(path=str(out))
        browser.close()
    # Flat colours: a palette of 128 takes a third of the bytes and looks the same.
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    with served(Path(sys.argv[1]).absolute()) as where:
        name = sys.argv[2]
        chosen = sys.argv[4] if len(sys.argv) > 4 else f'+key:"{name}/verify"'
        picture(where, name, chosen, Path(sys.argv[3]))
