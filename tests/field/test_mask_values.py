"""What mask values mean, in cases from public bug reports: read rightly, or asked about with advice that works."""

import json

import numpy as np
import pytest
from PIL import Image

from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.sets import load_labelled, load_masked
from unet_diffusion.images.pixel_range import PixelRange


@pytest.fixture
def load(tmp_path):
    def load(images, masks, **options):
        config = options_of(tmp_path, images, masks, **options)
        report = examine(config)
        try:
            sets = load_masked(config)
        except ValueError as error:
            assert report.refusal, f"found in training, but not by the doctor: {error}"
            raise
        assert not report.refusal, str(report)
        return sets

    return load


@pytest.fixture
def score(tmp_path):
    """Opens masks for a network of two classes."""

    def score(images, masks, saved=None, **options):
        named = MaskedOptions(data=str(images), masks=str(masks), cache_dir=str(tmp_path / "cache"), **options)
        full = PixelRange.full("uint8")
        return load_labelled(named, num_classes=2, channels=1, pixel_range=full, saved=saved)

    return score


def options_of(tmp_path, images, masks, **options):
    return MaskedDataConfig(data=str(images), masks=str(masks), cache_dir=str(tmp_path / "cache"), **options)


def shares(dataset) -> list[float]:
    """The shares of the classes in all masks of the source, those held out included."""
    counts = np.zeros(256)
    np.add.at(counts, dataset.table[: len(dataset.cache.keys)], dataset.cache.counts.sum(axis=0))
    return [round(float(share), 4) for share in counts[: dataset.num_classes] / counts.sum()]


def save(folder, masks) -> None:
    folder.mkdir(parents=True)
    for number, mask in enumerate(masks):
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(folder / f"{number}.png")


def images_for(folder, count: int, shape=(16, 16)) -> None:
    random = np.random.default_rng(0)
    save(folder, [random.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)])


