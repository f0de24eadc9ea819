"""Classify every image in a folder, and print the best class of each.

    python examples/classify_folder.py PHOTOS/ model.yaml out/

Run it again after an interruption: it goes on where it stopped.
"""

import sys

import infermill


def main(photos: str, model: str, output: str) -> None:
    summary = infermill.run(photos, model, output, infermill.Options())
    for row in infermill.read(output).to_pylist():
        if row["error"] is None:
            best = row["top"][0]
            print(f"{row['key']}\t{best['label']}\t{best['score']:.3f}")
        else:
            print(f"{row['key']}\t{row['error']['code']}: {row['error']['message']}")
    print(f"{summary.ok} of {summary.planned} images predicted", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: classify_folder.py PHOTOS/ model.yaml out/")
    try:
        main(*sys.argv[1:])
    except infermill.InfermillError as error:
        sys.exit(f"error: {error}")
