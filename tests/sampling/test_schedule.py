"""The noise levels are those of the published table; other grids are shifted as in diffusers, or refused."""

import math
from itertools import pairwise

import pytest

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

# z-image specification, section 7.3: six decimals
TABLE = {
    (3.0, 8): (1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0),
    (3.0, 9): (1, 0.96, 0.913044, 0.857143, 0.789474, 0.705882, 0.6, 0.461538, 0.272727, 0),
    (3.0, 4): (1, 0.9, 0.75, 0.5, 0),
    (6.0, 8): (1, 0.976744, 0.947368, 0.909091, 0.857143, 0.782609, 0.666667, 0.461538, 0),
    (6.0, 9): (1, 0.979592, 0.954546, 0.923077, 0.882353, 0.827586, 0.75, 0.631579, 0.428571, 0),
}


@pytest.mark.parametrize(("shift", "steps"), TABLE)
def test_sigmas_equal_the_table(shift, steps):
    got = FlowMatchEulerScheduler(shift).sigmas(steps)
    assert len(got) == steps + 1
    # half a unit of the sixth decimal, plus float32 rounding of a grid point
    assert got == pytest.approx(TABLE[shift, steps], abs=6e-7)


def test_28_steps_of_the_base_checkpoint_end_as_published():
    assert FlowMatchEulerScheduler(6.0).sigmas(28)[-5:] == pytest.approx(
        (0.5, 0.418605, 0.315789, 0.181818, 0), abs=6e-7
    )


def test_one_step_goes_straight_to_the_image():
    assert FlowMatchEulerScheduler().sigmas(1) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_sigmas_fall_from_one_to_zero(steps):
    got = FlowMatchEulerScheduler().sigmas(steps)
    assert got[0] == 1
    assert got[-1] == 0
    assert all(a > b for a, b in pairwise(got))


def test_own_grid_is_shifted_and_the_callers_list_untouched():
    grid = [1.0, 0.5, 0.25]
    assert FlowMatchEulerScheduler(3.0).shifted(grid) == pytest.approx((1, 0.75, 0.5, 0))
    assert grid == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**12, 2.5, True, None, math.nan, "8"])
def test_step_counts_outside_the_range_are_named(steps):
    with pytest.raises(BadArgument, match=r"num_inference_steps.*1 to 1000"):
        FlowMatchEulerScheduler().sigmas(steps)


@pytest.mark.parametrize(
    "grid",
    [
        [],
        [0.5, 0.5],
        [0.5, 1.0],
        [1.0, 0.0],
        [1.5],
        [math.nan],
        [1 / n for n in range(1, 1002)],
        [1.0, 1 - 1e-9],
        [1.0, 1e-46],
    ],
)
def test_grids_that_do_not_fall_within_the_range_are_refused(grid):
    with pytest.raises(BadArgument, match="sigmas"):
        FlowMatchEulerScheduler().shifted(grid)


@pytest.mark.parametrize("shift", [0, -3.0, math.inf, math.nan, "3", True, 1e300, 1e-300])
def test_bad_shifts_are_refused(shift):
    with pytest.raises(BadArgument, match="shift"):
        FlowMatchEulerScheduler(shift)


def test_a_shift_too_long_to_print_is_refused_too():
    with pytest.raises(BadArgument, match="shift: got a huge integer"):
        FlowMatchEulerScheduler(10**5000)


def test_config_files_are_read():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0, "use_dynamic_shifting": False}
    assert FlowMatchEulerScheduler.from_json(config) == FlowMatchEulerScheduler(6.0)


def test_config_files_of_other_schedules_are_refused_by_name():
    with pytest.raises(Unsupported, match="use_dynamic_shifting"):
        FlowMatchEulerScheduler.from_json({"shift": 3.0, "use_dynamic_shifting": True})


EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0}


@pytest.mark.parametrize(
    ("values", "shift", "message"),
    [
        (EULER | {"_class_name": "FlowMatchHeunDiscreteScheduler"}, 6.0, "asks for FlowMatchHeunDiscrete"),
        (UNIPC, 5.0, "asks for UniPCMultistepScheduler; Euler steps over the noise levels of shift 5 "),
        (EULER | {"sigma_min": 0.1}, 6.0, "sigma_min: not known, without effect"),
        (EULER | {"shift": None}, 3.0, "no shift is stated, 3"),
        ({}, 3.0, "no shift is stated, 3"),
    ],
)
def test_what_a_file_asks_for_and_does_not_get_is_told(values, shift, message):
    with pytest.warns(UserWarning, match=message) as told:
        assert FlowMatchEulerScheduler.from_json(values).shift == shift
    assert len(told) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler'"),
        ({"_class_name": 5}, "_class_name is 5"),
        ({"flow_shift": 5.0}, "shift is 6 and flow_shift is 5"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ({"shift_terminal": 0.02}, "shift_terminal is 0.02"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps is 'x'"),
        *(({"shift": v}, "shift is ") for v in ("3", [], {}, True, math.nan, 1e300, 0, -1)),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(change, message):
    with pytest.raises((Unsupported, BadArgument), match=rf"scheduler_config\.json.*{message}"):
        FlowMatchEulerScheduler.from_json(EULER | change)


def test_keys_without_effect_on_a_static_shift_are_no_news(recwarn):
    quiet = {"base_shift": 0.5, "time_shift_type": "exponential", "invert_sigmas": None, "flow_shift": 6}
    assert FlowMatchEulerScheduler.from_json(EULER | quiet | {"_diffusers_version": "0.36"}).shift == 6.0
    assert not recwarn
