"""What ranks decide together: answers, failures and their names."""

import pytest
import torch.distributed as dist

from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.parallel.world import World
from tests.builders.parallel.ranks import run_ranks


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def decide() -> None:
    world = _world()
    assert world.first(lambda: f"said by {world.rank}, ü") == "said by 0, ü"
    assert world.first(lambda: "") == ""
    assert world.largest(world.rank) == 2

    def fails(rank: int) -> None:
        if world.rank == rank:
            raise EnvironmentFailed("the disk is full")

    for rank in range(3):
        with pytest.raises(EnvironmentFailed) as failure:
            world.together(lambda rank=rank: fails(rank))  # type: ignore[misc]
        named = "the disk is full" if world.rank == rank else f"rank {rank}: the disk is full"
        assert str(failure.value) == named

    def refuses() -> str:
        raise Misuse("in the way")

    with pytest.raises(Misuse, match="in the way"):
        world.first(refuses)
    world.together(lambda: None)


def test_ranks_agree_on_answers_and_on_failures() -> None:
    run_ranks(decide, 3, timeout=60)


def test_one_process_agrees_with_itself() -> None:
    world = World()
    assert world.first(lambda: "mine") == "mine"
    assert world.largest(7) == 7
    world.barrier()
    with pytest.raises(Misuse, match=r"^in the way$"):
        world.together(lambda: (_ for _ in ()).throw(Misuse("in the way")))
