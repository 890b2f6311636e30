"""What is taken where nobody says anything: the one place of the defaults that command line and Python API share."""

from pathlib import Path

MODEL = "mini-sd3"
REWARD = "clip"
DEVICE = "auto"
OUTPUT = Path("runs")
WORKLOAD = "shapes-clip"  # of a search
SEARCHES = Path("leaderboard/search")  # logs of searches
LEADERBOARD = Path("leaderboard")  # pages that are made from published results
RESULTS = LEADERBOARD / "results"
