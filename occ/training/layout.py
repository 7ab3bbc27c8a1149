"""Where a run is computed: devices along each axis of the mesh, and portions."""

from __future__ import annotations

import dataclasses
from typing import Literal

from occ.checks import validate


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Where a run is computed, and in what portions; none of it changes a result but for rounding.

    Attributes:
      data, fsdp, tensor, expert: devices along each axis of the mesh, whose product is the number
        of devices. Rows of a batch are cut along data, fsdp and expert; parameters along fsdp and
        tensor, those of experts along expert too.
      micro_batches: portions into which the backward pass of a minibatch is cut; the coefficient
        remains that of the whole minibatch.
      logits_chunk: columns of a batch whose logits exist at one time; 0 is all of them.
      pack: lay several sequences into one row for training.
      sequences_per_row: the most that one row takes when packed.
      generation_rows: slots in which rows are generated; a row that ends gives its own to the next,
        so that short responses wait for no long ones. 0 is one for each row.
      draft_depth: tokens that the MTP modules draft for every pass of the trunk in generation, of
        which those are kept that it samples itself. 0 is none; "auto" samples the first rollout
        with every depth and goes on with what is fastest for the acceptance of late, 0 included.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    micro_batches: int = 1
    logits_chunk: int = 0
    pack: bool = False
    sequences_per_row: int = 8
    generation_rows: int = 0
    draft_depth: int | Literal["auto"] = 0

    def __post_init__(self):
        validate(self)
        if self.generation_rows % self.row_parts:
            raise ValueError(
                f"LayoutConfig: generation_rows ({self.generation_rows}) cannot be cut evenly on "
                f"{self.row_parts} devices (data x fsdp x expert). Choose a multiple of them."
            )

    @property
    def fixed_depth(self) -> int:
        """Drafts of generation that nobody chooses the depth of."""
        return 0 if isinstance(self.draft_depth, str) else self.draft_depth

    @property
    def most_in_a_row(self) -> int:
        """S, the most sequences in a row of a minibatch: 1 unless they are packed."""
        return self.sequences_per_row if self.pack else 1

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return self.data * self.fsdp * self.expert

    @property
    def devices(self) -> int:
        """Devices that the mesh takes."""
        return self.data * self.fsdp * self.tensor * self.expert
