"""A student in a teacher's space: against its definition, and what a file must hold for it."""

import pytest
import torch

from models.ladder import Ladder
from models.teacher_space import EPS, teacher_space_from_file
from tests.students import HEADS, student_file
from utils import UsageError


def test_tokens_are_the_sum_of_the_projectors_brought_back_by_the_teachers_statistics(tmp_path):
    file, images = student_file(tmp_path), torch.randn(2, 3, 16, 16)
    for head in HEADS:
        network = teacher_space_from_file(tmp_path / "unic.pth", "model", head)
        assert network.label == f"vit_micro/8 in the space of {head}" and network.report.complete
        blocks = network.model.encoder.forward_blocks(images)
        expected = []
        for kind, tokens in (("cls", slice(0, 1)), ("patch", slice(1, None))):
            ladder = Ladder(128, HEADS, {0: 6, 2: 6}, midnorm=True)
            own = {n.removeprefix("module.lp."): t for n, t in file["model"].items() if n.startswith("module.lp.")}
            ladder.load_state_dict(own)
            projectors = ladder.heads[head.replace(".", "_")][kind]
            y = sum(projectors[str(b)](blocks[b][:, tokens]) for b in (0, 2))
            numbers = file["teacher_ft_stats"][head][kind]
            expected.append(y * (numbers["std"].view(-1) + EPS) + numbers["mean"].view(-1))
        with torch.no_grad():
            torch.testing.assert_close(network.model.forward_features(images), torch.cat(expected, dim=1))
            torch.testing.assert_close(network.model(images), expected[0][:, 0])


def test_a_head_that_a_file_does_not_hold_whole_is_refused_in_one_line(tmp_path):
    first = "module.lp.heads.a.{}.0.layers.0.weight"
    for head, changed, said in (
        ("timm/b.d", {}, r"its ladder does not lead there; did you mean timm/b_c\?; it leads to a, timm/b_c"),
        ("a", {"teacher_ft_stats": None}, r"no statistics of teachers \(teacher_ft_stats\)"),
        ("a", {"teacher_ft_stats": {"a": {"cls": 1}}}, "cls mean: none there, .7,. expected"),
        ("a", {"teacher_ft_stats": {"a": {"cls": {"mean": torch.zeros(1, 5)}}}}, "cls mean: .5,. there, .7,. expected"),
        ("a", {first.format("patch"): torch.zeros(6, 96)}, "lp.heads.a.patch.0.layers.0.weight: .6, 96. there"),
        ("a", {"hidden": (0, 9)}, "blocks up to 9, its encoder has 4 blocks 128 wide"),
        ("a", {"heads": {}}, r"no ladder of projectors \(lp.heads"),
    ):
        student_file(tmp_path, **changed)
        with pytest.raises(UsageError, match=rf"--apply_head {head}: .*unic.pth: .*{said}") as error:
            teacher_space_from_file(tmp_path / "unic.pth", "model", head)
        assert "\n" not in str(error.value)
