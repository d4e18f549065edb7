"""`python -m bench` lists the benchmarks; `python -m bench NAME [options]` runs one."""

import importlib
import sys

BENCHMARKS = {
    "overhead": "microseconds an op on 8x8 arrays, beside PyTorch, autograd and bare NumPy",
    "scan": "a recurrent layer, forward and backward over time, beside PyTorch and JAX",
    "lm": "the whole training step of a word model of two LSTM layers",
    "memory": "workspace and time against the number of steps, exact and truncated; what one layer keeps",
    "start": "from a fresh process to the first gradient of an LSTM",
}


def main() -> int:
    name, *rest = sys.argv[1:] or [""]
    if name in BENCHMARKS:
        return importlib.import_module(f"bench.{name}").main(rest)
    print("usage: python -m bench NAME [options]    (NAME --help lists the options)\n")
    for known, what in BENCHMARKS.items():
        print(f"  {known:10} {what}")
    if name in ("", "-h", "--help"):
        return 0
    print(f"\nthere is no benchmark {name!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
