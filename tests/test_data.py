"""Data sets: the embedded one, torchvision's file formats, and folders of any kind of image."""

import hashlib
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as TF

import simclr
import utils
from conftest import CPU, load_images, read_image
from utils import InputError


def test_digits():
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert train.images.shape == (1437, 3, 16, 16)
    assert test.images.shape == (360, 3, 16, 16)
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    assert train.classes == tuple("0123456789")
    assert (train.images[:, :1] == train.images).all()
    assert test.labels.bincount().min() >= 35  # stratified: 178 / 5 and more
    assert torch.equal(load_images("digits", "pretrain").images, train.images)
    both = torch.cat([train.images, test.images])  # each scan is in one split
    brightness = both.float().mean().item() / 255
    assert brightness == pytest.approx(load_digits().images.mean() / 16, abs=1e-3)
    assert len({image.numpy().tobytes() for image in both}) == 1797


# ------------------------------------------------------------------------- torchvision's formats


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def with_checksums(monkeypatch, source, folder):
    """Makes torchvision expect the files that there are."""
    for attribute in ("train_list", "test_list"):
        files = [[name, md5(folder / name)] for name, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, files)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, kind):
    """An archive of 5 + 2 images; one that is damaged is refused."""
    source = getattr(torchvision.datasets, kind.upper())
    folder = tmp_path / source.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind == "cifar10" else "fine_labels"
    names = [name for name, _ in source.train_list]
    sizes = {name: 5 if len(names) == 1 else 1 for name in names} | {source.test_list[0][0]: 2}
    for seed, (name, n) in enumerate(sizes.items()):
        entry = {"data": pixels(n, 3072, seed=seed), key: [(seed + i) % 10 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: [f"class {i}" for i in range(10)]}))
    with_checksums(monkeypatch, source, folder)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta)})
    train, test = load_images(kind, "train", tmp_path), load_images(kind, "test", tmp_path)
    assert train.images.shape == (5, 3, 32, 32)
    assert test.images.shape == (2, 3, 32, 32)
    first = pickle.loads((folder / names[0]).read_bytes())
    assert np.array_equal(train.images[0].numpy().ravel(), first["data"][0])  # planes R, G, B
    assert train.labels.dtype == torch.int64
    assert train.classes[3] == "class 3"

    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/nowhere.tar.gz")  # no one listens
    with open(folder / names[-1], "ab") as file:
        file.write(b"!")
    with pytest.raises(InputError, match=rf"^{kind} could not .*put cifar-10+-python\.tar\.gz"):
        load_images(kind, "train", tmp_path)
    assert folder.exists()


def test_svhn(tmp_path, monkeypatch):
    content = {"X": pixels(32, 32, 3, 4), "y": np.array([[10], [1], [2], [3]])}
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", content)
    files = {s: ["", f"{s}_32x32.mat", md5(tmp_path / f"{s}_32x32.mat")] for s in ("train", "test")}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", files)
    data = load_images("svhn", "test", tmp_path)
    assert data.images.shape == (4, 3, 32, 32)
    assert np.array_equal(data.images[1].numpy(), content["X"][..., 1].transpose(2, 0, 1))
    assert data.labels.tolist() == [0, 1, 2, 3]  # the files call the digit 0 ten


def test_fashion_mnist(tmp_path):
    images = pixels(3, 28, 28)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.array([9, 0, 4], "u1"))):
            shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
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
    with_checksums(monkeypatch, source, folder)
    everything = load_images("stl10", "pretrain", tmp_path)
    assert len(everything) == 5
    assert everything.labels is None
    train = load_images("stl10", "train", tmp_path)
    assert train.labels.tolist() == [0, 9]
    # the files hold columns first
    assert np.array_equal(train.images[0].numpy(), content["train_X.bin"][0].transpose(0, 2, 1))
    assert load_images("stl10", "test", tmp_path).labels.tolist() == [4]


# ---------------------------------------------------------------------------------------- folders


def found(root, write_image, names):
    """Data of a folder with these images, and what a run says of it, without the folder's name."""
    for i, name in enumerate(names):
        (root / name).mkdir() if name.endswith("/") else write_image(root / name, seed=i)
    data = simclr.load_data(simclr.Config(dataset="folder", data_dir=root), CPU)
    return data, utils.describe_data(data).replace(f" in {root}", " in ROOT")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["c.png", "a/1.png", "b/2.png"], "1 images lie outside class folders: c.png"),
        (["1.png", "2.png"], "2 images lie outside class folders: 1.png, 2.png"),
        (["x/1/a.png", "x/b.PNG"], "there is only one folder of images"),
    ],
)
def test_why_there_are_no_labels(tmp_path, write_image, names, text):
    data, said = found(tmp_path, write_image, names)
    assert not data.labelled
    assert said == f"{len(names)} images to learn from in ROOT; no labels: {text}"
    assert len(data.test) == 0


