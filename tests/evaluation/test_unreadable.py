"""What cannot be read is named up to a limit and counted; what is tested on does not shrink unseen."""

import pytest

from evaluation.unreadable import Unreadable, UnreadableImages, leave_out, named, readable, refuse, remark
from tests.sources import Stripes

BAD = [Unreadable(index, f"{index}.png", "cut off") for index in range(23)]


def test_twenty_are_named_and_the_others_counted():
    text = named(image[1:] for image in BAD)
    assert text.startswith("0.png: cut off; 1.png: cut off; ") and text.endswith("19.png: cut off; and 3 more")
    assert named([("0.png", "cut off")]) == "0.png: cut off"


def test_an_image_is_told_once_and_none_that_is_left_is_an_error(caplog):
    leave_out(Stripes(), BAD[:3])
    leave_out(Stripes(), BAD[:3], told=BAD[:3])
    leave_out(Stripes(), BAD[:4], told=BAD[:3])
    first, second = caplog.messages
    assert "3 of its 24 images left out as unreadable: 0.png: cut off; 1.png: cut off; 2.png" in first
    assert "4 of its 24 images" in second and "3.png" in second and "2.png" not in second
    with pytest.raises(UnreadableImages, match=r"none of its images can be read: 0.png: cut off; .*and 3 more"):
        leave_out(Stripes(2, 3), BAD[:6])


def test_test_images_are_refused_in_one_line_with_the_way_out():
    refuse(Stripes(), [])
    with pytest.raises(UnreadableImages, match=r"23 of its 24 test .*19.png: cut off; and 3 more; mend.*--skip_un"):
        refuse(Stripes(), BAD)


def test_rows_belong_to_the_readable_images_and_results_say_how_many_were_not():
    assert readable(5, BAD[1:3]).tolist() == [0, 3, 4] and readable(2, []).tolist() == [0, 1]
    assert remark({"train": 0, "test": 0}) == ""
    assert remark({"train": 1, "test": 2}) == " (unreadable: 1 training image, 2 test images)"
