"""Bars of a student relative to each of its teachers, on the evaluations that were run on both.

    python visualize_relative.py --student results/student --teachers dino=results/dino,ibot=results/ibot

A result is what an evaluation wrote: ``eval_knn.json``, ``eval_linear.json`` and so on, or a folder of such. Only tests
on the same images are compared. 0 % is as good as that teacher; the figure is that of UNIC's README (2408.05088). It is
written to ``relative.png`` in ``--output_dir``, and its numbers are printed.
"""

from pathlib import Path

from data.pictures import save_picture
from evaluation.bars import bar_chart
from evaluation.relative import compare, read_results, table
from utils import Parser, UsageError, check_writable, escape, make_folder, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="visualize_relative.py", description="Bars of a student relative to each of its teachers.")
    add = parser.add_argument
    add("--student", required=True, metavar="RESULT", help="what an evaluation wrote, or a folder of such files")
    add(
        "--teachers",
        required=True,
        metavar="NAME=RESULT,...",
        help="the same of every teacher, in the order of the bars",
    )
    add("--nb_knn", default=None, type=int, help="of k-NN this k; left out: 20 where all have it, else the smallest")
    add("--title", default="The student relative to its teachers", help="above the bars")
    add("--output_dir", default=".", help="where relative.png is written")
    return parser


def named_results(text: str) -> dict[str, str]:
    """``NAME=RESULT,...`` -> {name: path}, in this order. Raises UsageError."""
    found: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--teachers {escape(word)}: write NAME=RESULT, as in dino=results/dino")
        if name in found:
            raise UsageError(f"--teachers {escape(name)}: named twice; name every teacher once")
        found[name] = path
    if not found:
        raise UsageError("--teachers is empty: name at least one, as in dino=results/dino")
    return found


def main() -> None:
    args = get_args_parser().parse_args()
    teachers = {name: read_results(path) for name, path in named_results(args.teachers).items()}
    axes = compare(read_results(args.student), teachers, args.nb_knn)
    check_writable(Path(args.output_dir))
    names = list(teachers)
    print(table(axes, names))
    groups = [
        (axis.label, f"student {axis.student:.1f} %", [axis.relative(n) if n in axis.teachers else None for n in names])
        for axis in axes
    ]
    subtitle = "difference in percent of what each teacher reached; 0 is as good as it"
    picture = bar_chart(args.title, subtitle, names, groups)
    path = Path(args.output_dir) / "relative.png"
    make_folder(path.parent)
    save_picture(picture, path)
    print(f"written to {escape(path)}")


if __name__ == "__main__":
    run_cli(main)
