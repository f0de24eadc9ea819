"""The recipe of 2017: CIFAR-10 as PNG objects in a bucket, ResNet-18 of MXNet, Spark, and the five best classes.

    python examples/cifar10_resnet18_spark.py s3://bucket/cifar10/test/ resnet-18 s3://bucket/predictions/ \
        --labels synset.txt --master spark://head:7077

docs/recipe-2017.md tells how the images get there. Run again after an interruption, it goes on where it stopped.
"""

import sys

import cyclopts

import infermill


def main(
    source: str,
    model: str,
    output: str,
    /,
    *,
    labels: str,
    master: str = "local[*]",
    conf: tuple[str, ...] = (),
    side: int = 224,
) -> None:
    card = infermill.CardOptions(labels=labels, exact=(side, side), filter="lanczos", top_k=5)
    summary = infermill.run(source, model, output, infermill.Options(engine="spark", master=master, conf=conf), card)
    for row in next(infermill.read_batches(output)).slice(0, 10).to_pylist():
        print(row["key"] if row["error"] is None else f"{row['key']} {row['error']['code']}: {row['error']['message']}")
        for best in row["top"] or ():
            print(f"    probability={best['score']:f}, class={best['label']}")
    print(f"{summary.ok} of {summary.planned} images predicted by {summary.workers} executors", file=sys.stderr)


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except infermill.InfermillError as error:
        sys.exit(f"error: {error}")
