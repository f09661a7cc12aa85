"""Folders of images that are streamed: decoded fast, by workers that stay, whatever the files."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_processes import CONTEXT

import simclr
import utils
from conftest import CPU, interrupt, log_of, position, read_image
from utils import Images, InputError

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
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture
def streamed_config(tiny_config):
    """Makes the configuration of a run on streamed images that takes a second."""

    def make(root, **overrides):
        options = dict(
            dataset="folder", data_dir=str(root), arch="resnet10", width=0.0625, head_dim=8,
            image_size=SIDE, views=2, view_sizes=(), batch_size=5, epochs=2, knn_every=1, workers=0,
        )  # fmt: skip
        return tiny_config(**{**options, **overrides})

    return make


def streamed(root, **options):
    names = np.array([os.fsencode(name) for name in utils.list_images(root)])
    return Images(None, paths=names, root=root, **options)


def break_files(root, *names):
    for name in names:
        file = root / name
        file.write_bytes(file.read_bytes()[:300])


# -------------------------------------------------------------------------------------- decoding


def cropped(path, boxes, size=SIDE):
    """uint8 (V, size, size, 3), and the size of what was decoded."""
    out, decoded = torch.empty(len(boxes), size, size, 3, dtype=torch.uint8), []
    with utils.Photo(path) as photo:
        real = photo.pixels
        photo.pixels = lambda least=1: decoded.append(real(least)) or decoded[-1]
        photo.crops(out, np.array(boxes))
    return out, tuple(decoded[0].shape[1:])


def from_whole(path, boxes, size=SIDE):
    """The same by torchvision, from all pixels."""
    image, resize = read_image(path), utils.TF.resized_crop
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
    Image.fromarray(smooth(160, 240)).save(tmp_path / "x.jpg")
    _, decoded = cropped(tmp_path / "x.jpg", [(0, 0, 160, 160), (7, 9, side, side + 20)])
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
        file = tmp_path / name
        image.save(file, **options)
        boxes = [(0, 0, *utils.image_size(file)), (2, 3, 20, 24), (9, 9, 7, 5)]
        views, _ = cropped(file, boxes)
        assert (views.int() - from_whole(file, boxes).int()).abs().max() <= 1, name


# --------------------------------------------------------------------------------------- workers


def views_of(config, data, epoch=0, start=0):
    return list(simclr.view_batches(config, data, CPU, epoch, start))


def same_views(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_views_do_not_depend_on_workers_requests_or_where_an_epoch_begins(
    photos, streamed_config, monkeypatch
):
    data = streamed(photos)
    alone = views_of(streamed_config(photos, batch_size=7), data)
    assert len(alone) == 2
    monkeypatch.setattr(utils, "REQUEST_IMAGES", 3)  # requests of 3, 3 and 1
    for workers in (0, 1, 2):
        config = streamed_config(photos, batch_size=7, workers=workers)
        assert same_views(views_of(config, data), alone)
    assert same_views(views_of(config, data, start=1), alone[1:])
    monkeypatch.setattr(utils, "REQUEST_BYTES", 2 * 3 * SIDE**2)  # of one image
    utils._idle_pools.clear()
    assert same_views(views_of(config, data), alone)
    utils._idle_pools.clear()
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "spawn")  # as on macOS
    one = streamed_config(photos, batch_size=7, workers=1)
    assert same_views(views_of(one, data), alone)


def workers_of(process):
    """Process ids of its children."""
    tasks = Path(f"/proc/{process}/task")
    return {int(x) for task in tasks.iterdir() for x in (task / "children").read_text().split()}


proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")


@proc
def test_workers_stay_and_ones_left_early_start_afresh(photos, streamed_config):
    before = workers_of(os.getpid())
    config, data = streamed_config(photos, workers=2), streamed(photos)
    first = views_of(config, data)
    started = workers_of(os.getpid()) - before
    assert len(started) == 2
    list(data.batches(SIDE, 6, CPU, workers=2))
    assert workers_of(os.getpid()) >= started
    left = simclr.view_batches(config, data, CPU, 0, 0)
    next(left)
    left.close()
    while started & workers_of(os.getpid()):  # not to answer the next call with what is left
        time.sleep(0.1)
    assert same_views(views_of(config, data), first)


def decode_and_sleep(root, lock, pipe):
    """A run that has a lock and two workers, until it is killed."""
    multiprocessing.set_start_method("fork", force=True)
    with utils.run_lock(lock):
        batches = streamed(root).batches(SIDE, 1, CPU, workers=2)
        pipe.send([len(next(batches)), len(next(batches))])  # of each worker: so both have begun
        time.sleep(100)


@proc
def test_workers_die_with_a_killed_run_and_keep_no_lock(photos, tmp_path):
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=decode_and_sleep, args=(photos, tmp_path / "lock", there))
    process.start()
    assert here.recv() == [1, 1]
    workers = workers_of(process.pid)
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # are for the run, not them
        for worker in workers:
            os.kill(worker, number)
    time.sleep(0.2)
    assert workers_of(process.pid) == workers
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)
    with utils.run_lock(tmp_path / "lock"):
        pass


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_is_an_error_of_one_line(photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(utils.Photo, "__init__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(InputError, match=r"^a process .* died: .* fewer --workers$"):
            list(streamed(photos).batches(SIDE, 6, CPU, workers=2))
    assert len(list(streamed(photos).batches(SIDE, 5, CPU, workers=2))) == 4  # by others


def test_too_little_shared_memory_is_one_line(photos, monkeypatch):
    """Where workers are not forked; forked ones need no room in /dev/shm."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert len(list(streamed(photos).batches(SIDE, 5, CPU, workers=2))) == 4
    utils._idle_pools.clear()
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "spawn")
    with pytest.raises(InputError, match=r"--workers 0 .*--shm-size.*No space left"):
        list(streamed(photos).batches(SIDE, 6, CPU, workers=2))


