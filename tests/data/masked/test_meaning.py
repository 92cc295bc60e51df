"""What mask values mean: for a network of a run, by a labelmap.txt, and by stated options."""

import numpy as np
import pytest

from unet_diffusion.checks import Question
from unet_diffusion.data.masked.cache import KeyTable
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.encoding import MaskEncoding, find_encoding, for_other_masks, parse_colours
from unet_diffusion.data.masked.labelmap import find_labelmap, read_labelmap
from unet_diffusion.data.masked.meaning import encoding_of_others, encoding_of_part, reading_of_others
from unet_diffusion.data.masked.questions import VOC_OUTLINE
from unet_diffusion.data.masked.reading import numbers_objects
from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.images.masks import DecodedMask, colour_key

RED, GREEN, OUTLINE = colour_key((128, 0, 0)), colour_key((0, 128, 0)), colour_key(VOC_OUTLINE)
BINARY = MaskEncoding({0: 0, 255: 1}, 2, kind="binary")
SPLIT = MaskEncoding({0: 0, 50: 1}, 2, kind="binary", threshold=50)
INDICES = find_encoding([0, 1, 2])
COLOURS = find_encoding([0, GREEN, RED])
INSTANCES = find_encoding([0, 1], "instances")


WHITE_FIRST = SeenMasks.of([0, 1], palette={0: (255, 255, 255), 1: (0, 0, 0)})


def of_others(*masks, saved=None, num_classes=2, palette=None, **options) -> MaskEncoding:
    named = MaskedOptions(data="set", **options)
    return encoding_of_others(named, SeenMasks.of(*masks), num_classes, palette, saved, "set")


# another set, for a network


@pytest.mark.parametrize(
    ("saved", "masks", "ones"),
    [
        (BINARY, [[255]], [255]),
        (BINARY, [[0, 1], [0, 255], [0]], [1, 255]),
        (BINARY, [[0, 38], [38]], [38]),  # two values, the higher of which is class 1
        (BINARY, [[0, 1, 127, 128, 254]], [128, 254]),
        (SPLIT, [[0, 1], [0]], [1]),
        (SPLIT, [[0, 20], [0, 60]], [60]),  # where it was stated
        (SPLIT, [[0, 1], [0, 60]], [60]),
        (INSTANCES, [[0, 1], [1]], [1]),
    ],
)
def test_binary_masks_of_another_hand(saved, masks, ones):
    found = of_others(*masks, saved=saved)
    assert [key for key in sorted(set().union(*masks)) if found.label(key) == 1] == ones
    assert not found.unknown(set().union(*masks))


def test_masks_of_one_class_do_not_fit_a_network_of_three():
    for saved in (BINARY, INDICES):
        with pytest.raises(ValueError, match="one class beside the background, but the network has 3 classes"):
            of_others([0, 255], saved=saved, num_classes=3)
    assert of_others([0, 1, 255], saved=INDICES, num_classes=3).label(255) == 255


def test_a_run_of_indices_still_knows_black_and_white_and_its_colours():
    two = find_encoding([0, 1])
    assert of_others([0, 255], saved=two).label(255) == 1
    assert of_others([255], saved=two).label(255) == 1
    assert of_others([0, RED], saved=two, palette=[(0, 0, 0), (128, 0, 0)]).label(RED) == 1
    assert of_others([0, 255], saved=two, mask_encoding="indices").label(255) == 255


def test_indices_that_a_palette_shows_as_white_and_black_are_asked_about():
    said = "index 0 is white and index 1 black. mask_encoding='binary' makes white class 1"
    with pytest.raises(Question, match=said):
        find_encoding(WHITE_FIRST, num_classes=2)
    with pytest.raises(Question, match=said):
        encoding_of_others(MaskedOptions(data="set"), WHITE_FIRST, 2, None, None, "set")
    assert find_encoding(WHITE_FIRST, "indices").label(1) == 1
    assert find_encoding(SeenMasks.of([0, 1], palette={0: (0, 0, 0), 1: (128, 0, 0)})).label(1) == 1


