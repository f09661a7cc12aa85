"""Folders of images that are streamed: decoded fast, by workers that stay, whatever the files."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
def unjudged(no_figure, monkeypatch):
    """Leaves the final evaluation and the figures out, which take longer than a tiny run."""
    monkeypatch.setattr(simclr, "evaluate", lambda *_: {})


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


def test_embedding_decodes_a_part_of_large_photographs(tmp_path):
    Image.fromarray(smooth(200, 300)).save(tmp_path / "x.jpg", quality=90)
    (view,) = streamed(tmp_path).batches(SIDE, 8, CPU)
    whole = utils.center_view(utils.read_image(tmp_path / "x.jpg")[None], SIDE)
    assert 0 < (view - whole).abs().mean() < 3 / 255


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
    utils.end_workers()
    assert same_views(views_of(config, data), alone)


def test_random_numbers_travel_with_their_images(photos):
    """The batches' u come back as they were given, and choose the boxes in the workers."""
    data, u = streamed(photos), torch.rand(20, 2, 3)
    requests = [(torch.arange(20), u), (torch.tensor([4, 2]), u[:2])]
    (crops, one), (_, two) = utils.decoded_batches(data, requests, SIDE, corner_boxes, 2, CPU)
    assert one is u
    assert two is requests[1][1]
    assert crops.shape == (20, 2, 3, SIDE, SIDE)
    whole = utils.read_image(photos / "a" / "04.jpg")
    left = int(u[2, 1, 0] * 9)
    assert torch.equal(crops[2, 1], whole[:, :SIDE, left : left + SIDE])


def corner_boxes(sizes, u):
    boxes = np.full((*u.shape[:2], 4), SIDE)
    boxes[..., 0], boxes[..., 1] = 0, u[..., 0] * 9
    return boxes


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
def test_workers_stay_and_ones_left_early_start_afresh(photos, streamed_config):
    before = workers_of(os.getpid())
    config, data = streamed_config(photos, workers=2), streamed(photos)
    first = views_of(config, data)
    started = workers_of(os.getpid()) - before
    assert len(started) == 2
    list(data.batches(SIDE, 6, CPU, workers=2))
    assert workers_of(os.getpid()) - before == started
    left = simclr.view_batches(config, data, CPU, 0, 0)
    next(left)
    left.close()
    assert workers_of(os.getpid()) == before  # not to answer the next call with what is left
    assert same_views(views_of(config, data), first)


def test_two_passes_at_a_time_do_not_meet(photos):
    data = streamed(photos)
    list(data.batches(SIDE, 3, CPU, workers=1))  # leaves a worker that one of them takes
    one, two = (data.batches(SIDE, 3, CPU, workers=1) for _ in range(2))
    assert same_views(*map(list, zip(*zip(one, two, strict=True), strict=True)))


def script(code, *arguments, **environment):
    """Starts Python code that finds its arguments in sys.argv and may import from tests/."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


SLEEPER = """
import sys, time
import torch, test_streaming, utils
from pathlib import Path
data = test_streaming.streamed(Path(sys.argv[1]))
with utils.file_lock(Path(sys.argv[2])) as free:
    batches = data.batches(16, 1, torch.device("cpu"), workers=2)
    one_of_each = next(batches), next(batches)  # so both have begun
    print("working", flush=True)
    time.sleep(100)
"""


@proc
def test_workers_die_with_a_killed_run_and_keep_no_lock(photos, tmp_path):
    with script(SLEEPER, photos, tmp_path / "lock") as process:
        process.stdout.readline()
        workers = workers_of(process.pid)
        assert len(workers) == 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # are for the run, not them
            for worker in workers:
                os.kill(worker, number)
        time.sleep(0.2)
        assert workers_of(process.pid) == workers
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)
    with utils.file_lock(tmp_path / "lock") as free:
        assert free


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


FAILING = """
import sys
import torch, test_streaming
from pathlib import Path
for views in test_streaming.streamed(Path(sys.argv[1])).batches(16, 1, torch.device("cpu"), 2):
    raise SystemExit(3)
