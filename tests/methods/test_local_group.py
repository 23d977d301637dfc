"""Local groups: all sizes in one pass, and the relation block on a few rows, against the textbook form."""

import torch
import torch.nn.functional as F

from methods.local_group import LocalGroupTransformer
from methods.memory import Memory
from tests.twins import random, randomise

SIZES = {"patch_size": 4, "img_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 3}


def textbook_block(block, x):
    batch, tokens, dim = x.shape
    q, k, v = block.attn.qkv(block.norm1(x)).view(batch, tokens, 3, 3, dim // 3).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * (dim // 3) ** -0.5).softmax(dim=-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
    return x + block.mlp(block.norm2(x))


def test_views_of_crops_of_two_sizes_and_their_gradients_are_those_of_the_textbook():
    network, memory = randomise(LocalGroupTransformer(**SIZES)), Memory(12, 9).double()
    crops = [random(2, 3, 16, 16, seed=seed) for seed in (0, 1)] + [random(2, 3, 8, 12, seed=2)]
    found = network.forward_views(crops, memory, 4)
    classes, relations, patches = [], [], None
    for crop in crops:
        x = network.prepare_tokens(crop)
        for block in network.blocks:
            x = textbook_block(block, x)
        query = x.mean(dim=1)
        index = (F.normalize(query, dim=1) @ F.normalize(memory.queue_q, dim=1).t()).topk(4, dim=1).indices
        related = torch.cat((query[:, None], memory.queue_k[index]), dim=1)
        relations.append(network.norm(textbook_block(network.relation_blocks[0], related))[:, 0])
        classes.append(network.norm(x)[:, 0])
        patches = network.norm(x)[:, 1:].mean(dim=1) if patches is None else patches
    expected = torch.cat(classes), torch.cat(relations), patches
    torch.testing.assert_close(tuple(found[:3]), expected, rtol=1e-10, atol=1e-12)
    assert not found.patches.requires_grad
    weights = random(6, 12, seed=4)
    loss = lambda a, b: (a * weights).sum() + (b * weights.flip(0)).sum()  # noqa: E731
    grads = [torch.autograd.grad(loss(*views[:2]), list(network.parameters())) for views in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


def test_the_order_of_the_neighbours_means_nothing():
    network = randomise(LocalGroupTransformer(**SIZES))
    query, rows = random(2, 12), random(2, 5, 12, seed=1)
    torch.testing.assert_close(network.relate(query, rows), network.relate(query, rows.flip(1)))


def test_it_is_a_vision_transformer_with_relation_blocks_behind_it():
    network = LocalGroupTransformer(**SIZES, drop_path_rate=0.5)
    extra = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert extra == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "relation_blocks"}
    assert [block.drop_path for block in network.relation_blocks] == [0.0]
    assert network.relation_blocks[0].mlp.fc1.bias.abs().max() == 0
