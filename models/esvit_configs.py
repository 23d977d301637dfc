"""EsViT's configuration files: ``--cfg FILE KEY VALUE ...`` -> options of ours.

A published file need not be there: its name stands for an architecture. Of a file that is there, BASE files first, the
keys that mean something for a network are read; what only supervised training reads is passed over. KEY VALUE pairs at
the end of a command override the file.
"""

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from models.layouts.shapes import SWIN_OF_SHAPE
from utils import UsageError, escape, nearest

KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")
SPEC, LONGFORMER = "MODEL.SPEC.", "MODEL.SPEC.MSVIT."
NETWORKS = {"swin_transformer": "swin", "cvt_v4_transformer": "cvt", "vision_longformer": "vil"}  # MODEL.NAME -> ours
# sections and settings of supervised training, which EsViT's pretraining and evaluation never read
PASSED_OVER = {
    *("AMP", "AUG", "BASE", "CUDNN", "DATALOADER", "DATASET", "DEBUG", "DIST_BACKEND", "FINETUNE", "GPUS", "INPUT"),
    *("LOSS", "MODEL_SUMMARY", "MULTIPROCESSING_DISTRIBUTED", "NAME", "OPTIMIZER", "OUTPUT_DIR", "PIN_MEMORY"),
    *("PRINT_FREQ", "RANK", "SEED", "TEST", "TRAIN", "VERBOSE", "WORKERS"),
}
SWIN_KEYS = ("DIM_EMBED", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE", "PATCH_SIZE", "DROP_PATH_RATE")
READ = {
    "swin": {SPEC + name for name in SWIN_KEYS},
    "cvt": {
        SPEC + name for name in ("DIM_EMBED", "DEPTH", "NUM_HEADS", "WINDOW_SIZE", "REL_POS_EMBED", "DROP_PATH_RATE")
    },
    "vil": {LONGFORMER + name for name in ("ARCH", "MODE", "DROP_PATH")},
}
FREE = {"MODEL.NUM_CLASSES", "MODEL.INIT_WEIGHTS", "MODEL.PRETRAINED", "MODEL.PRETRAINED_LAYERS"}
FREE |= {LONGFORMER + name for name in ("VIL_MODE_SWITCH", "SHARE_KV")}  # no code reads them, or they change nothing
FIXED = {  # what networks here are, and a file may say too
    "swin": {
        **{SPEC + name: value for name, value in (("MLP_RATIO", 4.0), ("QKV_BIAS", True), ("DROP_RATE", 0.0))},
        **{SPEC + name: value for name, value in (("ATTN_DROP_RATE", 0.0), ("USE_APE", False), ("PATCH_NORM", True))},
    },
    "cvt": {
        SPEC + name: value
        for name, value in {
            "NUM_STAGES": 4,
            "PATCH_SIZE": [7, 3, 3, 3],
            "PATCH_STRIDE": [4, 2, 2, 2],
            "PATCH_PADDING": [2, 1, 1, 1],
            "MLP_RATIO": [4.0] * 4,
            "QKV_BIAS": [True] * 4,
            "KERNEL_QKV": [3] * 4,
            "PADDING_QKV": [1] * 4,
            "STRIDE_QKV": [1] * 4,
            "DROP_RATE": [0.0] * 4,
            "ATTN_DROP_RATE": [0.0] * 4,
            "SHIFT": False,
            "RES_STEM": False,
        }.items()
    },
    "vil": {
        LONGFORMER + name: value
        for name, value in {
            "NORM_EMBED": True,
            "LN_EPS": 1e-6,
            "SHARE_W": True,
            "ATTN_TYPE": "longformerhand",
            "SW_EXACT": 0,
            "POOL_METHOD": None,
            "WITH_SE": None,
            "AVG_POOL": False,
            "DROP": 0.0,
        }.items()
    },
}


def _swin(dim: int, depths: tuple, heads: tuple, window: int, rate: float) -> dict:
    values = zip(SWIN_KEYS, (dim, list(depths), list(heads), window, 4, rate), strict=True)
    return {"MODEL.NAME": "swin_transformer"} | {SPEC + name: value for name, value in values}


def _cvt(dims: list, depths: list, heads: list, rate: float, bias: bool = False) -> dict:
    names = ("DIM_EMBED", "DEPTH", "NUM_HEADS", "WINDOW_SIZE", "DROP_PATH_RATE", "REL_POS_EMBED")
    values = zip(names, (dims, depths, heads, [7] * 4, rate, bias), strict=True)
    return {"MODEL.NAME": "cvt_v4_transformer"} | {SPEC + name: value for name, value in values}


SIZES = {  # width, blocks, heads, rate of stochastic depth
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.1),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.2),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.2),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 0.2),
}
S1 = [64, 192, 384, 768], [2, 2, 6, 2], [1, 3, 6, 12], 0.1
S3 = [64, 128, 256, 512], [2, 2, 10, 4], [2, 4, 8, 16], 0.2
VIL = "l1,h3,d96,n1,s1,g1,p4,f7_l2,h3,d192,n2,s1,g1,p2,f7_l3,h6,d384,n8,s0,g1,p2,f7_l4,h12,d768,n1,s0,g0,p2,f7"
VIL_2262 = (  # as the README's commands write it
    "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_"
    "l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0"
)
PUBLISHED: dict[str, dict] = {
    f"swin_{size}_patch4_window{window}_224": _swin(*sizes[:3], window, sizes[3])
    for size, sizes in SIZES.items()
    for window in (7, 14)
    if (size, window) != ("large", 14)
} | {
    "cvt_v4/s1": _cvt(*S1),
    "cvt_v4/s1_rpe": _cvt(*S1, bias=True),
    "cvt_v4/s3": _cvt(*S3),
    "vil/vil_small/base": {
        "MODEL.NAME": "vision_longformer",
        **{LONGFORMER + name: value for name, value in (("ARCH", VIL), ("MODE", 0), ("DROP_PATH", 0.1))},
    },
}


