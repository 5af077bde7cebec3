"""What a user can set about an ablation. Imports no torch."""

import msgspec

from blip3_lite.config import DeviceChoice

LEAST_SEEDS = 3


class AblateRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ablation: its arms with several seeds, and a page with the verdict. A stopped one goes on where it was."""

    out: str = "runs/ablations"
    """Folder of all ablations and of the starts that they share."""
    demo: str | None = None
    """Run folder of a demo whose checkpoints are the shared starts; without it they are trained first, and kept."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU where there is one (`auto`), or as said."""
    seeds: int = LEAST_SEEDS
    """Seeds of each arm: of its samples, their order, and fresh weights."""
    questions: int = 150
    """Held-out questions a skill, the same for all arms and seeds."""
    max_arms: int | None = None
    """Arms to train before stopping; the same command goes on with the others."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.seeds < LEAST_SEEDS:
            raise ValueError(f"seeds: expected at least {LEAST_SEEDS}, got {self.seeds}; fewer give no interval")
        for name in ("questions", "max_arms"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}; raise it")
