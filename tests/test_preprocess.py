from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.scoring.preprocess import (
    Preprocessing,
    crop_shortest_side,
    crop_shortest_side_floor,
    normalize,
    pad_longest_side,
    to_pil,
)

FITS = [crop_shortest_side, crop_shortest_side_floor, pad_longest_side]


def picture(height: int, width: int) -> torch.Tensor:
    """A picture (3, height, width) of slopes, in 8-bit steps, on which every resizing is exact but at the border."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return (torch.stack([x, y, 0.5 + 0 * x]) * 255).round() / 255


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(64, 64), (64, 48), (37, 80), (20, 20), (200, 24)], ids=str)
def test_both_paths_give_the_same_pixels_up_to_8_bit_rounding(fit, size: tuple[int, int]):
    preprocess = Preprocessing(24, fit)
    images = picture(*size)[None]
    reported, trained = preprocess.reported(images), preprocess.differentiable(images)
    assert reported.shape == trained.shape == (1, 3, 24, 24)
    # PIL rounds after both of its passes: half a step, and half a step times the sum of the filter's |weights|, 1.2.
    assert (reported - trained).abs().max().item() <= 1.5 / 255


@pytest.mark.parametrize("fit", FITS)
def test_a_picture_of_the_right_size_is_left_alone(fit):
    images = picture(24, 24)[None]
    preprocess = Preprocessing(24, fit)
    assert torch.equal(preprocess.reported(images), images)
    assert torch.equal(preprocess.differentiable(images), images)


def test_the_path_follows_the_gradient():
    preprocess = Preprocessing(24, crop_shortest_side)
    images = (picture(24, 24) + 0.3 / 255)[None].clamp(0, 1)  # between two 8-bit steps
    assert not torch.equal(preprocess(images), images)
    assert torch.equal(preprocess(images.requires_grad_()), images)
    with torch.no_grad():
        assert not torch.equal(preprocess(images), images)


def test_padding_keeps_the_whole_picture_and_cropping_its_middle():
    wide = torch.ones(1, 3, 24, 48)
    padded = Preprocessing(24, pad_longest_side).reported(wide)
    assert padded[0, 0].sum(1).tolist() == [0.0] * 6 + [24.0] * 12 + [0.0] * 6
    assert Preprocessing(24, crop_shortest_side).reported(wide).min() == 1


def test_an_odd_margin_is_rounded_as_the_models_packages_round_it():
    """27 columns to 24: torchvision leaves out round(1.5) = 2 on the left, transformers floor(1.5) = 1."""
    columns = torch.linspace(0, 1, 27).expand(1, 3, 24, 27)
    assert Preprocessing(24, crop_shortest_side).differentiable(columns)[0, 0, 0, 0] == columns[0, 0, 0, 2]
    assert Preprocessing(24, crop_shortest_side_floor).differentiable(columns)[0, 0, 0, 0] == columns[0, 0, 0, 1]


def test_pixels_are_rounded_to_8_bits_and_not_cut():
    assert np.array(to_pil(torch.full((1, 3, 2, 2), 0.999))[0]).max() == 255
    assert np.array(to_pil(torch.full((1, 3, 2, 2), 0.4 / 255))[0]).max() == 0
    assert np.array(to_pil(torch.full((1, 3, 2, 2), 7.0))[0]).max() == 255


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_mode_becomes_rgb(mode: str):
    source = to_pil(picture(40, 40)[None])[0].convert(mode)
    assert Preprocessing(24, crop_shortest_side).from_pil(source).shape == (3, 24, 24)


def test_a_reference_of_plain_pil_gives_the_same_pixels():
    """Without torchvision: Image.resize to the sizes that the formulas give, then Image.crop."""
    image = to_pil(picture(50, 71)[None])[0]
    expected = image.resize((int(24 * 71 / 50), 24), Image.Resampling.BICUBIC)
    left = round((expected.width - 24) / 2)
    expected = expected.crop((left, 0, left + 24, 24))
    got = Preprocessing(24, crop_shortest_side).from_pil(image)
    assert torch.equal((got * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(expected)))

    expected = image.resize((24, round(50 * 24 / 71)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (24, 24))
    canvas.paste(expected, (0, (24 - expected.height) // 2))
    got = Preprocessing(24, pad_longest_side).from_pil(image)
    assert torch.equal((got * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(canvas)))


def test_normalisation_is_per_channel():
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(normalize(x, (0.5, 0.0, 0.1), (0.5, 2.0, 1.0))[:, 1], x[:, 1] / 2)


def test_threads_change_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(5, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    preprocess, found = Preprocessing(24, crop_shortest_side), []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(preprocess.reported(images))
    assert torch.equal(*found)
