"""Two estimates over different data, merged, against the one over all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc
from kfac_cond.structures import Fisher, SumBlock

from ..helpers import classifier
from ..reference import assert_same


def estimated(model: nn.Module, x: Tensor, **likelihood: Any) -> Fisher:
    """An exact estimate whose meta has the positions of every layer: one an example here."""
    fisher = kc.estimate(model, [x], kc.Categorical(**likelihood), kind="exact")
    counts = {**fisher.meta["counts"], "positions": dict.fromkeys(fisher, float(len(x)))}
    return Fisher(dict(fisher), meta={**fisher.meta, "counts": counts})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_one_estimate_over_all_data(reduction):
    model, x = classifier(), torch.randn(7, 3)
    whole = estimated(model, x, reduction=reduction)
    parts = [estimated(model, part, reduction=reduction) for part in x.split([1, 2, 4])]
    found = parts[0].merge(parts[1]).merge(parts[2])
    for name, block in whole.items():
        assert_same(found[name].A, block.A)
        assert_same(found[name].G, block.G)
    assert found.meta["counts"]["examples"] == 7
    assert float(found.meta["counts"]["terms"]) == float(whole.meta["counts"]["terms"])
    assert found.meta["counts"]["positions"] == whole.meta["counts"]["positions"]


def test_other_blocks_become_a_weighted_sum():
    model, x = classifier(), torch.randn(7, 3)
    parts = [estimated(model, part) for part in x.split([3, 4])]
    eigen = [Fisher({n: b.eigen() for n, b in part.items()}, meta=part.meta) for part in parts]
    found = eigen[0].merge(eigen[1])
    assert isinstance(found["0"], SumBlock)
    assert_same(found["0"].to_dense(), (3 * parts[0]["0"].to_dense() + 4 * parts[1]["0"].to_dense()) / 7)


def test_a_layer_that_was_not_used_adds_nothing():
    model, x = classifier(), torch.randn(7, 3)
    mine, theirs = (estimated(model, part) for part in x.split([3, 4]))
    without = Fisher({"2": theirs["2"]}, meta=theirs.meta)
    found = mine.merge(without)
    assert_same(found["0"].A, mine["0"].A)
    assert_same(found["0"].G, mine["0"].G * 3 / 7)


def test_what_is_absent_or_differs_is_named():
    model, x = classifier(), torch.randn(4, 3)
    mine = estimated(model, x)
    bare = {key: value for key, value in mine.meta["counts"].items() if key != "positions"}
    with pytest.raises(kc.ArgumentError, match=r"counts\['positions'\]\['0'\]"):
        mine.merge(Fisher(dict(mine), meta={**mine.meta, "counts": bare}))
    with pytest.raises(kc.ArgumentError, match=r"inverse\(damping=1.0"):
        mine.merge(mine.inverse(damping=1.0))
    with pytest.raises(kc.ArgumentError, match="likelihood"):
        mine.merge(estimated(model, x, reduction="sum"))


@pytest.mark.parametrize("structure", ["kfac", "dense", "diagonal"])
def test_estimates_from_files_merge_as_they_did_before(structure, tmp_path):
    model, x = classifier(), torch.randn(7, 3)
    parts = []
    for index, part in enumerate(x.split([3, 4])):
        kc.estimate(model, [part], "categorical", structure=structure, kind="exact").save(tmp_path / str(index))
        parts.append(Fisher.load(tmp_path / str(index), model))
    found = parts[0].merge(parts[1])
    whole = kc.estimate(model, [x], "categorical", structure="kfac" if structure == "kfac" else "dense", kind="exact")
    dense = torch.diag(whole.to_dense().diagonal()) if structure == "diagonal" else whole.to_dense()
    assert_same(found.to_dense(), dense)
    assert (found.meta["counts"]["examples"], found.meta["counts"]["terms"]) == (7, 7.0)
    found.save(tmp_path / "merged")
    assert torch.equal(Fisher.load(tmp_path / "merged").to_dense(), found.to_dense())
