"""Runs `unet-diffusion` as `python -m unet_diffusion`, and so as `accelerate launch -m unet_diffusion`."""

import sys


def main() -> None:
    """Runs the command line, whose import Ctrl-C may interrupt too."""
    try:
        from unet_diffusion import cli

        cli.main()
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        print("unet-diffusion: stopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