def split_command(argv: Sequence[str]) -> tuple[list[str], str | None, list[tuple[str, str]]]:
    """A command line -> itself without configuration keys, the file that --cfg names, and KEY VALUE pairs.

    Keys stand at the end, or in front of an option. Raises UsageError for a key without a value, or without --cfg.
    """
    rest, pairs, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        is_value = bool(rest) and rest[-1].startswith("--") and "=" not in rest[-1]
        if not KEY.fullmatch(word) or is_value:
            rest.append(word)
        elif not words:
            raise UsageError(f"{word}: a key of --cfg without a value; keys and values alternate")
        else:
            pairs.append((word, words.pop(0)))
    files = [after for word, after in itertools.pairwise(rest) if word == "--cfg"]
    files += [word.removeprefix("--cfg=") for word in rest if word.startswith("--cfg=")]
    if pairs and not files:
        raise UsageError(
            f"{pairs[0][0]}: a key of a configuration file, and there is no --cfg; pass --cfg FILE with it"
        )
    return rest, files[-1] if files else None, pairs


def options_of(file: str, pairs: Sequence[tuple[str, str]]) -> dict[str, object]:
    """The options of ours that a configuration stands for: arch, window_size, drop_path_rate, ...

    Raises UsageError for a file that is neither there nor published, for unknown keys, and for networks that there are
    not here.
    """
    given = {key: _literal(value) for key, value in pairs}
    where = f"--cfg {escape(file)}"
    values = read_config(file)
    family = NETWORKS.get((values | given).get("MODEL.NAME"))
    if family is None:
        name = (values | given).get("MODEL.NAME")
        raise UsageError(f"{where}: MODEL.NAME {name} is no network of EsViT's; there are {', '.join(NETWORKS)}")
    known = {"MODEL.NAME", "TRAIN.IMAGE_SIZE"} | FREE | READ[family] | FIXED[family].keys()
    for key in given:
        if key not in known:
            raise UsageError(f"{key}: no key of {where} that means anything here{nearest(key, known)}")
    for key in values:
        if key not in known and key.split(".")[0] not in PASSED_OVER:
            raise UsageError(f"{where}: unknown key {escape(key)}{nearest(key, known)}")
    values |= given
    for key, value in FIXED[family].items():
        if key in values and not _same(values[key], value):
            raise UsageError(f"{where}: {key} {values[key]}: networks here have {value} only; leave it out")
    size = values.get("TRAIN.IMAGE_SIZE", [224, 224])
    if size != [224, 224]:
        raise UsageError(f"{where}: TRAIN.IMAGE_SIZE {size}: windows are laid out for [224, 224] here; leave it out")
    return OPTIONS[family](values, where)


def read_config(file: str, depth: int = 0) -> dict[str, object]:
    """Keys and values of a file, ``MODEL.SPEC.DEPTHS`` and so on, those of its BASE too; a published one by name."""
    path = Path(file)
    if not path.is_file():
        name = path.with_suffix("").as_posix() if path.suffix in (".yaml", ".yml") else path.as_posix()
        found = next((known for known in PUBLISHED if f"/{name}".endswith(f"/{known}")), None)
        if found is None:
            tip = nearest(name.rpartition("/")[2], PUBLISHED) or nearest(name, PUBLISHED)
            names = ", ".join(PUBLISHED)
            raise UsageError(f"--cfg {escape(file)}: no such file, and none of EsViT's{tip or f'; these are: {names}'}")
        return dict(PUBLISHED[found])
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--cfg {escape(file)}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(content, dict):
        raise UsageError(f"--cfg {escape(file)}: not a configuration, which is sections of keys and values")
    bases = content.get("BASE") or []
    if depth > 8 or not isinstance(bases, list):
        raise UsageError(f"--cfg {escape(file)}: BASE has to be a list of files, and these must not lead in a circle")
    values: dict[str, object] = {}
    for base in bases:
        if base:
            values |= read_config(str(path.parent / str(base)), depth + 1)
    return values | dict(_flat(content))


