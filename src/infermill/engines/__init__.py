"""Where workers run: each engine is a module with `run(job, ids, meter) -> Iterator[PartitionReport]`."""
