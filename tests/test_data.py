"""Data sets: the embedded one, torchvision's file formats, and folders of any kind of image."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from sklearn.datasets import load_digits

import simclr
import utils
from utils import ImageFiles, ImageSet, InputError, load_images


def test_digits():
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert train.images.shape == (1437, 3, 16, 16)
    assert test.images.shape == (360, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert train.classes == tuple("0123456789")
    assert (train.images[:, :1] == train.images).all()
    assert test.labels.bincount().min() >= 35  # stratified: 178 / 5 and more
    assert torch.equal(load_images("digits", "pretrain").images, train.images)


def test_digits_splits_are_disjoint_and_complete():
    """Every scan is in one split: the mean brightness of the whole set adds up."""
    train, test = load_images("digits", "train"), load_images("digits", "test")
    whole = torch.from_numpy(load_digits().images).float().mean() / 16
    both = torch.cat([train.images, test.images]).float().mean() / 255
    assert len(train) + len(test) == 1797
    assert both.item() == pytest.approx(whole.item(), abs=1e-3)
    known = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in known for image in test.images) == 0


# ------------------------------------------------------------------------- torchvision's formats


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_cifar(root, monkeypatch, kind):
    """A CIFAR archive of 5 + 2 images with the checksums torchvision expects of it."""
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    source = source[kind]
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind == "cifar10" else "fine_labels"
    names = [name for name, _ in source.train_list]
    sizes = {name: 5 if len(names) == 1 else 1 for name in names} | {source.test_list[0][0]: 2}
    for seed, (name, n) in enumerate(sizes.items()):
        entry = {"data": pixels(n, 3072, seed=seed), key: [(seed + i) % 10 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    meta = {source.meta["key"]: [f"class {i}" for i in range(10)]}
    (folder / source.meta["filename"]).write_bytes(pickle.dumps(meta))
    train = [[name, md5(folder / name)] for name in names]
    test = [[name, md5(folder / name)] for name, _ in source.test_list]
    monkeypatch.setattr(source, "train_list", train)
    monkeypatch.setattr(source, "test_list", test)
    meta_file = source.meta["filename"]
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(folder / meta_file)})
    return source, folder


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, kind):
    _, folder = make_cifar(tmp_path, monkeypatch, kind)
    train, test = load_images(kind, "train", tmp_path), load_images(kind, "test", tmp_path)
    assert train.images.shape == (5, 3, 32, 32)
    assert test.images.shape == (2, 3, 32, 32)
    first = pickle.loads((folder / ("data_batch_1" if kind == "cifar10" else "train")).read_bytes())
    assert np.array_equal(train.images[0].numpy().ravel(), first["data"][0])  # planes R, G, B
    assert train.labels.dtype == torch.int64
    assert train.classes[3] == "class 3"


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/server on this machine; yields its URL."""
    (tmp_path / "server").mkdir()
    handler = functools.partial(QuietHandler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_cifar_is_downloaded_checked_and_unpacked(tmp_path, monkeypatch, server):
    source, folder = make_cifar(tmp_path / "server", monkeypatch, "cifar10")
    archive = tmp_path / "server" / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "url", f"{server}/{source.filename}")
    monkeypatch.setattr(source, "tgz_md5", md5(archive))
    train = load_images("cifar10", "train", tmp_path / "data")
    assert len(train) == 5
    assert (tmp_path / "data" / source.filename).exists()

    monkeypatch.setattr(source, "tgz_md5", "0" * 32)
    with pytest.raises(InputError, match="cifar10 could not be read from or downloaded to"):
        load_images("cifar10", "train", tmp_path / "elsewhere")


def test_damaged_cifar_is_refused(tmp_path, monkeypatch, server):
    source, folder = make_cifar(tmp_path, monkeypatch, "cifar10")
    monkeypatch.setattr(source, "url", f"{server}/nowhere.tar.gz")
    with open(folder / "data_batch_2", "ab") as file:
        file.write(b"!")
    with pytest.raises(InputError, match=r"put cifar-10-python\.tar\.gz"):
        load_images("cifar10", "train", tmp_path)
    assert folder.exists()
    for kind in ("cifar10", "fashion-mnist"):
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"{server}/"])
        with pytest.raises(InputError, match="could not be read"):
            load_images(kind, "train", tmp_path / "new")
        assert not (tmp_path / "new").exists()  # no empty folder stays behind


