"""Trains one model, or goes on with a run that was stopped: `mla train` in a checkout. Its flags: python train.py --help."""

from mla.programs.train import CONFIG, main, run

__all__ = ["CONFIG", "main", "run"]

if __name__ == "__main__":
    run()
