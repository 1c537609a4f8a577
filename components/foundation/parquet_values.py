"""Prints which column of a Parquet file has the most values in one row group, as JSON: [values, column].

A program of its own, because pyarrow ends the whole process where a file's description of a column is damaged.
"""

import json
import sys
from typing import Any

import pyarrow.parquet


def most_values(path: str) -> tuple[int, str]:
    metadata: Any = pyarrow.parquet.read_metadata(path)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    return max(((column.num_values, column.path_in_schema) for column in columns), default=(0, ""))


if __name__ == "__main__":
    print(json.dumps(most_values(sys.argv[1])))
