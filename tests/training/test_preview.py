"""What TensorBoard shows of a run."""

import numpy as np
import pytest
import torch

from data.preprocess import to_pixels
from evaluation.attention import attention_maps, attention_sheet
from models import build_backbone
from models.vit import VisionTransformer
from training.preview import attention_pictures


@pytest.mark.parametrize("names", [[""], ["cls", "cls+"]])
def test_every_image_has_a_row_of_attention_for_each_class_token(names):
    vit = VisionTransformer(embed_dim=12, depth=2, num_heads=3, patch_size=4, img_size=32, num_class_tokens=len(names))
    images = torch.randn(2, 3, 32, 32)
    rows = np.split(attention_pictures(vit.eval(), images), 2 * len(names))
    expected = [(picture, token) for picture in range(2) for token in range(len(names))]
    for row, (picture, token) in zip(rows, expected, strict=True):
        maps = attention_maps(vit, images, token)[picture]
        assert np.array_equal(row, attention_sheet(to_pixels(images)[picture], maps, token=names[token]))


def test_networks_without_such_attention_have_no_picture():
    assert attention_pictures(build_backbone("resnet18"), torch.randn(1, 3, 64, 64)) is None
