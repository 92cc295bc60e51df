from .checkpoints import Checkpoint as Checkpoint
from .checkpoints import load_latest as load_latest
from .checkpoints import save_checkpoint as save_checkpoint
from .config import TrainingConfig as TrainingConfig
from .task import Task as Task
from .trainer import Trainer as Trainer
