"""Seconds to translate an MXNet checkpoint and load it: python benchmarks/translated.py SYMBOL."""

import sys
import time

import infermill


def main(symbol: str) -> None:
    options = infermill.CardOptions(crop=(224, 224), shorter=256)
    started = time.perf_counter()
    infermill.load_model(symbol, card_options=options)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
