"""Many scripts behind one start of the processes: a JSON file of [module, [arguments]] in the command line."""

import importlib
import json
import sys
from pathlib import Path

from utils import run_cli


def main() -> None:
    for module, arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = [module, *arguments]
        importlib.import_module(module).main()


if __name__ == "__main__":
    run_cli(main)
