"""The world of shapes under the name that it had in the first layout."""

from __future__ import annotations

from flowbench.testbeds.shapes import world


def test_scripts_that_were_written_for_the_first_layout_find_the_world():
    import flowbench.testbed.world as former

    assert all(getattr(former, name) is getattr(world, name) for name in former.__all__)
    assert {"parse", "render", "sample_scenes"} <= set(former.__all__)
