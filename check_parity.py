"""Certificate of parity: every golden case through this repository's code, with the largest deviation it shows.

    python check_parity.py                        all cases in tests/golden
    python check_parity.py --method dino          one method
    python check_parity.py --golden DIR --json    another folder of the same format, as JSON

Exit code 0 when nothing failed and nothing was left uncovered, else 1. Optional cases are reported and do not count.
"""

import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads only wait for each other

import torch

from tests.parity import Result, load_cases, run_case
from utils import Parser, run_cli


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n")[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--golden", default=here / "tests" / "golden", type=Path, help="folder of golden cases")
    parser.add_argument("--method", nargs="+", metavar="NAME", help="only these methods or evaluations")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def describe(result: Result) -> str:
    case = result.case
    name = f"{case.method}/{case.name}" + (" (optional)" if case.optional else "")
    if result.status == "not covered":
        return f"{name:58s} {'':24s} not covered"
    rtol, atol, _ = case.tolerance
    line = f"{name:58s} deviation {result.deviation:8.1e}   rtol {rtol:g} atol {atol:g}   {result.status}"
    return line + "".join(f"\n    {problem}" for problem in result.problems[:5])


def main() -> int:
    args = get_args_parser().parse_args()
    results = []
    for case in load_cases(args.golden, args.method):
        results.append(run_case(case))
        if not args.json:
            print(describe(results[-1]), flush=True)
    required = [result for result in results if not result.case.optional]
    passed = sum(result.status == "ok" for result in results)
    failed = sum(result.status == "FAIL" for result in required)
    uncovered = sum(result.status == "not covered" for result in required)
    if args.json:
        cases = [
            {
                "method": r.case.method,
                "case": r.case.name,
                "optional": r.case.optional,
                "status": r.status,
                "deviation": r.deviation if math.isfinite(r.deviation) else None,
                "worst": r.worst,
                "tolerance": r.case.entry.get("tolerance"),
                "problems": r.problems,
            }
            for r in results
        ]
        totals = {"passed": passed, "failed": failed, "not_covered": uncovered}
        print(json.dumps({"cases": cases, "torch": torch.__version__, **totals}, indent=1))
    else:
        print(f"{len(results)} cases, {passed} passed, {failed} failed, {uncovered} not covered")
    return int(failed + uncovered > 0)


if __name__ == "__main__":
    run_cli(main)