@pytest.mark.parametrize(
    ("names", "classes", "test_labels", "text"),
    [
        (["train/a/1.png", "train/b/1.png", "train/b/2.png", "train/c/1.png", "test/b/1.png",
          "test/c/1.png", "test/c/2.png"], "a b c", [1, 2, 2], "3 test images in ROOT/test"),
        (["a/1.png", "a/2.png", "train/1.png"], "a train", [], "in ROOT, no test images"),
        (["train/a/1.png", "train/b/1.png"], "a b", [], "in ROOT/train, no test images"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/2.png"], "a b", None,
         "the evaluation in ROOT/test: 1 images lie outside class folders: 2.png"),
        # Tiny ImageNet, whose classes of val/ are in a text file
        (["train/a/images/1.png", "train/b/images/1.png", "val/images/1.png"], "a b", None,
         "no labels for the evaluation in ROOT/val: there is only one folder of images"),
        # a labelled folder before a flat one; one class of two, numbered as in train/
        (["train/a/1.png", "train/b/1.png", "test/1.png", "val/b/1.png"], "a b", [1], "ROOT/val"),
        (["Train/a/1.png", "Train/b/1.png", "Test/b/1.png"], "a b", [1], "in ROOT/Test"),
        (["training/a/1.png", "training/b/1.png", "testing/b/2020/1.png"], "a b", [1], "/testing"),
        (["train/a/p/q/1.png", "train/b/1.png", "VALID/b/1.png"], "a b", [1], "in ROOT/VALID"),
        (["train/a/1.png", "train/b/1.png", "validation/a/1.png"], "a b", [0], "/validation"),
        (["test/", "train/a/1.png", "train/b/1.png", "val/b/1.png"], "a b", [1],
         "1 test images in ROOT/val"),
    ],
)  # fmt: skip
def test_layouts_that_people_use(tmp_path, write_image, names, classes, test_labels, text):
    data, said = found(tmp_path, write_image, names)
    assert data.train.classes == data.test.classes == tuple(classes.split())
    assert text in said
    assert data.labelled == bool(test_labels)
    if data.test.labels is not None:
        assert data.test.labels.tolist() == test_labels
    of_class = [data.train.classes[label] for label in data.train.labels.tolist()]
    assert of_class == [os.fsdecode(path).split("/")[0] for path in data.train.paths]


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


def test_class_names_are_compared_as_they_are_read(tmp_path, write_image):
    for name in ("train/caf\N{LATIN SMALL LETTER E WITH ACUTE}", "train/b b", "test/b b"):
        write_image(tmp_path / name / "1.png")
    as_macos_writes_it = "cafe\N{COMBINING ACUTE ACCENT}"
    write_image(tmp_path / "test" / as_macos_writes_it / "1.png")
    assert load_images("folder", "test", tmp_path).labels.tolist() == [0, 1]
    (tmp_path / "test/b b").rename(tmp_path / "test/b\N{NO-BREAK SPACE}b")
    with pytest.raises(InputError, match=r"test has classes .*: \['b\\xa0b'\] \(there: \['b b'"):
        load_images("folder", "test", tmp_path)


def test_images_are_known_by_any_ending_that_pil_knows(tmp_path, write_image, capsys):
    for name in ("a.jpg", "b.JFIF", "c.jpe", "d.Webp", "e.tga"):
        write_image(tmp_path / "x.png").rename(tmp_path / name)
    for name in ("LICENSE", "labels.csv", "more.csv", "film.mp4", ".DS_Store", "data.h5"):
        (tmp_path / name).write_bytes(b"no image")
    write_image(tmp_path / "x.png").rename(tmp_path / "without")
    assert utils.list_images(tmp_path) == ["a.jpg", "b.JFIF", "c.jpe", "d.Webp", "e.tga", "without"]
    assert capsys.readouterr().err == (
        f"left out of {tmp_path}: 5 files without an image's ending, LICENSE, data.h5, film.mp4, "
        "labels.csv, more.csv\n"
    )


def test_a_small_set_is_used_without_its_unreadable_images(tmp_path, write_image, capsys):
    for i in range(10):
        for name in ("a", "b"):
            write_image(tmp_path / name / f"{i}.png", seed=i)
    (tmp_path / "a" / "3.png").write_bytes(b"not found")
    with pytest.raises(InputError, match=r"a/3\.png.*; 1 of 16 images cannot be read \(--max-bad"):
        load_images("folder", "pretrain", tmp_path)
    assert "a/3.png" in capsys.readouterr().err
    data = load_images("folder", "pretrain", tmp_path, max_bad=0.1)
    assert data.images is not None
    assert len(data) == len(data.labels) == len(data.paths) == 15
    assert b"a/3.png" not in data.paths
    assert data.labels.bincount().tolist() == [7, 8]
    shutil.copytree(tmp_path / "a", tmp_path / "train" / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "train" / "b")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    for i in range(4, 10):
        (tmp_path / "test" / "a" / f"{i}.png").write_bytes(b"")
    assert len(load_images("folder", "test", tmp_path, max_bad=0.1)) == 13  # of those for testing
    with pytest.raises(InputError, match=r"test/a/3\.png"):
        load_images("folder", "test", tmp_path)


