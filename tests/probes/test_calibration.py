"""Calibrations: their files, their refusals, their linear algebra."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dynprobe.errors import CalibrationError
from dynprobe.probes import Calibration, load_calibration
from dynprobe.probes._calibration import QUANTILE_LEVELS, covariance_root, principal_components, quantiles


def made() -> Calibration:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "mean": torch.randn(4, 8, generator=draw), "std": torch.rand(4, 8, generator=draw),
        "cov_basis.2": torch.linalg.qr(torch.randn(8, 3, generator=draw)).Q,
        "cov_sqrt.2": torch.rand(3, generator=draw),
    }  # fmt: skip
    header = {"hash": "abc", "weights": "w1", "dtype": "float32", "schema": "1.0", "n_layers": 3}
    return Calibration(tensors, {"limen_ct": np.linspace(0, 1, 201) ** 2}, header)


def test_round_trip(tmp_path: Path) -> None:
    before = made()
    after = load_calibration(before.save(tmp_path / "deep" / "c"))
    assert after.header == before.header
    assert after.hash == "abc"
    assert set(after.tensors) == set(before.tensors)
    assert all(torch.equal(after.tensors[k], before.tensors[k]) for k in before.tensors)
    assert np.array_equal(after.signals["limen_ct"], before.signals["limen_ct"])
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["c"]  # nothing half-written beside it


def test_saving_again_replaces(tmp_path: Path) -> None:
    made().save(tmp_path / "c")
    other = made()
    other.tensors["mean"] += 1
    other.save(tmp_path / "c")
    assert torch.equal(load_calibration(tmp_path / "c").tensors["mean"], other.tensors["mean"])


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path / "c")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("dynprobe.probes._calibration.save_file", full)
    with pytest.raises(OSError, match="no space"):
        made().save(tmp_path / "c")
    assert load_calibration(tmp_path / "c").hash == "abc"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def damage_missing_header(folder: Path) -> None:
    (folder / "calibration.json").unlink()


def damage_missing_tensors(folder: Path) -> None:
    (folder / "calibration.safetensors").unlink()


def damage_cut_tensors(folder: Path) -> None:
    path = folder / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def damage_one_bit(folder: Path) -> None:
    path = folder / "calibration.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def damage_json(folder: Path) -> None:
    (folder / "calibration.json").write_text("{ not json")


def damage_other_json(folder: Path) -> None:
    (folder / "calibration.json").write_text("[1, 2]")


def damage_no_signals(folder: Path) -> None:
    header = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps({k: v for k, v in header.items() if k != "signals"}))


def _with_signals(folder: Path, change: Any) -> None:
    header = json.loads((folder / "calibration.json").read_text())
    header["signals"] = {name: change(levels) for name, levels in header["signals"].items()}
    (folder / "calibration.json").write_text(json.dumps(header))


def damage_fewer_quantiles(folder: Path) -> None:
    _with_signals(folder, lambda levels: levels[:-1])


def damage_quantiles_out_of_order(folder: Path) -> None:
    _with_signals(folder, lambda levels: [levels[-1] + 1, *levels[1:]])


def damage_quantiles_that_are_no_numbers(folder: Path) -> None:
    _with_signals(folder, lambda levels: [float("nan"), *levels[1:]])


def damage_everything(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


DAMAGES = [f for name, f in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_files(damage: object, tmp_path: Path) -> None:
    folder = made().save(tmp_path / "c")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CalibrationError, match="dynprobe calibrate MODEL"):
        load_calibration(folder)


def test_newer_schemas_are_refused_and_minor_ones_read(tmp_path: Path) -> None:
    for schema, fine in (("1.7", True), ("2.0", False)):
        calibration = made()
        calibration.header["schema"] = schema
        folder = calibration.save(tmp_path / schema)
        if fine:
            assert load_calibration(folder).header["schema"] == schema
        else:
            with pytest.raises(CalibrationError, match=r"schema 2.0; this version reads 1.2"):
                load_calibration(folder)


def test_another_models_calibration_is_refused() -> None:
    made().check("w1", "float32")
    with pytest.raises(CalibrationError, match="made with weights 'w1', the model has 'w2'"):
        made().check("w2", "float32")
    with pytest.raises(CalibrationError, match="made with dtype 'float32', the model has 'bfloat16'"):
        made().check("w1", "bfloat16")


def test_sites_share_the_statistics_of_their_depth() -> None:
    calibration = made()
    post, pre = calibration.site_stats("resid_post", 1), calibration.site_stats("resid_pre", 2)
    assert post is not None
    assert pre is not None
    assert torch.equal(post.std, calibration.tensors["std"][2])
    assert torch.equal(post.std, pre.std)
    assert torch.equal(post.cov_basis, calibration.tensors["cov_basis.2"])
    other = calibration.site_stats("resid_post", 0)
    assert other is not None
    assert other.cov_basis is None
    assert calibration.site_stats("mlp_out", 1) is None


def test_quantiles_of_a_signal() -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.normal(size=100), np.array([[np.nan, np.inf], [0.5, -0.5]])]
    values = np.concatenate([pieces[0], [0.5, -0.5]])
    found = quantiles({"a": pieces, "empty": [np.array([np.nan])]})
    assert set(found) == {"a"}
    assert np.array_equal(found["a"], np.quantile(values, QUANTILE_LEVELS))
    calibration = Calibration({}, found, {})
    assert calibration.quantile("a", 0.9) == pytest.approx(np.quantile(values, 0.9), abs=1e-12)
    with pytest.raises(CalibrationError, match="signal 'b' is not in the calibration; it holds a"):
        calibration.quantile("b", 0.5)


def cloud(n: int, dim: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, dim)) * np.linspace(0.3, 2, dim))
    return x - x.mean(0)


# The last three have many more axes than components: another road through the same algebra.
@pytest.mark.parametrize(
    ("n", "dim", "k"), [(200, 12, 5), (9, 40, 5), (40, 40, 39), (400, 80, 4), (80, 400, 4), (700, 90, 1)]
)
def test_principal_components_against_numpy(n: int, dim: int, k: int) -> None:
    x = cloud(n, dim)
    rows, values = principal_components(x, k)
    expected, axes = np.linalg.eigh(np.cov(x.numpy(), rowvar=False))
    order = np.argsort(expected)[::-1][:k]
    assert rows.shape == (k, dim)
    np.testing.assert_allclose(values.numpy(), expected[order], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.abs((rows.numpy() * axes[:, order].T).sum(1)), 1.0, atol=1e-8)
    torch.testing.assert_close(rows @ rows.T, torch.eye(k, dtype=torch.float64), atol=1e-9, rtol=0)
    strongest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    assert (strongest > 0).all()
    again, _ = principal_components(x.clone(), k)
    assert torch.equal(again, rows)


def test_no_more_components_than_there_are() -> None:
    assert principal_components(cloud(4, 9), 7)[0].shape == (3, 9)
    assert principal_components(cloud(50, 3), 7)[0].shape == (3, 3)
    assert principal_components(cloud(1, 5), 7)[0].shape == (0, 5)


@pytest.mark.parametrize(("n", "dim"), [(30, 8), (12, 60), (60, 200)])
def test_repeated_rows_have_no_invented_directions(n: int, dim: int) -> None:
    """Depth 0 of a short calibration holds the same embeddings over and over."""
    x = cloud(3, dim).repeat(n // 3, 1)
    rows, values = principal_components(x, 6)
    assert torch.isfinite(rows).all()
    assert (values[2:].abs() < 1e-12).all()
    assert (rows.norm(dim=1) < 1 + 1e-9).all()
    basis, root = covariance_root(x)
    assert basis.shape == (dim, 2)
    covariance = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    torch.testing.assert_close(basis @ torch.diag(root**2) @ basis.T, covariance, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "dim"), [(300, 10), (10, 50)])
def test_covariance_root_reproduces_the_covariance(n: int, dim: int, dtype: torch.dtype) -> None:
    x = cloud(n, dim).to(dtype)
    basis, root = covariance_root(x)
    assert basis.shape == (dim, min(n - 1, dim))
    covariance = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    found = (basis.double() * root.double() ** 2) @ basis.double().T
    torch.testing.assert_close(found, covariance, atol=1e-10 if dtype == torch.float64 else 1e-5, rtol=0)


def test_covariance_of_nothing() -> None:
    for x in (cloud(1, 4), torch.zeros(5, 4)):
        basis, root = covariance_root(x)
        assert basis.shape == (4, 0)
        assert root.shape == (0,)
