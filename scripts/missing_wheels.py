"""Prints the wheels of a folder whose packages this Python lacks, one a line (``scripts/gpu_pack.sh``).

python scripts/missing_wheels.py FOLDER
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def is_missing(wheel: Path) -> bool:
    """Whether no version of the wheel's package is installed."""
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        return True
    return False


if __name__ == "__main__":
    print("\n".join(str(wheel) for wheel in sorted(Path(sys.argv[1]).glob("*.whl")) if is_missing(wheel)))
