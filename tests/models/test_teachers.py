import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.preprocess import MEAN, STD
from methods.base import Clock
from models import build_backbone, library
from models.batch_norm import synchronise_batch_norm
from models.checkpoints import weights_hash
from models.teachers import CLIP, IMAGENET, PUBLISHED, Pixels, Teacher, build_teachers, check_teachers
from models.vit import Variant, VisionTransformer
from simulation.gpu import DEVICE, fake_gpu, obstacle
from simulation.watch import Record
from utils import UsageError

NAMES = "dino_vitbase_16,deit3_vitbase_16,ibot_vitbase_16,dbotft_vitbase_16"
SIZES = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def file(tmp_path):
    """Writes the weights of a small network of ours, or of another one."""

    def write(model: nn.Module, name: str = "file", **beside):
        path = tmp_path / f"{name}.pth"
        torch.save({"state_dict": model.state_dict(), **beside} if beside else model.state_dict(), path)
        return path

    return write


def micro(**options) -> VisionTransformer:
    model = build_backbone("vit_micro", **{"patch_size": 8, "img_size": 32} | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


class Recorder(nn.Module):
    """A network that says what it was shown: patches of 8 pixels, in three numbers each."""

    num_prefix_tokens = 1

    def forward_features(self, images):
        self.shown = images
        maps = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return torch.cat((maps.mean(dim=1, keepdim=True), maps), dim=1)


def test_the_numbers_of_imagenet_are_those_that_the_data_is_normalised_by():
    assert tuple(IMAGENET) == (MEAN, STD)


def test_a_teacher_sees_the_image_in_its_own_size_and_with_its_own_numbers():
    colours = torch.rand(2, 3, 32, 32)
    network = Recorder()
    teacher = Teacher("clip", network, dim=3, side=48, grid=6, pixels=CLIP)
    seen = (colours - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    classes, patches = teacher(seen)
    expected = (colours - torch.tensor(CLIP.mean).view(3, 1, 1)) / torch.tensor(CLIP.std).view(3, 1, 1)
    expected = F.interpolate(expected, size=(48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(network.shown, expected, rtol=1e-5, atol=1e-5)
    assert classes.shape == (2, 3) and patches.shape == (2, 36, 3)
    Teacher("same", network, dim=3, side=32, grid=4)(seen)
    assert network.shown is seen


def test_a_map_of_another_grid_is_resampled_to_that_of_the_student():
    teacher = Teacher("coarse", Recorder(), dim=3, side=32, grid=8)
    images = torch.rand(2, 3, 32, 32)
    _, patches = teacher(images)
    maps = F.interpolate(F.avg_pool2d(images, 8), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(patches, maps.flatten(2).transpose(1, 2))


def test_teachers_of_files_come_sorted_and_are_frozen_for_good(file):
    model, swin = micro(drop_path_rate=0.5), build_backbone("swin_tiny").eval()
    words = f"second={file(swin, 'b')}, first={file(model, 'a')}"
    first, second = build_teachers(words, image_size=64, patch_size=16, download=False)
    assert [(t.name, t.dim, t.side) for t in (first, second)] == [("first", 128, 32), ("second", 768, 128)]
    assert "vit_micro/8 from" in first.about and "sees images of 32 pixels" in first.about
    images = torch.randn(2, 3, 64, 64)
    classes, patches = first(images)
    tokens = model.forward_features(F.interpolate(images, size=(32, 32), mode="bicubic", antialias=True))
    torch.testing.assert_close((classes, patches), (tokens[:, 0], tokens[:, 1:]))
    assert second(images)[1].shape == (2, 16, 768)
    first.train()
    assert not any(module.training for module in first.modules())
    assert not classes.requires_grad and not any(parameter.requires_grad for parameter in first.parameters())
    again = build_teachers(f"first={file(model, 'moved')}", 32, 8, download=False)[0]
    assert weights_hash(again) == weights_hash(first), "normalisation and place are no weights"


def open_clip_names(state: dict) -> dict:
    """Our names -> those of an image tower in open_clip's files, which hold a text tower as well."""
    named = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("norm_pre.", "ln_pre."),
            ("blocks.", "transformer.resblocks."),
            (".norm1.", ".ln_1."),
            (".norm2.", ".ln_2."),
            (".attn.qkv.", ".attn.in_proj_"),
            (".attn.proj.", ".attn.out_proj."),
            (".mlp.fc1.", ".mlp.c_fc."),
            (".mlp.fc2.", ".mlp.c_proj."),
        ):
            name = name.replace(ours, theirs)
        named[f"visual.{'ln_post' + name[4:] if name.startswith('norm.') else name}"] = tensor
    named["visual.class_embedding"] = named.pop("visual.cls_token").flatten()
    named["visual.positional_embedding"] = named.pop("visual.pos_embed")[0]
    named["visual.conv1.weight"] = named.pop("visual.patch_embed.proj.weight")
    del named["visual.patch_embed.proj.bias"]
    text = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(5)}
    return named | {"visual.proj": torch.zeros(128, 7)} | text


def test_a_clip_is_read_with_its_activation_its_numbers_and_its_norms(tmp_path):
    model = micro(variant=Variant(mlp="quick_gelu", norm_first=True), norm_eps=1e-5)
    nn.init.zeros_(model.patch_embed.proj.bias)
    torch.save(open_clip_names(model.state_dict()), tmp_path / "clip.pt")
    (teacher,) = build_teachers(f"metaclip_micro_8={tmp_path / 'clip.pt'}", 32, 8, download=False)
    assert teacher.pixels == CLIP and "QuickGELU" in teacher.about
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images * teacher.scale + teacher.shift)
    torch.testing.assert_close(teacher(images), (tokens[:, 0], tokens[:, 1:]))
    with pytest.raises(UsageError, match=r"metaclip_vithuge_14.*holds a vit_micro"):
        build_teachers(f"metaclip_vithuge_14={tmp_path / 'clip.pt'}", 32, 8, download=False)


def test_the_targets_of_the_published_layouts_are_those_of_their_papers(tmp_path):
    """DeiT III positions patches alone and scales its layers; dBOT's target of an image is what it pools."""
    images = torch.randn(2, 3, 48, 48)
    deit, dbot = micro(init_values=0.1), micro(use_mean_pooling=True)
    nn.init.zeros_(deit.pos_embed.data[:, :1])
    head = {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    patches_alone = {"pos_embed": deit.pos_embed[:, 1:].clone()}
    torch.save({"model": deit.state_dict() | patches_alone | head}, tmp_path / "deit.pth")
    torch.save({"model": dbot.state_dict() | head}, tmp_path / "dbot.pth")
    texts = f"deit={tmp_path / 'deit.pth'},dbot={tmp_path / 'dbot.pth'}"
    second, first = build_teachers(texts, 48, 8, download=False)
    tokens = deit.forward_blocks(images)[-1]
    torch.testing.assert_close(first(images), (deit.norm(tokens)[:, 0], deit.norm(tokens)[:, 1:]))
    tokens = dbot.forward_blocks(images)[-1]
    torch.testing.assert_close(second(images), (dbot.fc_norm(tokens[:, 1:].mean(dim=1)), tokens[:, 1:]))


def test_a_file_may_be_a_checkpoint_with_registers_and_a_network_of_a_library(file):
    registers = micro(num_registers=2, init_values=0.1)
    beside = {"args": {"arch": "resnet18"}, "epoch": 1}
    resnet = build_backbone("resnet18").eval()
    texts = f"a={file(registers, 'a')},b={file(resnet, 'b', **beside)}"
    first, second = build_teachers(texts, 64, 16, download=False)
    assert first(torch.randn(1, 3, 64, 64))[1].shape == (1, 16, 128)
    images = torch.randn(2, 3, 128, 128)
    classes, patches = second(images)
    assert second.side == 128 and patches.shape == (2, 16, 512)
    with torch.no_grad():
        torch.testing.assert_close(classes, resnet(images))
    torch.testing.assert_close(patches.mean(dim=1), classes)


@pytest.mark.parametrize(
    ("name", "side", "dim"),
    [
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", 64, 192),
        ("timm/regnetx_002", 128, 368),
        ("timm/mixer_s32_224", 224, 512),
    ],
)
def test_networks_of_timm_are_teachers_with_their_own_numbers(name, side, dim, file):
    """The last one takes one size only, so that its map is resampled."""
    model = build_backbone(".".join(name.split(".")[:1])).eval()
    (teacher,) = build_teachers(f"{name}={file(model)}", 64, 16, download=False)
    assert (teacher.side, teacher.dim) == (side, dim)
    assert teacher.pixels == Pixels(*(tuple(model.pretrained_cfg[key]) for key in ("mean", "std")))
    images = torch.randn(2, 3, 64, 64)
    classes, patches = teacher(images)
    assert classes.shape == (2, dim) and patches.shape == (2, 16, dim)
    shown = images * teacher.scale + teacher.shift
    shown = F.interpolate(shown, size=(side, side), mode="bicubic", antialias=True) if side != 64 else shown
    with torch.no_grad():
        torch.testing.assert_close(classes, model(shown))


def test_batch_norms_of_a_teacher_ask_no_other_process(file, monkeypatch):
    model = build_backbone("timm/regnetx_002").eval()  # whose batch norms have an activation
    (teacher,) = build_teachers(f"timm/regnetx_002={file(model)}", 64, 32, download=False)
    images = torch.randn(2, 3, 64, 64)
    alone = teacher(images)
    monkeypatch.setattr("models.batch_norm.world_size", lambda: 2)
    monkeypatch.setattr("models.batch_norm.all_gather_rows", lambda rows: pytest.fail("asked another process"))
    synchronise_batch_norm(teacher).train()
    torch.testing.assert_close(teacher(images), alone)
    before = [buffer.clone() for buffer in teacher.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.buffers(), strict=True))


def test_products_of_a_placed_teacher_are_in_half_and_its_norms_are_not():
    network = VisionTransformer(**SIZES)
    images = torch.randn(2, 3, 32, 32)
    teacher = Teacher("vit", network, dim=24, side=32, grid=4)
    whole = teacher(images)
    teacher.place(None)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    teacher.place(torch.bfloat16)
    halves = {name.split(".")[-2] for name, p in network.named_parameters() if p.dtype == torch.bfloat16}
    assert halves == {"proj", "qkv", "fc1", "fc2"}
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher(images)
    assert all(part.dtype == torch.float32 for part in half)
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)


def test_timm_may_fetch_weights_only_if_it_is_told_to(monkeypatch):
    asked = []

    def create(name, pretrained, **options):
        asked.append((name, pretrained))
        raise OSError("no route to host\nat all")

    import timm

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UsageError, match="pass timm/vit_tiny_patch16_224=FILE, or --download_teachers"):
        build_teachers("timm/vit_tiny_patch16_224", 224, 16, download=False)
    assert not asked
    with pytest.raises(UsageError, match=r"its weights cannot be fetched: no route to host$"):
        build_teachers("timm/vit_tiny_patch16_224", 224, 16, download=True)
    assert asked == [("vit_tiny_patch16_224", True)]


