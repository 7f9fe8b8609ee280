"""Trains and evaluates every point of a sweep: `mla sweep` in a checkout. Its flags: python sweep.py --help."""

from mla.programs.sweep import CONFIG, main, run

__all__ = ["CONFIG", "main", "run"]

if __name__ == "__main__":
    run()
