"""Where the `capfilt` command begins, and `python -m capfilt`, which is how torchrun starts a training:
`torchrun --nproc-per-node 8 -m capfilt train …`.

Ctrl-C is understood from the first moment: what is imported next takes a third of a second.
"""

import os
import sys

from capfilt.cli.interrupts import EXIT_INTERRUPTED, MESSAGES, handle_interrupts


def main() -> None:
    """Run the command line."""
    handle_interrupts()
    # Arrow's own allocator keeps what it has freed: the peak of tables grows half as much by the system's
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        from capfilt.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write(f"capfilt: {MESSAGES[EXIT_INTERRUPTED]}\n")
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