def test_svhn(tmp_path, monkeypatch):
    content = {"X": pixels(32, 32, 3, 4), "y": np.array([[10], [1], [2], [3]])}
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", content)
    monkeypatch.setattr(
        torchvision.datasets.SVHN,
        "split_list",
        {s: ["", f"{s}_32x32.mat", md5(tmp_path / f"{s}_32x32.mat")] for s in ("train", "test")},
    )
    data = load_images("svhn", "test", tmp_path)
    assert data.images.shape == (4, 3, 32, 32)
    assert np.array_equal(data.images[1].numpy(), content["X"][..., 1].transpose(2, 0, 1))
    assert data.labels.tolist() == [0, 1, 2, 3]  # the files call the digit 0 ten


def test_fashion_mnist(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = pixels(3, 28, 28), np.array([9, 0, 4], dtype=np.uint8)
    for prefix in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big")
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        for name in ("images-idx3", "labels-idx1"):
            with gzip.open(raw / f"{prefix}-{name}-ubyte.gz", "wb") as file:
                file.write(b"")
    data = load_images("fashion-mnist", "train", tmp_path)
    assert data.images.shape == (3, 3, 28, 28)
    assert np.array_equal(data.images[:, 1].numpy(), images)
    assert data.labels.tolist() == [9, 0, 4]
    assert data.classes[9] == "Ankle boot"


def test_stl10_pretrains_on_train_and_unlabelled(tmp_path, monkeypatch):
    source = torchvision.datasets.STL10
    folder = tmp_path / source.base_folder
    folder.mkdir()
    content = {
        "train_X.bin": pixels(2, 3, 96, 96), "unlabeled_X.bin": pixels(3, 3, 96, 96, seed=1),
        "test_X.bin": pixels(1, 3, 96, 96, seed=2), "train_y.bin": np.array([1, 10], np.uint8),
        "test_y.bin": np.array([5], np.uint8),
    }  # fmt: skip
    for name, values in content.items():
        (folder / name).write_bytes(values.tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    (folder / "fold_indices.txt").write_text("0 1\n")
    for attribute in ("train_list", "test_list"):
        files = [[n, md5(folder / n)] for n, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, files)
    everything = load_images("stl10", "pretrain", tmp_path)
    assert len(everything) == 5
    assert everything.labels is None
    train = load_images("stl10", "train", tmp_path)
    assert train.labels.tolist() == [0, 9]
    # the files hold columns first
    assert np.array_equal(train.images[0].numpy(), content["train_X.bin"][0].transpose(0, 2, 1))
    assert load_images("stl10", "test", tmp_path).labels.tolist() == [4]


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown data set 'imagenette'"):
        load_images("imagenette", "train")
    with pytest.raises(InputError, match="unknown split 'val'"):
        load_images("digits", "val")


# ---------------------------------------------------------------------------------------- folders


def test_folder_with_train_and_val(tmp_path, write_image):
    for split, n in (("train", 3), ("val", 2)):
        for name in ("cat", "dog", "eel"):
            if (split, name) == ("val", "cat"):
                continue  # a class may be missing in the test split, and keeps its number
            for i in range(n):
                write_image(tmp_path / split / name / f"{i}.png", seed=i)
    train, test = (load_images("folder", s, tmp_path) for s in ("train", "test"))
    assert isinstance(train, ImageSet)
    assert train.images.shape == (9, 3, 12, 12)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert train.classes == test.classes == ("cat", "dog", "eel")
    assert test.labels.tolist() == [1, 1, 2, 2]


def test_folder_with_an_unknown_class_in_test(tmp_path, write_image):
    for place in ("train/a", "train/b", "test/a", "test/zebra"):
        write_image(tmp_path / place / "x.png")
    with pytest.raises(InputError, match=r"test has classes .*zebra"):
        load_images("folder", "test", tmp_path)


def found(root):
    """What a run on the folder says that it found."""
    data = simclr.load_data(simclr.Config(dataset="folder", data_dir=root), torch.device("cpu"))
    return data, simclr.describe_data(data)


def test_a_class_may_be_called_train(tmp_path, write_image):
    for name in ("boat", "plane", "train"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.png", seed=i)
    data, text = found(tmp_path)
    assert data.train.classes == ("boat", "plane", "train")
    assert text == "3 classes, 12 images to learn from, 3 held out for the evaluation"


def test_train_with_class_folders_is_a_split_without_test(tmp_path, write_image):
    for name in ("a", "b"):
        write_image(tmp_path / "train" / name / "x.png")
    data, text = found(tmp_path)
    assert data.train.classes == ("a", "b")
    assert text == "2 classes, 2 images to learn from, none held out for the evaluation"


def test_of_test_and_val_the_first_with_images_is_taken(tmp_path, write_image):
    (tmp_path / "test" / "a").mkdir(parents=True)
    for place in ("train/a", "train/b", "val/b"):  # one class in val/, numbered as in train/
        write_image(tmp_path / place / "x.png")
    data, text = found(tmp_path)
    assert data.test.labels.tolist() == [1]
    assert data.test.classes == ("a", "b")
    assert data.labelled
    assert text == "2 classes, 2 images to learn from, 1 held out for the evaluation"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["cover.png", "a/1.png", "b/2.png"], "cover.png lies outside the class folders"),
        (["b/c/3.png", "a/1.png", "d.png"], "b/c/3.png lies outside the class folders, and 1 more"),
        (["1.png", "2.png"], "the images do not lie in class folders"),
        (["a/1.png", "a/2.png"], "there is only one folder of images"),
    ],
)
def test_why_there_are_no_labels(tmp_path, write_image, names, text):
    for name in names:
        write_image(tmp_path / name)
    data, said = found(tmp_path)
    assert not data.labelled
    assert said == f"{len(names)} images to learn from; no labels: {text}"


