"""EsViT's configuration files: what they stand for here, and what is refused."""

import pytest

from evaluation.network import add_network_arguments, parse_network_args
from models.esvit_configs import PUBLISHED, options_of, split_command
from training.options import parse_options
from utils import Parser, UsageError

SWINS = "experiments/imagenet/swin/swin_{}_patch4_window{}_224.yaml"


@pytest.mark.parametrize(("size", "window", "rate"), [("tiny", 7, 0.1), ("small", 14, 0.2), ("base", 14, 0.2)])
def test_a_published_name_is_a_network_though_no_file_is_there(size, window, rate):
    options = options_of(SWINS.format(size, window), [("MODEL.NUM_CLASSES", "0")])
    assert options == {"arch": f"swin_{size}", "window_size": window, "patch_size": 4, "drop_path_rate": rate}


def test_every_published_name_is_read():
    archs = {options_of(name, [])["arch"] for name in PUBLISHED}
    assert archs >= {"swin_large", "cvt_tiny", "cvt_small", "vil_2262"}


def test_keys_of_a_command_override_the_file_and_may_stand_in_front_of_an_option():
    arch = "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s0,g0,p2,f7,a0"
    words = ["--local_crops_number", "8", "MODEL.SPEC.MSVIT.ARCH", arch, "MODEL.SPEC.MSVIT.MODE", "1"]
    words = ["--cfg", "x/vil/vil_small/base.yaml", *words, "MODEL.SPEC.MSVIT.VIL_MODE_SWITCH", "0.75", "--epochs", "3"]
    rest, file, pairs = split_command(words)
    assert rest == ["--cfg", "x/vil/vil_small/base.yaml", "--local_crops_number", "8", "--epochs", "3"]
    options = options_of(file, pairs)
    assert (options["arch"], options["vil_arch"], options["vil_mode"]) == ("vil_2262", arch, 1)


def test_what_follows_an_option_is_its_value_whatever_it_looks_like():
    rest, _, pairs = split_command(["--cfg", "a.yaml", "--pretrained_weights", "MODEL.PTH", "MODEL.NUM_CLASSES", "0"])
    assert rest[-2:] == ["--pretrained_weights", "MODEL.PTH"] and pairs == [("MODEL.NUM_CLASSES", "0")]


def test_a_file_that_is_there_is_read_with_its_base_and_without_what_supervised_training_reads(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "MODEL:\n  NAME: swin_transformer\n  SPEC:\n    DIM_EMBED: 96\n    WINDOW_SIZE: 7\n"
    )
    (tmp_path / "own.yaml").write_text(
        "BASE: ['base.yaml']\nAUG:\n  MIXUP: 0.8\nMODEL:\n  SPEC:\n    DEPTHS: [2, 2, 18, 2]\n    WINDOW_SIZE: 14\n"
    )
    assert options_of(str(tmp_path / "own.yaml"), []) == {"arch": "swin_small", "window_size": 14}


def test_training_and_evaluation_take_the_network_of_the_file_whatever_the_name_beside_it_says():
    file = SWINS.format("small", 14)
    args = parse_options(["--method", "esvit", "--arch", "swin_tiny", "--cfg", file, "MODEL.NUM_CLASSES", "0"])
    assert (args.arch, args.window_size, args.patch_size, args.drop_path_rate) == ("swin_small", 14, 4, 0.2)
    parser = Parser()
    add_network_arguments(parser)
    args = parse_network_args(parser, ["--cfg", file, "--arch", "swin_tiny", "MODEL.NUM_CLASSES", "0"])
    assert (args.arch, args.window_size) == ("swin_small", 14)


TINY = SWINS.format("tiny", 7)
BAD = {
    "no such file": (["--cfg", "swin_tny_patch4_window7_224.yaml"], "did you mean swin_tiny_patch4_window7_224"),
    "unknown key": (["--cfg", TINY, "MODEL.SPEC.WINDOW", "7"], "did you mean MODEL.SPEC.WINDOW_SIZE"),
    "no value": (["--cfg", TINY, "MODEL.NUM_CLASSES"], "MODEL.NUM_CLASSES: a key of --cfg without"),
    "no file": (["MODEL.NUM_CLASSES", "0"], "and there is no --cfg"),
    "another kind": (["--arch", "vit_small", "--cfg", TINY], "--arch vit_small --cfg"),
    "no network here": (["--cfg", TINY, "MODEL.SPEC.DEPTHS", "(2,2,4,2)"], "no Swin here has DIM_EMBED"),
    "fixed here": (["--cfg", TINY, "MODEL.SPEC.USE_APE", "True"], "USE_APE True: networks here have"),
    "no name": (["--cfg", TINY, "MODEL.NAME", "cls_vil"], "MODEL.NAME cls_vil is no network"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_what_stands_for_no_network_is_answered_in_one_line(words, said):
    with pytest.raises(UsageError) as error:
        parse_options(["--method", "esvit", *words])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    for text, said in (
        ("- a\n", "not a configuration"),
        ("a: [\n", "cannot be read"),
        ("MODEL:\n  NMAE: x\n", "NAME None"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UsageError, match=said):
            options_of(str(tmp_path / "a.yaml"), [])
    (tmp_path / "a.yaml").write_text("MODEL:\n  NAME: swin_transformer\n  SPEC:\n    DEPHTS: [2, 2, 6, 2]\n")
    with pytest.raises(UsageError, match=r"unknown key MODEL.SPEC.DEPHTS; did you mean MODEL.SPEC.DEPTHS\?"):
        options_of(str(tmp_path / "a.yaml"), [])
