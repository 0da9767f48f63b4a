"""``python -m skyrl_spec`` is ``skyrl-spec``."""

import sys

from skyrl_spec.cli import main

if __name__ == "__main__":
    sys.exit(main())
