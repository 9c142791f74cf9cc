"""Fixtures of the storages."""

from collections.abc import Callable

import pytest

from support.aliases import Case, build


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    built: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in built:
            built[kind] = build(kind, tmp_path_factory.mktemp(kind))
        return built[kind]

    return case


@pytest.fixture
def paged(cases: Callable[[str], Case]) -> Case:
    return cases("paged")


@pytest.fixture(params=["paged", "padded", "scaled", "gpt2", "phi3", "falcon-gqa"])
def any_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)
