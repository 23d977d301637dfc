"""Names of tensors: from those of published files to those of our networks, and to timm's. Pure functions on dicts."""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from models.safe_load import CheckpointError
from utils import shortened

State = dict[str, torch.Tensor]

# what wraps a module in place, wherever that module stands: DDP, torch.compile, FSDP, recomputed blocks, Fabric
WRAPPER = re.compile(
    r"\b(module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
# what holds a network beside its head, so only in front: multi-crop wrapper (UDI's twice), UNIC's encoder
HOLDERS = ("backbone.", "encoder.")

# a tensor that a network has once and near its images: a vision transformer's, a Swin's (torchvision's both too), a
# ResNet's, those of CvT, Vision Longformer, CLIP and Hugging Face
LANDMARK = re.compile(
    r"(?P<prefix>(?:.+?\.)??)(?:backbone\.|encoder\.)*"
    r"(?:pos_embed|(?:embeddings\.)?(?<!layer\d\.0\.)cls_token"  # each stage of a Vision Longformer has one
    r"|class_token|features\.1\.0\.norm1\.weight|layers\.0\.blocks\.0\.norm1\.weight|layer1\.0\.conv1\.weight"
    r"|stage0\.0\.proj\.weight"
    r"|layer1\.0\.norm_embed\.weight|visual\.conv1\.weight|embeddings\.patch_embeddings\.projection\.weight)"
)

# in files: heads, classifiers and decoders, whoever saved them
NOT_BACKBONE = re.compile(
    r"(\w+_)?head(_\w+)?\.|(fc|linear|classifier|lp|decoder_\w+)(\.|$)|\d+\.(module\.)?linear\.|fc_norm\."
)
# in networks: what only pretraining reads, or what follows from the architecture
NOT_NEEDED = re.compile(
    r"masked_embed$|n_averaged$|pos_grid$|.*\b(num_batches_tracked|relative_position_index|attn_mask)$"
)


def unwrapped(name: str) -> str:
    """``name`` without the words of wrappers, wherever they stand: blocks can be wrapped one by one."""
    return WRAPPER.sub("", name)


def plain_name(name: str) -> str:
    """``name`` without the words of wrappers, and without what holds the network in front."""
    name = unwrapped(name)
    while prefix := next((prefix for prefix in HOLDERS if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def renamed(state: State, rename: Callable[[str], str]) -> State:
    """Every tensor under its new name. Raises CheckpointError where two would get the same one."""
    result = {rename(name): tensor for name, tensor in state.items()}
    if len(result) < len(state):
        names = [rename(name) for name in state]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"several tensors would be called {twice}: more than one network, which is to be split")
    return result


def networks_in(names: Collection[str]) -> list[str]:
    """What stands in front of the names of every network among unwrapped ones: "", "teacher_backbone.", ...

    Networks are told by their landmarks. Without any, what all names begin with counts: it belongs to one network.
    """
    found = [match["prefix"] for name in names if (match := LANDMARK.fullmatch(name))]
    if not found and len(names) > 2:  # two tensors are a classifier, which is called something
        columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = itertools.takewhile(lambda words: len(set(words)) == 1, columns)
        found = ["".join(f"{words[0]}." for words in shared)]
    return list(dict.fromkeys(found))


def below(state: State, prefix: str, others: Sequence[str] = ()) -> State:
    """The tensors whose names begin with ``prefix``, without it, but for those of the ``others`` that lie deeper."""
    deeper = tuple(other for other in others if other != prefix and other.startswith(prefix))
    kept = [name for name in state if name.startswith(prefix) and not name.startswith(deeper)]
    return {name.removeprefix(prefix): state[name] for name in kept}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """What a network's ``names`` are called once a file's wrappers, holders and prefix are gone -> those names.

    Some networks have such words in names of their own: iformer's ``mixer.module.0``, DenseNet's ``features.``.
    """
    own = {unwrapped(name): name for name in names}
    prefixes = networks_in(own)
    prefix = prefixes[0] if len(prefixes) == 1 else ""
    return {plain_name(name.removeprefix(prefix)): own[name] for name in own}


def strip_wrappers(state: State) -> State:
    return renamed(state, plain_name)


def unchunk_blocks(state: State) -> State:
    """``blocks.<chunk>.<i>.`` -> ``blocks.<i>.``: DINOv2 and UNIC group blocks in chunks; i counts through them.

    Those of networks of several stages, which have no class token, are numbered anew in every stage.
    """
    if "cls_token" not in state:
        return state
    return renamed(state, lambda name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name))


def rename_tokens_and_scales(state: State) -> State:
    """DINOv2's and timm's names of LayerScale, registers and mask token -> those of models/vit.py."""
    names = {"reg_token": "register_tokens", "mask_token": "masked_embed"}
    return renamed(state, lambda name: names.get(name, re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)))


