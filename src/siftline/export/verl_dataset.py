"""verl's data set over native messages: `siftline export --to verl` copies this file beside them.

Parquet gives every message of a column the same keys and every tool the same parameters, so
conversations come as JSON text and are parsed here. An earlier turn of weight 0 takes no loss. The
file needs verl alone; name it in `data.custom_cls`.
"""

import json
from typing import Any

from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset


class NativeDataset(MultiTurnSFTDataset):
    """`MultiTurnSFTDataset` whose columns of messages and tools are JSON text."""

    def _read_files_and_process(self) -> None:
        super()._read_files_and_process()
        self.messages = [json.loads(text) for text in self.dataframe[self.messages_key]]
        self.dataframe[self.messages_key] = self.messages
        if self.tools_key in self.dataframe.columns:
            self.tools = [json.loads(text) or None for text in self.dataframe[self.tools_key]]

    def _process_single_message(self, index: int, message: Any, *more: Any, **options: Any) -> Any:
        shown = {key: value for key, value in message.items() if key != "weight"}
        tokens, mask, *rest = super()._process_single_message(index, shown, *more, **options)
        return tokens, mask * 0 if message.get("weight") == 0 else mask, *rest
