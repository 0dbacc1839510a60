"""The ranks of a pipeline: which of them do what, and how a run on all of them begins, goes on and ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from zimage_core.errors import BadArgument, RankFailed, Unsupported, ZImageError, printable
from zimage_core.models.vae_tiles import TILE
from zimage_core.parallel.group import Group, join_world, link_of, read_timeout
from zimage_core.parallel.marks import mark, marks_of
from zimage_core.parallel.ulysses import Ulysses
from zimage_core.parallel.vae import Strip, strips
from zimage_core.run.components import networks
from zimage_core.run.request import Request, Run
from zimage_core.sampling import noise

DIMENSIONS = ("guidance", "sequence")
"""Names of the dimensions of a mesh of ranks, where it has two."""


class Ranks:
    """The ranks that make the images of a pipeline together; all call the same methods in the same order.

    Args:
        mesh: The argument of `ZImagePipeline.parallelize`.
        guidance: The argument of that name.
        timeout: The argument of that name.
        device: Device of the computation.
    """

    def __init__(self, mesh: Any, guidance: int | None, timeout: float | None, device: torch.device) -> None:
        seconds = read_timeout(timeout)
        join_world(timeout)
        grid = _grid(mesh, guidance)
        backends = dist.get_backend_config()
        if f"{device.type}:" not in backends:
            raise Unsupported(
                f"parallelize: the process group has no backend for {device}, it has {printable(backends)}; "
                'start it by torch.distributed.init_process_group("cpu:gloo,cuda:nccl"), or let parallelize '
                "do it"
            )
        self.link = link_of(sorted(rank for row in grid for rank in row), seconds)
        row = next(i for i, each in enumerate(grid) if self.link.rank in each)
        column = grid[row].index(self.link.rank)
        self.sequence = Group(self.link, grid[row], device)
        self.guidance, self._all = None, self.sequence
        if len(grid) > 1:
            self.guidance = Group(self.link, [each[column] for each in grid], device)
            self._all = Group(self.link, self.link.ranks, device)
        self.ulysses = Ulysses(self.sequence, self.guidance)
        self.computing = False

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {size}" for name, size in self.settings.items())
        return f"Ranks(rank {self.link.rank} of {len(self.link.ranks)}: {shown}; {self.sequence.device})"

    def __getstate__(self) -> NoReturn:
        """Refuse copies and pickles, whose groups would be those of this process.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported(
            "a pipeline on several ranks is not copied or pickled: call parallelize(False) first, or "
            "open the model a second time (mapped files are shared)"
        )

    @property
    def first(self) -> bool:
        """Whether this is the first of the ranks, the one that writes files and speaks to the user."""
        return self.link.rank == self.link.ranks[0]

    @property
    def settings(self) -> dict[str, int]:
        """What the settings of an image say: rounding depends on the ranks."""
        sides = {} if self.guidance is None else {"guidance_ranks": self.guidance.size}
        return {"ranks": self.sequence.size, **sides}

    def seed(self) -> int:
        """A new seed, drawn by the first rank."""
        return int(self.link.agree(str(noise.fresh_seed()), first=True)[0])

    @contextmanager
    def run(self, pipe: Any, request: Request) -> Iterator[Request]:
        """Context of a run: its request with a seed, and its failure told to the other ranks.

        Raises:
            BadArgument: Another rank was called with other arguments, or has another model.
            RankFailed: A rank failed, ended or does not answer.
        """
        self.computing = False
        request = self._same(pipe, request)
        try:
            yield request
        except RankFailed:
            raise
        except BaseException as error:
            self._tell(error)
            raise
        self.link.agree()

    def _same(self, pipe: Any, request: Request) -> Request:
        """The request, which must be that of all ranks, with the seed of the first rank if it has none."""
        marks = marks_of(request, pipe, networks(pipe))
        message = json.dumps({"marks": marks, "seed": noise.fresh_seed()})
        said = [json.loads(each) for each in self.link.agree(message, first=True)]
        for rank, other in zip(self.link.ranks, said, strict=True):
            names = [name for name, each in said[0]["marks"].items() if other["marks"].get(name) != each]
            if names:
                raise BadArgument(
                    f"parallel: rank {rank} has another {' and '.join(names)} than rank "
                    f"{self.link.ranks[0]}; call all ranks with the same arguments"
                )
        seed = said[0]["seed"]
        if request.seed is not None or request.generator is not None:
            return request
        if request.latents is None:
            return replace(request, seed=seed)
        # given latents have no seed; this is for what is drawn later
        return replace(request, generator=torch.Generator().manual_seed(seed))

    def _tell(self, error: BaseException) -> None:
        """Tell the others why this rank ends the run."""
        ours = isinstance(error, ZImageError)
        reason = str(error) if ours else f"{type(error).__name__} {printable(error)}".strip()
        if self.computing:
            self.link.fail(reason)
            return
        with suppress(RankFailed):  # what is raised is the error of this rank
            self.link.agree(f"rank {self.link.rank} failed: {reason}", first=True)

    def ready(self, run: Run, transformer: Any) -> Run:
        """The run, once all ranks are ready to denoise; after each step they agree on whether to go on.

        Raises:
            RankFailed: A rank failed to get ready, or failed altogether.
            BadArgument, Unsupported: The run cannot be shared by these ranks.
        """
        self.ulysses.stream(transformer, run)
        for reason in self.link.agree(first=True):
            if reason:
                raise RankFailed(reason)
        self.computing = True
        return replace(run, callback=self._callback(run.callback))

    def _callback(self, own: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
            before = dict(tensors)
            out = None if own is None else own(pipe, step, timestep, tensors)
            changes = out.items() if isinstance(out, dict) else ()
            changed = {name: value for name, value in changes if value is not before.get(name)}
            message = json.dumps([bool(pipe._interrupt), mark([changed, pipe._guidance_scale])])
            said = [json.loads(each) for each in self.link.agree(message)]
            for rank, (_, other) in zip(self.link.ranks, said, strict=True):
                if other != said[0][1]:
                    raise BadArgument(
                        f"callback_on_step_end: rank {rank} changed tensors or guidance otherwise than rank "
                        f"{self.link.ranks[0]}; change the same on all ranks"
                    )
            pipe._interrupt = any(stop for stop, _ in said)
            return out

        return call

    def strip(self, h: int, w: int, tile: int | None) -> Strip | None:
        """The part of a decoded image of h x w latents that this rank computes; None for all of it."""
        return strips(self._all, h, w, TILE if tile is None else tile)


def _grid(mesh: Any, guidance: int | None) -> list[list[int]]:
    """Numbers of the ranks, a row for each side of guidance.

    Raises:
        BadArgument: The mesh is none, this rank is not in it, or it does not divide.
    """
    ranks, sides = _read_mesh(mesh)
    if sides is not None and guidance is not None:
        raise BadArgument("guidance: the mesh has this dimension already; leave it out")
    sides = sides or guidance or 1
    if sides not in (1, 2) or isinstance(guidance, bool) or len(ranks) % sides:
        raise BadArgument(
            f"guidance: got {printable(repr(sides), 40)} for {len(ranks)} ranks, wanted 1, or 2 for an even "
            "number of ranks"
        )
    if dist.get_rank() not in ranks:
        raise BadArgument(f"mesh: rank {dist.get_rank()} is not in it; only its ranks may call parallelize")
    size = len(ranks) // sides
    # torch numbers the ranks of a group in rising order
    grid = sorted(sorted(ranks[i : i + size]) for i in range(0, len(ranks), size))
    if any(list(column) != sorted(column) for column in zip(*grid, strict=True)):
        raise BadArgument(f"mesh: got {grid}, wanted numbers of ranks that rise in both dimensions")
    return grid


def _read_mesh(mesh: Any) -> tuple[list[int], int | None]:
    """Numbers of the ranks, one side of guidance after the other, and how many sides the mesh has."""
    if mesh is None:
        return list(range(dist.get_world_size())), None
    if isinstance(mesh, dist.ProcessGroup):
        return dist.get_process_group_ranks(mesh), None
    if not (hasattr(mesh, "mesh") and hasattr(mesh, "mesh_dim_names")):
        raise BadArgument(
            f"mesh: got {printable(repr(mesh), 60)}, wanted a DeviceMesh, a process group, or None for all"
        )
    numbers, names = mesh.mesh, tuple(mesh.mesh_dim_names or ())
    if numbers.ndim == 1:
        return numbers.tolist(), None
    if numbers.ndim != 2 or sorted(names) != list(DIMENSIONS):
        raise BadArgument(
            f"mesh: got {numbers.ndim} dimensions named {printable(names)}, wanted one, or two named "
            f"{DIMENSIONS}"
        )
    numbers = numbers if names == DIMENSIONS else numbers.T
    return numbers.flatten().tolist(), len(numbers)