def _flat(content: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _literal(value) if isinstance(value, str) else value


def _literal(text: str) -> object:
    """A value as the original reads it: Python where it is, else the words themselves."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value


def _same(there: object, here: object) -> bool:
    return there == here or (isinstance(here, list) and there == here[0]) or (here is None and there in ("", "none"))


def _swin_options(values: dict, where: str) -> dict[str, object]:
    width, depths = values.get(f"{SPEC}DIM_EMBED"), values.get(f"{SPEC}DEPTHS")
    arch = SWIN_OF_SHAPE.get((width, tuple(depths) if isinstance(depths, list) else depths))
    heads = next((list(sizes[2]) for sizes in SIZES.values() if (sizes[0], list(sizes[1])) == (width, depths)), None)
    if arch is None or values.get(f"{SPEC}NUM_HEADS", heads) != heads:
        raise UsageError(
            f"{where}: no Swin here has DIM_EMBED {width}, DEPTHS {depths}, NUM_HEADS {values.get(f'{SPEC}NUM_HEADS')}"
        )
    names = {"WINDOW_SIZE": "window_size", "PATCH_SIZE": "patch_size", "DROP_PATH_RATE": "drop_path_rate"}
    return {"arch": arch, **{ours: values[SPEC + key] for key, ours in names.items() if SPEC + key in values}}


def _cvt_options(values: dict, where: str) -> dict[str, object]:
    shape = tuple(values.get(SPEC + name) for name in ("DIM_EMBED", "DEPTH", "NUM_HEADS", "WINDOW_SIZE"))
    archs = {"cvt_tiny": (*S1[:3], [7] * 4), "cvt_small": (*S3[:3], [7] * 4)}
    arch = next((name for name, of in archs.items() if shape == of), None)
    if arch is None:
        raise UsageError(f"{where}: no CvT here has DIM_EMBED, DEPTH, NUM_HEADS, WINDOW_SIZE {shape}")
    bias = values.get(f"{SPEC}REL_POS_EMBED", False)
    rate = values.get(f"{SPEC}DROP_PATH_RATE", [])
    rate = rate[-1] if isinstance(rate, list) and rate else rate
    found = {"arch": arch, "rel_pos_embed": bool(bias[0] if isinstance(bias, list) else bias)}
    return found | ({} if rate == [] else {"drop_path_rate": rate})


def _vil_options(values: dict, where: str) -> dict[str, object]:
    names = {"ARCH": "vil_arch", "MODE": "vil_mode", "DROP_PATH": "drop_path_rate"}
    found = {ours: values[LONGFORMER + key] for key, ours in names.items() if LONGFORMER + key in values}
    text = found.get("vil_arch")
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where}: {LONGFORMER}ARCH {text}: an architecture is a string, l1,h3,d96,n2,..._l2,...")
    if text == VIL_2262:
        del found["vil_arch"]
    return {"arch": "vil_2262", **found}


OPTIONS: dict[str, Callable[[dict, str], dict]] = {"swin": _swin_options, "cvt": _cvt_options, "vil": _vil_options}


def words_of(argv: Sequence[str], known: Mapping[str, object]) -> tuple[list[str], list[str], list[str]]:
    """A command line as parsers take it: what --cfg stands for, the rest of it, and the --arch that it stands for.

    ``known``: the options of the parser, ``--arch`` and so on; others of the configuration mean nothing to it. The file
    says the network whatever --arch says, of which the original reads the kind alone. Raises UsageError for two kinds.
    """
    rest, file, pairs = split_command(argv)
    if file is None:
        return [], rest, []
    options = options_of(file, pairs)
    arch = str(options.pop("arch"))
    archs = [after for word, after in itertools.pairwise(rest) if word == "--arch"]
    archs += [word.removeprefix("--arch=") for word in rest if word.startswith("--arch=")]
    if archs and archs[-1].split("_")[0] != arch.split("_")[0]:
        raise UsageError(f"--arch {escape(archs[-1])} --cfg {escape(file)}: the file is of {arch}; pass --arch {arch}")
    words = [word for name, value in options.items() if f"--{name}" in known for word in (f"--{name}", str(value))]
    return words, rest, ["--arch", arch]
