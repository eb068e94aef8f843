"""Two windows of one crop: what they share is the same, and how far they differ in it is measured there alone."""

import pytest
import torch

from vit3d.learning.consistency import disagreement

GRID, PATCH = (3, 4, 5), (2, 4, 4)
PLACES = torch.tensor([[0, 2, 1], [1, 0, 3]])  # they share 2 x 2 x 3 patches
SHARED = 2 * 2 * 3
APART = 0.047756  # nats by which 0.4 and 0.7 differ from 0.55, in the mean


def two_windows(probability: torch.Tensor, places=PLACES) -> torch.Tensor:
    """(2, 1, Z, Y, X): logits of a whole volume's probability in two windows."""
    cuts = []
    for place in places.tolist():
        span = (slice(p * at, p * (at + n)) for p, at, n in zip(PATCH, place, GRID, strict=True))
        cuts.append(probability[tuple(span)])
    return torch.stack(cuts)[:, None].logit()


def everything(windows: int = 2) -> torch.Tensor:
    return torch.ones(windows, *GRID, dtype=torch.bool)


@pytest.fixture
def whole() -> torch.Tensor:
    """Probability of a volume that holds both windows."""
    torch.manual_seed(0)
    return torch.rand([p * (n + 3) for p, n in zip(PATCH, GRID, strict=True)]).clamp(0.05, 0.95)


def test_windows_that_say_the_same_of_each_place_do_not_disagree(whole):
    assert disagreement(two_windows(whole), everything(), PLACES, PATCH) < 1e-6
    moved = PLACES + torch.tensor([[0, 0, 0], [0, 0, 1]])
    assert disagreement(two_windows(whole), everything(), moved, PATCH) > 0.1  # other places: other probabilities


def test_a_difference_counts_by_its_share_of_what_both_see(whole):
    logits = two_windows(torch.full_like(whole, 0.4))
    first = tuple(a - b for a, b in zip(PLACES[1].tolist(), PLACES[0].tolist(), strict=True))  # the second's corner
    assert first == (1, -2, 2)
    logits[0, 0, 2:4, 0:4, 8:12] = torch.tensor(0.7).logit()  # one of the patches that both see
    assert disagreement(logits, everything(), PLACES, PATCH) == pytest.approx(APART / SHARED, rel=1e-4)
    logits[0, 0, 0:2] = 5.0  # the first layer, which the second window does not hold
    logits[1, 0, 4:6] = -5.0  # and the other way round
    assert disagreement(logits, everything(), PLACES, PATCH) == pytest.approx(APART / SHARED, rel=1e-4)


@pytest.mark.parametrize("window, patch", [(0, (1, 0, 2)), (1, (0, 2, 0))])
def test_a_patch_that_one_of_both_leaves_out_does_not_count(whole, window, patch):
    logits = two_windows(torch.full_like(whole, 0.4))
    logits[0, 0, 2:4, 0:4, 8:12] = torch.tensor(0.7).logit()
    mask = everything()
    mask[(window, *patch)] = False  # the same place, as either window counts
    assert disagreement(logits, mask, PLACES, PATCH) < 1e-6


def test_windows_that_share_nothing_give_zero_and_a_gradient(whole):
    logits = two_windows(whole).requires_grad_()
    found = disagreement(logits, torch.zeros(2, *GRID, dtype=torch.bool), PLACES, PATCH)
    found.backward()
    assert found == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_each_window_is_drawn_to_the_mean_by_what_it_is_off():
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 1, *PATCH)).requires_grad_()
    together = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    disagreement(logits, together, torch.zeros(2, 3, dtype=torch.long), PATCH).backward()
    probability = logits.detach().sigmoid()
    off = probability - probability.mean(dim=0)
    assert torch.allclose(logits.grad, off / logits.numel(), atol=1e-7)


def test_windows_that_are_sure_of_the_opposite_give_a_finite_cost():
    logits = torch.stack([torch.full((1, *PATCH), 90.0), torch.full((1, *PATCH), -90.0)])
    together = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    found = disagreement(logits, together, torch.zeros(2, 3, dtype=torch.long), PATCH)
    assert found == pytest.approx(45 - torch.log(torch.tensor(2.0)).item(), rel=1e-5)


def test_pairs_do_not_see_one_another(whole):
    torch.manual_seed(1)
    pairs = [two_windows(torch.rand_like(whole)) + torch.randn(2, 1, 1, 1, 1) for _ in range(2)]
    apart = [disagreement(pair, everything(), PLACES, PATCH) for pair in pairs]
    together = disagreement(torch.cat(pairs), everything(4), PLACES.repeat(2, 1), PATCH)
    assert together == pytest.approx(float(sum(apart)) / 2, rel=1e-5)
