"""`python -m moe_dist` is the command `moe-dist`."""

import signal

if __name__ == "__main__":
    # Until there is something to save, Ctrl-C just ends the process: no traceback from every rank.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from moe_dist.cli.main import app

    app()
