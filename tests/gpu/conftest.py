"""These tests need a card; where there is none one line says so."""

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_runs.py", "test_memory.py"]