def blocks(*values: int, shape=(16, 16)) -> np.ndarray:
    """A mask of stripes of equal width, one for each value."""
    return np.repeat(np.array(values, dtype=np.uint8), shape[1] // len(values))[None].repeat(shape[0], axis=0)


# black and white


@pytest.mark.parametrize("kind", ["masks", "masks_png"])
def test_binary_masks_saved_as_jpeg(field, load, kind):
    folder, right = field("binary_masks_saved_as_jpeg")
    with pytest.raises(ValueError, match=r"'binary' splits at half.*128") as question:
        load(folder / "images", folder / kind)
    assert "save them as PNG" not in str(question.value)
    sets = load(folder / "images", folder / kind, mask_encoding="binary")
    assert shares(sets.train) == right["shares"]
    assert sets.encoding.threshold == 128
    assert "values of 128 and more are class 1" in sets.encoding.notes
    assert any("JPEG files" in note for note in sets.encoding.notes) == (kind == "masks")


@pytest.mark.parametrize("kind", ["three", "one"])
def test_class_index_masks_saved_as_jpeg(field, load, kind):
    folder, _ = field("class_index_masks_saved_as_jpeg")
    with pytest.raises(
        ValueError, match="12 of 12 masks are JPEG files, whose compression changes values.*'binary'.*PNG"
    ):
        load(folder / "images", folder / kind)
    sets = load(folder / "images", folder / kind, mask_encoding="indices")
    assert any("compression changes values, so that classes may be wrong" in note for note in sets.encoding.notes)


@pytest.mark.parametrize("kind", ["smooth", "smooth_colour", "smooth_alpha"])
def test_soft_edges(field, load, kind):
    folder, right = field("masks_with_soft_edges")
    with pytest.raises(ValueError, match=r"mask_encoding.*'binary'.* splits (at half|them at half)"):
        load(folder / "images", folder / kind)
    sets = load(folder / "images", folder / kind, mask_encoding="binary")
    assert shares(sets.train) == right["shares"]
    if kind == "smooth_colour":
        with pytest.raises(ValueError, match="most of them blends"):
            load(folder / "images", folder / kind, mask_colours={"black": 0, "red": 1})


@pytest.mark.parametrize("kind", ["white_on_nothing", "white_palette"])
def test_white_on_nothing_and_palettes(field, load, kind):
    folder, right = field("masks_with_soft_edges")
    for encoding in ("auto", "binary"):
        assert shares(load(folder / "images", folder / kind, mask_encoding=encoding).train) == right["shares"]


def test_the_outline_of_pascal_voc_is_ignored(field, load):
    folder, right = field("masks_with_soft_edges")
    sets = load(folder / "images", folder / "cream_outline")
    assert (sets.num_classes, shares(sets.train)) == (2, right["cream_outline"][:2])
    assert "(224, 224, 192), the outline of Pascal VOC, is ignored" in sets.encoding.notes
    colours = {"#000000": 0, "#800000": 1, "#e0e0c0": 2}
    assert load(folder / "images", folder / "cream_outline", mask_colours=colours).num_classes == 3


def test_deep_masks_with_soft_edges_are_split_at_half_or_where_stated(tmp_path, load):
    """They hold more values than a set of classes may have."""
    images_for(tmp_path / "images", 4, (64, 64))
    ramp = np.arange(4096).reshape(64, 64) * 16
    save(tmp_path / "masks", [(ramp + shift).astype(np.uint16) for shift in range(4)])
    with pytest.raises(ValueError, match="'binary'"):
        load(tmp_path / "images", tmp_path / "masks")
    half = load(tmp_path / "images", tmp_path / "masks", mask_encoding="binary")
    assert shares(half.train) == [0.5, 0.5]
    stated = load(tmp_path / "images", tmp_path / "masks", mask_encoding="binary", mask_threshold=50000)
    assert shares(stated.train)[1] == round(float(np.mean([ramp + shift >= 50000 for shift in range(4)])), 4)


def test_masks_of_0_and_1_among_masks_of_0_and_255(field, load):
    folder, right = field("masks_of_a_test_set_unlike_those_trained_on")
    images, mixed = folder / "images", folder / "mixed"
    with pytest.raises(ValueError, match="5 masks of 0 and 1, and 5 of 0 and 255.*mask_threshold=1.*'indices'"):
        load(images, mixed)
    with pytest.raises(ValueError, match="splits at 128, but 5 of 10 masks hold no value above 1.*mask_threshold=1"):
        load(images, mixed, mask_encoding="binary")
    sets = load(images, mixed, mask_encoding="binary", mask_threshold=1)
    assert shares(sets.train) == right["shares"]
    stated = {"mask_encoding": "binary", "mask_threshold": 128}
    split = load(images, folder / "values_0_255", validation_data=str(images), validation_masks=str(mixed), **stated)
    assert shares(split.validation)[1] < right["shares"][1] == shares(split.train)[1]
    assert load(images, mixed, **stated).encoding.label(1) == 0
    assert load(images, mixed, mask_encoding="indices").encoding.label(255) == 255


def test_masks_of_one_value_teach_nothing(field, load):
    folder, _ = field("masks_of_a_test_set_unlike_those_trained_on")
    for kind, value in (("all_255", 255), ("all_0", 0)):
        for encoding in ("auto", "binary", "indices"):
            with pytest.raises(ValueError, match=f"every pixel of the masks is {value}, so there is nothing to learn"):
                load(folder / "images", folder / kind, mask_encoding=encoding)


@pytest.mark.parametrize("encoding", ["auto", "binary"])
@pytest.mark.parametrize("saved", [True, False])
def test_test_masks_unlike_those_trained_on(field, load, score, encoding, saved):
    folder, right = field("masks_of_a_test_set_unlike_those_trained_on")
    meaning = load(folder / "images", folder / "values_0_255").encoding if saved else None

    def found(kind: str) -> list[float]:
        return shares(score(folder / "images", folder / kind, meaning, mask_encoding=encoding))

    assert (found("all_255"), found("all_0")) == ([0, 1], [1, 0])
    assert found("values_0_1") == found("values_0_255") == right["shares"]
    if saved:
        assert found("mixed") == right["shares"]
    else:
        with pytest.raises(ValueError, match="mask_threshold=1") as question:
            found("mixed")
        assert "JPEG" not in str(question.value)
        stated = score(folder / "images", folder / "mixed", mask_encoding="binary", mask_threshold=1)
        assert shares(stated) == right["shares"]


def test_mixed_test_masks_are_asked_about_by_a_network_of_class_indices(field, load, score):
    """Taken as the training masks were, 255 would be ignored, which would empty five of ten masks."""
    folder, right = field("masks_of_a_test_set_unlike_those_trained_on")
    meaning = load(folder / "images", folder / "values_0_1").encoding
    assert meaning.kind == "indices"
    mixed = folder / "images", folder / "mixed", meaning
    with pytest.raises(ValueError, match="5 masks of 0 and 1, and 5 of 0 and 255.*mask_threshold=1.*'indices'"):
        score(*mixed)
    assert shares(score(*mixed, mask_encoding="binary", mask_threshold=1)) == right["shares"]
    score(*mixed, mask_encoding="indices")


def test_validation_masks_may_hold_a_single_class(field, load):
    folder, right = field("one_label_among_many_pictures")
    validation = {"validation_data": str(folder / "pictures"), "validation_masks": str(folder / "all_object")}
    sets = load(folder / "labelled", folder / "masks", **validation)
    assert (shares(sets.train), shares(sets.validation)) == (right["shares"], [0, 1])


def test_test_masks_of_objects_alone_are_scored_as_their_colour_is_stated(field, score):
    folder, _ = field("one_label_among_many_pictures")
    colours = {"#000000": 0, "#ffffff": 1}
    assert shares(score(folder / "pictures", folder / "all_object", mask_colours=colours)) == [0, 1]


def test_soft_test_masks_are_split_by_a_network_of_binary_masks(field, load, score):
    folder, right = field("masks_with_soft_edges")
    meaning = load(folder / "images", folder / "white_on_nothing").encoding
    for kind in ("smooth", "smooth_colour", "smooth_alpha", "white_palette"):
        assert shares(score(folder / "images", folder / kind, meaning)) == right["shares"]


@pytest.mark.parametrize("values", [(1, 255), (7, 255)])
def test_two_values_of_which_one_may_be_ignored(tmp_path, load, values):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "masks", [blocks(*values)] * 4)
    with pytest.raises(
        ValueError, match=f"hold only {values[0]}, 255. mask_encoding='binary' makes {values[0]} class 0"
    ):
        load(tmp_path / "images", tmp_path / "masks")
    assert shares(load(tmp_path / "images", tmp_path / "masks", mask_encoding="binary").train) == [0.5, 0.5]


