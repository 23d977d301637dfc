import itertools

import pytest
import torch

from methods.ladder import hidden_widths, ladder_options
from models.ladder import KINDS, Ladder, ladder_arguments
from utils import UsageError

NORMS = list(itertools.product([False, True], repeat=2))
HEADS = {"b": 5, "a": 7, "c.d": 5}


def small_ladder(**options) -> Ladder:
    return Ladder(6, HEADS, {0: 8, 2: 10}, **options).double()


def tokens(batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, 2 + 9, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def one_by_one(ladder: Ladder, blocks: list[torch.Tensor]) -> dict[str, tuple]:
    """The definition: every image, every block, every projector."""
    found = {}
    for name, key in (("a", "a"), ("b", "b"), ("c.d", "c_d")):
        parts = [x[:, :1] for x in blocks], [x[:, 2:] for x in blocks]
        sums = []
        for kind, part in zip(KINDS, parts, strict=True):
            terms = [ladder.heads[key][kind][str(block)](part[block]) for block in (0, 2)]
            sums.append(terms[0] + terms[1])
        found[name] = (sums[0][:, 0], sums[1])
    return found


@pytest.mark.parametrize("norms", NORMS)
def test_values_and_gradients_are_those_of_every_projector_by_itself(norms):
    ladder, blocks = small_ladder(prenorm=norms[0], midnorm=norms[1]), tokens()
    outputs, gradients = [], []
    for found in (ladder(blocks, 2), one_by_one(ladder, blocks)):
        outputs.append([y for name in sorted(HEADS) for y in found[name]])
        total = sum(y.square().sum() for y in outputs[-1])
        gradients.append(torch.autograd.grad(total, [*ladder.parameters(), *blocks[::2]]))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_every_parameter_has_a_gradient_of_its_own_which_a_second_piece_adds_to():
    ladder, pieces = small_ladder(), [tokens(), tokens(3)]
    for blocks in pieces:
        sum(y.square().sum() for pair in ladder(blocks, 2).values() for y in pair).backward()
    grads = [parameter.grad for parameter in ladder.parameters()]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)
    total = sum(y.square().sum() for b in pieces for pair in one_by_one(ladder, b).values() for y in pair)
    torch.testing.assert_close(grads, list(torch.autograd.grad(total, list(ladder.parameters()))))


def test_recomputed_hidden_layers_change_no_bit():
    ladder, blocks = small_ladder(), tokens()
    gradients = []
    for ladder.grad_checkpointing in (False, True):
        total = sum(y.square().sum() for pair in ladder(blocks, 2).values() for y in pair)
        gradients.append(torch.autograd.grad(total, [*ladder.parameters(), *blocks[::2]]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_teachers_stand_in_sorted_order_and_a_dot_in_a_name_separates_nothing():
    names = list(small_ladder().state_dict())
    assert list(dict.fromkeys(name.split(".")[1] for name in names)) == ["a", "b", "c_d"]
    assert names[0] == "heads.a.cls.0.layers.0.weight"


@pytest.mark.parametrize("name", ["half", "training"])
def test_a_teacher_called_as_what_every_module_has_is_refused(name):
    with pytest.raises(UsageError, match=f"--teachers {name}: the name of a ladder's own part"):
        Ladder(6, {name: 5}, {0: 8})


@pytest.mark.parametrize("norms", NORMS)
def test_every_width_can_be_read_from_the_shapes(norms):
    state = small_ladder(prenorm=norms[0], midnorm=norms[1]).state_dict()
    again = Ladder(**ladder_arguments(state)).state_dict()
    assert {name: value.shape for name, value in again.items()} == {name: value.shape for name, value in state.items()}
    with pytest.raises(UsageError, match="no ladder of projectors"):
        ladder_arguments({"encoder.cls_token": torch.zeros(1, 1, 6)})


def test_only_the_last_block_of_the_network_has_the_last_width():
    options = ladder_options("{'which_blocks': [2, 0], 'hidden_dim': 3, 'last_hidden_dim': 9}")
    assert hidden_widths(options, 4) == {0: 3, 2: 3}
    assert hidden_widths(options, 3) == {0: 3, 2: 9}
    assert hidden_widths(ladder_options("{}"), 2) == {0: 768, 1: 3072}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'std': 0.02", "no Python literal"),
        ("__import__('os').system('true')", "no Python literal"),
        ("[1]", "a list; pass a dictionary"),
        ("{'hiden_dim': 3}", "unknown key hiden_dim; did you mean hidden_dim?"),
        ("{'hidden_dim': 0}", "hidden_dim 0 has to be a whole number"),
        ("{'last_hidden_dim': 2.5}", "last_hidden_dim 2.5"),
        ("{'prenorm': 1}", "prenorm 1 has to be True or False"),
        ("{'std': 0}", "std 0 has to be a positive number"),
        ("{'which_blocks': 3}", "which_blocks 3"),
        ("{'which_blocks': []}", "which_blocks"),
        ("{'which_blocks': [0, 'a']}", "which_blocks"),
    ],
)
def test_what_is_no_ladder_is_refused_in_one_line(text, said):
    with pytest.raises(UsageError, match="--lp_args") as error:
        ladder_options(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_blocks_that_the_student_has_not_are_refused():
    for block in (4, -1):
        with pytest.raises(UsageError, match=f"which_blocks has {block}, and the student's blocks are 0 to 3"):
            hidden_widths(ladder_options(f"{{'which_blocks': [{block}]}}"), 4)
