"""The public surface: what users may rely on."""

import infermill


def test_public_names_are_pinned_and_importable() -> None:
    assert infermill.__all__ == sorted(infermill.__all__)
    assert set(infermill.__all__) == set(infermill._HOMES)
    for name in infermill.__all__:
        assert getattr(infermill, name).__name__ == name
