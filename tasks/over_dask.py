"""Work of a stage spread over machines: Prefect's task runner on a Dask cluster.

The cluster's workers must see the store under the same path, and have this package installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vlmcore.errors import MissingExtraError


def mapper_over_dask(address: str) -> Callable[[Callable, Iterable], list]:
    """A `map` whose calls are Prefect tasks on the workers of a Dask cluster, in order.

    Args:
        address: of the cluster's scheduler, such as `tcp://10.0.0.5:8786`.

    Raises:
        MissingExtraError: prefect-dask is not installed.
    """
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise MissingExtraError(
            "a Dask cluster needs prefect-dask, which is not installed: pip install 'vlmflow[dask]'"
        ) from error
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    def run(work: Callable, items: Iterable) -> list:
        @task(name="data.shards.range", cache_policy=NO_CACHE, persist_result=False)
        def one(item: Any) -> Any:
            return work(item)

        @flow(
            name="data.shards.ranges",
            task_runner=DaskTaskRunner(address=address),
            persist_result=False,
        )
        def every() -> list:
            return [future.result() for future in [one.submit(item) for item in items]]

        return every()

    return run
