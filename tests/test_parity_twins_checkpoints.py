"""Twins of checkpoints and of what processes agree on: networks and files of other sizes and names."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from methods.heads import DINOHead
from methods.memory import Memory
from methods.mugs import to_file
from tests.parity import Case, find_runner, judge
from tests.parity.mugs_training import small_mugs
from tests.parity.swin import build_swin
from tests.test_parity_twins_mugs import contrast, rewrite
from tests.twins import agrees, as_arrays, golden, random, randomise


@pytest.fixture
def plain(monkeypatch):
    from plain import esvit, textbook

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return {"esvit": esvit, "textbook": textbook}


def placed(case: Case, folder: Path, arrays: dict, outputs: dict) -> Case:
    """The case in a folder of its own, with these arrays in a file of another name."""
    np.savez(folder / "renamed.npz", **as_arrays(arrays | outputs))
    described = [{"key": name} for name in outputs]
    files = {key: f"{name}.pth" for key, name in zip(case.params["files"], "abcd", strict=False)}
    entry = case.entry | {"file": "renamed.npz", "outputs": described, "extra_files": list(files.values())}
    return Case(folder, case.method, entry)


def test_features_of_a_swin_in_files_of_other_names(tmp_path, plain):
    case = golden("esvit", "checkpoint_features")
    config = {"img_size": 24, "patch_size": 2, "embed_dim": 6, "depths": [1, 2, 2], "num_heads": [1, 3, 2]}
    case.params["arch_config"] = config | {"window_size": 3, "mlp_ratio": 3.0}
    case.params["files"] = {"a.pth": "one"}
    arrays, outputs, file = {}, {}, {"epoch": 1}
    for seed, size in enumerate((24, 20)):
        arrays[f"u8_{size}"] = (random(2, 3, size, size, seed=seed).sigmoid() * 255).to(torch.uint8)
    for seed, key in enumerate(("student", "teacher")):
        swin = randomise(build_swin(case.params["arch_config"]), seed=seed)
        state = swin.state_dict() | {f"head.{n}": v for n, v in DINOHead(24, 4).state_dict().items()}
        file[key] = {("module." if key == "student" else "") + n: v for n, v in state.items()}
        with torch.no_grad():
            for size in (24, 20):
                images, seen = (arrays[f"u8_{size}"].double() - 128) / 64, []
                handles = [b.register_forward_hook(lambda _m, _i, y, to=seen: to.append(y)) for b in swin.blocks]
                pooled = plain["esvit"].swin(swin, images, None).mean(dim=1)
                swin.eval()(images)
                for handle in handles:
                    handle.remove()
                outs = [y.flatten(1, 2) for y in seen]
                last = [(swin.norm(y) if y.shape[-1] == swin.embed_dim else y).mean(dim=1) for y in outs]
                for label, value in {
                    "knn": pooled,
                    "knn_normalised": pooled / pooled.norm(dim=1, keepdim=True),
                    "nlast1": pooled,
                    "nlast3": torch.cat(last[-3:], dim=1),
                }.items():
                    outputs[f"{key}_{label}_{size}"] = value
    torch.save(file, tmp_path / "a.pth")
    agrees(placed(case, tmp_path, arrays, outputs))


def test_features_of_mugs_in_files_of_other_names_and_sizes(tmp_path, plain):
    case = golden("mugs", "checkpoint_features")
    model = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 12, "mlp_ratio": 3}
    heads = {"hidden": 5, "pred_hidden": 6, "out": 4, "group_out": 7, "bottleneck": 3}
    p = case.params
    p["model"] |= model
    p |= {"head_sizes": heads, "queue_size": 6, "memory_size": 5, "top_n": 2, "files": {"x": "a.pth", "y": "b.pth (z)"}}
    sizes = {"dim": 8, "depth": 2, "heads": 2, "patch": 4, "img": 12, "mlp_ratio": 3, "hid": 5, "pred": 6, "out": 4}
    method = small_mugs(sizes | {"gout": 7, "bott": 3}, queue_sizes=(6, 6))
    method.memories["student"], method.memories["teacher"] = Memory(8, 5), Memory(8, 5)
    for seed, side in enumerate(("student", "teacher")):
        randomise(getattr(method, side), seed=seed)
    parts = {key: part.state_dict() for key, part in method.checkpoint_parts().items()}
    assert list(parts["teacher"]) == list(to_file(method.teacher.state_dict()))
    file = {
        key: {("module." if key == "student" else "") + n: v for n, v in part.items()} for key, part in parts.items()
    }
    groups = [{"params": list(range(len(group["params"])))} for group in method.param_groups()]
    p["student_keys"], p["teacher_keys"] = list(file["student"]), list(file["teacher"])
    file |= {"optimizer": {"state": {}, "param_groups": groups}, "epoch": 3, "args": {}}
    p["top_level_keys"] = list(file)
    torch.save(file, tmp_path / "a.pth")
    bare = {n.removeprefix("backbone."): v for n, v in file["teacher"].items() if n.startswith("backbone.")}
    torch.save({"state_dict": bare}, tmp_path / "b.pth")
    arrays, outputs = {"in.images": random(2, 3, 12, 12), "in.images_rect": random(2, 3, 8, 20, seed=1)}, {}
    for side in ("student", "teacher"):
        network = getattr(method, side).backbone
        for rect, images in (("", arrays["in.images"]), ("rect.", arrays["in.images_rect"])):
            layers = []
            handles = [b.register_forward_hook(lambda _m, _i, y, to=layers: to.append(y)) for b in network.blocks]
            with torch.no_grad():
                network.get_intermediate_layers(images, 2)
                x = plain["textbook"].vit(network, images, None)
                for handle in handles:
                    handle.remove()
                before = network.norm(layers[0].view(2, -1, 8))[:, 0]
            found = {"knn": x[:, 0], "knn_l2": F.normalize(x[:, 0], dim=1), "multi_avg1": x[:, 1:].mean(dim=1)}
            found |= {"linear_n2": torch.cat((before, x[:, 0]), dim=1)}
            outputs |= {f"out.{side}.{rect}{name}": value for name, value in found.items()}
    outputs |= {n: v for n, v in outputs.items() if n.startswith("out.teacher")}
    agrees(placed(case, tmp_path, arrays, outputs))


def test_what_two_processes_of_mugs_hold_with_other_sizes():
    """More than a pipe holds at once; a queue that is written over twice, and a step in which no image is weak."""
    case, crops, batch, dim, size, groups, wide, rows = golden("mugs", "two_rank_state"), 3, 3, 40, 23, 150, 30, 11
    p = {"batch_per_rank": batch, "ncrops": crops, "dim": dim, "queue_size": size, "temperature": 0.4}
    p |= {"group_out_dim": groups, "memory_dim": wide, "memory_size": rows, "steps": 4, "student_temp": 0.3}
    p |= {"warmup_teacher_temp": 0.1, "teacher_temp": 0.2, "warmup_teacher_temp_epochs": 2, "nepochs": 4}
    case.params |= p | {"center_momentum": 0.7, "epoch_of_step": [0, 1, 2, 3]}
    queue, memory = F.normalize(random(dim, size), dim=0), random(rows, wide, seed=1)
    centre, places, temps = torch.zeros(1, groups).double(), [0, 0], [0.1, 0.2, 0.2, 0.2]
    inputs, outputs = {"in.queue_init": queue.clone(), "in.mem_init": memory.clone()}, {}
    for step, temp in enumerate(temps):
        keys, logits, written = [], [], []
        for rank in range(2):
            seed, name = 50 + 20 * step + 10 * rank, f"step{step}.rank{rank}"
            z = F.normalize(random(crops * batch, dim, seed=seed), dim=1).requires_grad_()
            keys.append(F.normalize(random(2, batch, dim, seed=seed + 1), dim=2))
            student = random(crops * batch, groups, seed=seed + 2).requires_grad_()
            logits.append(random(2 * batch, groups, seed=seed + 3))
            tokens, weak = random(batch, wide, seed=seed + 4), torch.tensor([step != 1, rank == 0 and step != 1, False])
            written += list(tokens[weak])
            nce = contrast(z, keys[rank], queue.clone(), 0.4)
            targets = ((logits[rank] - centre) / temp).softmax(dim=1).chunk(2)
            views = (student / 0.3).log_softmax(dim=1).chunk(crops)
            pair = {(i, v): -(q * s).sum(1).mean() for i, q in enumerate(targets) for v, s in enumerate(views)}
            small = [value for (_, v), value in pair.items() if v > 1]
            group = ((pair[0, 1] + pair[1, 0]) / 2 + sum(small) / len(small)) / 2
            given = {"s": z, "t": keys[rank].flatten(0, 1), "gs": student, "gt": logits[rank], "tok": tokens}
            inputs |= {f"in.{name}.{kind}": value.detach() for kind, value in (given | {"weak": weak}).items()}
            found = {"nce_loss": nce, "nce_grad": torch.autograd.grad(nce, z)[0], "group_loss": group}
            found["group_grad"] = torch.autograd.grad(group, student)[0]
            outputs |= {f"out.{name}.{kind}": value.detach() for kind, value in found.items()}
        for key in torch.cat(keys, dim=1).flatten(0, 1):
            queue[:, places[0]] = key
            places[0] = (places[0] + 1) % size
        for at, row in enumerate(written):
            memory[(places[1] + at) % rows] = row
        end = places[1] + len(written)
        places[1] = (end + len(written)) % rows if end <= rows else end - rows
        centre = 0.7 * centre + 0.3 * torch.cat(logits).mean(dim=0, keepdim=True)
        found = {"queue": queue.clone(), "center": centre, "mem": memory.clone(), "ptrs": [*places, len(written)]}
        outputs |= {f"out.step{step}.{kind}": value for kind, value in found.items()}
    result = judge(rewrite(case, inputs, outputs), find_runner(case))  # once, since processes take their time
    assert result.status == "ok", result.problems