# grey values and instances


def test_gaps_between_grey_values(field, load):
    folder, right = field("grey_masks_with_gaps_between_values")
    for kind, values, classes in (("value_38", "0, 38", 2), ("values_20_40_60", "0, 20, 40, 60", 4)):
        with pytest.raises(
            ValueError, match=rf"masks hold {values}, .*'palette' makes each value a class \({classes} "
        ):
            load(folder / "images", folder / kind)
        sets = load(folder / "images", folder / kind, mask_encoding="palette")
        assert shares(sets.train) == right[kind]
        highest = int(values.split()[-1])
        assert load(folder / "images", folder / kind, num_classes=highest + 1).num_classes == highest + 1
    names = ("ground", "a", "b", "c")
    assert load(folder / "images", folder / kind, mask_encoding="palette", class_names=names).class_names == names


def test_a_few_gaps_and_255_beside_classes_are_settled(tmp_path, load):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "gaps", [blocks(0, 1, 3, 0)] * 4)
    assert load(tmp_path / "images", tmp_path / "gaps").num_classes == 4
    save(tmp_path / "voc", [blocks(0, 1, 255, 0), blocks(0, 0, 255, 0), blocks(0, 1, 0, 0), blocks(0, 0, 0, 0)])
    sets = load(tmp_path / "images", tmp_path / "voc")
    assert (sets.num_classes, sets.encoding.label(255)) == (2, 255)


@pytest.mark.parametrize("kind", ["int32", "uint32", "float32", "int64"])
def test_numbers_of_cells_are_not_taken_for_classes(field, load, kind):
    folder, right = field("cell_labels_of_cellpose")
    config = {"images": folder / "images", "masks": folder / kind}
    with pytest.raises(ValueError, match=r"numbers of objects.*up to 9.*'instances' .*'indices'"):
        load(**config)
    assert shares(load(**config, mask_encoding="instances").train) == right["shares"]
    assert load(**config, mask_encoding="indices").num_classes == 10