def test_a_stop_signal_ends_the_wait_for_a_worker_that_hangs(photos, monkeypatch):
    monkeypatch.setattr(utils, "PATIENCE_S", 0.2)
    monkeypatch.setattr(utils.Photo, "__init__", lambda *_: time.sleep(100))

    def decode_until_stopped():
        with utils.stop_signals():
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            list(streamed(photos).batches(SIDE, 6, CPU, workers=2))

    with pytest.raises(InputError, match=r"stopped while a process .* did not answer"):
        decode_until_stopped()


# ------------------------------------------------------------------------------- unreadable files


def test_an_unreadable_file_is_replaced_named_once_and_counted(own_photos, streamed_config, capsys):
    break_files(own_photos, "a/02.jpg", "a/04.jpg", "b/19.jpg")
    data = streamed(own_photos)
    order = {name: i for i, name in enumerate(utils.list_images(own_photos))}
    config = streamed_config(own_photos, batch_size=20, crop_min=1.0)
    (views,) = views_of(config, data)
    assert sorted(data.unreadable) == [order["a/02.jpg"], order["a/04.jpg"], order["b/19.jpg"]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("warning: cannot read the image" in line for line in lines)
    two = streamed_config(own_photos, batch_size=20, crop_min=1.0, workers=2)
    for again in (views_of(config, data), views_of(two, streamed(own_photos))):
        assert same_views(again, [views])
    assert not capsys.readouterr().err  # once, though several parts of the data hold them
    for bad, good in ("a/02.jpg", "a/06.jpg"), ("a/04.jpg", "a/06.jpg"), ("b/19.jpg", "a/00.jpg"):
        (own_photos / bad).write_bytes((own_photos / good).read_bytes())
    assert same_views(views_of(config, streamed(own_photos)), [views])


@pytest.mark.parametrize("workers", [0, 2])
def test_in_an_evaluation_they_are_an_error_or_rows_of_nan(own_photos, workers, capsys):
    whole = utils.embed(utils.flat_pixels, streamed(own_photos), SIDE, CPU)
    assert whole.isfinite().all()
    break_files(own_photos, "a/02.jpg", "b/19.jpg")
    with pytest.raises(InputError, match=r"^cannot read the image .*02\.jpg .*; 2 of 20 images"):
        utils.embed(utils.flat_pixels, streamed(own_photos), SIDE, CPU, "float32", 3, workers)
    data = streamed(own_photos, max_bad=0.1)
    features = utils.embed(utils.flat_pixels, data, SIDE, CPU, "float32", 3, workers)
    bad = torch.tensor([1, 19])
    assert features[bad].isnan().all()
    good = ~features.isnan().any(1)
    assert (~good).nonzero().flatten().tolist() == bad.tolist()
    assert torch.equal(features[good], whole[good])
    (own_photos / "a" / "02.jpg").write_bytes((own_photos / "a" / "00.jpg").read_bytes())
    again = utils.embed(utils.flat_pixels, data, SIDE, CPU)  # mended too late for this run
    assert torch.equal(~again.isnan().any(1), good)
    assert len(utils.only_readable(data, workers)) == 18
    assert utils.subset(data, torch.tensor([3, 19])).unreadable.keys() == {1}
    break_files(own_photos, *utils.list_images(own_photos))
    with pytest.raises(InputError, match="20 of 20 images cannot be read"):
        utils.embed(utils.flat_pixels, streamed(own_photos, max_bad=1.0), SIDE, CPU)


def test_an_output_that_is_not_finite_is_an_error(photos):
    with pytest.raises(InputError, match="is not finite"):
        utils.embed(lambda images: utils.flat_pixels(images) / 0, streamed(photos), SIDE, CPU)


def test_a_run_goes_on_with_unreadable_files_and_resumes_alike(
    own_photos, streamed_config, unjudged, no_figure, capsys
):
    data = simclr.load_data(streamed_config(own_photos), CPU)
    train, test = (os.fsdecode(part.paths[2]) for part in (data.train, data.test))
    break_files(own_photos, train, test)
    options = dict(max_bad=0.1, epochs=3, batch_size=4)
    whole, cut = (streamed_config(own_photos, run=run, **options) for run in ("whole", "cut"))
    simclr.run(whole)
    assert [row["unreadable"] for row in log_of(whole)] == [1, 1, 1]
    assert all("knn" in row for row in log_of(whole))
    assert (whole.folder / "summary.json").exists()

    interrupt(lambda: simclr.run(cut), 6)
    assert position(cut) == (1, 2)
    assert train in capsys.readouterr().err
    simclr.run(streamed_config(own_photos, run="cut", **options, workers=2))
    assert log_of(cut) == log_of(whole)
