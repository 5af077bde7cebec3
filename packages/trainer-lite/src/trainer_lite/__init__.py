"""One training loop: optimiser groups, schedule, run folder, exact resume, guards, logging, report."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interleave_data import samples_digest as samples_digest

    from .atomic import write_atomically as write_atomically
    from .config import OptimizerConfig as OptimizerConfig
    from .config import ParallelConfig as ParallelConfig
    from .config import ScheduleConfig as ScheduleConfig
    from .config import TrainConfig as TrainConfig
    from .contract import Batch as Batch
    from .contract import LossSum as LossSum
    from .contract import ModelFiles as ModelFiles
    from .contract import NamesSkips as NamesSkips
    from .contract import ShardedModelFiles as ShardedModelFiles
    from .contract import StepModel as StepModel
    from .contract import StopsWaiting as StopsWaiting
    from .contract import Stream as Stream
    from .contract import TellsChanges as TellsChanges
    from .loop import FitResult as FitResult
    from .loop import NonFiniteError as NonFiniteError
    from .loop import Trainer as Trainer
    from .measure import PhaseTimer as PhaseTimer
    from .measure import keep_freed_memory as keep_freed_memory
    from .measure import peak_rss_bytes as peak_rss_bytes
    from .metrics import MetricsLog as MetricsLog
    from .metrics import StepRecord as StepRecord
    from .metrics import read_metrics as read_metrics
    from .muon import Muon as Muon
    from .muon import orthogonalize as orthogonalize
    from .optimizer import Optimizers as Optimizers
    from .optimizer import group_parameters as group_parameters
    from .planning import DEVICE_KINDS as DEVICE_KINDS
    from .planning import DeviceKind as DeviceKind
    from .planning import Sharding as Sharding
    from .planning import StateBytes as StateBytes
    from .planning import sent_bytes as sent_bytes
    from .planning import state_bytes as state_bytes
    from .planning import step_seconds as step_seconds
    from .processes import Processes as Processes
    from .processes import join as join
    from .progress import IndexProgress as IndexProgress
    from .progress import Progress as Progress
    from .progress import QuietProgress as QuietProgress
    from .progress import TqdmProgress as TqdmProgress
    from .report import Picture as Picture
    from .report import Report as Report
    from .report import Share as Share
    from .run_folder import FoundCheckpoint as FoundCheckpoint
    from .run_folder import RunFolder as RunFolder
    from .run_folder import SaveError as SaveError
    from .schedule import learning_rate_factor as learning_rate_factor
    from .stop import StopFlag as StopFlag
    from .watchman import RankLostError as RankLostError

_HOMES = {
    "DEVICE_KINDS": "planning",
    "Batch": "contract",
    "DeviceKind": "planning",
    "FitResult": "loop",
    "FoundCheckpoint": "run_folder",
    "IndexProgress": "progress",
    "LossSum": "contract",
    "MetricsLog": "metrics",
    "ModelFiles": "contract",
    "Muon": "muon",
    "NamesSkips": "contract",
    "NonFiniteError": "loop",
    "OptimizerConfig": "config",
    "Optimizers": "optimizer",
    "ParallelConfig": "config",
    "PhaseTimer": "measure",
    "Picture": "report",
    "Processes": "processes",
    "Progress": "progress",
    "QuietProgress": "progress",
    "RankLostError": "watchman",
    "Report": "report",
    "RunFolder": "run_folder",
    "SaveError": "run_folder",
    "ScheduleConfig": "config",
    "Sharding": "planning",
    "Share": "report",
    "ShardedModelFiles": "contract",
    "StateBytes": "planning",
    "StepModel": "contract",
    "StepRecord": "metrics",
    "StopFlag": "stop",
    "StopsWaiting": "contract",
    "Stream": "contract",
    "TellsChanges": "contract",
    "TqdmProgress": "progress",
    "TrainConfig": "config",
    "Trainer": "loop",
    "group_parameters": "optimizer",
    "join": "processes",
    "keep_freed_memory": "measure",
    "learning_rate_factor": "schedule",
    "orthogonalize": "muon",
    "peak_rss_bytes": "measure",
    "read_metrics": "metrics",
    "samples_digest": "loop",
    "sent_bytes": "planning",
    "state_bytes": "planning",
    "step_seconds": "planning",
    "write_atomically": "atomic",
}
__all__ = [
    "DEVICE_KINDS",
    "Batch",
    "DeviceKind",
    "FitResult",
    "FoundCheckpoint",
    "IndexProgress",
    "LossSum",
    "MetricsLog",
    "ModelFiles",
    "Muon",
    "NamesSkips",
    "NonFiniteError",
    "OptimizerConfig",
    "Optimizers",
    "ParallelConfig",
    "PhaseTimer",
    "Picture",
    "Processes",
    "Progress",
    "QuietProgress",
    "RankLostError",
    "Report",
    "RunFolder",
    "SaveError",
    "ScheduleConfig",
    "ShardedModelFiles",
    "Sharding",
    "Share",
    "StateBytes",
    "StepModel",
    "StepRecord",
    "StopFlag",
    "StopsWaiting",
    "Stream",
    "TellsChanges",
    "TqdmProgress",
    "TrainConfig",
    "Trainer",
    "group_parameters",
    "join",
    "keep_freed_memory",
    "learning_rate_factor",
    "orthogonalize",
    "peak_rss_bytes",
    "read_metrics",
    "samples_digest",
    "sent_bytes",
    "state_bytes",
    "step_seconds",
    "write_atomically",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
