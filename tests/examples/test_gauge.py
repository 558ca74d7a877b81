"""The strength of the losses that were tried is measured on a run."""

import pytest

import candidates
import gauge


@pytest.mark.slow
def test_each_loss_has_a_share_of_the_masks_gradient(trained, capsys) -> None:
    run = trained("sam", "lora")
    capsys.readouterr()
    gauge.main([str(run)])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    shares = {name.removeprefix("| "): float(share) for name, _, share, _ in lines}
    assert [*shares] == ["infosam", *(n for n in candidates.CANDIDATES if n != "on-source")]
    assert all(0 <= share < 100 for share in shares.values())
    assert shares["infosam"] > 0
    assert shares["anchor-balanced"] <= candidates.SHARE + 0.05  # less where its weight is at most
