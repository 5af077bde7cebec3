"""`uv run apps/evaluate CHECKPOINT [options]`: ask a model what is known, and write figures with intervals."""

import sys

from evaluate_config import parse_command_line

if __name__ == "__main__":
    config = parse_command_line(sys.argv[1:])

    # After the command line, so that --help and a typing error answer at once: this imports torch.
    from evaluate_run import run

    sys.exit(run(config))