def test_as_many_values_in_every_mask_are_taken_for_classes_and_said(field, load):
    folder, right = field("instance_maps_of_cells")
    sets = load(folder / "images", folder / "labels")
    assert sets.num_classes == right["cells"] + 1
    assert any("values 1 to 6 is one piece in nearly every mask" in note for note in sets.encoding.notes)
    assert shares(load(folder / "images", folder / "labels", mask_encoding="instances").train) == right["shares"]


def test_classes_that_always_occur_together_are_not_taken_for_numbers_of_objects(tmp_path, load):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "masks", [blocks(0, 1, 2, 3, 4, 5, 6, 7)] * 4)
    assert load(tmp_path / "images", tmp_path / "masks").num_classes == 8
    scattered = np.random.default_rng(0).integers(0, 9, (4, 16, 16), dtype=np.uint8)
    save(tmp_path / "scattered", [mask.clip(0, 8 - number) for number, mask in enumerate(scattered)])
    assert load(tmp_path / "images", tmp_path / "scattered").num_classes == 9


def test_maps_of_instances_without_background(tmp_path, load):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "masks", [blocks(1, 2, 3, 4)] * 4)
    with pytest.raises(ValueError, match="every pixel of the masks belongs to an object"):
        load(tmp_path / "images", tmp_path / "masks", mask_encoding="instances")


# colours


NAMES = ("background", "cat", "dog")


def test_a_labelmap_gives_names_and_colours(field, load):
    folder, right = field("voc_colour_masks_with_labelmap")
    images, masks = folder / "JPEGImages", folder / "SegmentationClass"
    sets = load(images, masks)
    assert sets.class_names == NAMES
    assert sets.palette == tuple(right["colours"].values())
    assert shares(sets.train) == right["shares"]
    assert any("labelmap.txt" in note for note in sets.encoding.notes)
    assert load(images, masks, class_names=NAMES).class_names == NAMES
    other = load(images, masks, class_names=("background", "dog", "cat"))
    assert shares(other.train) == [right["shares"][0], right["shares"][2], right["shares"][1]]
    with pytest.raises(ValueError, match="class_names are background, cat, bird, but .* names background, cat, dog"):
        load(images, masks, class_names=("background", "cat", "bird"))


def test_without_a_labelmap_names_of_colours_are_asked_for(field, load):
    folder, right = field("voc_colour_masks_with_labelmap")
    (folder / "labelmap.txt").unlink()
    images, masks = folder / "JPEGImages", folder / "SegmentationClass"
    for options in ({"class_names": NAMES}, {"num_classes": 4}):
        with pytest.raises(ValueError, match='mask_colours.*"#000000" 0 "#008000" 1 "#800000" 2'):
            load(images, masks, **options)
    colours = {"#000000": 0, "#800000": 1, "#008000": 2}
    assert shares(load(images, masks, class_names=NAMES, mask_colours=colours).train) == right["shares"]


def test_palette_files_beside_a_labelmap_are_read_by_their_colours(tmp_path, load):
    images_for(tmp_path / "images", 4)
    files = []
    for _ in range(4):
        file = Image.fromarray(blocks(0, 1, 2, 2), mode="P")
        file.putpalette([0, 0, 0, 0, 128, 0, 128, 0, 0])
        files.append(file)
    save(tmp_path / "masks", files)
    (tmp_path / "masks" / "labelmap.txt").write_text("cat:128,0,0::\ndog:0,128,0::\n")
    sets = load(tmp_path / "images", tmp_path / "masks")
    assert (sets.class_names, shares(sets.train)) == (NAMES, [0.25, 0.5, 0.25])
    assert load(tmp_path / "images", tmp_path / "masks", mask_encoding="indices").class_names is None


def test_grey_masks_beside_a_labelmap_keep_their_meaning(tmp_path, load):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "masks", [blocks(0, 1, 2, 2)] * 4)
    (tmp_path / "labelmap.txt").write_text("cat:128,0,0::\n")
    sets = load(tmp_path / "images", tmp_path / "masks")
    assert sets.num_classes == 3
    assert any("labelmap.txt is not used" in note for note in sets.encoding.notes)


