import numpy as np
import pytest

from data.chosen import ChosenClasses
from data.decode import Reading
from tests.sources import Stripes
from utils import UsageError


def test_the_first_images_of_the_named_classes_come_in_the_order_of_the_names():
    source = Stripes(classes=8, per_class=5)
    chosen = ChosenClasses(source, ["class6", "class2"], 3)
    assert chosen.class_names == ["class6", "class2"] and chosen.labels.tolist() == [0] * 3 + [1] * 3
    assert [chosen.image_name(i) for i in (0, 3)] == ["stripes/6.png", "stripes/2.png"]
    assert np.array_equal(chosen.array(1), source.array(14))
    assert np.array_equal(np.asarray(chosen.read_as(Reading()).pil(4)), source.array(10))


def test_without_names_the_first_six_classes_are_taken_and_small_ones_whole():
    chosen = ChosenClasses(Stripes(classes=8, per_class=2), None, 100)
    assert chosen.class_names == [f"class{number}" for number in range(6)] and len(chosen) == 12
    assert len(ChosenClasses(Stripes(classes=2, per_class=2), None, 1)) == 2


def test_unknown_classes_and_images_without_classes_are_refused():
    with pytest.raises(UsageError, match=r"--classes clas3: no class of stripes.*did you mean class3"):
        ChosenClasses(Stripes(), ["clas3"], 3)
    source = Stripes()
    source.labels = np.full(4, -1)
    with pytest.raises(UsageError, match="one folder per class"):
        ChosenClasses(source, None, 3)
