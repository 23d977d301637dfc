import numpy as np
import pytest

from evaluation.sets import common_labels
from tests.sources import Stripes
from utils import UsageError


def test_classes_are_matched_by_name_and_not_by_number():
    train, test = Stripes(4, 2), Stripes(2, 2)
    test.class_names = ["class3", "class1"]
    assert [labels.tolist() for labels in common_labels(train, test)] == [train.labels.tolist(), [3, 1, 3, 1]]
    test.class_names = ["class3", "dog"]
    with pytest.raises(UsageError, match=r"1 classes are not in .*such as dog"):
        common_labels(train, test)
    test.labels = np.array([-1, 0, 1, 0])
    with pytest.raises(UsageError, match="without a class"):
        common_labels(train, test)