def test_indices_of_other_colours_than_in_training_are_asked_about():
    black, red, green = (0, 0, 0), (128, 0, 0), (0, 128, 0)
    learnt = find_encoding(SeenMasks.of([0, 1, 2], palette={0: black, 1: red, 2: green}))
    swapped = SeenMasks.of([0, 1, 2], palette={0: black, 1: green, 2: red})

    def of_test(seen, **options):
        return encoding_of_others(MaskedOptions(data="set", **options), seen, 3, learnt.palette, learnt, "set")

    for meaning in (of_test, lambda seen: encoding_of_part(MaskedDataConfig(data="set"), learnt, seen)):
        with pytest.raises(Question, match=r"index 1 has the colour \(0, 128, 0\) .* and \(128, 0, 0\) in those of"):
            meaning(swapped)
        for alike in (SeenMasks.of([0, 1], palette={0: black, 1: red}), SeenMasks.of([0, 1, 2])):
            assert meaning(alike) == learnt
    assert encoding_of_part(MaskedDataConfig(data="set", mask_encoding="indices"), learnt, swapped) == learnt
    assert of_test(swapped, mask_encoding="indices").label(1) == 1
    assert of_test(SeenMasks.of([0, GREEN, RED]), mask_encoding="palette").label(GREEN) == 2
    without_green = find_encoding(SeenMasks.of([0, 1], palette={0: black, 1: red}), num_classes=3)
    assert for_other_masks(without_green, SeenMasks.of([0, 2], palette={0: black, 2: green})) == without_green


def test_a_run_of_colours_keeps_them_and_the_outline():
    assert of_others([0, RED], saved=COLOURS, num_classes=3).label(RED) == 2
    assert of_others([0, RED, OUTLINE], saved=COLOURS, num_classes=3).label(OUTLINE) == 255
    assert of_others([0, RED, OUTLINE], num_classes=2, palette=[(0, 0, 0), (128, 0, 0)]).label(OUTLINE) == 255
    assert for_other_masks(COLOURS, SeenMasks.of([0, 7])).unknown([0, 7]) == [7]


def test_masks_are_read_as_those_trained_on_unless_options_state_it():
    options = MaskedOptions(data="set")
    kinds = {"brightness": BINARY, "values": INDICES, "colours": COLOURS, "instances": INSTANCES}
    for reading, saved in kinds.items():
        assert reading_of_others(options, saved) == reading
    assert reading_of_others(options, None) == "values"
    assert reading_of_others(MaskedOptions(data="set", mask_encoding="palette"), BINARY) == "colours"


def test_mixed_and_lossy_test_masks_are_asked_about():
    with pytest.raises(ValueError, match="1 masks of 0 and 1, and 1 of 0 and 255"):
        of_others([0, 1], [0, 255])
    seen = SeenMasks([{0: 1, 1: 1, 2: 1}], lossy=["JPEG"])
    for saved in (None, INDICES):
        with pytest.raises(ValueError, match="masks are JPEG files"):
            encoding_of_others(MaskedOptions(data="set"), seen, 3, None, saved, "set")
    stated = MaskedOptions(data="set", mask_encoding="indices")
    assert encoding_of_others(stated, seen, 3, None, INDICES, "set").label(2) == 2


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_threshold": 0.0}, "mask_threshold is 0.0, but must be a value above 0"),
        (
            {"mask_threshold": 1.0},
            "mask_threshold is 1.0, but mask_encoding is 'auto', .*; set mask_encoding to 'binary'",
        ),
        ({"mask_colours": {"red": 256}}, "the class of 'red' in mask_colours is 256"),
        ({"mask_colours": {"red": -1}}, "the class of 'red' in mask_colours is -1"),
        ({"mask_colours": {"red": 1, "#ff0000": 2}}, "'#ff0000' the class 2, but the same colour has the class 1"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedOptions(data="set", **options)


def test_a_threshold_beyond_the_values_is_refused():
    assert find_encoding([0, 1, 255], "binary", threshold=1).keys_of(1) == [1, 255]
    assert find_encoding([0, 200], "binary", threshold=0.5).keys_of(1) == [200]
    with pytest.raises(ValueError, match="mask_threshold is 1, but masks hold 7, 255, so that every pixel .* class 1"):
        find_encoding([7, 255], "binary", threshold=1)
    with pytest.raises(ValueError, match="up to 3000, which is the largest neither of 8 nor of 16 bits"):
        find_encoding([0, 7, 3000], "binary")


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([0, 38], {}),
        ([1, 255], {}),
        ([0, 255], {"num_classes": 3}),
        ([0, 7, 3000], {"encoding": "binary"}),
        ([0, GREEN, RED], {"class_names": ("ground", "cat", "dog")}),
    ],
)
def test_what_an_option_settles_is_a_question(keys, options):
    with pytest.raises(Question):
        find_encoding(keys, **options)


