"""Object detection: boxes, average precision, and the detectors of `--tasks detection`."""

import copy
import json
import os

import coco_numbers
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import FasterRCNN

import load_simCLR
import simclr
import utils
from conftest import CPU, error_of, module_digest, random_statistics, read_image
from hostile import Calls
from load_simCLR import Boxes, Detection, Options, Source, load_source, precisions, summary


def boxes_of(edges, crowds):
    """Boxes of one image's objects, all of one class, without the image."""
    boxes = torch.tensor(edges, dtype=torch.float64)
    labels = torch.ones(len(edges), dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels, "iscrowd": torch.tensor(crowds)}
    return Boxes(None, [target], [], ("a",), ())


def found_of(edges):
    """What a detector of one class returns of one image, by confidence."""
    boxes, n = torch.tensor(edges, dtype=torch.float64).view(-1, 4), len(edges)
    scores = torch.linspace(1, 0.5, n, dtype=torch.float64)
    return [{"boxes": boxes, "labels": torch.ones(n).long(), "scores": scores}]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The file of an exported encoder with random weights and statistics."""
    network = random_statistics(simclr.Encoder("resnet10", 0.125, "small"))
    file = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    source = Source(file, network, network, "cifar10", "", simclr.make_config(dataset="digits"))
    load_simCLR.export_encoder(source, file)
    return file


# ------------------------------------------------------------------------------ average precision

A, B = [0, 0, 10, 10], [20, 20, 40, 40]
CLOSED_FORMS = {  # objects, which are crowds, detections by confidence; AP, AP50 and AP75
    "perfect": ([A, B], [0, 0], [A, B], [1, 1, 1]),
    "nothing found": ([A, B], [0, 0], [], [0, 0, 0]),
    # precision 1 at the recalls 0.00 to 0.50, which are 51 of 101
    "half of them": ([A, B], [0, 0], [A], [51 / 101] * 3),
    # the second object comes with precision 2/3
    "a duplicate is a miss": ([A, B], [0, 0], [A, A, B], [(51 + 50 * 2 / 3) / 101] * 3),
    # a hit at 7 of the 10 thresholds; at the others a miss, then a hit of precision 1/2
    "an IoU of 0.8": ([A, B], [0, 0], [[0, 0, 10, 8], B], [(7 + 3 * 51 / 101 / 2) / 10, 1, 1]),
    "in a crowd": (
        [A, [20, 20, 60, 60]], [0, 1], [[20, 20, 30, 30], [30, 30, 45, 45], A], [1, 1, 1]),
    "the hundredth": ([A], [0], [B] * 99 + [A], [1 / 100] * 3),
    "the next does not count": ([A], [0], [B] * 100 + [A], [0, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_ap_has_a_closed_form(name):
    objects, crowds, found, expected = CLOSED_FORMS[name]
    scores = summary(precisions(boxes_of(objects, crowds), found_of(found)))
    values = [scores[key] for key in ("AP", "AP50", "AP75")]
    assert values == pytest.approx(expected, abs=1e-9)


def case_of(seed):
    truth, found = coco_numbers.random_case(seed)

    def part(entries, image, name, key):
        own = [entry for entry in entries if entry["image_id"] == image]
        edges = torch.tensor([entry["bbox"] for entry in own], dtype=torch.float64).view(-1, 4)
        edges = torch.cat([edges[:, :2], edges[:, :2] + edges[:, 2:]], 1)
        labels = torch.tensor([entry["category_id"] for entry in own])
        return {"boxes": edges, "labels": labels, name: torch.tensor([x[key] for x in own])}

    targets = [part(truth, i, "iscrowd", "iscrowd") for i in range(1, 13)]
    found = [part(found, i, "scores", "score") for i in range(1, 13)]
    return Boxes(None, targets, [], tuple("abcd"), ()), found


@pytest.mark.parametrize("seed", range(coco_numbers.CASES))
def test_ap_is_that_of_pycocotools(seed):
    truth, found = case_of(seed)
    expected = json.loads(coco_numbers.FILE.read_text())[seed]
    result = precisions(truth, found)
    for name, value in summary(result).items():
        assert value == pytest.approx(expected[name], abs=1e-9)
    per_class = np.nan_to_num(result.mean((0, 2)), nan=-1)
    assert np.allclose(per_class, expected["per_class"], atol=1e-9)


# --------------------------------------------------------------------------------- one's own boxes

SIZE = (40, 30)  # of each image, width and height
OBJECTS = {  # class and corners in pixels; an image without any; one box that leaves the image
    "train": {"a": [("cat", 4, 6, 20, 18)], "b": [("dog", 0, 0, 8, 10), ("cat", 10, 10, 40, 30)]},
    "val": {"c": [], "d": [("dog", 8, 3, 16, 27)]},
}
IDS = {"cat": 3, "dog": 17}  # with holes


def write_images(root, place, write_image):
    for split, images in OBJECTS.items():
        for i, name in enumerate(images):
            write_image(root / place.format(split=split) / f"{name}.jpg", SIZE, seed=i)


def written(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_coco(root, write_image, files="annotations/instances_{}2017.json", place="{split}2017"):
    write_images(root, place, write_image)
    for split, images in OBJECTS.items():
        listed = [{"id": 7 * i, "file_name": f"{name}.jpg", "width": 40, "height": 30}
                  for i, name in enumerate(images)]  # fmt: skip
        things = [
            {"image_id": 7 * i, "category_id": IDS[kind], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, objects in enumerate(images.values()) for kind, x1, y1, x2, y2 in objects
        ]  # fmt: skip
        kinds = [{"id": key, "name": name} for name, key in IDS.items()]
        content = dict(images=listed, annotations=things, categories=kinds)
        written(root / files.format(split), json.dumps(content))


def write_voc(root, write_image):
    write_images(root, "JPEGImages", write_image)
    for split, images in OBJECTS.items():
        written(root / f"ImageSets/Main/{split}.txt", "\n".join(images))
        for name, objects in images.items():
            things = "".join(
                f"<object><name>{kind}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for kind, x1, y1, x2, y2 in objects
            )
            size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.jpg</filename>{size}{things}</annotation>"
            written(root / f"Annotations/{name}.xml", text)


def write_yolo(root, write_image, images="images/{split}", labels="labels/{}",
               names="names:\n  0: cat  # a comment\n  1: 'dog'\nnc: 2\n"):  # fmt: skip
    write_images(root, images, write_image)
    for split, objects in OBJECTS.items():
        for name, things in objects.items():
            lines = [
                f"{sorted(IDS).index(kind)} {(x1 + x2) / 80} {(y1 + y2) / 60} {(x2 - x1) / 40} "
                f"{(y2 - y1) / 30}\n" for kind, x1, y1, x2, y2 in things
            ]  # fmt: skip
            written(root / labels.format(split) / f"{name}.txt", "".join(lines))
    written(root / "data.yaml", names)
    (root / labels.format("val") / "c.txt").unlink()  # an image without boxes has no file, or this


WRITERS = {
    "coco": (write_coco,),
    "roboflow": (write_coco, "{}/_annotations.coco.json", "{split}"),
    "beside": (write_coco, "{}.json", "."),
    "voc": (write_voc,),
    "yolo": (write_yolo,),
    "swapped": (write_yolo, "{split}/images", "{}/labels", 'train: x\nnames: [cat, "dog"]\n'),
    "listed": (write_yolo, "images/{split}", "labels/{}", "names:\n- cat\n- dog\n"),
}


def write(layout, root, write_image):
    function, *places = WRITERS[layout]
    function(root, write_image, *places)


@pytest.mark.parametrize("layout", WRITERS)
def test_all_formats_give_the_same_boxes(layout, tmp_path, write_image):
    write(layout, tmp_path, write_image)
    for part, images in zip(load_simCLR.read_boxes(tmp_path)[:2], OBJECTS.values(), strict=True):
        assert part.classes == ("cat", "dog")
        for i, (name, objects) in enumerate(images.items()):
            assert os.path.basename(part.images.paths[i]) == f"{name}.jpg".encode()
            assert part.images.image(i).shape == (3, 30, 40)
            edges = torch.tensor([box for _, *box in objects]).float().view(-1, 4)
            target, labels = part.targets[i], [sorted(IDS).index(kind) + 1 for kind, *_ in objects]
            assert torch.allclose(target["boxes"], edges, atol=1e-4)
            assert target["labels"].tolist() == labels


def test_coco_ids_crowds_and_boxes_that_leave_the_image(tmp_path, write_image):
    write_coco(tmp_path, write_image)
    file = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"] += [
        {"image_id": 0, "category_id": 3, "bbox": [-5, -5, 20, 10], "iscrowd": 1},
        {"image_id": 0, "category_id": 3, "bbox": [50, 5, 20, 10]},
        {"image_id": 0, "category_id": 3, "bbox": [5, 5, 0.5, 10]},
    ]
    file.write_text(json.dumps(content))
    _, test, _ = load_simCLR.read_boxes(tmp_path)
    assert test.targets[0]["boxes"].tolist() == [[0, 0, 15, 5]]
    assert test.targets[0]["iscrowd"].tolist() == [1]
    assert (test.image_ids, test.class_ids) == ([0, 7], (3, 17))
    assert test.dropped == {"under a pixel": 1, "outside the image": 1}


@pytest.mark.parametrize("turn", [1, 3, 5, 6, 7, 8])
def test_boxes_turn_with_a_photograph_that_exif_turns(turn, tmp_path):
    """A white patch in the file is where its box is in the image as displayed."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[4:10, 6:30] = 255
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)

    def assemble(size):
        items = {1: (tmp_path / "a.png", size, [("x", 6, 4, 30, 10, False)])}
        return load_simCLR.assemble(tmp_path, items, {"x": "x"}).targets[0]["boxes"]

    box = assemble([40, 30])
    shown = read_image(tmp_path / "a.png")[0]
    assert shown.shape == ((40, 30) if turn >= 5 else (30, 40))
    if turn >= 5:  # a half turn leaves the size, so that one cannot see which of them is meant
        x1, y1, x2, y2 = box[0].int().tolist()
        assert shown[y1:y2, x1:x2].min() == 255
        assert shown.sum() == 255 * 24 * 6
    with pytest.raises(utils.InputError, match="its annotation says 400 × 300"):
        assemble([400, 300])


