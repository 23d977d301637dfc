import torch
import torch.nn.functional as F

from methods.heads import DINOHead, WeightNormLinear


def test_every_prototype_has_the_length_of_its_weight_g():
    layer = WeightNormLinear(8, 20, train_norm=True)
    layer.weight_g.data.uniform_(0.5, 2.0)
    torch.testing.assert_close(layer.weight().norm(dim=1, keepdim=True), layer.weight_g)
    torch.testing.assert_close(F.normalize(layer.weight(), dim=1), F.normalize(layer.weight_v, dim=1))


def test_names_are_those_of_published_checkpoints():
    names = list(DINOHead(8, 20, use_bn=True).state_dict())
    assert names[:2] == ["mlp.0.weight", "mlp.0.bias"]
    assert names[-2:] == ["last_layer.weight_g", "last_layer.weight_v"]
    assert {name.split(".")[1] for name in names if "running_mean" in name} == {"1", "4"}
    assert list(DINOHead(8, 20, nlayers=1).state_dict())[:2] == ["mlp.weight", "mlp.bias"]


def test_norm_last_layer_freezes_the_lengths():
    assert not DINOHead(8, 20).last_layer.weight_g.requires_grad
    assert DINOHead(8, 20, norm_last_layer=False).last_layer.weight_g.requires_grad


def test_the_bottleneck_is_of_unit_length_and_feeds_the_prototypes():
    head = DINOHead(8, 20)
    x = torch.randn(5, 8)
    torch.testing.assert_close(head.bottleneck(x).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(head(x), head.bottleneck(x) @ head.last_layer.weight().t())
