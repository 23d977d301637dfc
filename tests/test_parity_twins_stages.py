"""Golden cases of EsViT's networks with other sizes, numbers and arrays, recomputed by the textbook forms."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision

from tests.models import test_cvt as cvt_textbook
from tests.models import test_vil as vil_textbook
from tests.parity.staged import CVT_KEYS, build_cvt, build_vil
from tests.parity.swin import esvit_images, hash_weights
from tests.twins import agrees, as_arrays, golden, randomise


def rewritten(case, network, outputs):
    weights = {f"w::{name}": tensor for name, tensor in network.state_dict().items()}
    case.__dict__["arrays"] = as_arrays(weights | outputs)
    case.entry["outputs"] = [{"key": name} for name in outputs]
    return case


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (
            [36, 44],
            {
                "PATCH_SIZE": [5, 3],
                "PATCH_STRIDE": [4, 2],
                "PATCH_PADDING": [2, 1],
                "WINDOW_SIZE": [4, 2],
                "DIM_EMBED": [6, 10],
                "NUM_HEADS": [2, 5],
                "DEPTH": [2, 3],
                "MLP_RATIO": [3.0, 1.5],
                "QKV_BIAS": [False, True],
                "KERNEL_QKV": [5, 3],
                "PADDING_QKV": [2, 1],
            },
        ),
        ([40], {"WINDOW_SIZE": [5, 3, 2, 1], "REL_POS_EMBED": True}),
    ],
    ids=["two stages", "biases"],
)
def test_a_cvt_of_other_stages(sizes, config):
    case = golden("esvit", "cvt_forward_rpe" if "REL_POS_EMBED" in config else "cvt_forward")
    case.params.update(config, input_sizes=sizes, input=case.params["input"].replace("70000", "555"))
    network = build_cvt(case.params).double()
    randomise(network)
    for name, buffer in network.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    assert set(CVT_KEYS) <= set(case.params)
    outputs, start = {}, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for size in sizes:
        images = esvit_images(case, size)
        with torch.no_grad():
            outputs[f"tokens_{size}"] = cvt_textbook.textbook(network.eval(), images)
            outputs[f"pooled_{size}"] = outputs[f"tokens_{size}"].mean(dim=1)
            outputs[f"nlast1_{size}"] = outputs[f"pooled_{size}"]
            embed = network.stages[0][0]
            first = torch.nn.functional.conv2d(
                images[:1], *embed.proj.parameters(), embed.proj.stride, embed.proj.padding
            )
            outputs[f"conv_embed0_{size}"] = cvt_textbook.layer_norm(embed.norm, first)
            outputs[f"tokens_train_{size}"] = cvt_textbook.textbook(network.train(), images)
        norm = network.blocks[0][0].fn.qkv.bn
        padded = nn.functional.pad(
            cvt_textbook.layer_norm(network.blocks[0][0].norm, embed_all(embed, images)),
            padding_of(network, embed, images),
        )
        seen = network.blocks[0][0].fn.qkv.dw(padded).transpose(0, 1).flatten(1)
        name = "stage0.1.layers.0.0.fn.qkv.bn"
        outputs[f"after_{size}::{name}.running_mean"] = 0.9 * norm.running_mean + 0.1 * seen.mean(dim=1)
        outputs[f"after_{size}::{name}.running_var"] = 0.9 * norm.running_var + 0.1 * seen.var(dim=1)
    network.load_state_dict(start)
    agrees(rewritten(case, network, outputs))


def embed_all(embed, images):
    return cvt_textbook.layer_norm(embed.norm, embed.proj(images))


def padding_of(network, embed, images):
    height, width = embed.proj(images).shape[2:]
    window = min(network.blocks[0][0].fn.window, height, width)
    return 0, -width % window, 0, -height % window


OTHER = "l1,h2,d8,n1,s1,g2,p2,f2,a0_l2,h1,d6,n1,s1,g0,p2,f3,a0_l3,h3,d9,n2,s0,g1,p3,f2,a0"


@pytest.mark.parametrize(("name", "sizes"), [("mode0", [24, 30]), ("mode1", [26, 36]), ("modem1", [36])])
def test_a_longformer_of_another_string(name, sizes):
    case = golden("esvit", f"vil_forward_{name}")
    said = case.params["input"]
    case.params.update(arch=OTHER, img_size=36, input_sizes=sizes, input=said.replace("8", "7").replace("(2,3", "(3,3"))
    case.params.pop("depths")
    network = randomise(build_vil(case.params))
    drawn = {26: [8, 2], 36: [4, 5]}
    for key in [key for key in case.params if key.startswith("neighbour")]:
        del case.params[key]
    outputs = {}
    for size in sizes:
        images = esvit_images(case, size)
        with torch.no_grad():
            rows = vil_textbook.textbook(network.eval(), images)
            outputs[f"tokens_{size}"], outputs[f"pooled_{size}"] = rows[:, 1:], rows[:, 0]
            outputs[f"nlast1_{size}"] = rows[:, 0]
            if name == "mode1":
                case.params[f"neighbour chunk per sparse attention call, size {size}"] = drawn[size]
                outputs[f"tokens_train_{size}"] = vil_textbook.textbook(network.train(), images, drawn[size])[:, 1:]
    agrees(rewritten(case, network, outputs))


def test_a_smaller_resnet_of_another_size():
    case = golden("esvit", "resnet_forward")
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    case.params.update(arch="resnet18", sizes=[33], names=list(theirs.state_dict()))
    case.params["weights"] = case.params["weights"].replace("3000", "91")
    weights = hash_weights({name: tensor.double() for name, tensor in theirs.state_dict().items()}, 91)
    images, outputs = esvit_images(case, 33), {}
    for mode in ("eval", "train"):
        theirs.double().load_state_dict(weights)
        maps = []
        handle = theirs.layer4.register_forward_hook(lambda module, inputs, output, to=maps: to.append(output))
        with torch.no_grad():
            outputs[f"pooled_{mode}_33"] = theirs.train(mode == "train")(images).numpy().astype(np.float32)
        handle.remove()
        rows = maps[0].permute(0, 2, 3, 1).reshape(-1, 512)
        outputs[f"tokens_sum_l2_{mode}_33"] = torch.stack((rows.sum(dim=1), rows.norm(dim=1)), dim=1)
        outputs[f"npatch_{mode}_33"] = np.array([4])
    case.__dict__["arrays"] = as_arrays(outputs)
    case.entry["outputs"] = [{"key": name} for name in outputs]
    agrees(case)


def test_fewer_names_and_shapes_of_other_networks():
    case = golden("esvit", "state_dict_layouts")
    head = {"mlp.0.weight": [2048, 12], "mlp.0.bias": [2048], "mlp.2.weight": [2048, 2048], "mlp.2.bias": [2048]}
    head |= {
        "mlp.4.weight": [256, 2048],
        "mlp.4.bias": [256],
        "last_layer.weight_g": [5, 1],
        "last_layer.weight_v": [5, 256],
    }
    theirs = torchvision.models.resnet34()
    theirs.fc = nn.Identity()
    front = "backbone.backbone."
    entries = {f"{front}{name}": list(tensor.shape) for name, tensor in theirs.state_dict().items()}
    wide = {name: [size[0], 512] if name == "mlp.0.weight" else size for name, size in head.items()}
    case.__dict__["arrays"] = {
        "projection head 12 -> 5": {"entries": head},
        "resnet34 (multi-crop wrapper, heads with out_dim 5)": {
            "entries": entries
            | {f"{key}.{name}": size for key in ("head", "head_dense") for name, size in wide.items()}
        },
    }
    agrees(case)
