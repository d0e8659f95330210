"""Commands for the Makefile.

python tool.py key               print the build key
python tool.py unpatched FOLDER  build the unpatched libraries into FOLDER unless up to date
"""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
sys.path.insert(0, str(PACKAGE))

from pop_build.errors import BuildError  # noqa: E402
from pop_build.tree import key, recipe  # noqa: E402
from pop_build.unpatched import build_unpatched  # noqa: E402


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["key"]:
            print(key(recipe(PACKAGE, os.environ)))
        elif len(arguments) == 2 and arguments[0] == "unpatched":
            build_unpatched(PACKAGE, Path(arguments[1]))
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