def test_published_names_are_looked_for_in_a_folder_and_their_absence_says_where_they_come_from(
    tmp_path, monkeypatch, file
):
    monkeypatch.chdir(tmp_path)
    check_teachers(NAMES)
    for name, published in PUBLISHED.items():
        with pytest.raises(UsageError) as refused:
            build_teachers(name, 224, 14, download=False)
        assert published.source in str(refused.value) and f"pass {name}=FILE" in str(refused.value)
    (tmp_path / "teachers").mkdir()
    file(micro(), "teachers/dino_vitbase_16")
    with pytest.raises(UsageError, match=r"teachers/dino_vitbase_16\.pth holds a vit_micro .* not a vit_base/16"):
        build_teachers("dino_vitbase_16", 32, 8, download=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--teachers is empty"),
        (" , ", "--teachers is empty"),
        ("dino_vitbase_15", "unknown; did you mean dino_vitbase_16"),
        ("mine", "any other as mine=FILE"),
        ("dino_vitbase_16,mine=a,dino_vitbase_16=b", "dino_vitbase_16: named twice"),
        ("=a.pth", "a name has letters"),
        ("a.b=c", "a name has letters"),
        ("mine=", "write mine=FILE"),
        ("timm/vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("timm/vit_base_patch16_224.din", "did you mean vit_base_patch16_224.dino"),
    ],
)
def test_names_that_cannot_mean_anything_are_refused_in_one_line(text, words):
    with pytest.raises(UsageError) as refused:
        check_teachers(text)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UsageError):
        build_teachers(text, 224, 16, download=False)


