"""Conditions in SQL over the pairs of a manifest, judged by DuckDB.

In: what stands behind WHERE, and pairs as an Arrow table. Out: which of them it is true of. A condition sees these
pairs and nothing else: no file, no network, no other statement, no variable of this program.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from capfilt.data.schemas import SCHEMAS
from capfilt.data.texts import first_line
from capfilt.errors import MissingPackageError, UsageError

_NOTHING_OUTSIDE: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",  # names of tables that are variables of Python
    "threads": "1",
}
_ROW = "row_of_the_shard"


class Condition:
    """A condition that was understood."""

    def __init__(self, sql: str) -> None:
        """UsageError for what is no condition over the manifest's columns, MissingPackageError without DuckDB."""
        try:
            import duckdb
        except ImportError:
            raise MissingPackageError("duckdb", "sql", "--where") from None
        self.sql = sql
        self._refused = duckdb.Error
        connection = duckdb.connect(":memory:", config=_NOTHING_OUTSIDE)
        connection.execute("SET lock_configuration = true")
        self._relation_of = connection.from_arrow
        self.holds(SCHEMAS["manifest"].empty_table())

    def holds(self, pairs: pa.Table) -> NDArray[np.bool_]:
        """Of which pairs it is true, (N,); where it is neither true nor false it does not hold. UsageError as above."""
        numbered = pairs.append_column(_ROW, pa.array(np.arange(pairs.num_rows)))
        try:
            # `filter` takes one expression, where text put behind a WHERE could be anything
            found = self._relation_of(numbered).filter(self.sql).project(_ROW).fetchnumpy()[_ROW]
        except self._refused as error:
            known = ", ".join(SCHEMAS["manifest"].names)
            raise UsageError(
                f"--where {self.sql!r} is no condition that can be judged: {first_line(error)}. The columns are "
                f"{known}. Give what stands behind WHERE, such as \"itm_score < 0.6 and source = 'web'\"."
            ) from None
        holds = np.zeros(pairs.num_rows, np.bool_)
        holds[found] = True
        return holds
