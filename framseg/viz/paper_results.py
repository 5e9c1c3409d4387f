"""What papers report on the real QVHighlights: the numbers of `paper_results.yaml`, where each is explained."""

from pathlib import Path

import pandas as pd
import yaml

_REPORTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

TABLE_I_COLUMNS = tuple(_REPORTED["TABLE_I_COLUMNS"])
TEST, VAL = (  # rows of these columns as numbers by metric; what the paper leaves open is absent
    {name: pd.Series(row, TABLE_I_COLUMNS, float).dropna().to_dict() for name, row in _REPORTED[split].items()}
    for split in ("TEST", "VAL")
)
SYSTEM_COLUMNS, SYSTEM = tuple(_REPORTED["SYSTEM_COLUMNS"]), tuple(_REPORTED["SYSTEM"])
BY_EPOCH_COLUMNS = tuple(_REPORTED["BY_EPOCH"])
BY_EPOCH = tuple(pd.DataFrame(_REPORTED["BY_EPOCH"]).to_dict("records"))
CLASS_RATIO, BACKGROUND_SHARE = _REPORTED["CLASS_RATIO"], _REPORTED["BACKGROUND_SHARE"]
TABLE_II, TABLE_III = _REPORTED["TABLE_II"], _REPORTED["TABLE_III"]
