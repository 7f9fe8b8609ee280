"""Evaluates a trained model: `mla eval` in a checkout. Its flags: python eval.py --help."""

from mla.programs.eval import CONFIG, main, run

__all__ = ["CONFIG", "main", "run"]

if __name__ == "__main__":
    run()