def test_without_a_split_a_fifth_is_held_out(tmp_path, write_image):
    for i in range(10):
        write_image(tmp_path / f"images/{i}.jpg", seed=i)
        written(tmp_path / f"labels/{i}.txt", "0 0.5 0.5 0.5 0.5\n")
    written(tmp_path / "classes.txt", "thing\n")
    train, test, text = load_simCLR.read_boxes(tmp_path)
    names = [utils.image_names(part.images) for part in (train, test)]
    assert [len(part) for part in names] == [8, 2]
    assert not set(names[0]) & set(names[1])
    assert "held out" in text


def edited(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


COCO, VOC = "annotations/instances_train2017.json", "Annotations/b.xml"
YOLO = "labels/train/a.txt"


@pytest.mark.parametrize(("layout", "harm", "message"), [
    ("coco", lambda root: edited(root / COCO, "[4,", "[NaN,"), "not finite"),
    ("coco", lambda root: edited(root / COCO, '"image_id": 7', '"image_id": 8'), "image_id 8"),
    ("coco", lambda root: edited(root / COCO, '_id": 3', '_id": 4'), "class 4, which has no"),
    ("coco", lambda root: (root / "train2017/a.jpg").unlink(), "cannot read the image"),
    ("coco", lambda root: (root / COCO).write_text("["), "cannot read"),
    ("coco", lambda root: None, "give at least 5 training images"),
    ("voc", lambda root: edited(root / VOC, "<xmin>", "<xmin>x"), "b.xml"),
    ("voc", lambda root: edited(root / VOC, "<name>dog</name>", ""), "b.xml"),
    ("yolo", lambda root: edited(root / YOLO, "0 0.3", "9 0.3"), "class 9, which has no name"),
    ("yolo", lambda root: edited(root / YOLO, "0 0.3", "0 12"), "shares of the image's sides"),
    ("yolo", lambda root: edited(root / YOLO, "0 0.3", "0"), "a.txt"),
    ("yolo", lambda root: (root / "data.yaml").unlink(), "no data.yaml"),
    ("yolo", lambda root: (root / YOLO).parent.parent.rename(root / "x"), "in a known layout"),
])  # fmt: skip
def test_wrong_boxes_are_one_line(layout, harm, message, tmp_path, write_image, encoder, capfd):
    write(layout, tmp_path, write_image)
    harm(tmp_path)
    flags = ("--data-dir", tmp_path, "--figures", tmp_path, "--device", "cpu")
    error = error_of(capfd, load_simCLR.main, encoder, "--tasks", "detection", *flags)
    assert message in error


# ---------------------------------------------------------------------------------- the detectors


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(load_simCLR, "TRAIN_SCENES", 20)
    monkeypatch.setattr(load_simCLR, "TEST_SCENES", 6)
    monkeypatch.setattr(load_simCLR, "RATES", (3e-3,))
    sizes = load_simCLR.DETECTORS["digits"]._replace(steps=2)
    monkeypatch.setitem(load_simCLR.DETECTORS, "digits", sizes)


@pytest.fixture
def plan(encoder, few_scenes):
    """Makes a comparison of detectors of 10 scenes, with the options."""

    def make(**options):
        options = Options(**{"dataset": "digits", "labels": ("10",), "device": "cpu", **options})
        return Detection(load_source(encoder), options, CPU)

    return make


def trained(plan, name="simclr", **options):
    job = plan(**options)
    return job.fit(name, job.labelled(10, 0), 3e-3, 2, 0)


def test_scenes_follow_from_the_seed_and_boxes_are_tight():
    one, more = (load_simCLR.digit_scenes("train", n, 5) for n in (4, 8))
    other, test = load_simCLR.digit_scenes("train", 4, 6), load_simCLR.digit_scenes("test", 4, 5)
    assert torch.equal(one.images.images, more.images.images[:4])
    assert not torch.equal(one.images.images, other.images.images)
    assert not torch.equal(one.images.images, test.images.images)
    for i in range(len(more)):
        ink = more.images.image(i)[0] >= load_simCLR.INK
        assert 1 <= len(more.targets[i]["labels"]) <= 4
        for x1, y1, x2, y2 in more.targets[i]["boxes"].int().tolist():
            part = ink[y1:y2, x1:x2]
            assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))


