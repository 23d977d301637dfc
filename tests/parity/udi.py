"""Runners: UDI's sampling, its wiring of crops, levels and centre, and whole runs."""

from collections.abc import Iterator

import numpy as np
import torch

from evaluation.features import Feature, class_token, pool_tokens
from evaluation.knn import class_votes, knn_classify, neighbours_in_chunks
from evaluation.linear_heads import LinearHeads, Probe, Recipe, cosine_factor
from methods.base import Clock
from methods.heads import DINOHead
from methods.srs import SampledBackbone
from methods.udi import UDI, UDINetwork, teacher_places
from models.adapt import select_class_tokens
from models.checkpoints import load_tensors
from models.reading import read_backbone
from models.vit import VisionTransformer
from tests.parity import Case
from tests.parity.losses import on_ranks
from tests.parity.trajectories import Diary, train
from utils import cosine_scheduler, warmup_scheduler
from visualize_attention import keep_mass


def sparse(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense maps (..., places, patches) -> index and weight (..., places, 4), and whether a place has any weight."""
    weight, index = maps.topk(4, dim=-1)
    return index, weight, maps.sum(dim=-1) > 0


def sampled_places(source: torch.Tensor, target: torch.Tensor, local: torch.Tensor | None) -> dict:
    """What the loader makes of dense maps: source and target (2, batch, s, patches), local (2 * crops, batch, s_l,
    patches), ordered l0 -> g1, l0 -> g0, l1 -> g1, ...
    """
    index, weight, _ = sparse(target)
    there = source.sum(dim=-1) > 0
    batch = {
        "source": source.argmax(dim=-1).transpose(0, 1),
        "target_index": index.transpose(0, 1),
        "target_weight": weight.transpose(0, 1),
        "points": there.flatten().nonzero().flatten(),
    }
    if local is not None and len(local):
        index, weight, there = sparse(local.unflatten(0, (-1, 2)))  # (crops, 2, batch, s_l, 4)
        batch["local_index"], batch["local_weight"] = (x.permute(2, 0, 1, 3, 4) for x in (index, weight))
        batch["local_points"] = there.flatten().nonzero().flatten()
    return batch


def build_network(p: dict, classes: int = 2, patch: bool = True, frozen: bool = True) -> UDINetwork:
    vit = VisionTransformer(
        patch_size=p["patch_size"],
        embed_dim=p["embed_dim"],
        depth=p["depth"],
        num_heads=p["num_heads"],
        img_size=p["img_size"],
        num_class_tokens=classes,
    )
    sizes = {"out_dim": p["out_dim"], "hidden_dim": p["head_hidden"], "bottleneck_dim": p["head_bottleneck"]}
    head = DINOHead(p["embed_dim"], norm_last_layer=frozen, **sizes)
    return UDINetwork(SampledBackbone(vit, patch, p.get("srs_heads")), head, classes + patch)


def load_network(network: UDINetwork, case: Case, prefix: str) -> None:
    """The cases leave out the further names of the head."""
    state = case.state(prefix)
    for name in list(state):
        for level in range(1, len(network.head)):
            if name.startswith("head.0."):
                state[name.replace("head.0.", f"head.{level}.", 1)] = state[name]
    network.load_state_dict(state)


def srs_module(case: Case) -> Iterator[tuple]:
    p = case.params
    vit = VisionTransformer(patch_size=8, img_size=16, embed_dim=p["dim"], depth=1, num_heads=1)
    tokens = case.tensor("tokens")
    for side in ("src", "tgt"):
        backbone = SampledBackbone(vit, num_heads=p["num_heads"]).to(case.dtype)
        backbone.attn.load_state_dict(case.state("attn"))
        backbone.norm1.load_state_dict(case.state("norm1"))
        maps = case.tensor(f"map_{side}")
        index, weight, there = sparse(maps)
        rows = [
            backbone.sample(tokens, i, w, torch.arange(i[..., 0].numel())) for i, w in zip(index, weight, strict=True)
        ]
        found = torch.stack(rows).view(case.arrays[f"reps_{side}"].shape)
        yield f"reps_{side}", found, case.arrays[f"reps_{side}"]
        weights = attention_of(backbone, tokens, index, weight) * there[:, :, None, :, None]
        yield f"attn_{side}", weights, case.arrays[f"attn_{side}"]
    for prefix in ("grad", "cot0_grad"):
        backbone = SampledBackbone(vit, num_heads=p["num_heads"]).to(case.dtype)
        backbone.attn.load_state_dict(case.state("attn"))
        backbone.norm1.load_state_dict(case.state("norm1"))
        leaf = tokens.clone().requires_grad_()
        total = 0.0
        for side in ("src", "tgt"):
            index, weight, there = sparse(case.tensor(f"map_{side}"))
            for i, w, t, cot in zip(index, weight, there, case.tensor(f"cot_{side}"), strict=True):
                points = torch.arange(t.numel()) if prefix == "grad" else t.flatten().nonzero().flatten()
                total = total + (backbone.sample(leaf, i, w, points) * cot.flatten(0, 1)[points]).sum()
        total.backward()
        yield f"{prefix}_tokens", leaf.grad, case.arrays[f"{prefix}_tokens"]
        for module in ("attn", "norm1"):
            for name, parameter in getattr(backbone, module).named_parameters():
                label = f"{prefix}_{module}/{name}"
                yield label, parameter.grad, case.arrays[label]


def attention_of(backbone: SampledBackbone, tokens, index, weight) -> torch.Tensor:
    """Softmax attention of every place (sets, batch, heads, places, patches), which training never forms."""
    y, attn = backbone.norm1(tokens), backbone.attn
    heads = attn.num_heads
    q_all, k, _ = attn.qkv(y).chunk(3, dim=-1)
    maps = torch.zeros(*index.shape[:-1], tokens.shape[1], dtype=tokens.dtype).scatter_add_(-1, index, weight)
    q, k = ((maps @ q_all).unflatten(-1, (heads, -1)).transpose(2, 3), k.unflatten(-1, (heads, -1)).transpose(1, 2))
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def multicrop_forward(case: Case) -> Iterator[tuple]:
    p = case.params
    student, teacher = (build_network(p).to(case.dtype) for _ in range(2))
    load_network(student, case, "student")
    load_network(teacher, case, "teacher")
    crops = [case.tensor(name) for name in case.names("crop")]
    maps = {side: [case.tensor(name) for name in case.names(f"{side}_map")] for side in ("src", "tgt")}
    batch = {"crops": crops}
    batch |= sampled_places(torch.stack(maps["src"][:2]), torch.stack(maps["tgt"][:2]), torch.stack(maps["tgt"][2:]))
    method = UDI(student, teacher, np.full(1, 0.04)).to(case.dtype)
    load_network(method.teacher, case, "teacher")
    head, rows = student.head[0].last_layer, 2 * len(crops[0])
    vectors = method.student_vectors(batch, Clock(0, 0))
    for name, label in (("cls", "cls"), ("cls+", "clsp")):
        yield f"s_{label}_g", head(vectors[name][:rows]), case.arrays[f"s_{label}_g"]
        yield f"s_{label}_l", head(vectors[name][rows:]), case.arrays[f"s_{label}_l"]
    mask = torch.stack(maps["src"][:2]).sum(-1).flatten(0, 1)
    yield "s_mask_g", mask, case.arrays["s_mask_g"]
    expected = case.tensor("s_patch_g").flatten(0, 1)[batch["points"]]
    yield "s_patch_g, valid places", head(vectors["patch"]), expected
    bottleneck, last = method.teacher.head[0].bottleneck, method.teacher.head[0].last_layer
    classes, patches = method.teacher.backbone.backbone.forward_with_patches((crops[1], crops[0]))
    yield "t_cls", last(bottleneck(classes[:, 0])), case.arrays["t_cls"]
    index, weight, points = teacher_places(batch)
    logits = last(bottleneck(method.teacher.backbone.sample(patches, index, weight, points)))
    count = len(batch["points"])
    yield "t_patch_g, valid places", logits[:count], case.tensor("t_patch_g").flatten(0, 1)[batch["points"]]
    yield "t_patch_l, valid places", logits[count:], case.tensor("t_patch_l").flatten(0, 2)[batch["local_points"]]
    sums = weight.sum(-1)
    s = batch["source"].shape[-1]
    yield "t_mask_g", sums[:, :s], case.arrays["t_mask_g"], (1e-6, 1e-6)
    local = sums[:, s:].unflatten(1, (p["local_crops_number"], -1)).transpose(0, 1)
    yield "t_mask_l", local, case.arrays["t_mask_l"], (1e-6, 1e-6)


class Levels:
    """A UDI method whose vectors are logits: its prototypes are the unit vectors."""

    def __init__(self, p: dict, dtype: torch.dtype, classes: int, patch: bool):
        k = p["out_dim"]
        sizes = {"patch_size": 4, "img_size": 8, "embed_dim": 4, "depth": 1, "num_heads": 1, "srs_heads": 1}
        sizes |= {"out_dim": k, "head_hidden": 4, "head_bottleneck": k}
        networks = [build_network(sizes, classes, patch) for _ in range(2)]
        temps = p.get("teacher_temp_schedule", [0.04])
        self.method = UDI(*networks, temps, patch, p.get("alpha", 0.5)).to(dtype)
        for network in networks:
            network.head[0].last_layer.weight_v.data = torch.eye(k, dtype=dtype)
            network.head[0].last_layer.weight_g.data = torch.ones(k, 1, dtype=dtype)

    def targets(self, read, epoch: int) -> tuple[dict, dict]:
        """Targets of a step's teacher logits; ``read(name)`` gives an array of the case or None."""
        t_cls, t_patch, t_local = read("t_cls"), read("t_patch_g"), read("t_patch_l")
        batch, z, weights = {}, None, None
        if t_patch is not None:
            mask = read("s_mask") if read("s_mask") is not None else (read("t_mask_g") > 0).to(t_cls.dtype)
            size = len(t_cls) // 2
            batch["points"] = mask.flatten().nonzero().flatten()
            batch["source"] = torch.zeros(size, 2, mask.shape[1])
            z = [t_patch.flatten(0, 1)[batch["points"]]]
            weights = [read("t_mask_g").flatten()[batch["points"]]]
            if t_local is not None:
                crops, _, count, _ = t_local.shape
                batch["local_index"] = torch.zeros(size, crops, 2, count, 4)
                batch["local_points"] = read("t_mask_l").flatten().nonzero().flatten()
                z.append(t_local.flatten(0, 2)[batch["local_points"]])
                weights.append(read("t_mask_l").flatten()[batch["local_points"]])
            z, weights = torch.cat(z), torch.cat(weights)
        self.blends = self.method.target_vectors(t_cls, z, weights, batch)[0]
        return self.method.targets_of(t_cls, z, weights, batch, Clock(epoch, 0)), batch


def centre_on_rank(rank: int, p: dict, inputs: dict, dtype: torch.dtype) -> dict:
    levels = Levels(p, dtype, 2, True)
    computed = {}
    for step in sorted({name.split("/")[0] for name in inputs}):
        levels.targets(
            lambda name, step=step: inputs[f"{step}/{name}"][rank] if f"{step}/{name}" in inputs else None, 0
        )
        levels.method.centres.commit(None)
        computed[f"{step}/center_after"] = levels.method.centres.center.clone()
    return computed


def udi_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    levels = Levels(p, case.dtype, p["number_cls_token"], p["include_patch"])
    for step, epoch in enumerate(p["epoch_of_step"]):

        def read(name, step=step):
            return case.tensor(f"step{step}/{name}") if f"step{step}/{name}" in case.arrays else None

        targets, batch = levels.targets(read, epoch)
        names = ("s_cls_g", "s_cls_l", "s_clsp_g", "s_clsp_l", "s_patch_g")
        leaves = {name: read(name).clone().requires_grad_() for name in names if read(name) is not None}
        vectors = {"cls": torch.cat([leaves[n] for n in names[:2] if n in leaves])}
        if "s_clsp_g" in leaves:
            vectors["cls+"] = torch.cat([leaves[n] for n in names[2:4] if n in leaves])
        if "s_patch_g" in leaves:
            vectors["patch"] = leaves["s_patch_g"].flatten(0, 1).index_select(0, batch["points"])
        found = levels.method.losses(vectors, targets, p["local_crops_number"])
        found["loss"].backward()
        levels.method.centres.commit(None)
        ours = {
            "loss": "loss",
            "g_cls": "g_cl",
            "l_cls": "l_cl",
            "g_clsp": "g_mcl",
            "l_clsp": "l_mcl",
            "g_patch": "g_pch",
        }
        for name in case.names(f"step{step}/"):
            short = name.split("/")[1]
            if short in ours:
                yield name, found[ours[short]], case.arrays[name]
            elif short.startswith("grad_"):
                yield name, leaves[short.removeprefix("grad_")].grad, case.arrays[name]
            elif short.startswith("pstar_"):
                blend = levels.blends[{"pstar_g": "cls+", "pstar_l": "local"}[short]]
                if short == "pstar_l":  # the case has (crops * batch, 2, K)
                    blend = blend.view(p["local_crops_number"], 2, -1, p["out_dim"]).transpose(1, 2).flatten(0, 1)
                yield name, blend, case.arrays[name]
            elif short == "center_after":
                yield name, levels.method.centres.center, case.arrays[name]


def trajectory(case: Case) -> Iterator[tuple]:
    p = case.params
    student, teacher = (build_network(p, p["ncls"], p["patch"], frozen) for frozen in (p["norm_last_layer"], True))
    temps = warmup_scheduler(p["wtt"], p["tt"], p["wtte"], p["epochs"])
    method = UDI(student, teacher, temps, p["patch"], p["alpha"], p["freeze"]).to(case.dtype)
    load_network(method.student, case, "init")
    load_network(method.teacher, case, "init")
    names = {"clip_grad": "clip_grad", "iters_per_epoch": "niter", "batch_size_per_gpu": "B", "warmup_epochs": "warmup"}
    names |= {"weight_decay": "wd", "weight_decay_end": "wd_end", "momentum_teacher": "mom", "optimizer": "opt"}
    options = {ours: p[theirs] for ours, theirs in names.items()}
    options |= {name: p[name] for name in ("epochs", "lr", "min_lr")} | {"world_size": 1}
    diary = Diary(method)
    stats = train(options, method, trajectory_pieces(case))
    for name in ("lr", "wd", "momentum", "loss"):
        yield name, diary.column(name), case.arrays[name]
    yield "teacher_temp", temps, case.arrays["teacher_temp"]
    g = ["g_cl", *(["g_mcl"] if p["ncls"] == 2 else []), *(["g_pch"] if p["patch"] else [])]
    columns = {"components_g": g, "components_l": ["l_cl", "l_mcl"][: p["ncls"]]}
    for label, parts in columns.items():
        yield label, np.array([[step[part] for part in parts] for step in diary.steps]), case.arrays[label]
    yield "center", torch.stack(diary.column("centering.center")), case.arrays["center"]
    if "grad_norms" in case.arrays:
        found = [[step["grad_norms"].get(name, 0.0) for name in p["grad_norm_names"]] for step in diary.steps]
        yield "grad_norms", np.array(found), case.arrays["grad_norms"]
    for side in ("student", "teacher"):
        state = getattr(method, side).state_dict()
        sums = torch.stack([torch.stack((state[name].sum(), state[name].norm())) for name in p["final_names"]])
        yield f"{side}_final_norms", sums, case.arrays[f"{side}_final_norms"]
        for name in case.names(f"{side}_final/"):
            yield name, state[name.removeprefix(f"{side}_final/")], case.arrays[name]
    for epoch, expected in enumerate(p["epoch_stats"]):
        for name, value in expected.items():
            yield f"loss, epoch {epoch} {name}", stats[epoch][name], value


def trajectory_pieces(case: Case) -> Iterator[dict]:
    p = case.params
    for step in range(p["epochs"] * p["niter"]):
        piece = {"crops": [case.tensor(name) for name in case.names(f"step{step}/crop")]}
        if p["patch"]:
            names = ("src_maps_g", "tgt_maps_g", "tgt_maps_l")
            maps = [
                case.tensor(f"step{step}/{name}") if f"step{step}/{name}" in case.arrays else None for name in names
            ]
            piece |= sampled_places(*maps)
        yield piece | {"indices": torch.zeros(0), "bad": [], "first_sample": 0}


def schedules(case: Case) -> Iterator[tuple]:
    for name, p in case.params.items():
        number, epochs, niter = name.removeprefix("grid"), p["epochs"], p["niter"]
        lr = p["lr"] * p["bs"] * p["world"] / 256
        found = {
            "lr": cosine_scheduler(lr, p["min_lr"], epochs, niter, p["warmup"]),
            "wd": cosine_scheduler(p["wd"], p["wd_end"], epochs, niter),
            "mom": cosine_scheduler(p["mom"], 1.0, epochs, niter),
            "temp": warmup_scheduler(p["wtt"], p["tt"], p["wtte"], epochs),
        }
        for label, values in found.items():
            yield f"{label}{number}", values, case.arrays[f"{label}{number}"]


def head(case: Case) -> Iterator[tuple]:
    p = case.params
    sizes = {name: p[name] for name in ("out_dim", "nlayers", "hidden_dim", "bottleneck_dim")}
    module = DINOHead(p["in_dim"], norm_last_layer=False, **sizes).to(case.dtype)
    module.load_state_dict(case.state("sd"))
    leaf = case.tensor("x3").requires_grad_()
    results = {name: module(x) for name, x in (("3", leaf), ("4", case.tensor("x4")))}
    sum((case.tensor(f"cot{name}") * y).sum() for name, y in results.items()).backward()
    for name, y in results.items():
        yield f"y{name}", y, case.arrays[f"y{name}"]
    yield "grad_x3", leaf.grad, case.arrays["grad_x3"]
    for name in case.names("grad/"):
        yield name, module.get_parameter(name.removeprefix("grad/")).grad, case.arrays[name]
    normed = DINOHead(p["in_dim"], use_bn=True, **sizes).to(case.dtype)
    normed.load_state_dict(case.state("bn_sd"))
    for name, buffer in normed.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()  # the case has recorded this counter, of all its "before", after the pass
    yield "bn_y_train", normed.train()(case.tensor("bn_x")), case.arrays["bn_y_train"]
    for name in case.names("bn_sd_after/"):
        yield name, normed.get_buffer(name.removeprefix("bn_sd_after/")), case.arrays[name]
    yield "bn_y_eval", normed.eval()(case.tensor("bn_x")), case.arrays["bn_y_eval"]


def backbone_two_class_tokens(case: Case) -> Iterator[tuple]:
    p = case.params
    vit = VisionTransformer(
        **{
            name: p[name]
            for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
        },
        num_class_tokens=p["num_class_token"],
    ).to(case.dtype)
    vit.load_state_dict(case.state("sd"))
    for name in case.names("x_"):
        kind, images = name.removeprefix("x_"), case.tensor(name)
        yield f"cls_{kind}", vit(images), case.arrays[f"cls_{kind}"]
        yield f"cls_{kind}, with patches", vit.forward_with_patches([images])[0], case.arrays[f"cls_{kind}"]
        yield f"attn_{kind}", vit.get_last_selfattention(images), case.arrays[f"attn_{kind}"]
        yield f"pos_{kind}", vit.position_embedding(*images.shape[-2:]), case.arrays[f"pos_{kind}"]
        for index, layer in enumerate(vit.get_intermediate_layers(images, vit.depth)):
            if f"layer{index}_{kind}" in case.arrays:
                yield f"layer{index}_{kind}", layer, case.arrays[f"layer{index}_{kind}"]


def weighted_knn(case: Case) -> Iterator[tuple]:
    tensors = [case.tensor(name) for name in ("train", "train_labels", "test", "test_labels")]
    classes = case.params["num_classes"]
    for temperature, k, top1, top5, ambiguous in case.arrays["results"]:
        found = knn_classify(*tensors, [int(k)], temperature, classes)[int(k)]
        label = f"results T={temperature} k={int(k)}"
        yield f"{label} top1", found[0], top1
        yield f"{label} top5", found[1], top5, (0, ambiguous + 1e-9)
    chunks = neighbours_in_chunks(tensors[0], tensors[1], tensors[2], 5, classes)
    votes = torch.cat([class_votes(similarities, labels, 0.07, classes) for _, similarities, labels in chunks])
    yield "votes_first", votes, case.arrays["votes_first"]


def linear_probe(case: Case) -> Iterator[tuple]:
    p = case.params
    lr = p["lr"] * p["B"] * p["world"] / 256
    init = case.state("init")
    heads = LinearHeads(init["linear.weight"][None].clone(), init["linear.bias"][None].clone(), [Recipe(lr)])
    probe, rates, losses = Probe([heads]), [], []
    for epoch in range(p["epochs"]):
        factor = cosine_factor(epoch, p["epochs"])
        rates.append(lr * factor)
        total = 0.0
        for step in range(epoch * p["niter"], (epoch + 1) * p["niter"]):
            layers = case.tensor(f"step{step}/tokens").unbind(1)
            feature = pool_tokens(layers, layers[-1], Feature(p["n"]), 2)
            total += probe.train_step([feature], case.tensor(f"step{step}/target"), p["B"], factor).item()
        losses.append(total / p["niter"])
    yield "lr_per_epoch", rates, case.arrays["lr_per_epoch"]
    yield "mean_loss_per_epoch", losses, case.arrays["mean_loss_per_epoch"]
    yield "weight", heads.weight[0], case.arrays["weight"]
    yield "bias", heads.bias[0], case.arrays["bias"]


def attention_threshold(case: Case) -> Iterator[tuple]:
    attention = case.tensor("attention")
    side = round(attention.shape[1] ** 0.5)
    found = keep_mass(attention.view(-1, side, side), case.params["threshold"])
    yield "mask", found.flatten(1), case.arrays["mask"]


def checkpoint_eval_features(case: Case) -> Iterator[tuple]:
    images, large = case.tensor("x"), case.tensor("x_large")
    features = {
        "knn_cls": lambda model: class_token(model, images),
        "cls_plus": lambda model: model(images)[:, 1],
        "knn_cls_large": lambda model: class_token(model, large),
        "linear_n1": lambda model: Feature(1)(model, images),
        "linear_n2": lambda model: Feature(2)(model, images),
        "linear_avgpool_patches": lambda model: Feature(1, "interleaved")(model, images),
    }
    for name in case.extra_files:
        for key in ("teacher", "student") if "backbone" not in name else ("teacher",):
            model = model_of(case, name, key)
            for label, feature in features.items():
                yield f"{key}/{label} of {name}", feature(model), case.arrays[f"{key}/{label}"]
            tokens = model.get_intermediate_layers(images, 1)[0]
            literal = torch.stack((tokens[:, 0], tokens[:, 1:].mean(1)), dim=2).flatten(1)
            yield f"{key}/linear_avgpool_literal of {name}", literal, case.arrays[f"{key}/linear_avgpool_literal"]
        if "backbone" in name:
            continue
        model = model_of(case, name, "teacher")
        attention = model.get_last_selfattention(large[: len(case.arrays["attn_cls"])], queries=2)[:, :, :, 2:]
        yield f"attn_cls of {name}", attention[:, :, 0], case.arrays["attn_cls"]
        yield f"attn_cls_plus of {name}", attention[:, :, 1], case.arrays["attn_cls_plus"]
        state, info = read_backbone(case.folder / name, "teacher")
        single = select_class_tokens(state, 1)
        yield f"finetune_cls_token of {name}", single["cls_token"], case.arrays["finetune_cls_token"]
        yield f"finetune_pos_embed of {name}", single["pos_embed"], case.arrays["finetune_pos_embed"]
        model = small_vit(case, 1)
        load_tensors(model, single, info)
        yield f"one_cls_knn of {name}", class_token(model, images), case.arrays["one_cls_knn"]
        yield f"one_cls_linear_n2 of {name}", Feature(2)(model, images), case.arrays["one_cls_linear_n2"]


def small_vit(case: Case, class_tokens: int) -> VisionTransformer:
    sizes = {name: case.params[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    return VisionTransformer(**sizes, num_class_tokens=class_tokens).to(case.dtype).eval()


def model_of(case: Case, file: str, key: str) -> VisionTransformer:
    vit = small_vit(case, 2)
    load_tensors(vit, *read_backbone(case.folder / file, key))
    return vit


RUNNERS = {
    "udi/schedules": schedules,
    "udi/head": head,
    "udi/backbone_two_class_tokens": backbone_two_class_tokens,
    "udi/center_two_ranks": on_ranks(centre_on_rank),
    "udi/knn": weighted_knn,
    "udi/linear_probe": linear_probe,
    "udi/attention_threshold": attention_threshold,
    "udi/checkpoint_eval_features": checkpoint_eval_features,
    "udi/srs_module": srs_module,
    "udi/multicrop_forward": multicrop_forward,
    "udi/loss_*": udi_loss,
    "udi/trajectory_*": trajectory,
}