def test_why_there_are_no_labels_for_the_evaluation(tmp_path, write_image):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/2.png"):
        write_image(tmp_path / name)
    data, text = found(tmp_path)
    assert not data.labelled
    assert text.endswith("no labels for the evaluation: 2.png lies outside the class folders")


def test_folder_of_classes_holds_out_a_fifth(tmp_path, write_image):
    for name, n in (("a", 10), ("b", 20)):
        for i in range(n):
            write_image(tmp_path / name / f"{i}.png", seed=hash((name, i)) % 2**32)
    train, test = (load_images("folder", s, tmp_path) for s in ("train", "test"))
    assert train.labels.bincount().tolist() == [8, 16]
    assert test.labels.bincount().tolist() == [2, 4]
    assert torch.equal(load_images("folder", "pretrain", tmp_path).images, train.images)
    known = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in known for image in test.images)


@pytest.mark.parametrize("names", [["a.png", "b.PNG"], ["x/1/a.png", "x/b.png"], ["only/a.png"]])
def test_unlabelled_folders(tmp_path, write_image, names):
    for name in names:
        write_image(tmp_path / name)
    data = load_images("folder", "pretrain", tmp_path)
    assert len(data) == len(names)
    assert data.labels is None
    assert len(load_images("folder", "test", tmp_path)) == 0


def test_mixed_and_large_sizes_are_streamed(tmp_path, write_image):
    write_image(tmp_path / "mixed" / "a.png", size=(20, 30))
    write_image(tmp_path / "mixed" / "b.jpg", size=(30, 20))
    write_image(tmp_path / "large" / "a.png", size=(200, 200))
    for name in ("mixed", "large"):
        data = load_images("folder", "pretrain", tmp_path / name)
        assert isinstance(data, ImageFiles)
    data = load_images("folder", "pretrain", tmp_path / "mixed")
    (batch,) = data.batches(16, 8, torch.device("cpu"))
    image = utils.read_image(tmp_path / "mixed" / "a.png")
    expected = torchvision.transforms.v2.functional.resize(image, [16])
    expected = torchvision.transforms.v2.functional.center_crop(expected, [16, 16])
    assert batch.shape == (2, 3, 16, 16)
    assert (batch[0] - expected.float() / 255).abs().max() <= 1.01 / 255


def test_streaming_with_workers_gives_the_same(tmp_path, write_image):
    for i in range(7):
        write_image(tmp_path / f"{i}.png", size=(20 + i, 30), seed=i)
    data = load_images("folder", "pretrain", tmp_path)
    alone, two = (
        torch.cat(list(data.batches(16, 3, torch.device("cpu"), workers))) for workers in (0, 2)
    )
    assert torch.equal(alone, two)