def test_files_that_cannot_be_teachers_are_refused_in_one_line(tmp_path, file):
    (tmp_path / "text.pth").write_text("hello")
    classifier = nn.Linear(3, 3)
    incomplete = {name: tensor for name, tensor in micro().state_dict().items() if "fc2.bias" not in name}
    torch.save(incomplete, tmp_path / "incomplete.pth")
    wide = build_backbone("timm/mobilenetv3_small_050")
    for text, words in (
        (f"mine={tmp_path / 'none.pth'}", "no such file; check the path"),
        (
            f"dino_vitbase_16={tmp_path / 'none.pth'}",
            "no such file; it comes from https://dl.fbaipublicfiles.com/dino/",
        ),
        (f"mine={tmp_path / 'text.pth'}", "text.pth"),
        (f"mine={file(classifier, 'classifier')}", "--teachers mine: "),
        (f"mine={tmp_path / 'incomplete.pth'}", "does not fit the network"),
        (f"metaclip_vithuge_14={file(micro(), 'micro')}", "holds a vit_micro (width 128, 4 blocks)"),
        (f"timm/mobilenetv3_small_050={file(wide, 'wide')}", "pooled features are 1024 wide and its patches 288"),
    ):
        with pytest.raises(UsageError) as refused:
            build_teachers(text, 32, 8, download=False)
        assert words in str(refused.value) and "\n" not in str(refused.value), refused.value


