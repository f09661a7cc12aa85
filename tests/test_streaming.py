"""Folders of images that are streamed: decoded fast, by workers that stay, whatever the files."""

import contextlib
import dataclasses
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import simclr
import utils
from utils import ImageFiles, InputError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SIDE = 16  # px of all views here


def smooth(height, width, seed=0):
    """uint8 (height, width, 3) that is as smooth as most photographs."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty JPEGs of two classes, 40 to 210 px a side."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(20):
        file = root / "ab"[i % 2] / f"{i:02}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(smooth(40 + 9 * i, 210 - 8 * i, seed=i)).save(file, quality=90)
    return root


@pytest.fixture
def own_photos(photos, tmp_path):
    """A copy of them, to damage."""
    for file in photos.rglob("*.jpg"):
        copy = tmp_path / "photos" / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path / "photos"


@pytest.fixture
def streamed_config(tiny_config):
    """Makes the configuration of a run on streamed images that takes a second."""

    def make(root, **overrides):
        options = dict(
            dataset="folder", data_dir=str(root), arch="resnet10", width=0.0625, head_dim=8,
            image_size=SIDE, batch_size=5, epochs=2, knn_every=1, workers=0,
        )  # fmt: skip
        return tiny_config(**{**options, **overrides})

    return make


@pytest.fixture
def unjudged(monkeypatch):
    """Leaves the final evaluation and the figures out, which take longer than a tiny run."""
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})
    monkeypatch.setattr(simclr.FigureKeeper, "draw", lambda *_: None)


def streamed(root, **options):
    names = np.array([os.fsencode(name) for name in utils.list_images(root)])
    return ImageFiles(root, names, **options)


def break_files(root, *names):
    for name in names:
        file = root / name
        file.write_bytes(file.read_bytes()[:300])


# -------------------------------------------------------------------------------------- decoding


def cropped(path, boxes, size=SIDE):
    """uint8 (V, size, size, 3), and the size of what was decoded."""
    out, sizes = torch.empty(len(boxes), size, size, 3, dtype=torch.uint8), []
    with utils.Photo(path) as photo:
        real = photo.pixels
        photo.pixels = lambda least=1: sizes.append(real(least)) or sizes[-1]
        photo.crops(out, np.array(boxes))
    return out, tuple(sizes[0].shape[1:])


def from_whole(path, boxes, size=SIDE):
    """The same by torchvision, from all pixels."""
    image, resize = utils.read_image(path), utils.TF.resized_crop
    return torch.stack([resize(image, *box, [size, size]).permute(1, 2, 0) for box in boxes])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_boxes_are_cut_from_a_smaller_decoding(tmp_path, orientation):
    """At 64 px within 2 levels of 255 on average, which is less than half a pixel to one side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file, size = tmp_path / "x.jpg", 64
    Image.fromarray(smooth(403, 599)).save(file, quality=90, exif=exif)
    height, width = utils.image_size(file)
    boxes = [(0, 0, height, width), (height - 301, width - 323, 301, 323), (3, 5, 261, 270)]
    views, decoded = cropped(file, boxes, size)
    assert decoded == (-(-height // 4), -(-width // 4))
    whole = from_whole(file, boxes, size).float()
    difference = (views - whole).abs().mean()
    assert difference < 2
    assert 2 * difference < (whole[:, :, 1:] - whole[:, :, :-1]).abs().mean()


@pytest.mark.parametrize(("side", "shrink"), [(16, 1), (33, 1), (34, 2), (68, 4), (136, 8)])
def test_no_box_gets_fewer_pixels_than_the_view_has(tmp_path, side, shrink):
    file = tmp_path / "x.jpg"
    Image.fromarray(smooth(160, 240)).save(file)
    _, decoded = cropped(file, [(0, 0, 160, 160), (7, 9, side, side + 20)])
    assert decoded == (160 // shrink, 240 // shrink)
    assert side // shrink >= SIDE


def test_whatever_is_not_reduced_is_decoded_as_ever(tmp_path):
    """Each format, mode and orientation: the crops of read_image()'s pixels, exactly or by 1."""
    pixels, exif = smooth(30, 28), Image.Exif()
    exif[0x0112] = 6
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    clear = Image.fromarray(np.dstack([pixels, pixels[..., :1]]))
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    kinds = [
        (colour, "rgb.jpg", {}), (colour, "progressive.jpg", dict(progressive=True)),
        (colour, "444.jpg", dict(subsampling=0)), (colour, "turned.jpg", dict(exif=exif)),
        (colour, "kept.jpg", dict(keep_rgb=True)), (colour, "torn.jpg", dict(exif=b"Exif\0\0xx")),
        (grey, "grey.jpg", {}), (colour.convert("CMYK"), "cmyk.jpg", {}),
        (clear, "clear.png", {}), (deep, "deep.png", {}), (colour, "turned.tiff", dict(exif=exif)),
        (colour.quantize(16), "palette.gif", {}), (colour, "lossy.webp", {}),
    ]  # fmt: skip
    for image, name, options in kinds:
        image.save(tmp_path / name, **options)
        boxes = [(0, 0, *utils.image_size(tmp_path / name)), (2, 3, 20, 24), (9, 9, 7, 5)]
        views, _ = cropped(tmp_path / name, boxes)
        assert (views.int() - from_whole(tmp_path / name, boxes).int()).abs().max() <= 1, name


def test_torchvision_and_pil_decode_alike(tmp_path, monkeypatch):
    """So a file that only one of them reads makes no other view."""
    for name, options in {"a": {}, "b": dict(progressive=True, quality=40)}.items():
        Image.fromarray(smooth(90, 61)).save(tmp_path / f"{name}.jpg", **options)
        with utils.Photo(tmp_path / f"{name}.jpg") as photo:
            assert photo._plain_jpeg() is not None
            fast = photo.pixels()
        monkeypatch.setattr(utils.Photo, "_plain_jpeg", lambda self: None)
        with utils.Photo(tmp_path / f"{name}.jpg") as photo:
            assert torch.equal(photo.pixels(), fast)
        monkeypatch.undo()


def test_damaged_jpegs_are_decoded_in_silence(tmp_path, capfd):
    buffer = io.BytesIO()
    Image.fromarray(smooth(64, 64)).save(buffer, "jpeg", restart_marker_blocks=2)
    content = bytearray(buffer.getvalue())
    at = content.index(b"\xff\xd1")
    content[at - 6 : at] = b""
    (tmp_path / "x.jpg").write_bytes(content)
    utils.read_image(tmp_path / "x.jpg")
    assert capfd.readouterr().err == ""


def test_embedding_decodes_a_part_of_large_photographs(tmp_path):
    Image.fromarray(smooth(200, 300)).save(tmp_path / "x.jpg", quality=90)
    (view,) = streamed(tmp_path).batches(SIDE, 8, CPU)
    whole = utils.center_view(utils.read_image(tmp_path / "x.jpg")[None], SIDE)
    assert 0 < (view - whole).abs().mean() < 3 / 255


# --------------------------------------------------------------------------------------- workers


def views_of(config, data, start=0):
    return list(simclr.view_batches(config, data, simclr.make_augment(config), CPU, 0, start))


def test_views_do_not_depend_on_workers_jobs_or_where_an_epoch_begins(
    photos, streamed_config, monkeypatch
):
    data = streamed(photos)
    alone = views_of(streamed_config(photos, batch_size=7), data)
    monkeypatch.setattr(utils, "REQUEST_IMAGES", 3)  # jobs of 3, 3 and 1
    for workers in (1, 2):
        config = streamed_config(photos, batch_size=7, workers=workers)
        batches = views_of(config, data)
        assert len(batches) == 2
        assert all(torch.equal(a, b) for a, b in zip(alone, batches, strict=True))
    (last,) = views_of(streamed_config(photos, batch_size=7), data, start=1)
    assert torch.equal(alone[1], last)


def test_a_folder_is_found_from_where_the_run_is(photos, monkeypatch):
    list(streamed(photos).batches(SIDE, 6, CPU, workers=1))  # begins a worker, elsewhere
    monkeypatch.chdir(photos)
    assert len(list(streamed(Path("a")).batches(SIDE, 5, CPU, workers=1))) == 2


def workers_of(process):
    """Process ids of its children."""
    tasks = Path(f"/proc/{process}/task")
    return {int(x) for task in tasks.iterdir() for x in (task / "children").read_text().split()}


proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")


@proc
def test_workers_stay_and_ones_left_early_start_afresh(photos, streamed_config, monkeypatch):
    monkeypatch.setattr(utils, "_idle", {})
    before = workers_of(os.getpid())
    config, data = streamed_config(photos, workers=2), streamed(photos)
    first = views_of(config, data)
    started = workers_of(os.getpid()) - before
    assert len(started) == 2
    left = simclr.view_batches(config, data, simclr.make_augment(config), CPU, 0, 0)
    next(left)
    left.close()
    list(data.batches(SIDE, 6, CPU, workers=2))
    again = views_of(config, data)
    assert workers_of(os.getpid()) - before == started
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_passes_at_a_time_do_not_meet(photos):
    data = streamed(photos)
    list(data.batches(SIDE, 3, CPU, workers=1))  # leaves a worker that one of them takes
    one, two = (data.batches(SIDE, 3, CPU, workers=1) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


SLEEPER = """
import sys, time
import torch
sys.path.insert(0, sys.argv[1])
import simclr, test_streaming, utils
from pathlib import Path
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.5  # s, between looks at the parent
data = test_streaming.streamed(Path(sys.argv[2]))
with utils.file_lock(Path(sys.argv[3])) as free:
    batches = data.batches(16, 1, torch.device("cpu"), workers=2)
    one_of_each = next(batches), next(batches)  # so both have begun
    print("working", flush=True)
    time.sleep(100)
"""


@proc
def test_workers_die_with_a_killed_run_and_keep_no_lock(photos, tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", SLEEPER, here, str(photos), str(tmp_path / "lock")]
    path = os.pathsep.join([here, str(Path(here).parent)])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        process.stdout.readline()
        workers = workers_of(process.pid)
        assert len(workers) >= 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # are for the run, not them
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, number)
        time.sleep(0.2)
        assert workers_of(process.pid) == workers
        process.send_signal(signal.SIGKILL)
    with utils.file_lock(tmp_path / "lock") as free:
        assert free  # though they may live for the seconds that they wait for work
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)


FAILING = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, test_streaming
from pathlib import Path
for views in test_streaming.streamed(Path(sys.argv[2])).batches(16, 1, torch.device("cpu"), 2):
    raise SystemExit(3)
"""


def test_a_program_that_fails_does_not_wait_for_its_workers(photos):
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent)])
    done = subprocess.run(
        [sys.executable, "-c", FAILING, here, str(photos)], check=False, capture_output=True,
        env={**os.environ, "PYTHONPATH": path}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert not done.stderr


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_is_an_error_of_one_line(photos, monkeypatch):
    monkeypatch.setattr(utils, "_idle", {})
    monkeypatch.setattr(utils.Photo, "__init__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"^a process that decodes images died: "):
        list(streamed(photos).batches(SIDE, 6, CPU, workers=1))
    assert not utils._idle


# ------------------------------------------------------------------------------- unreadable files


def test_an_unreadable_file_is_replaced_named_once_and_counted(own_photos, streamed_config, capsys):
    break_files(own_photos, "a/02.jpg", "a/04.jpg", "b/19.jpg")
    data = streamed(own_photos, max_bad=0.15)
    order = {name: i for i, name in enumerate(utils.list_images(own_photos))}
    config = streamed_config(own_photos, batch_size=20, crop_min=1.0)
    (views,) = views_of(config, data)
    assert sorted(data.unreadable) == [order["a/02.jpg"], order["a/04.jpg"], order["b/19.jpg"]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("warning: cannot read the image" in line for line in lines)
    assert torch.equal(views_of(config, data)[0], views)
    two = streamed_config(own_photos, batch_size=20, crop_min=1.0, workers=2)
    assert torch.equal(views_of(two, streamed(own_photos, max_bad=0.15))[0], views)
    for bad, good in {
        "a/02.jpg": "a/06.jpg",
        "a/04.jpg": "a/06.jpg",
        "b/19.jpg": "a/00.jpg",
    }.items():
        (own_photos / bad).write_bytes((own_photos / good).read_bytes())
    assert torch.equal(views_of(config, streamed(own_photos))[0], views)


def test_a_run_begins_though_the_first_file_is_unreadable(own_photos):
    (own_photos / "a" / "00.jpg").write_bytes(b"no image")
    assert len(utils.load_images("folder", "pretrain", own_photos)) == 16


def test_too_many_of_them_are_an_error_that_names_them(own_photos, streamed_config, capsys):
    config = streamed_config(own_photos)
    names = ["a/00.jpg", "a/02.jpg", "b/01.jpg", "b/03.jpg"]
    break_files(own_photos, *names)
    for workers in (0, 2):
        data = streamed(own_photos, max_bad=0.15)
        with pytest.raises(
            InputError, match=r"4 of 20 images cannot be read, more than --max-bad 0\.15 allows"
        ) as error:
            list(views_of(streamed_config(own_photos, workers=workers, batch_size=20), data))
        assert sum(name in str(error.value) for name in names) >= 3
        assert not data.unreadable  # of the batch that is not to be
    with pytest.raises(InputError, match=r"^cannot read the image"):
        views_of(config, streamed(own_photos))


def labels_by_name(config):
    data = simclr.load_data(config, CPU)
    return data, dict(
        zip(map(os.fsdecode, data.train.paths), data.train.labels.tolist(), strict=True)
    )


def test_features_and_labels_stay_aligned(own_photos, streamed_config, capsys):
    """Also where files turn out to be unreadable in the middle of the measurement."""
    config = streamed_config(own_photos)
    data, label = labels_by_name(config)
    model = simclr.make_model(config).eval()
    whole = simclr.features(model.encoder, data.train, config, CPU)
    names = [os.fsdecode(path) for path in data.train.paths]
    bad = names[1], names[-2]
    good = (own_photos / bad[0]).read_bytes()
    break_files(own_photos, *bad)
    for _ in range(2):
        h = simclr.features(model.encoder, data.train, config, CPU)
        kept = [i for i, name in enumerate(names) if name not in bad]
        assert torch.allclose(h, whole[kept], atol=1e-5)
        assert data.train.labels_read.tolist() == [label[names[i]] for i in kept]
        (own_photos / bad[0]).write_bytes(good)  # comes too late for this run
    break_files(own_photos, bad[0])
    assert 0 <= simclr.knn_accuracy(model.encoder, data, config, CPU) <= 1
    evaluated = simclr.only_readable(data, config)
    assert len(evaluated.train) == len(names) - 2
    assert torch.equal(evaluated.train.labels, data.train.labels_read)


def log(config):
    rows = utils.read_jsonl(config.folder / "log.jsonl")
    return [{k: v for k, v in r.items() if "second" not in k} for r in rows]


def test_a_run_goes_on_with_unreadable_files_and_resumes_alike(
    own_photos, streamed_config, monkeypatch, unjudged, capsys
):
    data = simclr.load_data(streamed_config(own_photos), CPU)
    train, test = (os.fsdecode(part.paths[2]) for part in (data.train, data.test))
    break_files(own_photos, train, test)
    options = dict(max_bad=0.1, epochs=3, batch_size=4)
    whole, cut = (streamed_config(own_photos, run=run, **options) for run in ("whole", "cut"))
    simclr.run(whole)
    assert [row["unreadable"] for row in log(whole)] == [1, 1, 1]
    assert all("knn" in row for row in log(whole))
    assert (whole.folder / "summary.json").exists()

    real, steps = simclr.contrastive_accuracy, []

    def stop_in_the_second_epoch(*z):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*z)

    monkeypatch.setattr(simclr, "contrastive_accuracy", stop_in_the_second_epoch)
    with pytest.raises(simclr.Interrupted):
        simclr.run(cut)
    state = utils.load_checkpoint(cut.folder / "last.pt")
    assert state["position"]["epoch"] == 1
    assert state["position"]["step"] == 2
    assert len(state["unreadable"]) == 1
    assert train in capsys.readouterr().err
    simclr.run(streamed_config(own_photos, run="cut", **options, workers=2))
    assert log(cut) == log(whole)
    assert train not in capsys.readouterr().err  # it has been named


def test_more_than_max_bad_ends_a_run_saved(own_photos, streamed_config, monkeypatch, unjudged):
    config = streamed_config(own_photos, run="bad", save_every=100)
    finished = simclr.Pretraining.finish_epoch

    def then_break(self):
        row = finished(self)
        break_files(own_photos, *utils.list_images(own_photos)[:2])
        return row

    monkeypatch.setattr(simclr.Pretraining, "finish_epoch", then_break)
    with pytest.raises(InputError, match=r"than --max-bad 0\.01 allows.*continues here"):
        simclr.run(config)
    assert utils.load_checkpoint(config.folder / "last.pt")["position"]["epoch"] == 1


# ------------------------------------------------------------------------------ decoded only once


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Makes the streamed images of a folder, and a new cache for them in one of two places."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    count = iter(range(100))

    def make(root, kind, **options):
        shared_memory = tmp_path / f"memory{next(count)}"
        shared_memory.mkdir()
        monkeypatch.setattr(utils, "SHARED_MEMORY", shared_memory)
        if kind == "file":
            monkeypatch.setenv("XDG_CACHE_HOME", str(shared_memory))
        data = streamed(root, **options)
        utils.cache_pixels(data, kind)
        return data

    return make


def epoch_views(config, data, epoch):
    return list(simclr.view_batches(config, data, simclr.make_augment(config), CPU, epoch, 0))


def same_views(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_decoded_once_views_are_those_of_a_full_decoding(
    own_photos, streamed_config, cached, kind, workers, monkeypatch
):
    config = streamed_config(own_photos, workers=workers)
    data = cached(own_photos, kind)
    assert data.cache.path.parent.name != "simclr" or kind == "file"
    kept = [epoch_views(config, data, epoch) for epoch in (0, 1)]
    again = cached(own_photos, kind)
    assert again.cache.path != data.cache.path
    with monkeypatch.context() as patch:  # no cache at all, and nothing reduced
        patch.setattr(utils, "_idle", {})
        real = utils.Photo.pixels
        patch.setattr(utils.Photo, "pixels", lambda self, least=1: real(self))
        plain = [epoch_views(config, streamed(own_photos), epoch) for epoch in (0, 1)]
    assert all(same_views(a, b) for a, b in zip(kept, plain, strict=True))
    assert same_views(epoch_views(config, again, 1), kept[1])  # resumed: this epoch is its first
    for name in utils.list_images(own_photos):
        (own_photos / name).unlink()
    assert same_views(epoch_views(config, data, 1), kept[1])
    for i in (0, 7, 19):
        assert data.cache.has(i)
    part = utils.subset(data, torch.tensor([19, 3]))
    (both,) = part.batches(SIDE, 2, CPU, workers)
    assert len(both) == 2


def test_cached_pixels_are_read_images(own_photos, cached):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(150, 99)).save(own_photos / "a" / "turned.jpg", exif=exif)
    Image.fromarray(smooth(31, 47)[..., 0]).save(own_photos / "a" / "grey.png")
    data = cached(own_photos, "memory")
    (centres,) = data.batches(SIDE, 50, CPU)
    for i in range(len(data)):
        whole = utils.read_image(data.path(i))
        assert torch.equal(data.cache.pixels(i), whole)
        wanted = utils.to_uint8(utils.center_view(whole[None], SIDE)[0])
        assert torch.equal(utils.to_uint8(centres[i]), wanted)


def test_unreadable_and_changed_files_beside_a_cache(own_photos, streamed_config, cached, capsys):
    break_files(own_photos, "a/02.jpg")
    (own_photos / "a" / "04.jpg").write_bytes(b"no image")
    config = streamed_config(own_photos, batch_size=20)
    data = cached(own_photos, "memory", max_bad=0.15)
    assert data.cache.sizes.tolist()[2] == [0, 0]
    Image.fromarray(smooth(33, 44)).save(own_photos / "b" / "19.jpg")  # after it was measured
    (views,) = epoch_views(config, data, 0)
    plain = streamed(own_photos, max_bad=0.15, cache=None)
    assert len(epoch_views(config, plain, 0)[0]) == len(views)
    assert sorted(data.unreadable) == sorted(plain.unreadable) == [1, 2]
    assert not any(data.cache.has(i) for i in (1, 2, 19))
    assert sum(data.cache.has(i) for i in range(20)) == 17
    assert same_views(epoch_views(config, data, 0), [views])


def test_a_run_goes_on_without_its_cache(own_photos, streamed_config, cached):
    config = streamed_config(own_photos)
    data = cached(own_photos, "memory")
    before = epoch_views(config, data, 0)
    data.cache.path.unlink()
    utils._mapped.cache_clear()
    assert same_views(epoch_views(config, data, 0), before)
    assert not data.cache.has(0)


def test_a_cached_run_opens_no_file_after_its_first_epoch(
    own_photos, streamed_config, cached, monkeypatch, unjudged, capsys
):
    """Nor to measure kNN by the training images; the others are for testing, and stay."""
    cached(own_photos, "memory")  # only for its places
    config = streamed_config(own_photos, run="c", cache="memory", batch_size=4, epochs=3)
    finished, train = simclr.Pretraining.finish_epoch, simclr.load_data(config, CPU).train.paths

    def then_delete(self):
        for name in train:
            (own_photos / os.fsdecode(name)).unlink(missing_ok=True)
        return finished(self)

    simclr.run(dataclasses.replace(config, run="whole"))
    monkeypatch.setattr(simclr.Pretraining, "finish_epoch", then_delete)
    simclr.run(config)
    assert log(config) == log(dataclasses.replace(config, run="whole"))
    assert not any("unreadable" in row for row in log(config))
    with pytest.raises(InputError, match=r"--cache \(memory there, none now\)"):
        simclr.check_same_run(
            {"config": dataclasses.asdict(config), "images": 16},
            dataclasses.replace(config, cache="none"), 16, "",
        )  # fmt: skip


CACHED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, test_streaming, utils
from pathlib import Path
utils.SHARED_MEMORY = Path(sys.argv[3])
utils.cache_pixels(data := test_streaming.streamed(Path(sys.argv[2])), "memory")
workers = int(sys.argv[4])
for _ in data.batches(16, 5, torch.device("cpu"), workers):
    pass
print("kept", flush=True)
sys.stdin.read(1) == "k" and os.kill(os.getpid(), signal.SIGKILL)
"""


def start_cached(photos, memory, workers, **environment):
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent)])
    command = [sys.executable, "-c", CACHED, here, str(photos), str(memory), str(workers)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def test_a_cache_ends_with_its_run_or_with_the_next(photos, tmp_path, monkeypatch, capsys):
    """Processes of a run share a file, that the last deletes; the next run finds a dead one's."""
    monkeypatch.setattr(utils, "SHARED_MEMORY", tmp_path)
    at_exit = []
    monkeypatch.setattr(utils.atexit, "register", lambda *call: at_exit.append(call))
    as_if = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost"}  # fmt: skip
    one, killed = start_cached(photos, tmp_path, 0, **as_if), start_cached(photos, tmp_path, 1)
    for process in (one, killed):
        process.stdout.readline()
    shared, its = sorted(tmp_path.iterdir(), key=lambda path: str(killed.pid) in path.name)
    assert all(file.stat().st_mode & 0o077 == 0 for file in (shared, its))  # nobody else's to see
    killed.stdin.write("k")
    killed.stdin.close()
    killed.wait()
    assert its.exists()
    utils.cache_pixels(data := streamed(photos), "memory")  # of the process that started the other
    assert [*tmp_path.iterdir()] == [data.cache.path] == [shared]
    assert all(data.cache.has(i) for i in range(20))
    for let_go, *arguments in at_exit:
        let_go(*arguments)
    assert shared.exists()
    line = one.communicate(".")[1]
    assert one.returncode == 0
    assert not shared.exists()
    assert line == f"keeping 0.8 MiB of decoded images in {tmp_path}\n"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("kind", "hint"), [("memory", "--cache file"), ("file", "XDG_CACHE_HOME")])
