"""The methods of `ZImagePipeline` for several ranks.

What does the work is imported when `parallelize` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zimage_core.errors import Busy, Unsupported
from zimage_core.sampling import noise

if TYPE_CHECKING:
    import torch

    from zimage_core.parallel.ranks import Ranks
    from zimage_core.run.request import Request
    from zimage_core.run.result import ZImageResult


class Parallel:
    """One image on several devices: `parallelize`."""

    _ranks: Ranks | None = None
    _running: dict[str, object]

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        raise NotImplementedError

    def _generate(self, request: Request) -> ZImageResult:
        raise NotImplementedError

    def parallelize(
        self, mesh: Any = None, *, guidance: int | None = None, timeout: float | None = None
    ) -> None:
        """Make each image on several ranks, every one of which calls this and then makes the same calls.

        Each rank has a pipeline with the same model on its own device. All get the same images, which equal
        those of one process up to rounding; docs/guides/parallel.md. In a world of one rank this does
        nothing. After an error in a step the ranks cannot go on until all of them call this again.

        Args:
            mesh: None for all ranks that torchrun started; a process group; a DeviceMesh of one dimension, or
                of two named "guidance" and "sequence", with numbers that rise in both. False ends it.
            guidance: 2 lets each half of the ranks compute one side of guidance, which saves exchanges;
                default 1.
            timeout: Seconds to wait for another rank during a run, ten times as many at its start; default:
                the environment variable ZIMAGE_RANK_TIMEOUT, else 60. A rank that ended, hangs or raised an
                error is `RankFailed` on every other one within this time.

        Raises:
            BadArgument: There is no process group and torchrun's variables are not set, the mesh has other
                dimensions, does not hold this rank or does not divide by `guidance`.
            Unsupported: The process group has no backend for the device of the pipeline.
            RankFailed: Another rank does not come.
            Busy: The pipeline is running.
        """
        if self._running:
            raise Busy("parallelize: the pipeline is running; wait until the run has ended")
        self._ranks = None
        if mesh is False:
            return
        from zimage_core.parallel.ranks import Ranks

        found = Ranks(mesh, guidance, timeout, self.device)
        self._ranks = found if len(found.link.ranks) > 1 else None

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that make each image together; None for this process alone."""
        return self._ranks

    def _together(self, request: Request) -> ZImageResult:
        """Run a request on all ranks."""
        if self._ranks is None:
            raise Unsupported("parallel: this pipeline has no ranks; call parallelize first")
        with self._ranks.run(self, request) as same:
            return self._generate(same)

    def _fresh_seed(self) -> int:
        """A new seed, the same on all ranks."""
        return noise.fresh_seed() if self._ranks is None else self._ranks.seed()
