"""Weights sharded by FSDP 2 over two processes give the gradients of one process."""

import subprocess
import sys

import pytest

WORK = """
import os, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from siftline.training.objectives import read_tokens, token_scores

dist.init_process_group("gloo")
rank = dist.get_rank()

def made():
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=TIED)
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    read_tokens(model)
    return model

def loss_of(model, ids):
    scores = model(input_ids=ids, labels=ids, reader=token_scores)
    return -scores.logprobs.mean()

ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
plain = made()
loss_of(plain, ids).backward()
sharded = made()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
loss_of(sharded, ids[rank * 2 : rank * 2 + 2]).backward()
names = 0
for (name, one), (_, other) in zip(plain.named_parameters(), sharded.named_parameters()):
    assert isinstance(other, DTensor) and isinstance(other.grad, DTensor), name
    torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-6)
    names += 1
print("compared", names)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_weights_give_the_gradients_of_one_process(tmp_path, tied):
    path = tmp_path / "work.py"
    path.write_text(WORK.replace("TIED", str(tied)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compared") == 2