class Rows(nn.Module):
    """Features that lie in a row."""

    def forward_features(self, images):
        return torch.zeros(len(images), 1 + 5, 4)

    def forward_head(self, tokens, pre_logits):
        return tokens[:, 0]

    num_prefix_tokens = 1


def test_a_grid_that_cannot_be_made_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(library, "timm_backbone", lambda *args, **more: Rows())
    with pytest.raises(
        UsageError, match=r"--teachers timm/resnet18: its features \(1, 5, 4\) are no square grid of"
    ) as error:
        build_teachers("timm/resnet18", 32, 8, download=True)
    assert "\n" not in str(error.value)


# ---- on a GPU ------------------------------------------------------------------------------------------------------

NETWORKS = {
    "own size, SwiGLU, registers": lambda: VisionTransformer(
        **SIZES, num_registers=2, variant=Variant(mlp="swiglu", norm_first=True)
    ),
    "Swin": lambda: build_backbone("swin_tiny"),
    "batch norm": lambda: build_backbone("timm/regnetx_002"),
    "ResNet": lambda: build_backbone("resnet18"),
    "timm": lambda: build_backbone("timm/vit_tiny_patch16_224"),
}


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_no_teacher_waits_for_the_gpu(make):
    with fake_gpu() as gpu:

        def teacher() -> Teacher:
            return Teacher("any", make(), dim=1, side=64, grid=5, pixels=CLIP)

        model = gpu.build(teacher, torch.float32).place(torch.bfloat16)
        images = torch.randn(4, 3, 40, 40, device=DEVICE)
        for _ in range(2):
            gpu.watch.record = Record()
            with torch.autocast("cuda", torch.bfloat16):
                classes, patches = model(images)
        record = gpu.watch.record
        assert not record.waits and not record.pageable and not record.in_half
        assert patches.shape[:2] == (4, 25) and classes.dtype == patches.dtype == torch.float32


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_no_student_that_drops_by_rank_waits_for_the_gpu():
    with fake_gpu() as gpu:
        sizes = {"num_registers": 2, "variant": Variant(mlp="swiglu"), "drop_path_rate": 0.3}
        model = gpu.build(lambda: VisionTransformer(**SIZES, **sizes), torch.float32)
        images = torch.randn(4, 3, 40, 40, device=DEVICE)
        clock = Clock(0, 0, first_sample=4, global_batch=12)
        for _ in range(2):
            gpu.watch.record = Record()
            with torch.autocast("cuda", torch.bfloat16):
                blocks = model.forward_blocks(images, clock.batch_draws(2, 4))
            sum(block.float().square().mean() for block in blocks).backward()
        record = gpu.watch.record
        assert not record.waits and not record.pageable and not record.in_half
        assert sum(record.pinned.values()) == 1