def test_colours_that_a_labelmap_does_not_name(tmp_path, load):
    images_for(tmp_path / "images", 4)
    colours = np.array([(0, 0, 0), (128, 0, 0), (224, 224, 192), (1, 2, 3)], dtype=np.uint8)
    save(tmp_path / "masks", [colours[blocks(0, 1, 2, 2)]] * 4)
    save(tmp_path / "others", [colours[blocks(0, 1, 3, 3)]] * 4)
    (tmp_path / "labelmap.txt").write_text("cat:128,0,0::\n")
    assert shares(load(tmp_path / "images", tmp_path / "masks").train) == [0.25, 0.25]
    with pytest.raises(ValueError, match=r"masks hold \(1, 2, 3\), which .*labelmap.txt does not name"):
        load(tmp_path / "images", tmp_path / "others")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog", "line 2 of .*labelmap.txt is 'dog', but must be name:red,green,blue"),
        ("dog:0,300,0::", "red, green and blue must be from 0 to 255"),
        ("dog:128,0,0::", "its colour stands in a line before"),
        ("cat:0,128,0::", "its name stands in a line before"),
    ],
)
def test_a_labelmap_that_contradicts_itself_is_refused(tmp_path, load, line, message):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "masks", [blocks(0, 1, 2, 2)] * 4)
    (tmp_path / "labelmap.txt").write_text(f"cat:128,0,0::\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_masked(MaskedDataConfig(data=str(tmp_path / "images"), masks=str(tmp_path / "masks")))


def test_blends_of_three_colours_are_asked_about(tmp_path, load):
    images_for(tmp_path / "images", 4, (64, 64))
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[:, 20:40, 0] = 255
    mask[:, 45:60, 1] = 255
    for shade in range(1, 6):
        mask[shade, 20 - shade, 0] = mask[shade, 44, 1] = 40 * shade
    save(tmp_path / "masks", [mask] * 4)
    with pytest.raises(ValueError, match="13 different colours, most of them blends of .*without soft edges"):
        load(tmp_path / "images", tmp_path / "masks")
    assert load(tmp_path / "images", tmp_path / "masks", mask_encoding="palette").num_classes == 13


def test_objects_in_colours_of_their_own_are_asked_about(tmp_path, load):
    images_for(tmp_path / "images", 4)
    colours = np.random.default_rng(0).integers(1, 256, (4, 64, 3), dtype=np.uint8)
    maps = [np.kron(colours[number].reshape(8, 8, 3), np.ones((2, 2, 1), dtype=np.uint8)) for number in range(4)]
    for one in maps:
        one[:4] = 0
    save(tmp_path / "masks", maps)
    with pytest.raises(ValueError, match="colours may also number objects.*mask_threshold=1 every colour but black"):
        load(tmp_path / "images", tmp_path / "masks")
    sets = load(tmp_path / "images", tmp_path / "masks", mask_encoding="binary", mask_threshold=1)
    assert shares(sets.train) == [0.25, 0.75]


# the saved meaning


def test_a_meaning_comes_back_from_json(field, load):
    folder, _ = field("voc_colour_masks_with_labelmap")
    found = load(folder / "JPEGImages", folder / "SegmentationClass").encoding
    assert MaskEncoding.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.keys_of(1) == [key for key, label in found.classes.items() if label == 1]
    with pytest.raises(ValueError, match="saved meaning of masks is .*, which cannot be read"):
        MaskEncoding.from_dict({"classes": []})


# values without a background, and values that stand for no class


def trimaps(folder, *values: int) -> None:
    """Masks of three stripes, the first twice as wide as the others, for 8 images."""
    images_for(folder / "images", 8)
    save(folder / "masks", [blocks(values[0], *values)] * 8)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ((2, 1, 3), '--mask-colours "#010101" 0 "#020202" 1 "#030303" 2'),
        ((1, 2, 255), '--mask-colours "#010101" 0 "#020202" 1 "#ffffff" 255'),
    ],
)
def test_a_class_0_that_never_occurs_is_said_with_the_way_to_choose_classes(tmp_path, load, values, advice):
    trimaps(tmp_path, *values)
    folders = tmp_path / "images", tmp_path / "masks"
    (warning,) = (f for f in examine(options_of(tmp_path, *folders)).findings if "class 0 does not occur" in str(f))
    assert warning.severity == "warning" and str(warning).endswith(advice)
    words = advice.replace('"', "").split()[1:]
    colours = dict(zip(words[::2], map(int, words[1::2])))
    sets = load(*folders, mask_colours=colours)
    assert shares(sets.train) == ([0.25, 0.5, 0.25] if 3 in values else [0.5, 0.25])


