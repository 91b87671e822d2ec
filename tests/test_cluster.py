"""``--cluster``: files and keys, and what can't be."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamup import shipped
from megamup.cluster import Cluster, parse_cluster
from megamup.errors import MegamupError
from megamup.flops import BF16_PEAKS


def test_cluster_from_the_command_line() -> None:
    found = parse_cluster("devices=512,peak=989e12,mfu=40,price=2.5")
    assert found == Cluster(512, 989e12, 40, 2.5)
    assert found.flops_per_s == pytest.approx(512 * 989e12 * 0.4)
    assert parse_cluster("devices=8,device=NVIDIA A100-SXM4-80GB").peak == BF16_PEAKS["A100"]


@pytest.mark.parametrize("file", shipped.listing("configs/clusters", ".yaml"))
def test_shipped_clusters_have_a_peak_and_no_invented_price(file: str) -> None:
    found = parse_cluster(f"{file},nodes=4")
    assert found.devices == 32
    assert found.peak == BF16_PEAKS[Path(file).stem.upper()]
    assert (found.mfu, found.price) == (None, None)


@pytest.mark.parametrize("file", shipped.listing("configs/clusters", ".yaml"))
def test_shipped_clusters_have_the_rates_of_a_data_sheet(file: str) -> None:
    found = parse_cluster(f"{file},nodes=1")
    for key in ("memory", "memory_bandwidth", "node_bandwidth", "network_bandwidth", "fp32_peak"):
        assert getattr(found, key) is not None, key
    assert found.devices_per_node == 8
    assert found.kind == "cuda"


def test_devices_may_be_told_beside_the_text() -> None:
    assert parse_cluster("configs/clusters/h100.yaml", 24).devices == 24
    assert parse_cluster("configs/clusters/h100.yaml,nodes=2", 24).devices == 16


def test_what_follows_a_file_overrides_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("devices: 64\npeak: 1.0e15\nmfu: 30\nprice: 3\n")
    assert parse_cluster(f"{tmp_path / 'mine.yaml'},mfu=45") == Cluster(64, 1e15, 45, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100", r"--cluster: 'h100' is no file and no key=value; .*configs/clusters/h100\.yaml"),
        ("devices=8,peek=1e15", "cluster.peek: unknown key; expected one of device, kind, devices"),
        ("devices=8", "cluster.peak: missing, and no bf16 peak is known for device None"),
        ("devices=8,device=Cerebras", "no bf16 peak is known for device 'Cerebras'"),
        ("peak=1e15", "cluster.devices: missing"),
        ("nodes=2,peak=1e15", "cluster.nodes: goes with devices_per_node"),
        ("devices=2.5,peak=1e15", "cluster.devices: 2.5 is no whole number"),
        ("devices=8,peak=-1", "cluster.peak: -1 is no amount"),
        ("devices=8,peak=1e15,matmul=1.1", "cluster.matmul: 1.1 is over 1"),
        ("devices=8,peak=1e15,kind=tpu", "cluster.kind: 'tpu'; expected cuda or cpu"),
        ("devices=8,peak=1e15,mfu=140", "cluster.mfu: 140 is over 100"),
        ("devices=8,peak=1e15,memory=80", "cluster.memory: 80 is in bytes"),
        ("devices=8,peak=1e15,price=cheap", "cluster.price: 'cheap' is no amount"),
        ("devices=8,,peak=1e15", "nothing after a comma; expected a key and a value there"),
        ("configs/clusters/h100.yaml,nodes=2,", "nothing after a comma"),
        ("", "--cluster: '' is no file"),
    ],
)
def test_a_wrong_cluster_is_one_message(text: str, message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        parse_cluster(text)
