"""A worker process of ``Processes``: does the tasks that it is told until its driver is gone."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from sdopt.evaluating.hands import watch
from sdopt.sweep.place import Place
from sdopt.sweep.tasks import execute


def main() -> None:
    """``python -m sdopt.sweep.engines.worker FD ROOT``."""
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    connection, place = Connection(int(sys.argv[1])), Place(Path(sys.argv[2]))
    with suppress(EOFError):  # the other end is done
        while True:
            task = pickle.loads(connection.recv_bytes())  # the process that started this wrote it
            connection.send_bytes(pickle.dumps(execute(task, place)))


if __name__ == "__main__":
    main()
