#!/usr/bin/env python3
"""What a config means, without training: parameters, FLOPs, bytes per rank and every parameter's row of the table.

With --cluster also what a step takes there and what bounds it; with --search the fastest layouts that fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megamup.cli import report_errors
from megamup.cluster import Cluster, parse_cluster
from megamup.config import Config, load_config, micro_batches, split_arguments
from megamup.errors import MegamupError
from megamup.plan import plan, plan_lines, search, search_json, search_lines
from megamup.scaling.forecast import read_forecast


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b=c overrides")
    parser.add_argument("--ranks", type=int, help="ranks to plan for (default: the cluster's, else one replica)")
    parser.add_argument(
        "--cluster",
        metavar="configs/clusters/h100.yaml,nodes=8,price=2.5",
        help="predict the step's time on these devices",
    )
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit the cluster")
    parser.add_argument("--fit", type=Path, metavar="fit.json", help="a fitted scaling law: the final loss it predicts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(argv)  # an override may follow an option
    return report_errors(lambda: show(arguments))


def show(arguments: argparse.Namespace) -> None:
    config = load_config(*split_arguments(arguments.config))
    ranks, cluster = places(arguments, config)
    if arguments.search:
        if cluster is None:
            raise MegamupError("--search: ranks layouts by their time on a cluster; add --cluster")
        if arguments.fit:
            raise MegamupError("--fit: --search predicts no loss, which no layout changes; give one of them")
        found = search(config, cluster)
        print(json.dumps(search_json(found)) if arguments.json else "\n".join(search_lines(found, cluster)), flush=True)
        return
    micro_batches(config, ranks)
    forecast = read_forecast(arguments.fit, config, "--fit") if arguments.fit else None
    if arguments.json:
        known = {} if forecast is None else {"predicted": forecast.as_json()}
        print(json.dumps(plan(config, ranks, cluster) | known))
        return
    print("\n".join(plan_lines(config, ranks, cluster)), flush=True)
    if forecast is not None:
        print("\n".join([f"predicted {forecast}", *(f"warning: {text}" for text in forecast.warnings)]))


def places(arguments: argparse.Namespace, config: Config) -> tuple[int, Cluster | None]:
    """The number of ranks, and the cluster where one is given; either tells the other."""
    if arguments.ranks is not None and arguments.ranks < 1:
        raise MegamupError(f"--ranks {arguments.ranks}: expected at least 1")
    replica = config.parallel.replica_ranks
    ranks = arguments.ranks or replica
    if arguments.cluster is None:
        return ranks, None
    cluster = parse_cluster(arguments.cluster, ranks)
    if arguments.ranks is not None and cluster.devices != arguments.ranks:
        raise MegamupError(f"--ranks {arguments.ranks}: the cluster has {cluster.devices} devices; give one of them")
    if cluster.mfu is not None:
        raise MegamupError(f"cluster.mfu={cluster.mfu:g}: has no effect on a plan, which predicts it; leave it out")
    return cluster.devices, cluster


if __name__ == "__main__":
    sys.exit(main())
