"""What sets the pace of a job, and what would change it."""

from collections.abc import Mapping

_WAITING = 0.2
"Compute threads that wait for more than this part of their time, wait for something else than themselves."
_TELLING_SECONDS = 10.0
"A job of fewer thread-seconds is little more than its start and its end."


def bottleneck(busy_seconds: Mapping[str, float]) -> str:
    """The stage that the others wait for: the one that keeps the compute threads busy, or lets them wait."""
    computing = busy_seconds["predict"] + busy_seconds["decode"]
    if not computing:
        return ""
    is_waiting = busy_seconds["idle"] > _WAITING * (computing + busy_seconds["idle"])
    return max(("fetch", "write") if is_waiting else ("predict", "decode"), key=lambda stage: busy_seconds[stage])


def verdict(stage_seconds: Mapping[str, float], *, can_decode_faster: bool, is_fp32: bool) -> str:
    """A sentence: the stage that sets the pace, its part of the compute threads' time, and what to try; or none where
    the job was too short to tell.

    Args:
        stage_seconds: thread-seconds by stage, as `Meter.pace_seconds` has them.
        can_decode_faster: images are decoded, with the profile `exact`.
        is_fp32: the network computes in fp32.

    Example:
        >>> busy = {"list": 0, "fetch": 2.0, "decode": 61.0, "predict": 30.0, "write": 1.0, "idle": 9.0}
        >>> verdict(busy, can_decode_faster=True, is_fp32=True)
        "decode-bound: 61 % of the compute threads' time is decoding; try --decode fast"
    """
    stage = bottleneck(stage_seconds)
    total = sum(stage_seconds[name] for name in ("decode", "predict", "idle"))
    if not stage or total < _TELLING_SECONDS:
        return ""
    what, hint = {
        "decode": ("decoding", "try --decode fast" if can_decode_faster else "more cores would help"),
        "predict": (
            "the network",
            "try infermill quantize, or --precision where the processor has it" if is_fp32 else "more cores would help",
        ),
        "fetch": ("waiting for objects", "a nearer or faster source would help"),
        "write": ("waiting for parts to be written", "a nearer or faster output would help"),
    }[stage]
    part = stage_seconds[stage if stage in {"decode", "predict"} else "idle"] / total
    return f"{stage}-bound: {part:.0%} of the compute threads' time is {what}; {hint}".replace("%", " %")
