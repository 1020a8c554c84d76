"""What tokenizing a data set costs beyond the codecs: pipeline against a bare loop, two processes against one, memory.

    python benchmarks/tokenize.py      # the demo's own codecs; some ten minutes on two quiet cores

The work is in `tokenize_cost.py`. When any benchmark is run, this folder stands first on Python's path, and this
file in the place of Python's own module `tokenize`, which torch and others import: then it steps aside for it.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "tokenize":
    path = Path(sysconfig.get_path("stdlib")) / "tokenize.py"
    spec = importlib.util.spec_from_file_location(__name__, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

if __name__ == "__main__":
    from tokenize_cost import main

    main()