def test_modes_and_formats(tmp_path):
    def read(image, name, **options):
        image.save(tmp_path / name, **options)
        return utils.read_image(tmp_path / name)

    red = read(Image.new("RGB", (3, 2), (200, 10, 30)), "rgb.png")
    assert red.shape == (3, 2, 3)
    assert red[:, 0, 0].tolist() == [200, 10, 30]
    assert read(Image.new("L", (2, 2), 77), "grey.png").unique().tolist() == [77]
    deep = Image.fromarray(np.full((2, 2), 257 * 77, dtype=np.uint16))
    assert read(deep, "16bit.png").unique().tolist() == [77]
    clear = Image.new("RGBA", (2, 2), (200, 10, 30, 0))
    assert read(clear, "clear.png").unique().tolist() == [255]  # white shows through
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(palette, "palette.png")[:, 0, 0].tolist() == [10, 20, 30]
    cmyk = read(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "cmyk.jpg")
    assert cmyk.float().mean() > 250
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    first = read(frames[0], "two.gif", save_all=True, append_images=frames[1:])
    assert first[:, 0, 0].tolist() == [255, 0, 0]
    assert read(Image.new("1", (2, 2), 1), "bits.png").unique().tolist() == [255]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(pixels(4, 6, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert utils.image_size(tmp_path / "turned.png") == (6, 4)
    upright = utils.read_image(tmp_path / "turned.png")
    assert np.array_equal(upright.permute(1, 2, 0).numpy(), np.rot90(np.asarray(image), -1))


def exif(*entries):
    """EXIF of raw entries (tag, type, count, value of up to 4 bytes)."""
    directory = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + directory + bytes(4)


TURNED = (0x0112, 3, 1, b"\x06\0")


@pytest.mark.parametrize(
    ("content", "upright"),
    [
        (exif(TURNED), (6, 4)),
        (exif(TURNED, (0x0100, 2, 3, b"ab\0")), (6, 4)),  # a width in letters
        (exif(TURNED, (0x0100, 9, 1, b"\xff\xff\xff\xff")), (6, 4)),  # a negative one
        (exif((0x0112, 2, 2, b"6\0")), (4, 6)),  # the orientation in letters
        (exif(TURNED)[:18], (4, 6)),  # torn
        (b"Exif\0\0nonsense", (4, 6)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_exif_costs_no_photograph(tmp_path, content, upright):
    file = tmp_path / "odd.jpg"
    Image.fromarray(pixels(4, 6, 3)).save(file, exif=content)
    assert utils.image_size(file) == upright
    assert utils.read_image(file).shape[1:] == upright


@pytest.mark.parametrize("error", [struct.error, TypeError, AttributeError, KeyError])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, write_image, error):
    def load(_):
        raise error("strange")

    file = write_image(tmp_path / "strange.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(InputError, match=r"cannot read the image .*strange\.png \("):
        utils.read_image(file)


def test_exif_that_cannot_be_read_counts_as_upright(tmp_path, monkeypatch, write_image):
    def getexif(_):
        raise TypeError("a tag of an odd type")

    file = write_image(tmp_path / "photo.png", size=(6, 4))
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    monkeypatch.setattr(PngImageFile, "getexif", getexif)
    assert utils.image_size(file) == (4, 6)
    assert utils.read_image(file).shape == (3, 4, 6)


@pytest.mark.parametrize("shape", [(9, 3), (3, 10), (12, 12), (24, 23)])
def test_center_view_equals_torchvision(shape):
    image = torch.from_numpy(pixels(1, 3, *shape))
    tv = torchvision.transforms.v2.functional
    theirs = tv.center_crop(tv.resize(image.float() / 255, [8], antialias=True), [8, 8])
    assert (utils.center_view(image, 8) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", [(8000, 2), (3, 9001)])
def test_center_view_of_a_strip_is_its_middle_and_stays_small(shape, monkeypatch):
    strip = torch.linspace(0, 1, max(shape)).expand(1, 3, min(shape), -1)
    strip = strip if shape[1] > shape[0] else strip.mT
    largest, real = [], utils.TF.resize
    monkeypatch.setattr(
        utils.TF, "resize", lambda *a, **k: largest.append(real(*a, **k)) or largest[-1]
    )
    view = utils.center_view(strip, 32)
    assert (view - 0.5).abs().max() < 0.01
    assert max(largest[0].shape) <= (utils.LONGEST_ASPECT + 1) * 32


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_unreadable_images_are_named(tmp_path, write_image, content):
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(pixels(64, 64, 3)).save(buffer, "jpeg")
        content = buffer.getvalue()[:400]
    for name in ("a", "c"):
        write_image(tmp_path / f"{name}.jpg", size=(64, 64))
    (tmp_path / "b.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.jpg"):
        load_images("folder", "pretrain", tmp_path)
    files = ImageFiles(tmp_path, np.array([b"a.jpg", b"b.jpg"]))
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^cannot read the image .*b\.jpg"):
            list(files.batches(16, 2, torch.device("cpu"), workers))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(InputError, match="no images in"):
        load_images("folder", "pretrain", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="no images in"):
        load_images("folder", "pretrain", tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        load_images("folder", "pretrain", tmp_path / "nowhere")


def test_linked_folders_are_followed_and_loops_end(tmp_path, write_image):
    write_image(tmp_path / "elsewhere" / "x.png")
    home = tmp_path / "home"
    write_image(home / "own" / "y.png")
    os.symlink(tmp_path / "elsewhere", home / "linked")
    os.symlink(home, home / "own" / "loop")
    assert utils.list_images(home) == ["linked/x.png", "own/y.png"]
