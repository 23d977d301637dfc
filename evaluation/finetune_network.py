"""What is fine-tuned, and on which images."""

import argparse

import torch

from data.decode import reading_from
from data.index import refresh_indices
from data.labelled import SPLITS, open_labelled
from data.published import place_from
from evaluation.few_labels import listed
from evaluation.finetune_options import LABELLED
from evaluation.sets import Sets, open_train_and_test
from models import ALIASES, VIT, family_of
from models.adapt import load_to_finetune
from models.checkpoints import Network, choose_architecture
from models.finetuned import CutHead, build_finetuned
from models.layouts.table import recorded_image_size
from models.reading import read_backbone
from utils import UsageError, log


def build_network(args: argparse.Namespace) -> tuple[Network, Sets]:
    """The network to be fine-tuned, its weights from --finetune, and the images it will see."""
    state, info, trained_at = {}, None, None
    if args.finetune:
        state, info = read_backbone(args.finetune, args.checkpoint_key, *args.model_key.split("|"))
        trained_at = recorded_image_size(info.arguments)
    sets = build_sets(args, trained_at)
    arch, arguments = architecture(args, state, info)
    family = family_of(arch)
    backbone = family.arguments(arguments) | {"drop_path_rate": args.drop_path}
    if family is not VIT and (args.drop or args.attn_drop_rate):
        raise UsageError(f"--drop {args.drop:g} --attn_drop_rate {args.attn_drop_rate:g}: not for {arch}; leave out")
    family.check_size("--input_size", sets.crop_size, arguments)
    transformer = {
        "img_size": sets.crop_size,
        "num_registers": arguments.get("num_registers", 0),
        "norm_eps": arguments.get("norm_eps", 1e-6),
        "init_values": args.layer_scale_init_value,
        "use_mean_pooling": args.use_mean_pooling,
        "abs_pos_emb": args.abs_pos_emb,
        "rel_pos_bias": args.rel_pos_bias,
        "drop": args.drop,
        "attn_drop": args.attn_drop_rate,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = build_finetuned(arch, sets.classes, args.init_scale, backbone, transformer)
        if kept := getattr(args, "finetune_head_layer", 0):
            model.head = head_inside(args.finetune, state, model.embed_dim, sets.classes, kept)
    report = None
    if info is None:
        log.warning(f"NO --finetune: {arch} IS TRAINED FROM SCRATCH")
    else:
        report = load_to_finetune(model, state, info)
        log.info(f"{info.path}: {info.layout.name}, {arch}: {report}")
        for note in info.notes:
            log.info(f"{info.path}: {note}")
    return Network(model, arch, arguments, report), sets


def head_inside(path: str, state: dict, dim: int, classes: int, kept: int) -> CutHead:
    """A classifier above the first ``kept`` layers of a file's projection head, of that head's widths."""
    needed = [f"head.mlp.{2 * layer}.weight" for layer in range(kept)]
    needed += ["head.last_layer.weight_v", "head.last_layer.weight_g"] * (kept == 3)
    missing = [name for name in needed if name not in state]
    if missing:
        raise UsageError(f"--finetune_head_layer {kept}: {path} has no {missing[0]}; pass a whole checkpoint, or 0")
    widths = {"hidden_dim": len(state[needed[0]])}
    if kept == 3:
        widths["out_dim"], widths["bottleneck_dim"] = state["head.last_layer.weight_v"].shape
    return CutHead(dim, classes, kept, **widths)


def architecture(args: argparse.Namespace, state: dict, info: object) -> tuple[str, dict]:
    """Name and arguments: of --model (timm's long names too), else of the file, else vit_small/16."""
    arch, patch_size = args.model, args.patch_size
    if arch and "_patch" in arch:  # deit_small_patch16_224, swin_tiny_patch4_window7_224
        arch, _, rest = arch.partition("_patch")
        number = rest.split("_")[0]
        if not number.isdecimal() or (patch_size or int(number)) != int(number):
            raise UsageError(f"--model {args.model}: contradicts --patch_size {patch_size}; pass one of them")
        patch_size = int(number)
    arch = ALIASES.get(arch, {"deit_base": "vit_base"}.get(arch, arch))
    if info is not None:
        return choose_architecture(state, info, arch, patch_size, args.window_size)
    arch = arch or "vit_small"
    return arch, family_of(arch).arguments({"patch_size": patch_size, "window_size": args.window_size})


def build_sets(args: argparse.Namespace, recorded_size: int | None) -> Sets:
    """The images, at --input_size, else as the network was trained, else at 224 pixels."""
    size = args.input_size or recorded_size or 224
    whole = args.data_path is None or size >= 384  # a bundled tile has no border to cut off
    resize = int(size / (args.crop_pct or (1.0 if whole else 224 / 256)))
    refresh_indices(args.refresh_index)
    if name := LABELLED.get(args.data_set):
        images = tuple(open_labelled(name, args.data_path, part, official=not args.any_counts) for part in SPLITS)
    else:
        images = open_train_and_test(place_from(args), args.subset, eval_data_path=args.eval_data_path)
    if getattr(args, "target_list_path", None):
        images = listed(images[0], args.target_list_path), images[1]
    return Sets(images, reading_from(args), (size, resize), args.nb_classes, "--nb_classes")
