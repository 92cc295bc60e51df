from PIL import Image

from scripts.drawings.tiling import Drawing, draw


def test_the_drawing_is_an_image(tmp_path):
    path = draw(Drawing(output=tmp_path / "tiling.png"))
    assert Image.open(path).size == (1100, 390)
