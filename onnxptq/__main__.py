"""The way in, of ``python -m onnxptq`` (as ``torchrun -m onnxptq`` needs it) and of the command ``onnxptq``.

Importing the command line takes a second or more, in which Ctrl-C must end the program as it does later on. So this
module imports nothing heavy by itself.
"""

from __future__ import annotations

import sys

from onnxptq import interrupts
from onnxptq.errors import EXIT_INTERRUPTED, INTERRUPTED, is_interruption


def main() -> None:
    """Run the command line and exit with a documented code."""
    interrupts.begin()
    try:
        from onnxptq.cli.main import main as run

        run()
    except (Exception, KeyboardInterrupt) as error:
        if not is_interruption(error):
            raise
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        interrupts.end()


if __name__ == "__main__":
    main()
