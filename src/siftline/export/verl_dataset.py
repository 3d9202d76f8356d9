"""verl's data set over native messages: `siftline export --to verl` copies this file beside them.

Parquet gives every message of a column the same keys and every tool the same parameters, so
conversations come as JSON text and are parsed here. They are templated whole, since many templates
show a message otherwise when it stands alone (Qwen 3's drops its reasoning), and the loss is on the
last response. The file needs verl alone; name it in `data.custom_cls`.
"""

import json
from itertools import takewhile
from typing import Any

import torch
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset


class NativeDataset(MultiTurnSFTDataset):
    """`MultiTurnSFTDataset` whose columns of messages and tools are JSON text."""

    def _read_files_and_process(self) -> None:
        super()._read_files_and_process()
        self.messages = [json.loads(text) for text in self.dataframe[self.messages_key]]
        self.dataframe[self.messages_key] = self.messages
        if self.tools_key in self.dataframe.columns:
            self.tools = [json.loads(text) or None for text in self.dataframe[self.tools_key]]

    def _build_messages(self, example: Any) -> Any:
        self.conversation = super()._build_messages(example)
        return self.conversation

    def _process_single_message(
        self, index: int, message: Any, tools: Any = None, enable_thinking: Any = None
    ) -> Any:
        """The whole conversation for its first message, nothing for the others."""
        if index:
            nothing = torch.zeros(0, dtype=torch.long)
            return nothing, nothing, nothing, {}
        options = dict(self.apply_chat_template_kwargs)
        if enable_thinking is not None:
            options["enable_thinking"] = enable_thinking

        def templated(messages: Any, generation_prompt: bool) -> list[int]:
            made = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=generation_prompt, **options,
                tokenize=True, return_dict=True,
            )  # fmt: skip
            return list(made["input_ids"])

        whole = templated(self.conversation, False)
        prompt = templated(self.conversation[:-1], True)
        pairs = zip(whole, prompt, strict=False)
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        mask = torch.zeros(len(whole), dtype=torch.long)
        mask[start : self._end(whole)] = 1
        tokens = torch.tensor(whole)
        return tokens, mask, torch.ones_like(tokens), {}

    def _end(self, tokens: list[int]) -> int:
        """Behind the end of sequence, if white space alone follows it; else behind all."""
        end = self.tokenizer.eos_token_id
        last = max((i for i, token in enumerate(tokens) if token == end), default=len(tokens) - 1)
        rest = self.tokenizer.decode(tokens[last + 1 :])
        return len(tokens) if rest.strip() else last + 1