def test_more_classes_than_black_and_white_are_asked_about():
    with pytest.raises(ValueError, match="0 and 255 alone, but 3 classes are stated"):
        find_encoding([0, 255], num_classes=3)


def test_names_of_two_colours_need_no_table_if_one_is_black():
    assert find_encoding([0, RED], class_names=("ground", "cat")).label(RED) == 1
    with pytest.raises(ValueError, match="class_names are a, b, but nothing says which colour is which"):
        find_encoding([GREEN, RED], class_names=("a", "b"))
    assert parse_colours({"black": 0, "red": 1, "lime": 1}) == {(0, 0, 0): 0, (255, 0, 0): 1, (0, 255, 0): 1}


def test_masks_of_two_values_each_may_all_be_binary():
    with pytest.raises(ValueError, match="'binary' with mask_threshold=1 makes every value above 0 class 1"):
        find_encoding(SeenMasks.of([0, 128], [0, 255]))
    assert find_encoding(SeenMasks.of([0, 128], [0, 255]), "binary", threshold=1).keys_of(1) == [128, 255]


# labelmap.txt


def test_a_labelmap_is_found_beside_the_masks_first(tmp_path):
    images, masks = tmp_path / "set" / "images", tmp_path / "set" / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    assert find_labelmap("user/data", None) is None
    assert find_labelmap("https://example.org/a.parquet", None) is None
    for place, name in ((tmp_path / "set", "above"), (images, "images"), (masks, "masks")):
        (place / "labelmap.txt").write_text(f"{name}:1,2,3::\n")
        found = find_labelmap(str(images), str(masks))
        assert found is not None
        assert found.labels == ((name, (1, 2, 3)),)
    config = MaskedDataConfig(data=str(images), masks=str(masks))
    assert (config.mask_reading, MaskedOptions(data=str(images), masks=str(masks)).mask_reading) == (
        "colours",
        "values",
    )
    assert MaskedDataConfig(data=str(images), masks=str(masks), mask_encoding="indices").labelmap is None


def test_lines_of_a_labelmap(tmp_path):
    path = tmp_path / "labelmap.txt"
    path.write_text(
        "\ufeff# label:color_rgb:parts:actions\n\ncar: red:10, 20,30\nbackground:0,0,0::\ndog:1,1,1:a,b:c\n"
    )
    labels = read_labelmap(path)
    assert labels.labels == (("car: red", (10, 20, 30)), ("background", (0, 0, 0)), ("dog", (1, 1, 1)))
    assert [name for name, _ in labels.classes(True, None)] == ["background", "car: red", "dog"]  # black is class 0
    path.write_text("cat:128,0,0::\n")
    assert [name for name, _ in read_labelmap(path).classes(True, None)] == ["background", "cat"]
    assert [name for name, _ in read_labelmap(path).classes(False, None)] == ["cat"]
    path.write_text("cat:128,0,0::\nBackground:255,255,255::\n")
    assert [name for name, _ in read_labelmap(path).classes(True, None)] == ["Background", "cat"]
    for text, message in (("# nothing\n", "names no class"), ("cat\n", "line 1 of .* is 'cat'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labelmap(path)
    path.write_bytes(b"caf\xe9:1,2,3::")
    with pytest.raises(ValueError, match="labelmap.txt cannot be read"):
        read_labelmap(path)


# masks


def test_numbers_of_objects_are_1_to_n_each_in_one_piece():
    grid = np.kron(np.arange(6).reshape(2, 3), np.ones((4, 4), dtype=np.int64))
    assert numbers_objects(grid, range(6))
    assert not numbers_objects(grid.clip(0, 3), range(4))  # so few may be classes
    assert not numbers_objects(grid * 2, [0, 2, 4, 6, 8, 10])
    assert not numbers_objects(np.tile(grid, (2, 2)), range(6))  # each in four pieces


def test_brightness_of_many_values_is_rounded_but_never_across_a_threshold():
    values = np.arange(65536).reshape(256, 256)
    for threshold in (None, 7.0, 33000.5):
        table = KeyTable(rounds=True, threshold=threshold)
        first, _ = table.encode(DecodedMask(np.array([[0, 40000]])))
        codes, _ = table.encode(DecodedMask(values))
        keys = np.array(list(table.positions))
        assert (keys[first] == [[0, 40000]]).all()
        split = threshold or 32768
        assert ((keys[codes] >= split) == (values >= split)).all()