def name_gates(state: State) -> State:
    """timm's names of DINOv2's SwiGLU, which are those of a plain MLP -> DINOv2's. Its blocks have LayerScale."""
    first, second = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if (
        first is None
        or second is None
        or first.ndim != 2
        or second.ndim != 2
        or first.shape[0] != 2 * second.shape[1]
        or "blocks.0.gamma_1" not in state
    ):
        return state
    return renamed(state, lambda name: name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."))


HUGGING_FACE = (  # names of transformers' ViT and Dinov2, in files and (since version 5) in memory -> ours
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.mask_token$", "masked_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def rename_hugging_face(state: State) -> State:
    """The names of Hugging Face's ViT and Dinov2 -> those of models/vit.py, but for query, key and value."""

    def rename(name: str) -> str:
        for pattern, ours in HUGGING_FACE:
            name = re.sub(pattern, ours, name)
        return name

    return renamed(state, rename)


def join_layers(state: State) -> State:
    """``attn.q``, ``.k``, ``.v`` of a block -> ``attn.qkv``, ``mlp.w1``, ``.w2`` -> ``mlp.w12``, if all are there."""
    for front, letters in ((".attn.", "qkv"), (".mlp.w", "12")):
        state = _joined(state, re.compile(rf"(.*{re.escape(front)})([{letters}])(\.\w+)"), letters)
    return state


def _joined(state: State, pattern: re.Pattern, letters: str) -> State:
    joined: State = {}
    for name, tensor in state.items():
        head, part, tail = match.groups() if (match := pattern.fullmatch(name)) else ("", "", "")
        names = [f"{head}{letter}{tail}" for letter in letters]
        if not part or not all(other in state for other in names):
            joined[name] = tensor
        elif part == letters[0]:
            joined[f"{head}{letters}{tail}"] = torch.cat([state[other] for other in names])
    return joined


def to_timm(state: State, fold_class_position: bool | None = None) -> State:
    """Our names -> those of timm's vision transformers without classifier; heads and mask token stay behind.

    ``fold_class_position``: add the class token's position to the token itself and keep those of patches only, as timm
    holds networks with registers and DeiT III; None folds for those. Of several class tokens timm gets the first.
    """
    state = {
        name: tensor
        for name, tensor in state.items()
        if not (NOT_BACKBONE.match(name) or name in ("masked_embed", "pos_grid"))
    }
    if {"cls_token", "pos_embed"} <= state.keys():
        token, position = state["cls_token"][:, :1], state["pos_embed"][:, :1]
        patches = state["pos_embed"][:, state["cls_token"].shape[1] :]
        if fold_class_position is None:
            fold_class_position = "register_tokens" in state or not position.any()
        state["cls_token"] = token + position if fold_class_position else token.clone()
        state["pos_embed"] = patches.clone() if fold_class_position else torch.cat((position, patches), dim=1)
    for ours, theirs in (
        (r"^register_tokens$", "reg_token"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ):
        state = {re.sub(ours, theirs, name): tensor for name, tensor in state.items()}
    return state


def grouped(names: list[str]) -> str:
    """``head.* (8), masked_embed``."""
    counts: dict[str, int] = {}
    for name in names:
        group = name.split(".")[0]
        counts[group] = counts.get(group, 0) + 1
    groups = [group if group in names else f"{group}.* ({count})" for group, count in counts.items()]
    return listed(groups)


def listed(names: Iterable[str], show: int = 12) -> str:
    """The first ``show`` names, shortened, and how many more there are."""
    names = list(names)
    return ", ".join(
        [shortened(name) for name in names[:show]] + [f"... {len(names) - show} more"] * (len(names) > show)
    )


def square_side(count: int) -> int | None:
    """The side of a square grid of ``count`` patches, None when there is none."""
    side = round(max(count, 0) ** 0.5)
    return side if side > 0 and side * side == count else None