def test_not_enough_room_is_one_line(
    own_photos, streamed_config, cached, monkeypatch, capsys, kind, hint
):
    cached(own_photos, "memory")
    capsys.readouterr()
    monkeypatch.setattr(utils, "SHARED_MEMORY", own_photos.parent / "empty")
    utils.SHARED_MEMORY.mkdir()
    space = shutil.disk_usage(own_photos)._replace(free=300_000)
    if kind == "file":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: space)
    else:
        monkeypatch.setattr(utils, "free_memory", lambda: 300_000)
    config = streamed_config(own_photos)
    with pytest.raises(SystemExit) as stop:
        simclr.main(
            ["--dataset", "folder", "--data-dir", str(own_photos), "--device", "cpu", "--cache",
             kind, "--checkpoints", config.checkpoints, "--figures", config.figures]
        )  # fmt: skip
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        rf"--cache {kind}: the decoded images take \d\.\d MiB, but .* 0\.[23] MiB", line
    )
    assert hint in line
    assert not [*utils.SHARED_MEMORY.iterdir()]
    assert not [*own_photos.parent.glob("**/pixels-*")][1:]  # but for the fixture's
    assert not Path(config.checkpoints).exists()


def test_no_shared_memory_and_a_full_disk_are_errors(own_photos, cached, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(InputError, match=r"--cache file: cannot keep .*No space left"):
            cached(own_photos, "file")
        assert not [*own_photos.parent.glob("**/pixels-*")]
    monkeypatch.setattr(utils, "SHARED_MEMORY", own_photos / "none")
    with pytest.raises(InputError, match=r"needs .*none, which is not here; --cache file"):
        utils.cache_pixels(streamed(own_photos), "memory")


# ---------------------------------------------------------------------------------- lists of files


@pytest.fixture
def kept_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(utils, "LONG_LIST", 5)
    walks, real = [], utils._walk_images
    monkeypatch.setattr(utils, "_walk_images", lambda *a: walks.append(1) or real(*a))
    return walks


def settle(root, when=1e9):
    """As if nothing had been changed for a while, since `when`."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (when, when))


def test_a_long_list_is_kept_until_a_folder_changes(own_photos, kept_lists, tmp_path):
    settle(own_photos)
    names = utils.list_images(own_photos)
    assert utils.list_images(own_photos) == names == sorted(names)
    assert len(kept_lists) == 1
    (file,) = (tmp_path / "cache" / "simclr").iterdir()
    (own_photos / "b" / "01.jpg").rename(own_photos / "b" / "z.jpg")
    assert "b/z.jpg" in utils.list_images(own_photos)
    settle(own_photos, 1e9 + 1)
    utils.list_images(own_photos)
    assert len(kept_lists) == 3
    for content in (b"", file.read_bytes()[:100], b"PK nonsense"):
        file.write_bytes(content)
        assert len(utils.list_images(own_photos)) == 20
    assert len(kept_lists) == 6
    assert {p.name for p in own_photos.iterdir()} == {"a", "b"}  # nothing among the images


def test_a_list_is_not_kept_of_folders_that_just_changed(own_photos, kept_lists, tmp_path):
    """Another change in the same tick of the clock would not show."""
    utils.list_images(own_photos)
    assert not (tmp_path / "cache").exists()


def test_a_list_that_cannot_be_kept_is_made_again(own_photos, kept_lists, tmp_path):
    settle(own_photos)
    (tmp_path / "cache").write_bytes(b"")
    assert utils.list_images(own_photos) == utils.list_images(own_photos)
    assert len(kept_lists) == 2


def test_a_folder_is_gone_through_once_a_run(own_photos, kept_lists, monkeypatch):
    monkeypatch.setattr(utils, "LONG_LIST", 1000)
    config = simclr.Config(dataset="folder", data_dir=str(own_photos))
    data = simclr.load_data(config, CPU)
    assert len(kept_lists) == 1
    assert len(data.pretrain) == 16
    assert len(data.test) == 4


# ----------------------------------------------------------------------------------- changed files


def test_a_run_on_other_files_is_refused_unless_asked_for(own_photos, streamed_config, unjudged):
    config = streamed_config(own_photos, run="a", epochs=1)
    simclr.run(config)
    state = utils.load_checkpoint(config.folder / "last.pt")
    assert len(state["files"]) == 64
    more = streamed_config(own_photos, run="a", epochs=1, changed_files=True)
    train = simclr.load_data(config, CPU).train.paths[0].decode()
    (own_photos / train).rename(own_photos / train.replace(".jpg", "x.jpg"))
    for gone, why in ((False, r"files \(as many, 16"), (True, r"images \(16 there, 15 now\)")):
        if gone:
            (own_photos / train.replace(".jpg", "x.jpg")).unlink()
        for kept in (True, False):  # with the summary of a finished run, and without
            if not kept:
                (config.folder / "summary.json").rename(config.folder / "summary")
            with pytest.raises(InputError, match=f"{why}.*--changed-files continues"):
                simclr.run(config)
            if not kept:
                (config.folder / "summary").rename(config.folder / "summary.json")
    (config.folder / "summary.json").unlink()
    summary = simclr.run(more)
    assert summary["images"] == 15
    assert summary["files"] != state["files"]


def test_in_an_epoch_of_changed_files_all_of_it_is_done(own_photos, streamed_config):
    config = streamed_config(own_photos, run="a")
    run = simclr.Pretraining(config, simclr.load_data(config, CPU), CPU)
    run.position = simclr.Position(epoch=0, step=2, loss_sum=4.0)
    run.save()
    (own_photos / "a" / "00.jpg").rename(own_photos / "a" / "01.jpg")
    config = streamed_config(own_photos, run="a", changed_files=True)
    run = simclr.Pretraining(config, simclr.load_data(config, CPU), CPU)
    assert run.resume()
    assert run.position == simclr.Position()


def test_images_in_memory_have_a_digest_too(tmp_path, write_image, streamed_config):
    for i in range(4):
        write_image(tmp_path / "photos" / f"{i}.png", seed=i)
    config = streamed_config(tmp_path / "photos", run="a")
    data = simclr.load_data(config, CPU)
    assert isinstance(data.train, utils.ImageSet)
    before = utils.files_digest(data.train)
    labelled = utils.ImageSet(data.train.images, torch.arange(4), tuple("abcd"), data.train.paths)
    assert utils.files_digest(labelled) != before
    data.train.paths = data.train.paths[::-1].copy()
    assert len(before) == 64
    assert utils.files_digest(data.train) != before


# ---------------------------------------------------------------------------------------- ImageNet


def test_imagenets_layout(tmp_path, streamed_config):
    """train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, with the odd files that ImageNet has."""
    random = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for wnid in ("n01440764", "n02105855"):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(smooth(*random.integers(40, 90, 2).tolist(), seed=i))
                image.save(folder / f"{wnid}_{i}.JPEG", "jpeg")
    folder = tmp_path / "imagenet" / "train" / "n02105855"
    image = Image.fromarray(smooth(50, 60))
    image.convert("CMYK").save(folder / "n02105855_0.JPEG", "jpeg")
    image.save(folder / "n02105855_1.JPEG", "png")
    image.convert("L").save(folder / "n02105855_2.JPEG", "jpeg")
    image.save(folder / "n02105855_3.JPEG", "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    summary = simclr.run(streamed_config(tmp_path / "imagenet", epochs=1, max_bad=0.0))
    assert summary["images"] == 12
    assert set(summary["knn"]) == {"pixels", "untrained", "simclr"}


SPAWNED = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import simclr
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    simclr.evaluate = lambda *_: {}
    simclr.main(sys.argv[2:])
"""


def test_workers_that_are_not_forked(tmp_path, write_image):
    """As on macOS, and on Linux from Python 3.14 on."""
    for i in range(6):
        write_image(tmp_path / "images" / f"{i}.png", (20 + i, 24), seed=i)
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    flags = "--dataset folder --data-dir images --recipe digits --image-size 16 --width 0.125"
    done = subprocess.run(
        [sys.executable, script, ROOT, *flags.split(), "--epochs", "1", "--batch-size", "6",
         "--workers", "1", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_damaged_folder_costs_one_try_a_file(own_photos, monkeypatch):
    """Those that are known to be damaged are not tried again in the place of another."""
    names = [f"a/{i:02}.jpg" for i in range(0, 20, 2)]
    break_files(own_photos, *names)
    files, tried = streamed(own_photos, max_bad=0.9), []
    opened = utils.Photo.__init__
    monkeypatch.setattr(
        utils.Photo, "__init__", lambda photo, path: tried.append(path) or opened(photo, path)
    )
    crop = simclr.RandomResizedCrop(SIDE, (0.2, 1.0))
    rows, u = torch.arange(20), np.random.default_rng(0).random((20, 2, crop.draws), np.float32)
    boxes = partial(simclr.crop_boxes, crop)
    (views,) = utils.decoded_batches(files, [(rows, u)], SIDE, boxes, 0, CPU)
    assert len(views) == 20
    assert len(files.unreadable) == 10
    assert len(tried) <= 20 + 10 + 10  # all, each damaged one once more, and what replaces it
