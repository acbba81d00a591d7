"""The report: what it says is what the run wrote, on a page that a browser shows without complaint."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
from PIL import Image

from dist_cifar.cli import main
from dist_cifar.data.sources.synthetic import synthetic_split
from dist_cifar.errors import ConfigError
from dist_cifar.run import predictions
from dist_cifar.run.predictions import collect, wilson_interval
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tools import watch
from dist_cifar.tools.report import page as report_page
from dist_cifar.tools.report import read_run, render
from dist_cifar.tools.report.charts import Chart, Series
from dist_cifar.tools.report.drawing import line_chart
from dist_cifar.tools.report.formats import duration, number
from dist_cifar.tools.report.timeline import segments
from tests import PATIENCE_SECONDS, REPOSITORY, small_runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "first"
    small_runs.run(path, "run.profile=true")
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "second"
    watches_the_test = ("data.validation_size=0", "eval.tta=mirror")
    small_runs.run(path, "run.name=<second>", "optimizer.lr=0.01", "train.epochs=1", *watches_the_test)
    return path


class Page(HTMLParser):
    """Text, tags that are open at the end, addresses, and pictures of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.series: dict[str, list[dict]] = {}
        self.feed(html)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if "data-series" in found:
            self.series[found["aria-label"]] = json.loads(found["data-series"])
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data + " ")
            if self.open[-1] in ("h1", "h2"):
                self.headings.append(data)


def page_of(*runs: Path) -> Page:
    return Page(render([read_run(path) for path in runs]))


def test_the_end_of_a_run_writes_it(trained):
    html = (trained / "report.html").read_text()
    page = Page(html)
    assert page.open == [] and page.headings[0] == f"{read_run(trained).name}: done"
    assert len(html) < 3_000_000
    assert all(address.startswith("data:") for address in page.addresses)
    assert "http://www.w3.org" in html and not re.findall(r"https?://(?!www\.w3\.org)", html)


def test_the_first_screen_says_what_the_summary_says(trained):
    summary = json.loads((trained / "summary.json").read_text())
    text = page_of(trained).text.partition("Curves")[0]
    low, high = wilson_interval(round(summary["test_accuracy"] * 80), 80)
    assert f"{summary['test_accuracy']:.2%}" in text and f"{low:.2%} to {high:.2%}" in text
    assert f"{summary['images_per_second']:,.0f} images/s" in text and summary["device"] in text
    assert f"{summary['best_step'] * 2 / summary['steps']:g} of 2" in text


def test_every_section_is_there(trained):
    assert page_of(trained).headings[1:] == [
        "Curves",
        "Classes",
        "Worst mistakes",
        "Calibration",
        "Augmentation",
        "Where the time of a step goes",
        "Timeline",
        "Settings",
    ]