def test_mixed_and_large_sizes_are_streamed(tmp_path, write_image):
    write_image(tmp_path / "mixed" / "a.png", size=(20, 30))
    write_image(tmp_path / "mixed" / "b.jpg", size=(30, 20))
    write_image(tmp_path / "large" / "a.png", size=(200, 200))
    large, data = (load_images("folder", "pretrain", tmp_path / x) for x in ("large", "mixed"))
    assert large.images is None
    assert data.images is None
    (batch,) = data.batches(16, 8, CPU)
    expected = TF.resize(read_image(tmp_path / "mixed" / "a.png"), [16])
    expected = TF.center_crop(expected, [16, 16])
    assert batch.shape == (2, 3, 16, 16)
    assert (batch[0] - expected.float() / 255).abs().max() <= 1.01 / 255


def deep_picture(kind, size=(40, 40)):
    """A grey ramp of more than 8 bits, and the values that should be black and white."""
    ramp = np.linspace(0, 1, math.prod(size)).reshape(size)
    values, low, high = {
        "float": (ramp.astype("f4"), 0, 1), "float with NaN": (ramp.astype("f4"), 0, 1),
        "float to 255": ((255 * ramp).astype("f4"), 0, 255),
        "signed": ((3000 * ramp - 1000).astype("i4"), -1000, 2000),
        "8 bits in 32": ((255 * ramp).astype("i4"), 0, 255),
        "12 bits in 16": ((4095 * ramp).astype("u2"), 0, 4095),
        "16 bits": ((65535 * ramp).astype("u2"), 0, 65535),
    }[kind]  # fmt: skip
    if kind == "float with NaN":
        values[0, :2] = np.nan, np.inf
    return Image.fromarray(values), (low, high)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("float", ""), ("float with NaN", ""), ("16 bits", ""), ("float to 255", "more than"),
     ("signed", "under a tenth"), ("8 bits in 32", "under a tenth"),
     ("12 bits in 16", "under a tenth")],
)  # fmt: skip
def test_grey_pictures_of_any_depth_use_all_levels(tmp_path, capsys, kind, said):
    for i, size in enumerate([(40, 40), (40, 40), (44, 40)]):
        image, ends = deep_picture(kind, size)
        for folder in ("memory", "disk")[i > 1 :]:
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"{i}.tif")
    memory, disk = (load_images("folder", "pretrain", tmp_path / x) for x in ("memory", "disk"))
    assert memory.grey_range == disk.grey_range == ends
    assert disk.images is None
    streamed = torch.cat([*disk.batches(40, 2, CPU)])[:2]
    assert torch.equal(utils.to_uint8(streamed), memory.images)
    levels = memory.images[0, 0].flatten()
    assert levels.unique().tolist() == [*range(256)]
    assert levels[-1] == 255
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("warning: ") == bool(said)
    assert said in line
    assert f"{ends[0]:g} is taken as black, {ends[1]:g} as white" in line
    assert "--range LOW HIGH" in line

    narrow = load_images("folder", "pretrain", tmp_path / "memory", grey_range=(ends[0], 9e9))
    assert not narrow.images[:, :, 1:].any()
    assert "under a tenth of this range" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(9, 3), (3, 10), (12, 12), (24, 23)])
def test_center_view_equals_torchvision(shape):
    image = torch.from_numpy(pixels(1, 3, *shape))
    theirs = TF.center_crop(TF.resize(image.float() / 255, [8], antialias=True), [8, 8])
    assert (utils.center_view(image, 8) - theirs).abs().max() <= 1e-4


def test_panoramas_are_read_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MOST_PIXELS", 10_000)
    Image.fromarray(pixels(50, 150, 3)).save(tmp_path / "panorama.png")
    with pytest.warns(Image.DecompressionBombWarning):  # which command() hides
        assert read_image(tmp_path / "panorama.png").shape == (3, 50, 150)
    Image.fromarray(pixels(50, 250, 3)).save(tmp_path / "larger.png")
    with pytest.raises(InputError, match=r"larger\.png \(.* exceeds limit of 10000 pixels"):
        read_image(tmp_path / "larger.png")


def test_linked_folders_are_followed_and_loops_end(tmp_path, write_image):
    write_image(tmp_path / "elsewhere" / "x.png")
    home = tmp_path / "home"
    write_image(home / "own" / "y.png")
    os.symlink(tmp_path / "elsewhere", home / "linked")
    os.symlink(home, home / "own" / "loop")
    assert utils.list_images(home) == ["linked/x.png", "own/y.png"]
