import torch

from methods.centring import Centres


def test_the_centre_moves_to_the_mean_of_all_rows_of_a_step():
    centre = Centres(0.9, center=(1, 3)).double()
    rows = torch.randn(10, 3, dtype=torch.float64)
    for part in rows.split([1, 4, 5]):
        centre.collect(center=part)
        assert torch.equal(centre.center, torch.zeros(1, 3, dtype=torch.float64)), "pieces see the old centre"
    centre.commit(None)
    torch.testing.assert_close(centre.center, 0.1 * rows.mean(dim=0, keepdim=True))
    centre.collect(center=rows)
    centre.commit(torch.tensor(1.0))
    torch.testing.assert_close(centre.center, 0.19 * rows.mean(dim=0, keepdim=True))


def test_a_skipped_step_is_forgotten():
    centre = Centres(center=(1, 2))
    centre.collect(center=torch.full((4, 2), float("nan")))
    centre.commit(torch.tensor(0.0))
    assert torch.equal(centre.center, torch.zeros(1, 2))
    centre.collect(center=torch.ones(4, 2))
    centre.commit(None)
    torch.testing.assert_close(centre.center, torch.full((1, 2), 0.1))


def test_only_the_centres_themselves_are_saved():
    assert list(Centres(center=(1, 4), center2=(1, 1, 6)).state_dict()) == ["center", "center2"]