def test_curves_have_every_row(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    trained_rows, evaluated = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    (training, validation) = page_of(trained).series["Loss over epochs"]
    assert training["text"] == [f"{row['loss']:.4g} at epoch {row['epoch']:.4g}" for row in trained_rows]
    assert validation["text"] == [f"{row['loss']:.4g} at epoch {row['epoch']:.4g}" for row in evaluated]
    assert training["px"] == sorted(training["px"])


def labels_of(chart: str, html: str) -> list[str]:
    """The numbers on the vertical axis of a chart, from below."""
    drawing = html.partition(f'aria-label="{chart} over epochs"')[2].partition("</svg>")[0]
    return re.findall(r'text-anchor="end">([^<]+)</text>', drawing)


def test_each_rank_has_its_own_speed(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train":
            row |= {"images_per_second": 900.0, "rank_work_share": [0.9, 0.5]}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (name,) = (name for name in page_of(run).series if name.startswith("Images/s of each rank"))
    slow, fast = page_of(run).series[name]
    assert (slow["name"], fast["name"]) == ("rank 0", "rank 1")
    assert slow["text"][0].startswith("500 at epoch") and fast["text"][0].startswith("900 at epoch")


def test_a_long_run_of_many_ranks_and_classes_has_a_small_page(trained, tmp_path):
    """10,000 rows of 256 ranks, 60 jobs, and a hundred classes that are all confused with each other."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    row = next(row for row in read_run(run).rows if row["kind"] == "train")
    shares = np.linspace(0.5, 0.9, 256).round(4).tolist()
    rows = [json.dumps(row | {"step": i, "epoch": i / 13, "rank_work_share": shares}) for i in range(1, 10_001)]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    (run / "events.jsonl").write_text("\n".join(start(100 * i, 10 * i, 256) for i in range(60)))
    names = [f"class {i}" for i in range(100)]
    summary = json.loads((run / "summary.json").read_text())
    confusion = np.arange(10_000).reshape(100, 100) % 7 + 1
    summary |= {"test_confusion": confusion.tolist(), "test_class_accuracy": dict.fromkeys(names, 0.5)}
    (run / "summary.json").write_text(json.dumps(summary))
    html = render([read_run(run)])
    assert len(html) < 3_000_000
    page = Page(html)
    (chart,) = (series for name, series in page.series.items() if name.startswith("Images/s of each rank"))
    slowest, median, fastest = (float(one["text"][0].split()[0].replace(",", "")) for one in chart)
    own = row["images_per_second"] / 256
    assert (slowest, median, fastest) == pytest.approx((own / 0.9, own / 0.7, own / 0.5), rel=1e-2)
    assert "taken for class" in page.text and "60 starts" in page.text
    sizes = [2, 4] * 30
    (run / "events.jsonl").write_text("\n".join(start(i, 10 * i, size) for i, size in enumerate(sizes)))
    assert "world size 2, 4 cpu, 60 starts" in page_of(run).text


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.1e-3, 1.9e-3), (1.2e-3, 6.5e-3), (4e-4, 2.1e-3), (1e-6, 1e-2), (1e-3, 1e-3), (0.3, 0.31), (2e-4, 2e-4 + 1e-19)],
)
def test_a_rate_can_be_read_off_its_axis(low, high):
    points = [(0.0, low), (1.0, high), (2.0, low)]
    chart = Chart(title="x", series=[Series(name="lr", color=0, points=points)], log=True)
    drawn = report_page.environment().get_template("charts.html.j2").module.line_chart(line_chart(chart))
    labels = labels_of("x", str(drawn))
    assert 3 <= len(labels) <= 8 and len(set(labels)) == len(labels)
    values = [float(label) for label in labels]
    assert values == sorted(values) and max(map(len, labels)) <= 7


def test_numbers_are_short():
    for value, text in (
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (0.001, "1e-3"),
        (0.01, "0.01"),
        (0.25, "0.25"),
        (12345.6, "12,346"),
    ):
        assert number(value) == text
    assert number(0.0) == "0" and number(0.1234567) == "0.1235" and number(0.5, percent=True) == "50%"


def test_confusion_and_mistakes_are_those_of_the_test_split(trained):
    html = (trained / "report.html").read_text()
    summary = json.loads((trained / "summary.json").read_text())
    table = html.partition('<table class="confusion')[2].partition("</table>")[0]
    cells = [int(text or 0) for text in re.findall(r"<td[^>]*>(\d*)</td>", table)]
    assert cells == np.array(summary["test_confusion"]).flatten().tolist()
    found = predictions.read(trained)
    images, labels = synthetic_split(1, 80)
    assert (found.labels == labels).all()
    assert np.trace(summary["test_confusion"]) == (found.predicted == labels).sum()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="test image (\d+)', html)
    assert [int(index) for _, index in pictures] == found.worst_indices.tolist() and pictures
    for data, index in pictures:
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == images[int(index)]).all()
    shares = [found.probabilities[i, labels[i]] for i in found.worst_indices]
    wrong = found.predicted != labels
    assert shares == sorted(shares) and shares[0] == found.probabilities[wrong, labels[wrong]].min()


def test_calibration_error_is_that_of_the_definition(trained):
    found = predictions.read(trained)
    confidence, right = found.probabilities.max(1), found.predicted == found.labels
    error = 0.0
    for i in range(10):
        inside = (confidence >= i / 10) & (confidence < (i + 1) / 10 if i < 9 else confidence <= 1)
        if inside.any():
            error += abs(right[inside].sum() - confidence[inside].astype(float).sum()) / len(right)
    assert f"Expected calibration error {error:.2%}" in page_of(trained).text


def test_augmented_pictures_begin_with_the_pictures_themselves(trained):
    augmented = predictions.read(trained).augmented
    images = synthetic_split(0, 240)[0]
    originals = {image.tobytes() for image in images}
    assert all(row[0].tobytes() in originals for row in augmented)
    assert all(other.tobytes() not in originals for row in augmented for other in row[1:])


def test_wilson_interval_is_that_of_the_paper():
    low, high = wilson_interval(9, 10)  # the roots of (p - x)^2 = z^2 x (1 - x) / n
    for root in (low, high):
        assert (0.9 - root) ** 2 == pytest.approx(1.959964**2 * root * (1 - root) / 10)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)


def test_two_runs_are_compared(trained, other):
    page = page_of(trained, other)
    table = page.text.partition("Settings that differ")[2]
    assert "optimizer.lr" in table and "0.01" in table and "train.epochs" in table
    assert "<second>" in page.text, "escaped in the source, so it is text here"
    watched = {f"{read_run(trained).name}, validation", "<second>, test"}
    assert watched <= {series["name"] for series in page.series["Accuracy over epochs"]}
    with_tta = json.loads((other / "summary.json").read_text())["test_accuracy_tta"]
    best = max(row["accuracy"] for row in read_run(other).of_kind("eval"))
    assert f" {with_tta:.2%} {best:.2%} test " in page.text
    assert page.headings[:4] == ["2 runs", "Results", "Curves", "Settings that differ"]
    assert "run.dir" not in table.partition("<second>")[0] and "run.name" not in table.partition("Classes")[0]
    same = page_of(trained, trained)
    assert "The configs are equal." in same.text


def test_the_difference_of_two_runs_is_that_of_their_pairs(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    found = predictions.read(run)
    right = found.predicted == found.labels
    taken = found.labels.copy()
    taken[:20] = (taken[:20] + 1) % 10  # wrong on the first twenty, right on the rest
    predictions.write(run, replace(found, probabilities=np.eye(10, dtype=np.float32)[taken]))
    change = 100 * ((taken == found.labels).astype(float) - right)
    half = 1.959964 * change.std() / np.sqrt(80)
    text = page_of(trained, run).text
    assert f"{change.mean():+.2f} {change.mean() - half:+.2f} to {change.mean() + half:+.2f}" in text
    predictions.write(run, replace(found, labels=(found.labels + 1) % 10))
    assert "other images" in page_of(trained, run).text


def test_settings_that_are_as_by_default_are_apart(trained):
    page = page_of(trained).text.partition("What differs from the defaults")[2]
    changed, _, rest = page.partition("All settings that have their default value")
    assert "train.epochs 2" in changed and "optimizer.eps" not in changed
    assert "optimizer.eps 1e-08" in rest and "train.epochs" not in rest


def event(name: str, at: float, **facts) -> str:
    return json.dumps({"time": at, "event": name, **facts})


def start(at: float, step: int, world_size: int) -> str:
    facts = {"total_steps": 26, "steps_per_epoch": 13, "host": "n1", "device": "cpu", "strategy": "exact"}
    return event("started", at, step=step, world_size=world_size, **facts)


def test_the_timeline_has_every_job_and_its_end(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    lines = [
        start(100, 0, 4),
        event("checkpoint", 110, step=5, best=True),
        event("saved", 120, step=7),
        start(200, 7, 2),
        event("checkpoint", 220, step=9, best=False),
        start(300, 9, 1),
        event("failed", 310, step=9, rank=0, reason="a <reason>"),
        start(400, 9, 4),
        event("lr_reduction", 405, step=13, lr=1e-4),
        event("done", 500, step=26),
    ]
    (run / "events.jsonl").write_text("\n".join(lines) + '\n{"time": 1, "ev')
    found = segments(read_run(run))
    assert [job.start["world_size"] for job in found] == [4, 2, 1, 4]
    assert [job.end for job in found] == ["saved", "lost", "failed", "done"]
    assert [job.end_time for job in found] == [120, 220, 310, 500]
    page = page_of(run)
    assert "4 → 2 → 1 → 4" in page.text and "4 starts" in page.text and "a <reason>" in page.text
    html = render([read_run(run)])
    assert html.count('class="tick best"') == 1 and html.count('class="tick"') == 1
    assert re.findall(r'class="job (\w+)" style="left:([\d.]+)%;width:([\d.]+)%', html) == [
        ("saved", "0.00", "5.00"),
        ("lost", "25.00", "5.00"),
        ("failed", "50.00", "2.50"),
        ("done", "75.00", "25.00"),
    ]
    assert html.count("<title>resumed on 2 ranks at step 7<") == 3  # images/s of all, of each, data wait
    assert render([read_run(run)]).count("<title>plateau: lr 1e-4<") == 3  # loss, accuracy and rate


def test_a_run_that_has_only_begun_has_a_page(trained, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(trained / "config.yaml", run)
    assert page_of(run).headings[-1] == "Settings"
    (run / "events.jsonl").write_text(start(time.time(), 0, 2) + "\n")
    (run / "status.json").write_text('{"status": "running"}')
    (run / "metrics.jsonl").write_text((trained / "metrics.jsonl").read_text().splitlines()[0] + '\n{"kind')
    page = page_of(run)
    assert "running, step 2 of 26" in page.text and "Worst mistakes" not in page.text
    row = read_run(run).rows[0]
    left = 24 * 16 / row["images_per_second"]
    assert read_run(run).seconds_left == pytest.approx(left)
    assert f"about {duration(left)} of training left" in page.text and "training loss" in page.text
    assert '<i style="width:7.7%">' in render([read_run(run)])


def test_a_run_with_components_that_are_registered_elsewhere_has_a_page(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "config.yaml").read_text()
    names = (("name: resnet8", "name: tour"), ("also: []", "also: [ours]"), ("name: plateau", "name: ramps"))
    for before, after in names:
        assert before in text
        text = text.replace(before, after)
    (run / "config.yaml").write_text(text)
    config = read_run(run).config
    assert (config.model.name, config.schedule.name, config.tracking.also) == ("tour", "ramps", ("ours",))
    assert "tour" in page_of(run).text and RunDir(run).previous_config() == config
    (run / "config.yaml").write_text(text.replace("name: tour", "name: 3"))
    with pytest.raises(ConfigError, match=r"model\.name: must be one of"):
        read_run(run)


def test_a_job_that_died_is_not_shown_as_running(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "summary.json").unlink()
    events = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join(line for line in events if '"done"' not in line) + "\n")
    with RunDir(run).lock():
        RunDir(run).write_status("running")
        seen = watch.version([run])
        assert "running, step 24 of 24" in page_of(run).text
    assert watch.version([run]) != seen  # so the page asks for what is new
    text = page_of(run).text
    assert (
        "terminated without a final status (killed, or its node died) at step 24 of 24" in text
        and "running" not in text
    )
    assert read_run(run).seconds_left is None
    assert " lost " in watch.screen(read_run(run), 100).splitlines()[0]


def test_a_directory_in_which_nothing_has_begun_is_named(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: no training has begun here" in capsys.readouterr().err


def test_values_that_are_not_finite_leave_a_gap(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0]["loss"], rows[1]["loss"] = "nan", None
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before, after = (page_of(path).series["Loss over epochs"][0]["px"] for path in (trained, run))
    assert len(after) == len(before) - 2
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]))
    assert "loss nan" in watch.screen(read_run(run), 200)


def test_the_command_writes_and_refuses(trained, other, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(trained), str(other)]) == 0
    assert (tmp_path / "report.html").exists() and str(tmp_path / "report.html") in capsys.readouterr().out
    assert main(["report", str(trained), "--out", "one.html"]) == 0 and (tmp_path / "one.html").exists()
    assert main(["report", str(trained.parent / "firts")]) == 2
    assert f"did you mean {trained}?" in capsys.readouterr().err


def test_a_damaged_file_is_named_and_left_out(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "predictions.npz").write_bytes((run / "predictions.npz").read_bytes()[:1000])
    assert main(["report", str(run)]) == 0
    assert "predictions.npz: not what this version writes" in capsys.readouterr().err
    assert "predictions.npz: not what this version writes" in (run / "report.html").read_text()
    (run / "predictions.npz").unlink()
    for name in ("profile/summary.json", "summary.json", "status.json"):
        (run / name).write_text('{"a"')
        assert main(["report", str(run)]) == 0
        assert f"{run / name}: not what this version writes (not JSON" in capsys.readouterr().err


def test_only_mistakes_are_worst():
    logits = np.array([[9, 0], [0, 1], [5, 0], [0, 3]], np.float32)
    labels = np.array([0, 0, 1, 1])
    images, augmented = np.zeros((4, 32, 32, 3), np.uint8), np.zeros((1, 1, 32, 32, 3), np.uint8)
    found = collect(logits, labels, images, ("a", "b"), augmented)
    assert found.worst_indices.tolist() == [2, 1]
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-6)


def test_a_report_that_fails_leaves_the_run_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_page, "render", lambda runs: 1 / 0)
    small_runs.run(tmp_path / "run", "train.epochs=1")
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"
    assert "warning: no report (division by zero)" in capsys.readouterr().out


# --- templates and static files ----------------------------------------------------------------------------------


PAGE_PACKAGE = Path(report_page.__file__).parent


def test_a_name_that_a_template_misspells_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="titel"):
        report_page.environment().from_string("{{ titel }}").render(title="x")
    assert report_page.environment().from_string("{{ title }}").render(title="<b>") == "&lt;b&gt;"


def test_style_and_scripts_are_in_the_page_as_they_are(trained):
    html = render([read_run(trained)], refresh_seconds=2.0)
    files = sorted((PAGE_PACKAGE / "static").iterdir())
    assert [file.name for file in files] == ["live.js", "report.css", "report.js"]
    for file in files:
        text = file.read_text()
        assert text in html and "</" not in text, "nothing in it ends its element"
        assert max(map(len, text.splitlines())) <= 120, "written to be read"
    assert 'data-refresh-milliseconds="2000"' in html


@pytest.mark.parametrize("package", ["report", "export"])
def test_a_wheel_has_the_files_that_are_no_python(package):
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = REPOSITORY / "dist_cifar" / "tools" / package
    packed = {path for pattern in patterns[f"dist_cifar.tools.{package}"] for path in folder.glob(pattern)}
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == others != set()


def test_a_training_that_starts_does_not_wait_for_jinja():
    code = "import sys; import dist_cifar.tools.report; sys.exit('jinja2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=PATIENCE_SECONDS)


# --- watch -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(trained, tmp_path):
    run = tmp_path / "live"
    shutil.copytree(trained, run)
    made = watch.make_server([run], 0)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield run, f"http://127.0.0.1:{made.server_address[1]}/"
    made.shutdown()
    thread.join()
    made.server_close()


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read().decode()


def test_the_live_page_follows_the_run(server):
    run, address = server
    before = get(address + "version")
    assert get(address + "version") == before
    page = get(address)
    assert "setInterval" in page and "setInterval" not in (run / "report.html").read_text()
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row | {"step": 99, "epoch": 7.5, "loss": 0.123456}) + "\n")
    assert get(address + "version") != before
    assert "0.1235 at epoch 7.5" in get(address)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(address + "../../etc/passwd")
    foreign = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign, timeout=10)
    shutil.move(run, run.parent / "gone")
    with pytest.raises(urllib.error.HTTPError, match="500"):
        get(address)


def test_a_page_of_a_person_is_not_overwritten(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert main(["report", str(run)]) == 0  # its own page is
    (run / "report.html").write_text("my own page")
    assert main(["report", str(run)]) == 2
    assert "would be overwritten" in capsys.readouterr().err and (run / "report.html").read_text() == "my own page"
    assert main(["report", str(run), "--out", str(run / "report.html")]) == 0  # named


def test_the_page_is_for_this_machine_alone():
    made = watch.make_server([], 0)
    assert made.server_address[0] == "127.0.0.1"
    made.server_close()


def test_a_port_in_use_is_an_error(server, trained, capsys):
    port = server[1].rpartition(":")[2].strip("/")
    assert main(["watch", str(trained), "--port", port]) == 2
    assert "give another with --port" in capsys.readouterr().err


def test_the_terminal_shows_it_once_where_it_is_none(trained, capsys):
    assert main(["watch", "--terminal", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "step 24 of 24, 100%" in out and " test  step" in out and "training loss" in out


def test_the_terminal_is_as_wide_as_it_is(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "status.json").write_text('{"status": "running"}')
    for width in (40, 80, 120):
        lines = watch.screen(read_run(run), width).splitlines()
        assert max(map(len, lines)) <= width and any("step 24 of 24" in line for line in lines)


def test_sparklines_follow_the_values():
    assert watch.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert watch.sparkline([0, 0, 7, 7], 2) == "▁█" and watch.sparkline([5.0], 9) == "▁"


# --- in a browser ------------------------------------------------------------------------------------------------


def browse(address: str, screenshot: Path, *options: str) -> str:
    """What the browser says on its console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={screenshot.parent}/profile", f"--screenshot={screenshot}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package is called chromium")
def test_a_browser_shows_it_without_complaint(trained, other, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render([read_run(trained), read_run(other)]))
    for size in ("1280,900", "390,844"):
        picture = tmp_path / f"{size}.png"
        assert browse(page.as_uri(), picture, f"--window-size={size}") == ""
        assert len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)) > 20
    page.write_text(page.read_text().replace("wire();", "nothing_of_this_name();", 1))
    assert "nothing_of_this_name" in browse(page.as_uri(), tmp_path / "broken.png")


PHONE = """<iframe width=390 height=844 srcdoc="{page}" onload="document.title=
this.contentDocument.scrollingElement.scrollWidth+' '+this.contentWindow.innerWidth"></iframe>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package is called chromium")
def test_a_phone_need_not_scroll_sideways(trained, other, tmp_path):
    """The width that the content asks for, on a page 390 pixels wide."""
    wide = "<div style='width:500px'>wide</div></main>"
    for html, fits in (
        (render([read_run(trained)]), True),
        (render([read_run(trained), read_run(other)]).replace("<details", "<details open"), True),
        (render([read_run(trained)]).replace("</main>", wide), False),
    ):
        (tmp_path / "phone.html").write_text(PHONE.format(page=escape(html)))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "phone.html").as_uri()]
        out = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True).stdout
        wanted, given = map(int, re.search(r"<title>(\d+) (\d+)</title>", out).groups())
        assert (wanted <= given) == fits, (wanted, given)
