"""Owns the first moments of the command `sdbuild`, and of `python -m sdmerge_build`.

Has never heard of options; it only sees that starting costs little.
"""

from __future__ import annotations

import gc
import os
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Start the command line.

    Garbage is not collected: a build makes no cycles worth the while, and collecting while modules load would be a tenth of a run
    with nothing to do, and a seventh of torch's import.
    """
    gc.disable()
    try:
        from sdmerge_build.cli import main as run  # noqa: PLC0415  after the line above

        run()
    except KeyboardInterrupt:
        os._exit(130)  # nothing was begun


if __name__ == "__main__":
    main()
