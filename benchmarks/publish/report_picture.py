"""Takes the picture of a report that the README shows, with headless Chromium.

    accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py --config configs/quickstart.yaml
    python benchmarks/publish/report_picture.py runs/quickstart docs/report.png

Contract: everything in the picture is part of the run's report, as a browser shows it; parts are left out and moved,
none is drawn anew. Left out are the curves, pictures and sections that would make it too long to read on the README.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH_PIXELS = 1080
"""Two charts beside each other; the README shows it hardly smaller."""
CROP = """
<style>
  main { padding-bottom: 8px; }
  h2 { margin-top: 20px; }
  .pictures { display: grid; gap: 24px; grid-template-columns: 1fr 1fr; }
  .pictures .tiles { grid-template-columns: repeat(4, 1fr); }
</style>
<script>
  const main = document.querySelector("main");
  const sections = new Map([...main.querySelectorAll(":scope > section")].map((section) => [
    section.querySelector("h2")?.textContent ?? "Headline", section,
  ]));
  [...sections.get("Curves").querySelectorAll("figure")].slice(2).forEach((chart) => chart.remove());
  [...sections.get("Worst mistakes").querySelectorAll(".tile")].slice(8).forEach((tile) => tile.remove());
  sections.get("Timeline").querySelector(".scroll").remove();
  const pictures = document.createElement("div");
  pictures.className = "pictures";
  pictures.append(sections.get("Augmentation"), sections.get("Worst mistakes"));
  const shown = [main.querySelector("h1"), sections.get("Headline"), sections.get("Curves"), pictures];
  main.replaceChildren(...shown, sections.get("Timeline"));
  document.title = `height ${Math.ceil(main.getBoundingClientRect().height)}`;
</script>
"""


def crop(page: str) -> str:
    """The page with a script that leaves the parts of the picture."""
    assert page.count("</body>") == 1
    return page.replace("</body>", f"{CROP}</body>")


def take_picture(report: Path, picture: Path, chromium: str) -> None:
    """Screenshots the cropped page, in the light colours and as high as it is."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(crop(report.read_text(encoding="utf-8")), encoding="utf-8")
        browser = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        browser += ["--disable-background-networking", "--disable-sync", f"--user-data-dir={folder}/profile"]

        def run(*options: str) -> str:
            return subprocess.run(
                [*browser, *options, page.as_uri()], check=True, capture_output=True, text=True, timeout=180
            ).stdout

        document = run("--dump-dom", f"--window-size={WIDTH_PIXELS},2000")
        height = re.search(r"<title>height (\d+)</title>", document)
        if height is None:
            sys.exit(f"{report}: not the report of one run that is done")
        run(f"--screenshot={picture.resolve()}", f"--window-size={WIDTH_PIXELS},{height[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the directory of a run that is done")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium; Debian's package is called chromium")
    take_picture(options.run / "report.html", options.picture, chromium)


if __name__ == "__main__":
    main()
