"""Finds the packages, which pyproject.toml cannot do for two whose folders have other names."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["pop_local*"]), "pop_local.catalog", "pop_converter"])
