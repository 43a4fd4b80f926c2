"""Draw pictures with a trained generator: `python scripts/generate.py runs/digits/checkpoint.pt --out more.png`.

Exit status: 0, 130 after Ctrl-C, 2 for anything wrong with the input.
"""

import argparse
import signal
import sys

if __name__ == "__main__":
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported: an end without a traceback

from fastgan.command_line import run_command, say
from fastgan.training import generate


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint.pt of a run, or the folder of the run")
    parser.add_argument("--out", required=True, help="PNG file for the grid; with --separate, a folder; not there yet")
    parser.add_argument("--num", type=int, default=64, help="how many pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides which pictures (default: %(default)s)")
    parser.add_argument("--separate", action="store_true", help="one PNG file per picture, in a folder")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    return vars(parser.parse_args(argv))


def draw(options):
    count, side = generate(**options)
    say(f"{count} pictures of {side}x{side} in {options['out']}")
    return 0


def main(argv=None):
    options = parse(argv)
    return run_command(lambda: draw(options), options.keys() - {"checkpoint"})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
