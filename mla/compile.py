"""`python -m mla.compile`, which `mla compile` is too: see `mla.programs.compile`."""

from mla.programs.compile import run

if __name__ == "__main__":
    run()
