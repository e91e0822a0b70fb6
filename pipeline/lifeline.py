"""How a child process of ours ends with its parent, however the parent ends.

The parent holds the write end of a pipe and never writes. When it ends, even by SIGKILL, the
system closes that end, and the child, which waits at the other, reads the end of the file. This
works for every system and for any thread that started the child. (Linux's ``PR_SET_PDEATHSIG`` is
tied to that thread, and is cleared when the child changes its user.)

The workers of ``--workers`` do this, the guard of an embedded server, and the mock broker, whose
pipe is its stdin. Only the standard library is imported here: the guard starts in 15 ms.
"""

import os
import threading
from collections.abc import Callable


def on_parent_end(read_end: int, act: Callable[[], None]) -> None:
    """Call a function in a thread when the parent has ended.

    Args:
        read_end: Of the pipe. No process but the parent may hold its write end.
        act: Ends this process.
    """

    def wait() -> None:
        os.read(read_end, 1)
        act()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
