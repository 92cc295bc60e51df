"""Runs `unet-diffusion` as `python -m unet_diffusion`, and so as `accelerate launch -m unet_diffusion`."""

import os
import signal
import sys
from typing import Any

STOPPED = "unet-diffusion: stopped by Ctrl-C."
INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C, as in shells


def main() -> None:
    """Runs the command line. Ctrl-C ends it with one sentence, also while modules are imported."""
    try:
        handled = "--debug" not in sys.argv and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if handled:
            signal.signal(signal.SIGINT, end_at_once)
        from unet_diffusion import cli

        cli.main(before=raise_again if handled else lambda: None)
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        print(STOPPED, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def end_at_once(*signal_and_frame: Any) -> None:
    """Ends the program at once, since there is nothing to save until the command runs.

    An exception would not always get through: some libraries turn it into another one while they are imported.
    """
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED)


def raise_again() -> None:
    """Lets Ctrl-C raise a KeyboardInterrupt again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