"""


def test_a_program_that_fails_does_not_wait_for_its_workers(photos):
    process = script(FAILING, photos)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 3


def test_a_worker_that_dies_is_an_error_of_one_line(photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(utils.Photo, "__init__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(InputError, match=r"^a process .* died \(exit code -9.*--workers$"):
            list(streamed(photos).batches(SIDE, 6, CPU, workers=2))
    assert len(list(streamed(photos).batches(SIDE, 5, CPU, workers=2))) == 4  # by others


def test_an_error_in_a_worker_is_raised_here(photos):
    def batch(boxes):
        requests = [(torch.arange(20), torch.zeros(20, 1, 1))] * 9
        return list(utils.decoded_batches(streamed(photos), requests, SIDE, boxes, 2, CPU))

    with pytest.raises(RuntimeError, match=r"(?s)^in a worker process:.*in lossless\n.*no box"):
        batch(lossless)
    with pytest.raises(MemoryError):
        batch(greedy)


def lossless(*_):
    raise ConnectionError("no box")


def greedy(*_):
    raise MemoryError


@pytest.mark.parametrize("workers", [0, 2])
def test_too_few_file_handles_are_not_the_images_fault(photos, monkeypatch, workers):
    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", full)
    data = streamed(photos, max_bad=1.0)
    with pytest.raises(InputError, match=r"jpg: Too many open files \(see ulimit -n\)"):
        list(data.batches(SIDE, 6, CPU, workers))
    assert not data.unreadable


def test_too_little_shared_memory_is_one_line(photos, monkeypatch):
    """Where workers are not forked; else they need no room in /dev/shm."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert len(list(streamed(photos).batches(SIDE, 5, CPU, workers=2))) == 4
    utils.end_workers()
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "spawn")
    with pytest.raises(InputError, match=r"--workers 0 .*--shm-size.*No space left"):
        list(streamed(photos).batches(SIDE, 6, CPU, workers=2))


@proc
def test_a_stop_signal_ends_the_wait_for_a_worker_that_hangs(photos, monkeypatch):
    monkeypatch.setattr(utils, "PATIENCE_S", 0.2)
    monkeypatch.setattr(utils.Photo, "__init__", lambda *_: time.sleep(100))
    before = workers_of(os.getpid())

    def decode_until_stopped():
        with utils.StopSignals():
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            list(streamed(photos).batches(SIDE, 6, CPU, workers=2))

    with pytest.raises(InputError, match=r"stopped while a process .* did not answer"):
        decode_until_stopped()
    assert workers_of(os.getpid()) == before


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
    for bad, good in ("a/02.jpg", "a/06.jpg"), ("a/04.jpg", "a/06.jpg"), ("b/19.jpg", "a/00.jpg"):
        (own_photos / bad).write_bytes((own_photos / good).read_bytes())
    assert same_views(views_of(config, streamed(own_photos)), [views])


def test_a_damaged_folder_costs_one_try_a_file(own_photos, monkeypatch, capsys):
    """Those that are known to be damaged are not tried again in the place of another."""
    break_files(own_photos, *utils.list_images(own_photos)[1:13])
    files, tried = streamed(own_photos), []
    opened = utils.Photo.__init__
    monkeypatch.setattr(
        utils.Photo, "__init__", lambda self, path, *a: tried.append(path) or opened(self, path, *a)
    )
    requests = [(torch.arange(20), torch.zeros(20, 1, 1))]
    ((crops, _),) = utils.decoded_batches(files, requests, SIDE, corner_boxes, 0, CPU)
    assert torch.equal(crops[1:13], crops[13].expand(12, -1, -1, -1, -1))
    assert len(files.unreadable) == 12
    assert len(tried) <= 20 + 12
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[10] == "warning: more images that cannot be read are only counted"


