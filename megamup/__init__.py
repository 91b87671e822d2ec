"""Pretraining under maximal update parametrization, exact under sharding."""
