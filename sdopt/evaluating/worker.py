"""A worker process: ``python -m sdopt.evaluating.worker FD``, started by ``hands``."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from sdopt.evaluating.hands import serve, watch


def main() -> None:
    """Draw what the process that started this one asks for."""
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError):  # the other end is done
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