def test_a_trimap_becomes_object_background_and_ignored_border(tmp_path, load):
    trimaps(tmp_path, 2, 1, 3)
    colours = {"#020202": 0, "#010101": 1, "#030303": 255}
    sets = load(tmp_path / "images", tmp_path / "masks", mask_colours=colours)
    assert (sets.num_classes, shares(sets.train)) == (2, [0.5, 0.25])  # the rest is ignored


def test_a_stated_number_of_classes_settles_values_from_1(tmp_path, load):
    trimaps(tmp_path, 2, 1, 3)
    folders = tmp_path / "images", tmp_path / "masks"
    assert load(*folders, num_classes=4).num_classes == 4
    findings = [str(found) for found in examine(options_of(tmp_path, *folders, num_classes=4)).findings]
    assert f"warning: class 0 does not occur in the masks of {folders[0]} (train)." in findings


@pytest.mark.parametrize("options", [{"num_classes": 3}, {"class_names": ("pet", "ground", "border")}])
def test_as_many_classes_as_values_from_1_are_asked_about(tmp_path, load, options):
    trimaps(tmp_path, 2, 1, 3)
    folders = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(
        ValueError, match="masks hold 1..3, which would be 4 classes. .*'palette' makes each value a cl"
    ):
        load(*folders, **options)
    assert shares(load(*folders, mask_encoding="palette", **options).train) == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("dtype", ["uint32", "int64", "float32"])
def test_large_numbers_of_objects_are_taken(tmp_path, load, dtype):
    images_for(tmp_path / "images", 4)
    (tmp_path / "masks").mkdir()
    for number in range(4):
        np.save(tmp_path / "masks" / f"{number}.npy", (blocks(0, 1, 2, 0) * 70000.0).astype(dtype))
    folders = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(ValueError, match="masks hold 0, 70000, 140000.*'instances' if each value is one object"):
        load(*folders)
    sets = load(*folders, mask_encoding="instances")
    assert shares(sets.train) == [0.5, 0.5]
    assert np.unique(sets.train.cache.instances[0]).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("empty", "said"), [(-1, "where -1 stands"), (np.nan, "where it stands"), (-9999.0, "it stand")]
)
def test_what_stands_for_no_class_is_to_be_255(tmp_path, load, empty, said):
    images_for(tmp_path / "images", 2)
    (tmp_path / "masks").mkdir()
    for number in range(2):
        np.save(tmp_path / "masks" / f"{number}.npy", np.select([blocks(0, 1, 2, 0) == 2], [empty], 0))
    with pytest.raises(ValueError, match=f"{said}.* for pixels without a class, write 255, which is ignored, or .* 0"):
        load(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("dtype", ["uint32", "int64", "float64"])
def test_numbers_of_objects_that_are_too_large_are_to_be_renumbered(tmp_path, load, dtype):
    """Such as hashes, or the objects of whole volumes."""
    images_for(tmp_path / "images", 2)
    (tmp_path / "masks").mkdir()
    for number in range(2):
        np.save(tmp_path / "masks" / f"{number}.npy", np.where(blocks(0, 1, 2, 0) == 2, 20_000_000, 0).astype(dtype))
    with pytest.raises(ValueError, match="(?s)2e.07|20000000.*; renumber the objects from 1 up"):
        load(tmp_path / "images", tmp_path / "masks", mask_encoding="instances")


def test_soft_edges_of_several_classes_are_to_be_drawn_again(tmp_path, load):
    images_for(tmp_path / "images", 4, (128, 128))
    soft = Image.fromarray(blocks(0, 80, 160, 240, shape=(32, 32))).resize((128, 128), Image.Resampling.BILINEAR)
    save(tmp_path / "masks", [soft] * 4)
    with pytest.raises(ValueError, match="If more classes have soft edges, export the masks again, and resize them by"):
        load(tmp_path / "images", tmp_path / "masks")


# files that name the classes


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["name,r,g,b", "class_names, R, G, B", "name,red,green,blue"])
def test_a_table_of_colours_gives_names_and_colours(tmp_path, load, header, separator):
    images_for(tmp_path / "images", 4)
    colours = np.array([(0, 0, 0), (64, 128, 64), (192, 0, 128)], dtype=np.uint8)
    save(tmp_path / "masks", [colours[blocks(0, 1, 2, 0)]] * 4)
    rows = ["Archway, 192, 0, 128", "", "#2 Bike,1,2,3", "Animal,64,128,64", "Void,0,0,0"]
    (tmp_path / "class_dict.csv").write_text("\n".join([header, *rows]).replace(",", separator))
    sets = load(tmp_path / "images", tmp_path / "masks")
    assert sets.class_names == ("Void", "Archway", "#2 Bike", "Animal")
    assert shares(sets.train) == [0.5, 0.25, 0.0, 0.25]
    assert any("class_dict.csv" in note for note in sets.encoding.notes)