@pytest.mark.parametrize(("arch", "width", "stem"), [("resnet10", 0.125, "small"),
                                                     ("resnet50", 0.0625, "imagenet")])  # fmt: skip
def test_levels_are_the_encoders_and_see_what_it_saw(arch, width, stem):
    network = simclr.Encoder(arch, width, stem).eval()
    kind = "small" if stem == "small" else "imagenet"
    detector = load_simCLR.make_detector(network, kind, "cifar10", ["x"], 64, "float32").eval()
    image, seen = torch.rand(3, 64, 64), []
    inside, _ = detector.transform([image])
    outputs = [getattr(network, f"layer{stage}") for stage in load_simCLR.DETECTORS[kind].stages]
    for stage in outputs:
        stage.register_forward_hook(lambda module, x, y: seen.append(y))
    h = utils.Normalized(network, "cifar10")(image[None])
    levels = detector.backbone.body(inside.tensors)
    assert len(levels) == len(outputs)
    for level, expected in zip(levels.values(), seen, strict=False):
        assert torch.allclose(level, expected, atol=1e-5)
    assert torch.allclose(levels[str(len(outputs) - 1)].mean((2, 3)), h, atol=1e-5)
    convolutions = [block[0] for block in detector.backbone.fpn.inner_blocks]
    assert [c.in_channels for c in convolutions] == [level.shape[1] for level in levels.values()]
    assert isinstance(detector, FasterRCNN)


