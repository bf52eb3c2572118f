"""FSDP2 on two processes: built on the meta device, sharded, materialized, trained with statistics of both."""
import pytest
import torch
import torch.distributed as dist
from norm_cases import CASES, new
from torch import multiprocessing, nn

from fairseq_powernorm.statistics import RunningStatistics

C, RANKS = 8, 2


def model_of(name, variant):
    return nn.Sequential(nn.Linear(C, C), new(name, variant, C, warmup_updates=2), nn.Linear(C, C))


def train(model, batches, steps=4):
    """Buffers after some steps in which the batches of a step are micro-batches."""
    statistics = RunningStatistics(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for step in range(steps):
        for x in batches(step):
            with statistics.batch():
                model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        statistics.commit()
    return [buffer.clone() for buffer in model.buffers()]


def rows(step, rank):
    return torch.randn(6, C, generator=torch.Generator().manual_seed(10 * step + rank)) + rank


def work(rank, meeting):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    for name, variant in CASES:
        torch.manual_seed(0)
        plain = model_of(name, variant)
        with torch.device("meta"):
            model = model_of(name, variant)
        for module in model:
            fully_shard(module)
        fully_shard(model)
        model.to_empty(device="cpu")
        for module in model:
            module.reset_parameters()
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            with torch.no_grad():
                ours.to_local().copy_(theirs.chunk(RANKS)[rank] if len(theirs) > 1 else theirs[rank:])
        found = train(model, lambda step: [rows(step, rank)])
        if variant == "algorithm2":  # exact over micro-batches and ranks
            expected = train(plain, lambda step: [rows(step, other) for other in range(RANKS)])
            for one, other in zip(found, expected):
                torch.testing.assert_close(one, other)
        for value in found:
            total = value.clone()
            dist.all_reduce(total)
            assert torch.equal(total, value * RANKS) and torch.isfinite(value).all()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_fully_sharded(tmp_path):
    """Statistics are the same on both ranks, and those of algorithm2 those of one process with both batches."""
    # a fork has torch loaded already, but CUDA does not survive it
    method = "spawn" if torch.cuda.is_available() else "fork"
    multiprocessing.start_processes(work, (tmp_path / "meeting",), RANKS, start_method=method)
