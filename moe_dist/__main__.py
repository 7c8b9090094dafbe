"""`python -m moe_dist` is the command `moe-dist`."""

from moe_dist.cli.main import app

if __name__ == "__main__":
    app()
