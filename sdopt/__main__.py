"""``python -m sdopt``: the command ``sdopt`` where its script is not on PATH."""

from sdopt.cli import main

if __name__ == "__main__":
    main()
