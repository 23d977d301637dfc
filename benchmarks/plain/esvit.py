"""EsViT as its algorithm is written: a Swin that pads before qkv and makes its masks anew, logits of every token, and
for every pair of a teacher's view and a crop the teacher's tokens gathered and a log-softmax.
"""

import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.esvit import EsViT
from models.swin import SwinBlock, SwinTransformer, relative_position_index, shift_mask
from models.vit import VisionTransformer
from plain import textbook

Regions = tuple[torch.Tensor, list[torch.Tensor]]  # vectors of crops, tokens (samples, n, dim) of every size of them


def forward(method: EsViT, batch: dict, clock: Clock) -> torch.Tensor:
    crops = batch["crops"]
    draws = clock.drop_path_draws(method.student.backbone.depth, len(crops), len(crops[0]))
    with torch.no_grad():
        teacher = regions(method.teacher.backbone, crops[:2], None)
    return heads_and_loss(method, regions(method.student.backbone, crops, draws), teacher, clock)


def regions(network: SwinTransformer | VisionTransformer, crops: list[torch.Tensor], draws) -> Regions:
    batch, first, vectors, tokens = len(crops[0]), 0, [], []
    while first < len(crops):
        last = first
        while last < len(crops) and crops[last].shape == crops[first].shape:
            last += 1
        part = None if draws is None else draws[..., first * batch : last * batch]
        images = torch.cat(crops[first:last])
        if isinstance(network, VisionTransformer):
            x = textbook.vit(network, images, part)
            vectors, tokens = [*vectors, x[:, 0]], [*tokens, x[:, 1:]]
        else:
            tokens.append(swin(network, images, part))
            vectors.append(tokens[-1].mean(dim=1))
        first = last
    return torch.cat(vectors), tokens


def swin(network: SwinTransformer, images: torch.Tensor, draws) -> torch.Tensor:
    """Normalised tokens of the last stage (batch, tokens, dim)."""
    x, index = network.patch_embed(images), 0
    for layer in network.layers:
        for block in layer.blocks:
            for branch in (0, 1):
                y = attention(block, block.norm1(x)) if branch == 0 else block.mlp(block.norm2(x))
                if draws is not None and block.drop_path > 0:
                    kept = torch.from_numpy(draws[index, branch] >= block.drop_path).to(y.device)
                    y = y / (1 - block.drop_path) * kept[:, None, None, None]
                x = x + y
            index += 1
        if layer.downsample is not None:
            x = layer.downsample(x)
    return network.norm(x.flatten(1, 2))


def attention(block: SwinBlock, x: torch.Tensor) -> torch.Tensor:
    """(batch, side, side, dim) -> the same shape: padded, shifted, cut into windows, and back."""
    attn, window, shift = block.attn, block.attn.window, block.attn.shift
    batch, side, _, dim = x.shape
    x = F.pad(x, (0, 0, 0, -side % window, 0, -side % window))
    padded, heads = x.shape[1], attn.num_heads
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    count = padded // window
    x = x.view(batch, count, window, count, window, dim).transpose(2, 3).reshape(-1, window**2, dim)
    q, k, v = attn.qkv(x).reshape(len(x), window**2, 3, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * (dim // heads) ** -0.5) @ k.transpose(-2, -1)
    index = relative_position_index(window).to(x.device)
    bias = attn.relative_position_bias_table[index.flatten()].view(window**2, window**2, heads)
    logits = logits + bias.permute(2, 0, 1)
    if shift:
        mask = shift_mask(padded, window, shift).to(x.device)
        logits = (logits.view(batch, count**2, heads, window**2, window**2) + mask[:, None]).view_as(logits)
    x = attn.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(len(x), window**2, dim))
    x = x.view(batch, count, count, window, window, dim).transpose(2, 3).reshape(batch, padded, padded, dim)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x[:, :side, :side]


def heads_and_loss(method: EsViT, student: Regions, teacher: Regions, clock: Clock) -> torch.Tensor:
    """Both tasks, from the backbones' outputs; the centres are moved."""
    centres, temp = method.centres, method.teacher_temps[clock.epoch]
    batch, per_view = len(teacher[0]) // 2, teacher[1][0].shape[1]
    crops = len(student[0]) // batch
    s_tokens, t_tokens = (torch.cat([part.flatten(0, 1) for part in tokens]) for _, tokens in (student, teacher))
    with torch.no_grad():
        t_logits = textbook.head(method.teacher.head, teacher[0])
        t_regions = textbook.head(method.teacher.head_dense, t_tokens)
        q_regions = F.softmax((t_regions.float() - centres.center_grid) / temp, dim=-1).chunk(2)
    temps = method.student_temp, temp
    logits = textbook.head(method.student.head, student[0])
    view = textbook.cross_view_loss(logits, t_logits, centres.center, temps, crops)
    sizes = [part.shape[1] * batch for part in student[1] for _ in range(len(part) // batch)]
    s_regions = (textbook.head(method.student.head_dense, s_tokens).float() / method.student_temp).split(sizes)
    s_features, t_features = s_tokens.split(sizes), t_tokens.chunk(2)
    total, terms = 0.0, 0
    for i in range(2):
        targets = q_regions[i].unflatten(0, (batch, per_view))
        theirs = F.normalize(t_features[i].float().unflatten(0, (batch, per_view)), dim=-1)
        for v in range(crops):
            if v == i:
                continue
            ours = F.normalize(s_features[v].float().unflatten(0, (batch, -1)), dim=-1)
            match = (ours @ theirs.transpose(1, 2)).max(dim=2)[1]
            gathered = targets.gather(1, match[..., None].expand(-1, -1, targets.shape[-1]))
            predicted = F.log_softmax(s_regions[v].unflatten(0, (batch, -1)), dim=-1)
            total = total + torch.sum(-gathered * predicted, dim=-1).mean(dim=-1).mean()
            terms += 1
    textbook.move(centres.center, t_logits.float(), centres.momentum)
    textbook.move(centres.center_grid, t_regions.float(), centres.momentum)
    return 0.5 * view + 0.5 * total / terms
