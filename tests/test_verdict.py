"""What sets the pace of a job."""

import pytest

from infermill.verdict import bottleneck, verdict


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({"predict": 19.0, "idle": 1.0, "decode": 9.0, "fetch": 1.0, "write": 0.0}, "predict"),
        ({"predict": 5.0, "idle": 2.0, "decode": 19.0, "fetch": 1.0, "write": 0.0}, "decode"),
        ({"predict": 5.0, "idle": 15.0, "decode": 1.0, "fetch": 39.0, "write": 1.0}, "fetch"),
        ({"predict": 5.0, "idle": 15.0, "decode": 1.0, "fetch": 3.0, "write": 19.0}, "write"),
        ({"predict": 0.0, "idle": 0.0, "decode": 0.0, "fetch": 0.0, "write": 0.0}, ""),
    ],
)
def test_the_bottleneck_is_what_the_others_wait_for(busy: dict[str, float], expected: str) -> None:
    assert bottleneck(busy) == expected


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        (
            {"predict": 93.0, "idle": 2.0, "decode": 5.0, "fetch": 1.0, "write": 0.0},
            "predict-bound: 93 % of the compute threads' time is the network; "
            "try infermill quantize, or --precision where the processor has it",
        ),
        (
            {"predict": 30.0, "idle": 9.0, "decode": 61.0, "fetch": 1.0, "write": 0.0},
            "decode-bound: 61 % of the compute threads' time is decoding; try --decode fast",
        ),
        (
            {"predict": 5.0, "idle": 15.0, "decode": 5.0, "fetch": 39.0, "write": 1.0},
            "fetch-bound: 60 % of the compute threads' time is waiting for objects; "
            "a nearer or faster source would help",
        ),
        ({"predict": 1.0, "idle": 8.0, "decode": 0.5, "fetch": 0.1, "write": 0.2}, ""),
        ({"predict": 0.0, "idle": 0.0, "decode": 0.0, "fetch": 0.0, "write": 0.0}, ""),
    ],
)
def test_a_sentence_says_so_and_what_to_try(busy: dict[str, float], expected: str) -> None:
    assert verdict(busy, can_decode_faster=True, is_fp32=True) == expected


def test_what_is_done_already_is_not_proposed() -> None:
    busy = {"predict": 30.0, "idle": 9.0, "decode": 61.0, "fetch": 1.0, "write": 0.0}
    assert "--decode fast" not in verdict(busy, can_decode_faster=False, is_fp32=False)
    busy = {"predict": 93.0, "idle": 2.0, "decode": 5.0, "fetch": 1.0, "write": 0.0}
    assert verdict(busy, can_decode_faster=False, is_fp32=False).endswith("; more cores would help")