def test_in_training_they_are_judged_at_the_end_of_an_epoch(own_photos, streamed_config):
    names = ["a/00.jpg", "a/02.jpg", "b/01.jpg", "b/03.jpg"]
    break_files(own_photos, *names)
    data = streamed(own_photos)
    views_of(streamed_config(own_photos, batch_size=20, workers=2), data)
    assert utils.unreadable_error(data, 0.2) is None
    error = str(utils.unreadable_error(data, 0.15))
    assert "4 of 20 images cannot be read, more than --max-bad 0.15 allows: a/00.jpg" in error
    break_files(own_photos, *utils.list_images(own_photos))
    with pytest.raises(InputError, match=r"^none of the images can be read: cannot read the image"):
        views_of(streamed_config(own_photos), data)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_an_evaluation_they_are_an_error_or_rows_of_nan(own_photos, workers, capsys):
    whole = utils.embed(utils.flat_pixels, streamed(own_photos), SIDE, CPU)
    assert utils.rows_read(whole).all()
    break_files(own_photos, "a/02.jpg", "b/19.jpg")
    with pytest.raises(InputError, match=r"^cannot read the image .*02\.jpg"):
        utils.embed(utils.flat_pixels, streamed(own_photos), SIDE, CPU, "float32", 3, workers)
    data = streamed(own_photos, max_bad=0.01)
    features = utils.embed(utils.flat_pixels, data, SIDE, CPU, "float32", 3, workers)
    bad = torch.tensor([1, 19])
    assert features[bad].isnan().all()
    assert (~utils.rows_read(features)).nonzero().flatten().tolist() == bad.tolist()
    good = utils.rows_read(features)
    assert torch.equal(features[good], whole[good])
    (own_photos / "a" / "02.jpg").write_bytes((own_photos / "a" / "00.jpg").read_bytes())
    again = utils.embed(utils.flat_pixels, data, SIDE, CPU)  # mended too late for this run
    assert torch.equal(utils.rows_read(again), good)
    assert len(utils.only_readable(data, workers)) == 18
    assert utils.subset(data, torch.tensor([3, 19])).unreadable.keys() == {1}
    break_files(own_photos, *utils.list_images(own_photos))
    with pytest.raises(InputError, match=r"^none of the images can be read"):
        utils.embed(utils.flat_pixels, streamed(own_photos, max_bad=1.0), SIDE, CPU)


def test_an_output_that_is_not_finite_is_an_error_that_names_the_image(own_photos, capsys):
    def divided(images):
        h = utils.flat_pixels(images)
        h[3] /= 0
        return h

    break_files(own_photos, "a/02.jpg")
    with pytest.raises(InputError, match=r"not finite for 1 of 20 images, such as a/06\.jpg"):
        utils.embed(divided, streamed(own_photos, max_bad=0.1), SIDE, CPU)


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


def test_more_than_max_bad_ends_a_run_saved(own_photos, streamed_config, unjudged, capsys):
    train = simclr.load_data(streamed_config(own_photos), CPU).train.paths
    break_files(own_photos, *(os.fsdecode(name) for name in train[:2]))
    config = streamed_config(own_photos, run="bad")
    with pytest.raises(
        InputError, match=r"2 of 16 images cannot be read, more than --max-bad 0\.01"
    ):
        simclr.run(config)
    state = utils.load_checkpoint(config.folder / "last.pt")
    assert sorted(state["unreadable"]) == [0, 1]


# ---------------------------------------------------------------------------------- several ranks


RANKS = """
import sys
import torch, test_streaming, utils
from pathlib import Path
with utils.process_group(CPU := torch.device("cpu")):
    data = test_streaming.streamed(Path(sys.argv[1]), max_bad=1.0)
    rows = torch.arange(20)[utils.rank() :: 2]
    assert len(list(data.batches(16, 3, CPU, workers=utils.rank(), rows=rows))) == 4
    utils.agree_on_unreadable(data)
    print([*data.unreadable], flush=True)
    features = utils.embed(utils.flat_pixels, data, 16, CPU)
    print((~utils.rows_read(features)).nonzero().flatten().tolist(), flush=True)
"""


def test_ranks_agree_on_what_cannot_be_read(own_photos):
    break_files(own_photos, "a/04.jpg", "b/03.jpg")  # one is rank 0's, one rank 1's
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [
        script(RANKS, own_photos, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
               LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == "[2, 11]\n[2, 11]\n"
    assert said[0][1].count("warning: cannot read the image") == 2


# ----------------------------------------------------------------------------------- changed files


def test_a_run_on_other_files_is_refused(own_photos, streamed_config, unjudged):
    config = streamed_config(own_photos, run="a", epochs=1)
    simclr.run(config)
    train = simclr.load_data(config, CPU).train.paths[0].decode()
    (own_photos / train).rename(own_photos / train.replace(".jpg", "x.jpg"))
    for finished in (True, False):  # with the summary of a finished run, and without
        if not finished:
            (config.folder / "summary.json").unlink()
        with pytest.raises(InputError, match=r"files of images \(16 there, 16 now\)"):
            simclr.run(config)


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
    for i, wnid in enumerate(["n01440764", "n02105855"] * 9):
        folder = tmp_path / ("train" if i < 12 else "val") / wnid
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(smooth(40 + 5 * i, 90 - 3 * i, seed=i))
        image = image.convert({2: "CMYK", 4: "L"}.get(i, "RGB"))
        exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" if i == 6 else b""
        image.save(folder / f"{wnid}_{i}.JPEG", "png" if i == 8 else "jpeg", exif=exif)
    summary = simclr.run(streamed_config(tmp_path, epochs=1, max_bad=0.0))
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