def test_both_rows_begin_with_equal_heads_and_meet_the_same_images(plan, monkeypatch):
    job, made, met = plan(), [], []
    make, example = load_simCLR.make_detector, Detection.example

    def record(*args):
        made.append(copy.deepcopy((new := make(*args)).state_dict()))
        return new

    monkeypatch.setattr(load_simCLR, "make_detector", record)
    monkeypatch.setattr(Detection, "example", lambda *a: met.append(a[2:]) or example(*a))
    for name in ("scratch", "simclr"):
        job.fit(name, job.labelled(10, 0), 3e-3, 2, 0)
    heads = [{k: x for k, x in state.items() if ".body." not in k} for state in made]
    assert all(torch.equal(x, heads[1][k]) for k, x in heads[0].items())
    body = "backbone.body.conv1.weight"
    assert not torch.equal(made[0][body], made[1][body])
    assert met[: len(met) // 2] == met[len(met) // 2 :]


def test_a_training_repeats_bit_for_bit_and_leaves_the_encoder_alone(plan, encoder):
    job, threads, file = plan(), torch.get_num_threads(), encoder.read_bytes()
    before, data = module_digest(job.source.resnet), job.labelled(10, 0)
    one, two = (job.fit("simclr", data, 3e-3, 2, 0) for _ in range(2))
    assert module_digest(one) == module_digest(two)
    assert module_digest(job.source.resnet) == before
    assert encoder.read_bytes() == file
    assert torch.get_num_threads() == threads


def test_a_process_measures_what_this_one_would(plan, monkeypatch):
    job, trial = plan(epochs=1), ("simclr", 10, 0, 3e-3)
    _, _, expected, one = job.measure(*trial)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with load_simCLR.trainers(job) as measure:
        ((record, _, precision, other),) = measure([trial])
    assert (record["row"], record["images"], record["steps"]) == ("simclr", 10, 2)
    assert np.array_equal(precision, expected, equal_nan=True)
    assert module_digest(other) == module_digest(one)
    job.deadly = Calls(os._exit, 1)  # when it is unpickled
    died = pytest.raises(utils.InputError, match="a process that trains a detector died")
    with died, load_simCLR.trainers(job) as measure:
        list(measure([trial]))


@pytest.mark.parametrize("name", ["frozen", "simclr"])
def test_freeze_moves_neither_weights_nor_statistics(plan, name):
    body = trained(plan, name, freeze=True).backbone.body.state_dict()
    before = plan().source.resnet.state_dict()
    same = [torch.equal(x, before[key]) for key, x in body.items()]
    assert all(same) if name == "frozen" else not any(same)


def test_bfloat16_is_for_the_encoder_alone(plan):
    detector = trained(plan, precision="bfloat16")
    kinds = []
    detector.backbone.body.layer2.register_forward_hook(lambda *a: kinds.append(a[2].dtype))
    detector.backbone.fpn.register_forward_pre_hook(lambda m, x: kinds.append(x[0]["0"].dtype))
    load_simCLR.detect(detector, plan().test.images)
    assert kinds == [torch.bfloat16, torch.float32]
    assert all(p.isfinite().all() for p in detector.parameters())


def test_the_command_writes_what_it_promises(encoder, few_scenes, tmp_path, write_image, capfd):
    places = ["--figures", str(tmp_path), "--device", "cpu"]
    load_simCLR.main([str(encoder), "--dataset", "digits", "--tasks", "detection", "--labels", "5",
                      "--seeds", "1", "--against", str(encoder), *places])  # fmt: skip
    said = capfd.readouterr().out
    assert "5 images: pre-trained is" in said
    assert "from scratch, learning rate 0.003: AP50" in said
    assert "detector.pt began as pre-trained, and learned from 5 images" in said
    beside = encoder.parent / "encoder.pt.evaluation-detection.json"
    results = json.loads(beside.read_text())
    rows = [(r["row"], r["images"], r["seed"]) for r in results["detectors"]]
    names = ("scratch", "simclr", str(encoder))
    assert rows == [*((name, 5, 0) for name in names), ("longer", 5, 0)]
    assert (tmp_path / "encoder/detection.png").stat().st_size > 10_000
    truth = json.loads((encoder.parent / "encoder.pt.detections-truth.json").read_text())
    found = json.loads((encoder.parent / "encoder.pt.detections.json").read_text())
    assert len(truth["images"]) == 6
    assert {entry["image_id"] for entry in found} <= {image["id"] for image in truth["images"]}
    detector = load_simCLR.load_detector(encoder.parent / "encoder.pt.detector.pt")
    scenes = load_simCLR.digit_scenes("test", 6, 0)
    again = torch.cat([image["scores"] for image in load_simCLR.detect(detector, scenes.images)])
    assert again.tolist() == [entry["score"] for entry in found]
    write_image(tmp_path / "photos/a.jpg", (80, 60))
    (tmp_path / "photos/b.jpg").write_bytes(b"no image")
    out = tmp_path / "boxes.json"
    where = ("--detect", str(tmp_path / "photos"), "--out", str(out))
    load_simCLR.main([str(encoder), *where, *places])
    assert "images: 1," in capfd.readouterr().out
    assert {entry["image"] for entry in json.loads(out.read_text())} <= {"a.jpg"}
    where = ("--detect", str(tmp_path / "photos/a.jpg"), "--out", str(tmp_path / "one.json"))
    load_simCLR.main([str(encoder), *where, *places])
    assert (tmp_path / "one.json").read_bytes() == out.read_bytes()


def test_pretraining_helps_to_detect(tiny_config, no_figure, unjudged, monkeypatch):
    """A short run: over five seeds SimCLR was 13 to 23 points of AP50 better than from scratch."""
    config = tiny_config(epochs=30, batch_size=256, warmup_epochs=3.0, knn_every=0)
    simclr.run(config)
    sizes = load_simCLR.DETECTORS["digits"]._replace(steps=80)
    monkeypatch.setitem(load_simCLR.DETECTORS, "digits", sizes)
    monkeypatch.setattr(load_simCLR, "TRAIN_SCENES", 50)
    monkeypatch.setattr(load_simCLR, "TEST_SCENES", 100)
    job = Detection(load_source(config.folder / utils.CHECKPOINT), Options(), CPU)
    names = ("scratch", "simclr")
    scratch, pretrained = (job.measure(name, 50, 0, 3e-3)[0]["AP50"] for name in names)
    assert pretrained > scratch + 0.05


@pytest.mark.parametrize(("argv", "message"), [
    ("--tasks detection --dataset digits --labels 3", "--labels 3: give 5 to 20"),
    ("--tasks detection --dataset digits --labels 21", "--labels 21: give 5 to 20"),
    ("--tasks detection --dataset cifar10", "cifar10 has no boxes"),
    ("--detect .", "--tasks detection trains it"),
    ("--detect nowhere", "--detect nowhere is not a folder"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, message, few_scenes, tmp_path, encoder, capfd):
    file, places = tmp_path / "x.pt", ("--figures", tmp_path, "--device", "cpu")
    file.write_bytes(encoder.read_bytes())
    assert message in error_of(capfd, load_simCLR.main, file, *argv.split(), *places)
