"""Lets `python -m sdmerge_build` stand for `sdbuild`."""

from sdmerge_build.cli import main

if __name__ == "__main__":
    main()