def test_other_tables_are_left_alone_and_faulty_ones_refused(tmp_path, load):
    images_for(tmp_path / "images", 4)
    save(tmp_path / "masks", [blocks(0, 1, 2, 0)] * 4)
    (tmp_path / "class_dict.csv").write_text("label,name,r,g,b\n0,cat,1,2,3\n")
    sets = load(tmp_path / "images", tmp_path / "masks")
    assert sets.class_names is None
    assert any("class_dict.csv is not used, since its columns are not name, r" in note for note in sets.encoding.notes)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\ncat,1,2\n")
    with pytest.raises(
        ValueError, match="line 2 of .*class_dict.csv is 'cat:1,2', but must be name,red,green,blue as in"
    ):
        load(tmp_path / "images", tmp_path / "masks")


def test_a_list_of_classes_names_indices(tmp_path, load):
    images_for(tmp_path / "train", 4)
    save(tmp_path / "masks", [blocks(0, 1, 2, 0)] * 4)
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n3, cow\n")
    sets = load(tmp_path / "train", tmp_path / "masks")
    assert sets.class_names == ("background", "cat", "dog", "cow")
    assert shares(sets.train) == [0.5, 0.25, 0.25, 0.0]
    assert load(tmp_path / "train", tmp_path / "masks", num_classes=3).class_names is None
    for text in ("Pixel Value, Class\n0, background\n1, cat\n", "Pixel Value, Class\n5, a\n6, b\n7, c\n", ""):
        (tmp_path / "train" / "_classes.csv").write_text(text)
        assert load(tmp_path / "train", tmp_path / "masks").class_names is None


def test_a_list_of_classes_does_not_answer_for_lossy_masks(tmp_path, load):
    images_for(tmp_path / "images", 4)
    (tmp_path / "masks").mkdir()
    for number in range(4):
        Image.fromarray(blocks(0, 1, 2, 0)).save(tmp_path / "masks" / f"{number}.jpg")
    (tmp_path / "masks" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n3, cow\n")
    with pytest.raises(ValueError, match="4 of 4 masks are JPEG files, whose compression changes values"):
        load(tmp_path / "images", tmp_path / "masks")


def test_the_colour_of_class_0_is_said_where_none_is_black(tmp_path, load):
    images_for(tmp_path / "images", 4)
    colours = np.array([(255, 255, 255), (255, 0, 0), (0, 0, 0)], dtype=np.uint8)
    save(tmp_path / "white", [colours[blocks(0, 1, 0, 0)]] * 4)
    sets = load(tmp_path / "images", tmp_path / "white")
    assert shares(sets.train) == [0.25, 0.75]
    assert any("class 0, the background of most masks, is (255, 0, 0)" in note for note in sets.encoding.notes)
    stated = load(tmp_path / "images", tmp_path / "white", mask_colours={"white": 0, "red": 1})
    assert (shares(stated.train), stated.encoding.notes) == ([0.75, 0.25], ())
    save(tmp_path / "black", [colours[blocks(2, 1, 2, 0)]] * 4)
    assert load(tmp_path / "images", tmp_path / "black").encoding.notes == ()
